"""Files of another format as a table: columns of items, in parts that are read one after the other."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from actshuffle.arraytypes import U8


class FilePart(NamedTuple):
    """Items of a column in one file.

    ``at`` is a byte offset, or a name inside the file; ``swap`` is the width of big-endian numbers, which
    are turned round, else 0.
    """

    file: str
    at: int | str
    items: int
    swap: int = 0


@dataclass(frozen=True)
class FileColumn:
    """One column: its items over all files.

    ``dtype`` is numpy's name, little-endian, or "bfloat16"; ``shape`` is that of an item.  ``fault`` says why the
    column cannot be read, which matters only if it is wanted; ``tensor``: its type says that an item is no sequence.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    parts: tuple[FilePart, ...]
    fault: str = ""
    tensor: bool = False

    @property
    def items(self) -> int:
        return sum(part.items for part in self.parts)

    @property
    def item_bytes(self) -> int:
        width = 2 if self.dtype == "bfloat16" else np.dtype(self.dtype).itemsize
        return width * math.prod(self.shape)


class Table:
    """Reads items of columns of one format.  A new format implements `columns` and `read`."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options

    def columns(self, files: Sequence[Path]) -> Iterator[FileColumn]:
        """The columns of each file; columns of one name belong together, one without is named after its file."""
        raise NotImplementedError

    def read(self, part: FilePart, start: int, out: U8) -> None:
        """Read items from ``start`` on of one file's part of a column into ``out``, uint8 ``(m, item bytes)``."""
        raise NotImplementedError

    def left_out(self, files: Sequence[Path]) -> dict[str, str]:
        """Columns that hold no numbers by name, and what they hold."""
        return {}

    def decoded_bytes(self, columns: Sequence[FileColumn]) -> int:
        """The most bytes that reading some columns takes besides the rows themselves; 0 where it takes none."""
        return 0


def dtype_name(dtype: str) -> str:
    """The usual name of a column's type: float32, not <f4."""
    return dtype if dtype == "bfloat16" else np.dtype(dtype).name


def unreadable(name: str, file: Path, fault: str) -> FileColumn:
    """A column of one file that cannot be read."""
    return FileColumn(name, "", (), (FilePart(str(file), 0, 0),), fault)


def joined(found: Sequence[FileColumn]) -> FileColumn:
    """Join columns of one name, file after file; the result has a fault where they differ in type or width."""
    first, fault = found[0], next((c.fault for c in found if c.fault), "")
    other = next((c for c in found if (c.dtype, c.shape) != (first.dtype, first.shape)), None)
    if other is not None and not fault:
        fault = (
            f"mixed widths: {first.name!r} has items of shape {first.shape}, {dtype_name(first.dtype)}, in "
            f"{first.parts[0].file}, and of {other.shape}, {dtype_name(other.dtype)}, in {other.parts[0].file}"
        )
    return replace(first, parts=tuple(p for c in found for p in c.parts), fault=fault)
