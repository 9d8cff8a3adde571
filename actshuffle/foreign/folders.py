"""Folders of files: which of the files count, and in which order.

Programs leave an index beside the files that they write, or count the files in their names.  A file of the same
kind that the index does not name is left from an earlier save, and to take it too would mix old rows with new
ones.  So an index counts in whichever folder it lies, and what it does not name is refused::

    state.json, dataset_dict.json              Arrow files and splits of ``datasets.save_to_disk``
    *.safetensors.index.json                   shards of safetensors
    _metadata                                  parts of a parquet data set (pyarrow, Dask)
    _delta_log, .hoodie, *.metadata.json       tables of Delta, Hudi, Iceberg: refused, since their log decides
    part-00003-of-00010                        one of ten files: the others must be there
"""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from actshuffle.errors import RequestError, SourceError
from actshuffle.extras import need
from actshuffle.units import counted

STORE = ("zarr.json", ".zgroup", ".zarray")  # a folder with one of these is a Zarr store, and not of files
SPLITS = "dataset_dict.json"
_COUNTED = re.compile(r"(?P<base>.*?)[-_. ]?(?P<number>\d+)-of-(?P<count>\d+)")
_TABLES = {"_delta_log": "Delta", ".hoodie": "Hudi"}


class Index(NamedTuple):
    """How files of some endings are listed: ``files`` gives those of a folder and a split, None without an index."""

    files: Callable[[Path, str | None], list[Path] | None]
    endings: tuple[str, ...]


class Found(NamedTuple):
    """The files of a folder, and the files and Zarr stores in it that no index names."""

    files: list[Path]
    others: list[Path]


def natural(text: str) -> list[tuple[int, str | int]]:
    """A sort key under which ``part10`` follows ``part9``."""
    return [(0, int(x)) if x.isdecimal() else (1, x) for x in re.split(r"(\d+)", text) if x]


def files_in(folder: Path, indexes: Sequence[Index], split: str | None) -> Found:
    """All files under a folder but hidden ones, in the order of their names and numbers, or of their index."""
    units: list[tuple[Path, list[Path]]] = []  # one file, or those of one index
    claims: list[tuple[Path, Index, set[Path]]] = []
    others: list[Path] = []
    for name, inner, names in os.walk(folder):
        here = Path(name)
        if set(STORE) & set(names):
            others.append(here)
            inner.clear()
            continue
        inner[:] = [n for n in inner if not n.startswith(".")]
        above = [claim for claim in claims if claim[0] in here.parents]
        for index in indexes:
            if not any(claim[1] is index for claim in above):
                listed = index.files(here, split)
                if listed is not None:
                    above.append((here, index, set(listed)))
                    claims.append(above[-1])
                    units.append((here, listed))
                    if (here / SPLITS).exists():  # other splits were not asked for
                        inner[:] = [n for n in inner if any(here / n in file.parents for file in listed)]
        for file in (here / n for n in sorted(names) if not n.startswith(".") and (here / n).is_file()):
            if not above:
                units.append((file, [file]))
            elif not any(file in listed for _, _, listed in above):
                _refuse_left(file, [(path, index.endings) for path, index, _ in above])
                others.append(file)
    if split is not None and not any((path / SPLITS).exists() for path, _, _ in claims):
        raise RequestError(f"{folder} has no splits to choose {split!r} from: leave --split out")
    units.sort(key=lambda unit: natural(unit[0].relative_to(folder).as_posix()))
    return Found([file for _, files in units for file in files], others)


def check_index(file: Path, index: Index) -> None:
    """Refuse a file that was given by its name, and that the index beside it does not name."""
    if (file.parent / SPLITS).exists():
        return
    listed = index.files(file.parent, None)
    if listed is not None and file.name not in {path.name for path in listed}:
        _refuse_left(file, [(file.parent, index.endings)])


def check_counts(files: Iterable[Path], complete: bool) -> None:
    """Refuse files whose names tell of several counts, ``-of-00003`` and ``-of-00004``, or of files that are absent."""
    families: dict[tuple[Path, str, str], dict[int, set[int]]] = defaultdict(lambda: defaultdict(set))
    for file in files:
        if (match := _COUNTED.fullmatch(file.stem)) is not None:
            family = families[file.parent, match["base"], file.suffix]
            family[int(match["count"])].add(int(match["number"]))
    for (folder, base, suffix), counts in families.items():
        what = f"{folder / base}...{suffix}"
        if len(counts) > 1:
            raise SourceError(
                f"{what} are said to be {' and '.join(counted(n, 'file') for n in sorted(counts))}: "
                "some are left from an earlier save; delete those, or give the files of one save by their names"
            )
        ((count, numbers),) = counts.items()
        if complete and numbers not in (set(range(count)), set(range(1, count + 1))):
            raise SourceError(
                f"{what} are said to be {counted(count, 'file')}, and {len(numbers)} of them are here; "
                "fetch the others, or give "
                "those that are here by their names"
            )


