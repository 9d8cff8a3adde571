"""One array of a store, as the engine sees it: opaque rows of a fixed width, and where their bytes lie."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Field:
    """One array of the store.  Rows are opaque: ``row_bytes`` little-endian bytes each.

    Attributes
    ----------
    name, source : its name in the output, its path in the source ("" for a bare array).
    source_chunk_rows : rows of a source object, chunk or shard.
    read_rows : rows that are read from the source in one go; whole chunks.
    source_key : where chunk files are the plain bytes of rows, their key with ``{}`` for the number;
        empty where zarr must decode them.
    metadata : text of the output array's ``zarr.json``.
    object_key : key of an output object, with ``{}`` for its number.
    chunk_rows, object_rows : rows of an output chunk and of an output object (chunk or shard).
    raw_output : output objects are the plain bytes of their rows.
    """

    name: str
    source: str
    row_bytes: int
    row_shape: tuple[int, ...]
    source_chunk_rows: int
    source_key: str
    read_rows: int = 0
    metadata: str = ""
    object_key: str = ""
    chunk_rows: int = 0
    object_rows: int = 0
    raw_output: bool = True
