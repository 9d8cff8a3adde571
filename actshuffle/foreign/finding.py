"""The files that the paths of an import, or of a collection, stand for."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path

from actshuffle.errors import RequestError, SourceError
from actshuffle.foreign.folders import STORE, check_counts, check_index, files_in
from actshuffle.foreign.formats import ENDINGS, FORMATS


def find_files(paths: Sequence[Path], format: str | None, split: str | None) -> tuple[str, list[Path], list[Path]]:
    """The format of some files and folders, their files in order, and what in the folders is left out."""
    if format is not None and format not in FORMATS:
        raise RequestError(f"unknown format {format!r}; known are {', '.join(sorted(FORMATS))}")
    files: list[Path] = []
    others: list[Path] = []
    for path in paths:
        _check_there(path)
        if path.is_file():
            if split is not None:
                raise RequestError(f"{path} is a file and has no splits: leave --split out")
            if (kind := format or ENDINGS.get(path.suffix)) is not None:
                check_index(path, FORMATS[kind].folder_index)
            files.append(path)
            continue
        found = files_in(path, [row.folder_index for kind, row in FORMATS.items() if format in (None, kind)], split)
        # Anything could be raw numbers, so in a folder their endings must say so; other formats tell by their bytes.
        endings = FORMATS["raw"].endings if format == "raw" else ENDINGS
        known = [file for file in found.files if file.suffix in endings or format not in (None, "raw")]
        check_counts(known, complete=True)
        files += known
        others += sorted({*found.files, *found.others} - set(known))
    check_counts(files, complete=False)
    kinds = {format or ENDINGS.get(file.suffix, "") for file in files}
    if not files or kinds == {""}:
        stores = [str(path) for path in others if is_store(path)]
        zipped = [str(path) for path in (*files, *others) if path.is_file() and zipfile.is_zipfile(path)]
        raise SourceError(
            f"nothing to import in {', '.join(map(str, paths))}: no files ending in {', '.join(ENDINGS)}"
            + (f"; {', '.join(stores)} is a Zarr store, which run, concat and append take as it is" if stores else "")
            + (f"; {', '.join(zipped)} is a zip file: unpack it first, and give the folder" if zipped else "")
        )
    if len(kinds) > 1:
        raise SourceError(f"files of several formats ({', '.join(sorted(k or '?' for k in kinds))}): give --format")
    return kinds.pop(), files, others


def text_files(paths: Sequence[Path], apart: Sequence[Path | None] = ()) -> list[Path]:
    """Files, and the files inside folders, in the order of their names and numbers.

    Hidden ones are left out, and Zarr stores, and what is in the folders ``apart``: where the result goes.
    """
    files: list[Path] = []
    for path in paths:
        _check_there(path)
        if path.is_file():
            files.append(path)
        else:
            files += files_in(path, [FORMATS["arrow"].folder_index, FORMATS["parquet"].folder_index], None).files
    ours = {p.resolve() for p in apart if p is not None}
    files = [f for f in files if not ours.intersection(f.resolve().parents)]
    if not files:
        raise SourceError(f"no files in {', '.join(map(str, paths))}")
    return files


def is_store(path: Path) -> bool:
    return any((path / name).exists() for name in STORE)


def _check_there(path: Path) -> None:
    if not path.exists():
        raise SourceError(f"no such file or folder: {path}")
