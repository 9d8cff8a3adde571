"""The oracle: the output that follows from the keys of a seed by numpy alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import zarr

from actshuffle.ordering.keys import Keys
from support.stores import opened, rows_of


def assert_is_oracle(
    src: Path,
    dst: Path,
    seed: int = 5,
    *,
    fields: Sequence[str] | None = None,
    source_row: bool = True,
    **key_bits: int,
) -> None:
    """Every array of ``dst`` is that of ``src`` in the order of the keys, with all its metadata."""
    (attributes, before), (found, after) = opened(src), opened(dst)
    before = {k: v for k, v in before.items() if fields is None or k in fields}
    n = next(iter(before.values())).shape[0]
    order = Keys(seed, **key_bits).order(n)
    assert found == attributes
    assert set(after) == {*before, *(["source_row"] * source_row)}
    if source_row:
        assert after["source_row"].dtype == np.dtype("<u8")
        np.testing.assert_array_equal(after["source_row"][:], order.astype(np.uint64))
    for name, was in before.items():
        now = after[name]
        assert now.shape == was.shape, name
        assert now.dtype == was.dtype.newbyteorder("<"), name
        assert _is_bfloat16(now) == _is_bfloat16(was), name
        assert now.nchunks_initialized >= now.nchunks, f"{name} has missing chunks"
        assert _scalar(now) == _scalar(was), f"fill value of {name}"
        assert _dimensions(name, now) == _dimensions(name, was), name
        assert dict(now.attrs) == {k: v for k, v in was.attrs.items() if k != "_ARRAY_DIMENSIONS"}, name
        np.testing.assert_array_equal(rows_of(now[:]), rows_of(was[:])[order], err_msg=name)


def _is_bfloat16(array: zarr.Array) -> bool:
    return array.metadata.to_dict().get("data_type") == "bfloat16"


def _scalar(array: zarr.Array) -> bytes:
    little = array.dtype.newbyteorder("<")
    fill = array.fill_value
    return (np.zeros((), little) if fill is None else np.array(fill, array.dtype).astype(little)).tobytes()


def _dimensions(name: str, array: zarr.Array) -> list[str]:
    names = array.attrs.get("_ARRAY_DIMENSIONS") if array.metadata.zarr_format == 2 else array.metadata.dimension_names
    if names is None or None in names:
        return ["row", *(f"{name}_{axis}" for axis in range(1, array.ndim))]
    return list(names)
