"""A peer's own process: ``python -m benchmarks.peers ACTION NAME JSON``.

Actions: ``versions`` (fails where the peer is not installed), ``prepare`` (its source, from the Zarr
store), ``run`` (what is measured), ``order`` (row numbers of what it wrote, as an .npy file).
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
