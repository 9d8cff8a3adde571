"""Several stores as one: a virtual source for a run, with the rows of the first, then of the second, ...

>>> concat(["monday.zarr", "tuesday.zarr"], "both")                 # doctest: +SKIP
>>> actshuffle.shuffle("both", "shuffled.zarr")                     # doctest: +SKIP

No row is copied: ``both`` is a small folder that names its parts.  A run reads the rows from the parts,
straight into its buffers.  Documents are numbered on from part to part (documents.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from actshuffle.arrays import readers, virtual
from actshuffle.arrays.codecs import name_of
from actshuffle.arrays.field import Field
from actshuffle.arrays.guard import described
from actshuffle.arrays.inventory import take_inventory
from actshuffle.arrays.metadata import ZarrArray, output_field, source_arrays, source_field
from actshuffle.arrays.names import RUN_KEY
from actshuffle.arrays.source import Source
from actshuffle.arraytypes import U8, U64
from actshuffle.errors import DestinationExistsError, FormatError, RequestError, SourceError
from actshuffle.jobs.locks import Locks
from actshuffle.loading.dataset import Dataset, open_dataset, open_place
from actshuffle.loading.documents import joint_attributes, move, shifts_of
from actshuffle.loading.views import combined, followed, identity_of, reference
from actshuffle.storage.objects import open_objects
from actshuffle.storage.place import Place, as_place, public_url
from actshuffle.units import counted, several, switches


def concat(
    sources: Sequence[str | Path],
    out: str | Path,
    *,
    fields: Iterable[str] | None = None,
    renumber: bool = True,
    storage_options: dict[str, Any] | None = None,
) -> Dataset:
    """Make ``out`` a virtual source with the rows of all sources, in the order given.

    Sources are Zarr arrays or groups, finished stores, views, or virtual sources, whose arrays have the
    same names, types and row shapes (``fields`` chooses some).  Attributes are those of the first.

    Document numbers (of an integer array named ``document``, ``doc_id`` or the like) move on from part to part, so that
    each document stays apart, and the attribute ``documents`` lists those of all parts; this reads the array once.
    Without ``renumber`` they stay as they are, for parts that number the documents of one collection.
    """
    switches(renumber=renumber)
    sources = several("sources", sources, of="paths")
    if not sources:
        raise RequestError("give at least one source")
    place = as_place(out, storage_options)
    stores = [open_dataset(s, incomplete=True, storage_options=storage_options) for s in sources]
    with Locks() as locks:
        locks.take(place)
        if next(iter(open_objects(place).list("")), None) is not None:
            raise DestinationExistsError(f"{place} exists already")
        names = sorted(stores[0].fields if fields is None else set(fields))
        check_alike(stores, None if fields is None else names)
        shifts = shifts_of(stores, names) if renumber else []
        write_concat(place, stores, names, shifts=shifts if any(shifts) else None)
    return open_dataset(place.url, incomplete=True, storage_options=storage_options)


@dataclass(frozen=True)
class Presented:
    """A virtual source as it appears: array metadata, attributes, and the settings of its reader."""

    arrays: dict[str, str]
    attributes: dict[str, Any]
    settings: dict[str, Any]


def present(
    place: Place,
    stores: Sequence[Dataset],
    names: Sequence[str] | None = None,
    *,
    rows: int | None = None,
    first_row: int = 0,
    shifts: Sequence[Mapping[str, int]] | None = None,
) -> Presented:
    """The stores as one at ``place``, after a check that they are alike; with ``rows``, only that many rows.

    ``shifts`` are those of the document numbers of each, by array; with them, the attributes list all documents.
    """
    found = check_alike(stores, names)
    count = sum(store.rows for store in stores) if rows is None else rows
    parts = [
        {
            "store": reference(place, s.root),
            "start": s.start,
            "stop": s.start + s.rows,
            "of": next(iter(arrays.values())).shape[0],
            **({"numbered_from": dict(shift)} if shift else {}),
        }
        for s, arrays, shift in zip(stores, found, shifts or [{}] * len(stores), strict=True)
    ]
    return Presented(
        {k: _metadata(k, [arrays[k] for arrays in found], count) for k in found[0]},
        stores[0].attributes if shifts is None else joint_attributes(stores, shifts),
        {"first_row": first_row, "parts": parts},
    )


def write_concat(
    place: Place,
    stores: Sequence[Dataset],
    names: Sequence[str] | None = None,
    *,
    reader: str = "concat",
    first_row: int = 0,
    shifts: Sequence[Mapping[str, int]] | None = None,
    **facts: Any,
) -> None:
    """Write the stores as one virtual source, and number its rows from ``first_row``."""
    shown = present(place, stores, names, first_row=first_row, shifts=shifts)
    if any(shifts or ()):
        reader = "renumbered"  # unknown to versions that would read the numbers as they are stored
    virtual.write(place, reader, shown.settings, shown.arrays, shown.attributes, **facts)


def begun_as_stored(place: Place, store: Dataset) -> bool:
    """True if a virtual source of these rows alone is at a place, with their document numbers as they are stored."""
    with suppress(FormatError):
        parts = (virtual.describe(place) or {}).get("settings", {}).get("parts", [])
        same = {"store": reference(place, store.root), "start": store.start, "stop": store.start + store.rows}
        return len(parts) == 1 and "numbered_from" not in parts[0] and same.items() <= parts[0].items()
    return False


@contextmanager
def leaving_nothing(target: Place, *helpers: Place) -> Iterator[None]:
    """Remove the helpers of ``target`` that are made meanwhile, if the work is refused before a run has begun."""
    new = [place for place in helpers if next(iter(open_objects(place).list("")), None) is None]
    try:
        yield
    except (RequestError, SourceError):
        if all(open_objects(place).size(RUN_KEY) is None for place in (target, *helpers)):
            for place in new:
                open_objects(place).delete_prefix("")
        raise


@dataclass(frozen=True)
class _Part:
    """Rows of one store, from its row ``offset``, that are rows ``[start, stop)`` of the whole."""

    place: Place
    source: Source
    fields: dict[str, Field]
    offset: int
    start: int
    stop: int
    shifts: dict[str, int]
    types: dict[str, np.dtype[Any]]


@readers.reader("renumbered")
@readers.reader("concat")
class Concat:
    """Reads the rows of several stores, one after the other."""

    def __init__(self, place: Place, settings: dict[str, Any]) -> None:
        self._first_row = int(settings["first_row"])
        self._parts: list[_Part] = []
        self.rows = 0
        for entry in settings["parts"]:
            found = followed(place, entry["store"])
            arrays = source_arrays(found, sorted(virtual.array_names(place)))
            offset, stop = int(entry["start"]), int(entry["stop"])
            have = next(iter(arrays.values())).shape[0]
            if have != entry["of"] or not 0 <= offset <= stop <= have:
                raise SourceError(
                    f"{found} has {counted(have, 'row')}, and had {entry['of']:,} when {place} was made of it; "
                    "make that again"
                )
            fields = {k: source_field(k, a) for k, a in arrays.items()}
            end = self.rows + stop - offset
            shifts, types = entry.get("numbered_from", {}), {k: a.dtype for k, a in arrays.items()}
            self._parts.append(_Part(found, Source(found), fields, offset, self.rows, end, shifts, types))
            self.rows = end

    def read(self, name: str, start: int, out: U8) -> None:
        stop = start + len(out)
        for part in self._parts:
            a, b = max(start, part.start), min(stop, part.stop)
            if a < b:
                into = out[a - start : b - start]
                part.source.read(part.fields[name], a - part.start + part.offset, into)
                if shift := part.shifts.get(name):
                    move(into, part.types[name], shift)

    def numbers(self, start: int, stop: int) -> U64:
        return np.arange(self._first_row + start, self._first_row + stop, dtype=np.uint64)

    def inventory(self, names: Sequence[str]) -> readers.Backing:
        parts: list[dict[str, Any]] = []
        places: list[str] = []
        for part in self._parts:
            sources, behind = sources_of(part.place, names, part.offset, part.stop - part.start)
            parts, places = parts + [_renumbered(p, part.shifts) for p in sources], places + behind
        return readers.Backing(identity_of(parts), {"parts": parts}, tuple(places))


def _renumbered(part: dict[str, Any], shifts: Mapping[str, int]) -> dict[str, Any]:
    """A source as markers record it, whose documents move on by so much."""
    if not shifts:
        return part
    before = part.get("numbered_from", {})
    return {**part, "numbered_from": before | {name: before.get(name, 0) + n for name, n in shifts.items()}}


def sources_of(place: Place, names: Sequence[str], offset: int, rows: int) -> tuple[list[dict[str, Any]], list[str]]:
    """The origin of rows ``[offset, offset + rows)`` of a source, as markers record it, and the stores behind them."""
    arrays = source_arrays(place, names)
    whole = (offset, rows) == (0, next(iter(arrays.values())).shape[0])
    identity, _ = take_inventory(place, arrays)
    url, (_, inner) = public_url(place.url), virtual.inventory(place, names) or ("", {})
    behind = list(inner.get("behind", [url]))
    if whole and "parts" in inner.get("marker", {}):
        return list(inner["marker"]["parts"]), behind  # a concatenation of concatenations is flat
    if not whole:
        identity = combined([identity, f"{offset}:{offset + rows}"])
    return [{"source": url, "rows": rows, "identity": identity}], behind


def part_of(place: Place, entry: Mapping[str, Any]) -> Dataset:
    """The rows that a virtual source takes from one store, by an entry of its settings."""
    data, start, stop = open_place(followed(place, entry["store"])), int(entry["start"]), int(entry["stop"])
    return replace(data, start=data.start + start, rows=stop - start)


def layout_of(store: Dataset) -> dict[str, Any]:
    """Chunks, shards and codec of a store's widest array, as a request names them."""
    name = max(store.fields, key=lambda k: store.fields[k].row_bytes)
    array = source_arrays(store.root, [name])[name]
    rows, shards = array.chunks[0], array.shards
    return {
        # A single chunk that holds all rows was not chosen, but was enough.
        "chunk_rows": None if rows >= array.shape[0] else rows,
        "chunks_per_shard": None if shards is None else shards[0] // rows,
        "codec": name_of([described(codec) for codec in array.compressors]),
    }


