"""Source stores: rows of random bits, each with its number in its first eight bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import zarr

CHUNK_BYTES = 32 << 20
WORD = 8  # rows are uint64; their width is a multiple of this


def make_source(folder: Path, nbytes: int, row_bytes: int, chunk_bytes: int = CHUNK_BYTES) -> Path:
    """A store of about ``nbytes`` in rows of ``row_bytes``, in plain chunks; made once and kept."""
    if row_bytes % WORD:
        raise ValueError(f"row bytes must be a multiple of {WORD}, got {row_bytes}")
    rows = max(1, nbytes // row_bytes)
    chunk_rows = max(1, min(chunk_bytes // row_bytes, rows))
    path = folder / f"source-{row_bytes}x{rows}-{chunk_rows}.zarr"
    if path.exists():
        return path
    partial = path.with_suffix(".making")
    width = row_bytes // WORD
    array = zarr.create_array(
        partial,
        shape=(rows, width),
        dtype="<u8",
        chunks=(chunk_rows, width),
        compressors=None,
        chunk_key_encoding={"name": "default", "separator": "."},
        overwrite=True,
        config={"write_empty_chunks": True},
    )
    rng = np.random.Generator(np.random.SFC64(0))
    chunk = np.empty((chunk_rows, width), np.uint64)
    for start in range(0, rows, chunk_rows):
        count = min(chunk_rows, rows - start)
        chunk.reshape(-1)[:] = np.frombuffer(rng.bytes(chunk.nbytes), np.uint64)
        chunk[:count, 0] = np.arange(start, start + count, dtype=np.uint64)
        array[start : start + count] = chunk[:count]
    return partial.rename(path)


def chunk_keys(path: Path) -> list[str]:
    """The chunk files of a source, in order of their number."""
    return sorted((p.name for p in path.glob("c.*")), key=lambda name: int(name.split(".")[1]))


def rows_of(path: Path) -> int:
    return int(zarr.open_array(path, mode="r").shape[0])
