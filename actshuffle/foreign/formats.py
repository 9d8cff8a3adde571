"""The file formats that can be imported, in one table.  A new format is a reader in its own module and a row here."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from actshuffle.foreign.arrowfiles import ArrowFiles, dataset_files
from actshuffle.foreign.bytefiles import Npy, Raw, Safetensors, Torch
from actshuffle.foreign.table import Table


class Format(NamedTuple):
    """One row: the reader, made from the options of an import, and how its files are recognised.

    ``folder`` lists the files of a folder with a layout that belongs to this format, or gives None for any
    other folder.  ``flatten``: columns of items with two axes hold sequences of tokens, unless the user says
    otherwise.
    """

    reader: Callable[[dict[str, Any]], Table]
    endings: tuple[str, ...]
    folder: Callable[[Path, str | None], list[Path] | None] = lambda path, split: None
    flatten: bool = False


FORMATS = {
    "npy": Format(Npy, (".npy",)),
    "raw": Format(Raw, (".bin", ".dat", ".raw", ".mmap")),
    "safetensors": Format(Safetensors, (".safetensors",)),
    "parquet": Format(partial(ArrowFiles, "parquet"), (".parquet",)),
    "arrow": Format(partial(ArrowFiles, "arrow"), (".arrow",), folder=dataset_files, flatten=True),
    "torch": Format(Torch, (".pt", ".pth")),
}
ENDINGS = {ending: name for name, row in FORMATS.items() for ending in row.endings}
