"""The file formats that can be imported, in one table.  A new format is a reader in its own module and a row here."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from actshuffle.foreign.arrowfiles import ArrowFiles
from actshuffle.foreign.bytefiles import Npy, Raw, Safetensors, Torch
from actshuffle.foreign.folders import Index, dataset_files, parquet_files, safetensors_files
from actshuffle.foreign.table import Table


class Format(NamedTuple):
    """One row: the reader, made from the options of an import, and how its files are recognised.

    ``listed`` gives the files that an index in a folder names, or None for a folder without one (see folders.py).
    ``told`` are the options that files need which do not say what they hold.  ``flatten``: columns of items with
    two axes hold sequences of tokens, unless the user says otherwise.
    """

    reader: Callable[[dict[str, Any]], Table]
    endings: tuple[str, ...]
    listed: Callable[[Path, str | None], list[Path] | None] = lambda folder, split: None
    told: tuple[str, ...] = ()
    flatten: bool = False

    @property
    def folder_index(self) -> Index:
        return Index(self.listed, self.endings)


FORMATS = {
    "npy": Format(Npy, (".npy",), told=("dtype",)),
    "raw": Format(Raw, (".bin", ".dat", ".raw", ".mmap"), told=("dtype", "row_shape")),
    "safetensors": Format(Safetensors, (".safetensors",), listed=safetensors_files),
    "parquet": Format(partial(ArrowFiles, "parquet"), (".parquet",), listed=parquet_files),
    "arrow": Format(partial(ArrowFiles, "arrow"), (".arrow",), listed=dataset_files, flatten=True),
    "torch": Format(Torch, (".pt", ".pth")),
}
ENDINGS = {ending: name for name, row in FORMATS.items() for ending in row.endings}
