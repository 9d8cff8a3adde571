"""Make a store of other files: .npy and memmap folders, safetensors, parquet, ``datasets``, torch.

>>> import_store(["acts.npy", "tokens.npy"], "acts.zarr")            # doctest: +SKIP

The files become a virtual source (virtual.py), and a run copies it in order, block by block: memory is
bounded, chunks are whole, and a stopped run resumes.  The result names the array of each column.

Rows are the items along the first axis.  Where items are sequences, shape (tokens, width), ``flatten``
makes each token a row; columns with one value per sequence are repeated, and ``document`` (the number of
the sequence) and ``position`` are added.  This is the default for ``datasets`` folders whose columns are
two-dimensional, the layout of SAELens's cached activations.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from actshuffle.building.filesource import Mapped, write_files
from actshuffle.engine.request import Request
from actshuffle.engine.run import copy_through
from actshuffle.errors import RequestError, SourceError
from actshuffle.executors import Executor
from actshuffle.foreign.finding import find_files, is_store
from actshuffle.foreign.folders import sets_of
from actshuffle.foreign.formats import FORMATS
from actshuffle.foreign.table import FileColumn, Table, joined
from actshuffle.html import page
from actshuffle.jobs.work import Work
from actshuffle.progress import Progress
from actshuffle.progress.display import shown
from actshuffle.seals import checksum
from actshuffle.storage.objects import open_objects
from actshuffle.storage.place import Place, as_place, local_path
from actshuffle.units import counted, format_bytes, format_seconds, several, switches

NAMED = 10  # files that are left out and named
ARRAY_NAME = re.compile(r"[^/\x00]+")


@dataclass(frozen=True)
class Imported:
    """The outcome of an import."""

    destination: str
    rows: int
    nbytes: int
    seconds: float
    mapping: tuple[Mapped, ...]
    left_out: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"{self.destination}: {counted(self.rows, 'row')}, {format_bytes(self.nbytes)}, "
            f"{format_seconds(self.seconds)}"
        ]
        lines += [f"  {m}" for m in self.mapping]
        return "\n".join([*lines, *(f"  left out: {name}" for name in self.left_out)])

    def _repr_html_(self) -> str:
        facts = {"store": self.destination, "rows": f"{self.rows:,}", "bytes": format_bytes(self.nbytes)}
        facts |= {"time": format_seconds(self.seconds), "left out": ", ".join(self.left_out) or "nothing"}
        return page("Imported", facts, ("array", "from"), [str(one).split(": ", 1) for one in self.mapping])


@shown
def import_store(
    paths: str | Path | Sequence[str | Path],
    dst: str | Path,
    *,
    format: str | None = None,
    columns: Iterable[str] | None = None,
    names: Mapping[str, str] | None = None,
    flatten: bool | None = None,
    together: bool | None = None,
    split: str | None = None,
    dtype: str | None = None,
    row_shape: Sequence[int] | None = None,
    attributes: Mapping[str, Any] | None = None,
    memory: str | int | None = None,
    chunk_rows: int | None = None,
    chunks_per_shard: int | None = None,
    codec: str | None = None,
    scratch: str | Path | None = None,
    overwrite: bool = False,
    executor: Executor | None = None,
    progress: Progress | bool = True,
    fsync: bool = True,
    storage_options: dict[str, Any] | None = None,
    **request: Any,
) -> Imported:
    """Copy files of another format into a store, in order.

    Parameters
    ----------
    paths : files, folders of them, or folders that ``datasets.save_to_disk`` wrote.
    format : "npy", "raw", "safetensors", "parquet", "arrow" or "torch"; by default the endings of the names decide.
    columns, names : columns to take (default: all of numbers), and array names for some of them.
    flatten : make a row of each token, where items are sequences (see above).
    together : read .npy files with numbered names as parts of one array.  Default: if the numbers are padded
        with zeros, or the names contain shard, part, chunk or batch.
    split : the split of a ``datasets`` folder to take.
    dtype, row_shape : data type and row shape of raw files, which have no header.
    attributes : further attributes for the store.

    Other parameters are as in `actshuffle.shuffle`.
    """
    given = {"flatten": flatten, "together": together}
    switches(**{name: value for name, value in given.items() if value is not None})
    work = Work.of(executor, progress, overwrite=overwrite, fsync=fsync)
    listed = [paths] if isinstance(paths, str | Path) else several("paths", paths, of="paths")
    kind, files, others = find_files([Path(p) for p in listed], format, split)
    options = {"dtype": dtype, "row_shape": None if row_shape is None else list(row_shape)}
    for name in sorted(name for name, value in options.items() if value is not None):
        if name not in FORMATS[kind].told:
            raise RequestError(
                f"--{name.replace('_', '-')} is for files without a header, and files of {kind} have one"
            )
    table = FORMATS[kind].reader(options)
    found = _columns(table, files, together)
    left_out = table.left_out(files)
    if not found:
        of = f" ({', '.join(f'{name}: {what}' for name, what in left_out.items())})" if left_out else ""
        raise SourceError(f"no columns of numbers in {files[0]}{' and the others' * (len(files) > 1)}{of}")
    chosen = _chosen(found, left_out, None if columns is None else list(columns), names or {})
    mapping, sequence = _mapped(chosen, kind, names or {}, flatten)
    place = as_place(dst, storage_options)
    source = _description(place)
    asked = Request.among(locals(), seed=0, source_row=False, **request)
    told = {"format": kind, "files": len(files), "mapping": {m.array: m.column or m.rule for m in mapping}}
    decoded = table.decoded_bytes(chosen)
    described = {**(attributes or {}), "imported": told}
    with work.locks:
        work.locks.take(place)
        rows = write_files(source, kind, options, files, found, mapping, sequence, decoded, described)
        try:
            made = copy_through(source, place, asked, work)
        except RequestError:
            open_objects(source).delete_prefix("")
            raise
    held = (f"{name} ({what})" for name, what in left_out.items())
    return Imported(str(place), rows, made.nbytes, work.seconds, tuple(mapping), (*held, *_named(others)))


def _description(place: Place) -> Place:
    """The place of the virtual source: always on this machine, as the files are."""
    if local_path(place) is not None:
        return Place(place.url).beside(".import")
    tag = checksum(place.url, 16)
    return Place(str(Path(tempfile.gettempdir()) / f"actshuffle-{tag}.import"))


def _named(others: Sequence[Path]) -> list[str]:
    """Files that are left out, the first ones by name."""
    told = [f"{path} ({'a Zarr store' if is_store(path) else 'a file of no known format'})" for path in others[:NAMED]]
    return told + [f"{len(others) - NAMED:,} more files"] * (len(others) > NAMED)


def _columns(table: Table, files: Sequence[Path], together: bool | None) -> dict[str, FileColumn]:
    """All columns by name; files of one column each that belong together make one column."""
    families = [_family(file, together) for file in files]
    named_after = {str(f): f.stem if families.count(n) == 1 else n for f, n in zip(files, families, strict=True)}
    by_name: dict[str, list[FileColumn]] = {}
    for column in table.columns(files):
        name = column.name or named_after[column.parts[0].file]
        by_name.setdefault(name, []).append(replace(column, name=name))
    found = {name: joined(parts) for name, parts in sorted(by_name.items())}
    for name, column in found.items():
        sets = sorted(sets_of(Path(part.file) for part in column.parts))
        if len(sets) > 1:  # the splits of a data set, say
            fault = f"{name!r} has rows of several sets of files, {' and '.join(sets)}; give the files of one of them"
            found[name] = replace(column, fault=column.fault or fault)
    return found


def _family(file: Path, together: bool | None) -> str:
    """The name of the array that a file holds, or holds a part of."""
    match = re.fullmatch(r"(.*?)[-_. ]?(\d+)(-of-\d+)?", file.stem)
    if match is None or together is False:
        return file.stem
    base, number = match[1], match[2]
    base = re.sub(r"[-_. ]?(shard|part|chunk|batch)$", "", base, flags=re.IGNORECASE)
    padded = len(number) > 2 and number.startswith("0")
    if together or padded or match[3] or base != match[1]:
        return base or file.parent.name or "data"
    return file.stem


def _chosen(
    found: Mapping[str, FileColumn], left_out: Mapping[str, str], columns: Iterable[str] | None, names: Iterable[str]
) -> list[FileColumn]:
    """The columns that are wanted; only these are judged."""
    wanted = list(found) if columns is None else list(columns)
    if not wanted:
        raise RequestError(f"no columns are chosen; there are {', '.join(map(repr, found))}")
    for name in (*wanted, *names):
        if name in left_out and name not in found:
            raise RequestError(f"column {name!r} holds {left_out[name]}, no numbers; those are in {', '.join(found)}")
        if name not in found:
            raise RequestError(f"no column {name!r}; there are {', '.join(map(repr, found))}")
        if name not in wanted:
            raise RequestError(f"column {name!r} is renamed, and --columns leaves it out")
    chosen = [found[name] for name in wanted]
    for column in chosen:
        if column.fault:
            others = ", ".join(c.name for c in found.values() if not c.fault)
            advice = f"; leave it out with --columns {others}" if columns is None and others else ""
            raise SourceError(column.fault + advice)
    counts = {c.name: c.items for c in chosen}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{k}: {v:,}" for k, v in counts.items())
        raise SourceError(f"columns of unequal length ({listed}); choose some with --columns")
    return chosen


def _mapped(
    chosen: Sequence[FileColumn], kind: str, names: Mapping[str, str], flatten: bool | None
) -> tuple[list[Mapped], int]:
    """The arrays to make, and how many tokens a sequence has (1 where items are rows)."""
    lengths = {c.name: c.shape[0] for c in chosen if c.shape}
    if flatten is None:
        flatten = FORMATS[kind].flatten and any(len(c.shape) == 2 and not c.tensor for c in chosen)
    if not flatten:
        mapping = [Mapped(names.get(c.name, c.name), c.name, "rows", c.dtype, c.shape, len(c.parts)) for c in chosen]
        return _distinct(mapping), 1
    if len(set(lengths.values())) != 1:
        listed = ", ".join(f"{k}: {v:,}" for k, v in lengths.items())
        raise SourceError(f"mixed widths: sequences of unequal length ({listed}); choose some with --columns")
    tokens = next(iter(lengths.values()))
    mapping = []
    for c in chosen:
        rule = "tokens" if c.shape else "repeated"
        mapping.append(Mapped(names.get(c.name, c.name), c.name, rule, c.dtype, c.shape[1:], len(c.parts)))
    taken = {m.array for m in mapping}
    for rule, width in (("document", "<u8"), ("position", "<u4")):
        if rule not in taken:
            mapping.append(Mapped(rule, "", rule, width, (), 0))
    return _distinct(mapping), tokens


def _distinct(mapping: list[Mapped]) -> list[Mapped]:
    arrays = [m.array for m in mapping]
    for name in arrays:
        if arrays.count(name) > 1:
            raise RequestError(f"two columns would become the array {name!r}; rename one with --name")
        if not ARRAY_NAME.fullmatch(name) or name in (".", "..") or name.startswith(("__", "_actshuffle")):
            raise RequestError(f"{name!r} is no name for an array; give another with --name")
    return mapping
