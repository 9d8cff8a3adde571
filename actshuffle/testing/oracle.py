"""The oracle of small stores: compares outputs with sources by zarr and numpy alone, and looks for leftovers."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from actshuffle.arrays.names import OUR_GROUP
from actshuffle.checking.verifier import verify
from actshuffle.engine.scratch import memory_beside, scratch_place
from actshuffle.errors import ActshuffleError, words_of
from actshuffle.ordering.keys import Keys
from actshuffle.storage.place import as_place


def differences(src: Path, dst: Path, seed: int) -> list[str]:
    """List the ways in which ``dst`` differs from ``src`` in the order of its seed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        node = zarr.open(src, mode="r", use_consolidated=False)
        before = {"data": node} if isinstance(node, zarr.Array) else dict(node.arrays())
        try:
            after = dict(zarr.open_group(dst, mode="r", use_consolidated=False).arrays())
        except Exception as err:  # zarr raises many kinds for damaged metadata
            return [f"cannot be opened: {type(err).__name__}: {err}"]
        found = [f"array {name} is absent" for name in sorted(set(before) - set(after))]
        rows = next(iter(before.values())).shape[0]
        order = Keys(seed).order(rows)
        expected: dict[str, NDArray[Any]] = {"source_row": order.astype("<u8")}
        expected |= {name: np.asarray(array[...])[order] for name, array in before.items()}
        for name, array in after.items():
            if name not in expected:
                found.append(f"array {name} is not of the source")
            elif array.nchunks_initialized < array.nchunks:
                found.append(f"array {name} lacks chunks")
            elif (problem := _difference(array, expected[name])) is not None:
                found.append(f"array {name} {problem}")
    return found


def _difference(array: zarr.Array[Any], expected: NDArray[Any]) -> str | None:
    try:
        now = np.asarray(array[...])
    except Exception as err:  # each codec raises its own kinds
        return f"cannot be read: {type(err).__name__}: {err}"
    if now.shape != expected.shape or now.dtype != expected.dtype.newbyteorder("<"):
        return f"has shape {now.shape} and dtype {now.dtype}"
    return None if now.tobytes() == expected.astype(now.dtype).tobytes() else "differs"


def leftovers(dst: Path) -> list[str]:
    """List what a finished run should have removed: scratch beside dst and in memory, receipts, partial files."""
    place = scratch_place(as_place(dst), None)
    scratch, memory = Path(place.url), Path(memory_beside(place).url)
    ours = dst / OUR_GROUP
    paths = [scratch, memory, ours / "run.json", ours / "receipts"]
    return [str(p) for p in (*paths, *dst.rglob("*.actshuffle-partial")) if p.exists()]


def alarm(src: Path, dst: Path) -> str:
    """The objections of `verify` to a store, or nothing."""
    try:
        report = verify(src, dst)
    except ActshuffleError as err:
        return words_of(err)
    return "" if report.ok else str(report)
