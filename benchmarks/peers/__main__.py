"""The process of one peer: ``python -m benchmarks.peers ACTION NAME JSON``.

Actions: ``versions`` (fails where the peer is not installed), ``prepare`` (makes its source from the Zarr
store), ``run`` (the action that is measured), ``order`` (saves the row numbers of its output as an .npy file).
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import numpy as np

from benchmarks.peers import IMPORTS, PEERS, Work, formats, versions


def main(action: str, name: str, text: str) -> None:
    peer, given = PEERS[name], json.loads(text)
    if action == "versions":
        for package in peer.packages:
            importlib.import_module(IMPORTS.get(package, package))
        print(json.dumps(versions(name)))
    elif action == "prepare":
        formats.write(peer.source, Path(given["source"]), Path(given["target"]))
    elif action == "run":
        module = importlib.import_module(f"benchmarks.peers.{peer.module}")
        getattr(module, peer.function)(Work(**given))
    elif action == "order":
        np.save(given["order"], formats.read_order(peer.target, Path(given["target"])))
    else:
        raise SystemExit(f"unknown action {action}")


if __name__ == "__main__":
    main(*sys.argv[1:])
