"""The file formats that can be imported, in one table: name, reader, and the endings that tell it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from actshuffle.building.bytefiles import Npy, Raw, Safetensors, Torch
from actshuffle.building.table import Table


def table_of(kind: str, options: dict[str, Any]) -> Table:
    """The reader of a format: "npy", "raw", "safetensors", "torch", "parquet" or "arrow"."""
    if kind in ("parquet", "arrow"):
        from actshuffle.building.arrowfiles import ArrowFiles

        return ArrowFiles(kind)
    tables: dict[str, Callable[[dict[str, Any]], Table]] = {
        "npy": Npy,
        "raw": Raw,
        "safetensors": Safetensors,
        "torch": Torch,
    }
    return tables[kind](options)


FORMATS = {
    ".npy": "npy",
    ".bin": "raw",
    ".dat": "raw",
    ".raw": "raw",
    ".mmap": "raw",
    ".safetensors": "safetensors",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".pt": "torch",
    ".pth": "torch",
}
