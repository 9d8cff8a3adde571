"""The arrays of a store, as a reader sees them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from actshuffle.arrays.metadata import ZarrArray, is_bfloat16, source_field
from actshuffle.loading.rowreader import stored_field


@dataclass(frozen=True)
class FieldInfo:
    """One array of a store, as a reader sees it.

    ``dtype`` is the little-endian numpy type of what is read; bfloat16 stays uint16 bits, with ``bfloat16`` set.
    ``object_rows`` is the number of rows of one stored object (a chunk, or a shard); ``raw`` says that objects
    are the plain bytes of their rows.  ``piece_rows`` rows are decoded together; 1 if raw.
    """

    name: str
    dtype: np.dtype[Any]
    row_shape: tuple[int, ...]
    row_bytes: int
    object_rows: int
    bfloat16: bool
    raw: bool
    piece_rows: int

    @property
    def dtype_name(self) -> str:
        return "bfloat16" if self.bfloat16 else str(self.dtype)


def is_float(info: FieldInfo) -> bool:
    return info.bfloat16 or info.dtype.kind == "f"


def is_integer(info: FieldInfo) -> bool:
    """True for whole numbers, and for True and False."""
    return not info.bfloat16 and info.dtype.kind in "iub"


def field_info(name: str, array: ZarrArray) -> FieldInfo:
    found = source_field(name, array)
    return FieldInfo(
        name=name,
        dtype=array.dtype.newbyteorder("<"),
        row_shape=found.row_shape,
        row_bytes=found.row_bytes,
        object_rows=found.source_chunk_rows,
        bfloat16=is_bfloat16(array),
        raw=bool(found.source_key),
        piece_rows=1 if found.source_key else stored_field(name, array).source_chunk_rows,
    )