def sets_of(files: Iterable[Path]) -> set[str]:
    """The sets that files belong to whose names count them: "train" of train-00003-of-00010."""
    matches = (_COUNTED.fullmatch(file.stem) for file in files)
    return {match["base"] for match in matches if match is not None}


def dataset_files(folder: Path, split: str | None) -> list[Path] | None:
    """The Arrow files of a folder that ``datasets.save_to_disk`` wrote, in order; None for any other folder."""
    if (splits := _body(folder / SPLITS).get("splits")) is not None:
        if split is None and len(splits) > 1:
            raise RequestError(f"{folder} has the splits {splits}: choose one with --split, or give its folder")
        if split is not None and split not in splits:
            raise RequestError(f"{folder} has no split {split!r}; there are {', '.join(map(repr, splits))}")
        inside = folder / (split or splits[0])
        if (found := dataset_files(inside, None)) is None:
            raise SourceError(f"no dataset in {inside}: there is no state.json")
        return found
    state = _body(folder / "state.json")
    if (entries := state.get("_data_files")) is None:
        splits = _body(folder / "dataset_info.json").get("splits") or {}
        if len(splits) > 1:
            raise RequestError(
                f"{folder} is a cache of datasets with the splits {', '.join(splits)}: give the files of one"
            )
        return None
    if state.get("_indices_files"):
        raise SourceError(
            f"{folder} is a selection or a shuffle by an index beside the data; write its rows out first "
            "(Dataset.flatten_indices), or import the dataset it was made from"
        )
    return _listed(folder, "state.json", [entry["filename"] for entry in entries])


def safetensors_files(folder: Path, split: str | None) -> list[Path] | None:
    """The shards that an index of safetensors names."""
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    names = {name: None for index in indexes for name in _body(index).get("weight_map", {}).values()}
    return _listed(folder, indexes[0].name, sorted(names, key=natural)) if names else None


def parquet_files(folder: Path, split: str | None) -> list[Path] | None:
    """The files that the common metadata of a parquet data set names; tables of other engines are refused."""
    kind = next((kind for mark, kind in _TABLES.items() if (folder / mark).is_dir()), None)
    kind = "Iceberg" if next((folder / "metadata").glob("*.metadata.json"), None) else kind
    if kind is not None:
        raise SourceError(
            f"{folder} is a table of {kind}, whose log says which files count; write it as plain parquet first"
        )
    if not (folder / "_metadata").is_file():
        return None
    parquet = need("pyarrow.parquet", "import")
    try:
        found = parquet.read_metadata(folder / "_metadata")
    except (OSError, ValueError) as err:
        raise SourceError(f"cannot read {folder / '_metadata'}: {err}") from err
    names = dict.fromkeys(found.row_group(i).column(0).file_path for i in range(found.num_row_groups))
    return _listed(folder, "_metadata", list(names)) if "" not in names else None


def _listed(folder: Path, index: str, names: Sequence[str]) -> list[Path]:
    """The files that an index names: inside its folder, and there."""
    for name in names:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise SourceError(f"{folder}/{index} names files outside its folder")
        if not (folder / name).is_file():
            raise SourceError(f"{folder}/{index} names {name}, which is not there")
    return [folder / name for name in names]


def _refuse_left(file: Path, claims: Sequence[tuple[Path, tuple[str, ...]]]) -> None:
    cached = file.suffix == ".arrow" and file.name.startswith(("cache-", "tmp"))  # results that datasets keeps
    for folder, endings in claims:
        if file.suffix in endings and not cached:
            raise SourceError(
                f"{file} is not in the index of {folder}: it is left from an earlier save, and its rows would come "
                "beside those of the last; delete it, or move it elsewhere"
            )


def _body(file: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no file, or no object in it."""
    if not file.is_file():
        return {}
    try:
        body = json.loads(file.read_text("utf-8"))
    except ValueError as err:
        raise SourceError(f"{file} is damaged: {err}") from err
    return body if isinstance(body, dict) else {}