def check_alike(stores: Sequence[Dataset], names: Sequence[str] | None) -> list[dict[str, ZarrArray]]:
    """The arrays of each store; refuses stores whose arrays differ in names, types or row shapes."""
    found = [source_arrays(store.root, sorted(store.fields) if names is None else names) for store in stores]
    first, known = found[0], stores[0].fields
    for store, arrays in zip(stores[1:], found[1:], strict=True):
        if set(arrays) != set(first):
            raise SourceError(
                f"{store.path} has arrays {sorted(arrays)}, {stores[0].path} has {sorted(first)}; "
                "choose those that both have with --fields"
            )
        for name in arrays:
            ours, theirs = known[name], store.fields[name]
            if (ours.dtype_name, ours.row_shape) != (theirs.dtype_name, theirs.row_shape):
                raise SourceError(
                    f"array {name!r} has rows of shape {theirs.row_shape}, {theirs.dtype_name}, in "
                    f"{store.path}, and of {ours.row_shape}, {ours.dtype_name}, in {stores[0].path}"
                )
    return found


def _metadata(name: str, arrays: Sequence[ZarrArray], rows: int) -> str:
    """``zarr.json`` of the joint array: with a codec if any of them has one, in the largest chunks."""
    fields = [source_field(name, array) for array in arrays]
    chunk = max(max(f.source_chunk_rows if f.source_key else f.read_rows for f in fields), 1)
    codec = "none" if all(f.source_key for f in fields) else "crc32c"
    return output_field(fields[0], arrays[0], rows, chunk, chunk, codec).metadata
