"""The arrays of a result, and the files that hold them.

::

    OUT/stat/count/c/3                      latents [3 chunk, 4 chunk), little-endian bytes without compression
    OUT/example/row/c/3/0
    OUT/zarr.json, OUT/stat/zarr.json ...   Zarr v3 metadata, written at the end

Row f of an array of `GROUPS` is about latent f.  Chunks are whole and not compressed, so that one latent is read with
one small range read of each array, whatever the number of latents.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import MemoryStore

from actshuffle.jobs import FolderJob
from saetrain.describing.slots import (
    CONTEXT,
    HISTOGRAM_BINS,
    NO_OFFSET,
    NO_ROW,
    POSITION_BINS,
    QUANTILES,
    TOP_TOKENS,
    Arrays,
    Slots,
)

WRITES = 8  # arrays written at once


class Column(NamedTuple):
    """One array: shape of a row, type, the value where there is nothing to say, and its definition."""

    shape: tuple[int, ...]
    dtype: str
    empty: float
    about: str


def columns(slots: Slots, rows: int, gradients: bool = False) -> dict[str, Column]:
    """All arrays that `collate` writes, by "group/name"."""
    n = "<u4" if rows < 2**32 else "<u8"
    nan = float("nan")
    per_slot = (slots.total,)
    found = {
        "stat/count": Column((), "<i8", 0, "rows on which the latent is active"),
        "stat/sum": Column((), "<f8", 0, "sum of its activations"),
        "stat/sum2": Column((), "<f8", 0, "sum of their squares"),
        "stat/sum3": Column((), "<f8", 0, "sum of their cubes"),
        "stat/sum4": Column((), "<f8", 0, "sum of their fourth powers"),
        "stat/min": Column((), "<f4", nan, "smallest activation; NaN for a dead latent"),
        "stat/max": Column((), "<f4", nan, "largest activation; NaN for a dead latent"),
        "stat/max_row": Column((), "<i8", NO_ROW, "first row with the largest activation; -1 for a dead latent"),
        "stat/documents": Column((), "<i8", 0, "documents in which it is active"),
        "stat/density": Column((), "<f8", 0, "count / rows"),
        "stat/density_low": Column((), "<f8", nan, "lower end of the density's 95% interval, documents as clusters"),
        "stat/density_high": Column((), "<f8", nan, "upper end of that interval"),
        "shape/histogram": Column((HISTOGRAM_BINS,), n, 0, "activations in bins of a quarter octave, below the max"),
        "shape/quantile": Column((len(QUANTILES),), "<f4", nan, "order statistics ceil(q count) of its activations"),
        "shape/position": Column((POSITION_BINS,), n, 0, "active rows by log2(1 + rows of the document before)"),
        "token/id": Column((TOP_TOKENS,), "<i8", -1, "tokens on which it is most often active; -1 for none"),
        "token/count": Column((TOP_TOKENS,), n, 0, "active rows with that token"),
        "token/mean": Column((TOP_TOKENS,), "<f4", nan, "mean activation on them"),
        "example/row": Column(per_slot, "<i8", NO_ROW, "row of the store; -1 for an empty slot"),
        "example/value": Column(per_slot, "<f4", 0, "activation on that row; 0 for quiet rows"),
        "context/offset": Column((*per_slot, CONTEXT), "|i1", NO_OFFSET, "rows from the example; 127 for none"),
        "context/value": Column((*per_slot, CONTEXT), "<f4", 0, "activation at that offset"),
    }
    if not gradients:
        return found
    return found | {
        "loss/effect": Column((), "<f8", 0, "mean over rows of activation times <decoder row, gradient of the loss>"),
        "loss/low": Column((), "<f8", nan, "lower end of its 95% interval, documents as clusters"),
        "loss/high": Column((), "<f8", nan, "upper end of that interval"),
    }


def empty(found: Mapping[str, Column], latents: int) -> Arrays:
    """Arrays of latents of which nothing is known."""
    return {name: np.full((latents, *c.shape), c.empty, c.dtype) for name, c in found.items()}


def chunk_key(name: str, number: int, axes: int) -> str:
    return f"{name}/c/{number}" + "/0" * (axes - 1)


def put_chunk(job: FolderJob, arrays: Arrays, number: int, chunk: int) -> int:
    """Write one chunk of each array, whole chunks also at the end; returns the bytes.

    A write ends when the disk has it, so several are under way at once.
    """

    def put(name: str, array: NDArray[Any]) -> int:
        whole = array
        if len(array) < chunk:
            whole = np.zeros((chunk, *array.shape[1:]), array.dtype)
            whole[: len(array)] = array
        data = np.ascontiguousarray(whole).reshape(-1).view(np.uint8)
        job.objects.put(chunk_key(name, number, array.ndim), data.data)
        return len(data)

    with ThreadPoolExecutor(WRITES) as pool:
        return sum(pool.map(put, arrays, arrays.values()))


def put_all(job: FolderJob, found: Mapping[str, bytes]) -> None:
    """Write objects by key, several at once."""
    with ThreadPoolExecutor(WRITES) as pool:
        for _ in pool.map(job.objects.put, found, found.values()):
            pass


def has_chunk(job: FolderJob, found: Mapping[str, Column], number: int) -> bool:
    return all(job.objects.size(chunk_key(n, number, len(c.shape) + 1)) is not None for n, c in found.items())


def metadata(found: Mapping[str, Column], latents: int, chunk: int, attributes: Any) -> Iterator[tuple[str, bytes]]:
    """The zarr.json of the root, with the attributes, of each group, and of each array."""
    store = MemoryStore()
    root = zarr.create_group(store, attributes=json.loads(json.dumps(attributes)))
    for name, column in found.items():
        root.create_array(
            name,
            shape=(latents, *column.shape),
            chunks=(chunk, *column.shape),
            dtype=np.dtype(column.dtype),
            fill_value=0,
            compressors=None,
            attributes={"definition": column.about},
        )

    yield from _held(store)


def group_metadata(arrays: Mapping[str, tuple[int, str]]) -> list[tuple[str, bytes]]:
    """The zarr.json of a group of arrays of one axis, each in one chunk; that of the group is last."""
    store = MemoryStore()
    root = zarr.create_group(store)
    for name, (length, dtype) in arrays.items():
        root.create_array(
            name, shape=(length,), chunks=(max(length, 1),), dtype=np.dtype(dtype), fill_value=0, compressors=None
        )
    return sorted(_held(store), key=lambda found: (found[0] == "zarr.json", found[0]))


def _held(store: MemoryStore) -> list[tuple[str, bytes]]:
    async def held() -> list[tuple[str, bytes]]:
        keys = sorted([key async for key in store.list()])
        got = [(key, await store.get(key, default_buffer_prototype())) for key in keys]
        return [(key, data.to_bytes()) for key, data in got if data is not None]

    return sync(held())
