"""Use an installed actshuffle as a newcomer would: the command line and the package, on a store of a thousand rows.

    python tests/smoke.py

It needs the package and its dependencies, no test tools, and works in a temporary folder; `make dist` runs it in a
fresh virtual environment for each version of Python.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import zarr

import actshuffle

ROWS, SEED = 1000, 5


def call(*words: str) -> str:
    """The output of a command, which must succeed."""
    command = [str(Path(sys.executable).with_name("actshuffle")), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise AssertionError(f"{' '.join(command)}: exit {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def told(*words: str) -> dict[str, Any]:
    """The JSON that a command prints."""
    document: dict[str, Any] = json.loads(call(*words, "--json"))
    return document


def write_source() -> dict[str, Any]:
    """acts.zarr: two arrays with the same rows."""
    rng = np.random.default_rng(SEED)
    arrays = {"acts": rng.random((ROWS, 16), "f4"), "document": np.arange(ROWS, dtype="i4") // 40}
    group = zarr.create_group("acts.zarr")
    for name, data in arrays.items():
        group.create_array(name, data=data, chunks=(64, *data.shape[1:]))
    return arrays


def same_rows(path: str, arrays: dict[str, Any], order: Any) -> None:
    """The rows of a store are those of the source in an order."""
    found = zarr.open_group(path, mode="r")
    for name, data in arrays.items():
        np.testing.assert_array_equal(found[name][:], data[order], err_msg=f"{name} of {path}")


def commands(arrays: dict[str, Any]) -> None:
    """Run each command that needs no extra, on small stores."""
    order = actshuffle.order(ROWS, seed=SEED)
    seed = ("--seed", str(SEED))
    assert told("plan", "acts.zarr")["rows"] == ROWS
    shape = ("--block-bytes", "16KB", "--run-bytes", "1KB", "--chunk-rows", "32")
    assert told("run", "acts.zarr", "shuffled.zarr", *seed, *shape, "--workers", "0")["rows"] == ROWS
    same_rows("shuffled.zarr", arrays, order)
    assert told("run", "acts.zarr", "by_workers.zarr", *seed, *shape, "--workers", "2")["workers"] == 2
    same_rows("by_workers.zarr", arrays, order)
    assert told("verify", "acts.zarr", "shuffled.zarr", "--mixing")["ok"]
    assert told("info", "shuffled.zarr")["shuffled"]["seed"] == SEED
    assert told("status", "shuffled.zarr")["state"] == "complete"
    assert told("stats", "shuffled.zarr")["rows"] == ROWS
    assert told("quality", "shuffled.zarr", "--batch-size", "50")["rows"] == ROWS
    assert told("came-from", "shuffled.zarr", "0")["rows"][0]["source_row"] == int(order[0])
    assert told("where-is", "shuffled.zarr", str(order[3]))["rows"] == [3]
    assert told("split", "shuffled.zarr", "train.zarr=0.9", "val.zarr=rest")["parts"]["val.zarr"]["rows"] == 100
    assert told("head", "shuffled.zarr", "10", "head.zarr", "--copy")["rows"] == 10
    same_rows("head.zarr", arrays, order[:10])
    assert told("sample", "acts.zarr", "100", "sample.zarr", *seed)["rows"] == 100
    same_rows("sample.zarr", arrays, order[:100])
    np.save("rows.npy", arrays["acts"])
    assert told("import", "rows.npy", "--out", "imported.zarr")["rows"] == ROWS
    assert told("concat", "acts.zarr", "acts.zarr", "--out", "twice")["rows"] == 2 * ROWS
    assert told("append", "shuffled.zarr", "acts.zarr", "--again", "--out", "grown.zarr")["rows"] == 2 * ROWS
    twice = {name: np.concatenate([data, data]) for name, data in arrays.items()}
    same_rows("grown.zarr", twice, actshuffle.order(2 * ROWS, seed=SEED))


def package(arrays: dict[str, Any]) -> None:
    """Do the same from Python, and load the result."""
    actshuffle.shuffle("acts.zarr", "by_python.zarr", seed=SEED)
    assert actshuffle.verify("acts.zarr", "by_python.zarr").ok
    loader = actshuffle.Loader("by_python.zarr", batch_size=100, epochs=1)
    rows = np.concatenate([batch["acts"].copy() for batch in loader])
    np.testing.assert_array_equal(rows, arrays["acts"][actshuffle.order(ROWS, seed=SEED)])


def main() -> None:
    version = importlib.metadata.version("actshuffle")
    assert actshuffle.__version__ == version
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        assert call("--version").split() == ["actshuffle", version]
        arrays = write_source()
        commands(arrays)
        package(arrays)
        os.chdir(os.sep)
    names = ("numpy", "zarr", "numcodecs", "dask", "distributed", "click")
    used = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    sys.stdout.write(f"actshuffle {version} works on Python {platform.python_version()} with {used}\n")


if __name__ == "__main__":
    main()
