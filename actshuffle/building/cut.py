"""Parts of a store: splits and heads that copy nothing, and exact samples without a full shuffle.

A row range of a shuffled store is a uniform sample of its rows, so a split by ranges is a random split.
It is a *view*: a marker that names the store and the range.  ``copy`` makes it a store of its own.

A sample of m rows is what the first m rows of the full shuffle under that seed would be, byte for byte:
the rows with the m smallest keys.  The m-th smallest key is found from the keys alone (bounds.py); then
only the rows below it are read and shuffled::

    keys of all rows  ->  key of rank m  ->  rows below it, in source order  ->  a run on these rows

Cost: about 25 ns for each row of the source, and the usual cost of a run for m rows.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actshuffle.arrays import virtual
from actshuffle.arrays.marker import read_marker
from actshuffle.arrays.names import SOURCE_ROW
from actshuffle.arraytypes import U8, U64
from actshuffle.building.growth import layout_of
from actshuffle.building.joining import Concat, present, write_concat
from actshuffle.engine.prepare import prepare
from actshuffle.engine.request import Request
from actshuffle.engine.run import Result, execute
from actshuffle.errors import DestinationExistsError, RequestError
from actshuffle.executors import Executor, Serial
from actshuffle.loading.dataset import Dataset, open_dataset, open_finished_or_plain, write_view
from actshuffle.ordering import bounds
from actshuffle.ordering.keys import Keys
from actshuffle.progress import Progress, Silent
from actshuffle.storage.directio import Extent
from actshuffle.storage.objects import open_objects
from actshuffle.storage.place import Place, as_place, public_url

ROWS_KEY = "_actshuffle/rows"  # the chosen rows, ascending, as little-endian uint64
REMOTE_GAP_BYTES = 1 << 20
GAP_BYTES = 16 << 10  # between two chosen rows, less than this is read through
SPAN_BYTES = 4 << 20  # read at a time
SHOWN_ROWS = 10_000
_SLICE = 1 << 18  # keys made at a time

Share = int | float | str


def shares(rows: int, parts: Mapping[str, Share]) -> dict[str, tuple[int, int]]:
    """Row ranges, one after the other, by name.

    An int is a number of rows, a float a fraction of all of them, and "rest" (once) what is left.
    Fractions are rounded where they end, so those that add up to one leave out no row.

    >>> shares(1000, {"train": 0.9, "test": 50, "spare": "rest"})
    {'train': (0, 900), 'test': (900, 950), 'spare': (950, 1000)}
    """
    if not parts:
        raise RequestError("give at least one part")
    if list(parts.values()).count("rest") > 1:
        raise RequestError("only one part can be the rest")
    wanted = {name: _rows_of(name, share, rows) for name, share in parts.items()}
    total = sum(w for w in wanted.values() if w is not None)
    if total > rows + 1e-9 * rows:
        raise RequestError(f"{total:,.0f} rows are asked for in all, and there are {rows:,}")
    counts, exact = {}, 0.0
    for name, count in wanted.items():
        if isinstance(count, float):
            counts[name], exact = round(exact + count) - round(exact), exact + count
        else:
            counts[name] = count or 0
    spare = rows - sum(counts.values())
    ends = np.cumsum([spare if wanted[name] is None else count for name, count in counts.items()])
    starts = [0, *ends[:-1].tolist()]
    return {name: (start, int(end)) for name, start, end in zip(counts, starts, ends, strict=True)}


def split(
    path: str | Path,
    parts: Mapping[str, Share],
    *,
    folder: str | Path | None = None,
    copy: bool = False,
    ordered: bool = False,
    executor: Executor | None = None,
    progress: Progress | None = None,
    storage_options: dict[str, Any] | None = None,
) -> dict[str, Dataset]:
    """Cut a shuffled store into contiguous ranges; ``parts`` maps paths to shares (see `shares`).

    Each part becomes a view, or with ``copy`` a store of its own, at its path (under ``folder``).  In a
    store that is not shuffled, a range is no random sample of it: refused unless ``ordered``.
    """
    store = open_dataset(path, storage_options=storage_options)
    if not store.shuffled and not ordered:
        raise RequestError(
            f"{store.path} is not shuffled, so a range of its rows is no random sample: shuffle it "
            "first, or say that the order is what you want (--ordered)"
        )
    crew, shown = executor or Serial(), progress or Silent()
    cuts = {
        name: (name if folder is None else f"{str(folder).rstrip('/')}/{name}", *share)
        for name, share in shares(store.rows, parts).items()
    }
    there = {name for name, cut in cuts.items() if _there(store, *cut, copy, storage_options)}
    if len(there) == len(cuts):
        raise DestinationExistsError(f"{next(iter(cuts.values()))[0]} is finished")
    return {
        name: open_dataset(cut[0], storage_options=storage_options)
        if name in there
        else _part(store, *cut, copy, crew, shown, storage_options)
        for name, cut in cuts.items()
    }


def head(
    path: str | Path,
    rows: int,
    out: str | Path,
    *,
    copy: bool = False,
    ordered: bool = False,
    executor: Executor | None = None,
    progress: Progress | None = None,
    storage_options: dict[str, Any] | None = None,
) -> Dataset:
    """The first rows of a store: of a shuffled one, a uniform sample without replacement."""
    made = split(
        path,
        {str(out): rows},
        copy=copy,
        ordered=ordered,
        executor=executor,
        progress=progress,
        storage_options=storage_options,
    )
    return made[str(out)]


def first_rows(path: str | Path, rows: int, storage_options: dict[str, Any] | None = None) -> dict[str, list[str]]:
    """The first rows of each array, as text: what a look at a store needs."""
    store = open_finished_or_plain(path, storage_options=storage_options)
    count, shown = min(rows, store.rows), {}
    if count > SHOWN_ROWS:
        raise RequestError(
            f"{count:,} rows are more than the {SHOWN_ROWS:,} that are shown at most; name a store to write them to"
        )
    for name, info in store.fields.items():
        values = store.read(name, 0, count)
        if info.bfloat16:
            values = (values.astype(np.uint32) << 16).view(np.float32)
        with np.printoptions(edgeitems=3, threshold=6, precision=4, linewidth=100):
            shown[name] = [str(value) for value in values]
    return shown


def sample(
    src: str | Path,
    rows: int,
    dst: str | Path,
    *,
    seed: int | None = None,
    fields: tuple[str, ...] | None = None,
    memory: str | int | None = None,
    chunk_rows: int | None = None,
    scratch: str | Path | None = None,
    overwrite: bool = False,
    executor: Executor | None = None,
    progress: Progress | None = None,
    fsync: bool = True,
    storage_options: dict[str, Any] | None = None,
    **request: Any,
) -> Result:
    """Write an exactly uniform sample of ``rows`` rows of ``src``, in exactly uniform random order.

    Byte for byte the first ``rows`` rows of ``shuffle(src, seed=seed)``.  The same again resumes.
    """
    crew, shown = executor or Serial(), progress or Silent()
    source, target = as_place(src, storage_options), as_place(dst, storage_options)
    store = open_dataset(src, incomplete=True, storage_options=storage_options)
    if not 0 < rows <= store.rows:
        raise RequestError(f"cannot take {rows:,} of the {store.rows:,} rows of {store.path}")
    if read_marker(open_objects(target)) is not None and not overwrite:
        raise DestinationExistsError(f"{target} is finished; --overwrite replaces it")
    names = tuple(sorted(store.fields if fields is None else set(fields)))
    chosen = Place(f"{target.url.rstrip('/')}.chosen", target.options)
    asked = {"rows": rows, "of": store.rows, "source": public_url(source.url), "names": list(names)}
    before = (virtual.describe(chosen) or {}).get("settings", {})
    if before.get("asked") == asked and seed in (None, before["seed"]) and not overwrite:
        seed = int(before["seed"])  # the same again: go on where it was
    else:
        seed = secrets.randbits(63) if seed is None else seed
        keys = Keys(seed, *Request.of(**request).key_bits)
        _choose(chosen, store, keys, names, rows, {"asked": asked, "seed": seed}, crew, shown)
    wanted = Request.of(seed=seed, memory=memory, fields=names, chunk_rows=chunk_rows, scratch=scratch, **request)
    job = prepare(chosen, target, wanted, crew, overwrite=overwrite, fsync=fsync)
    result = execute(job, crew, shown)
    open_objects(chosen).delete_prefix("")
    return result


def _choose(
    place: Place,
    store: Dataset,
    keys: Keys,
    names: tuple[str, ...],
    count: int,
    settings: dict[str, Any],
    crew: Executor,
    progress: Progress,
) -> None:
    """Write the virtual source that has the rows with the smallest keys, in source order."""
    objects = open_objects(place)
    objects.delete_prefix("")
    shown = present(place, [store], names, rows=count)
    step = bounds.COUNT_ROWS
    ranges = [(a, min(a + step, store.rows)) for a in range(0, store.rows, step)]
    where: Executor = crew if len(ranges) > 1 else Serial()

    def ask(query: bounds.Query) -> Iterator[NDArray[Any]]:
        for part in where.map(bounds.answer, ((keys, a, b, query) for a, b in ranges)):
            progress.advance(0, True)
            yield part

    progress.begin("choosing rows", len(ranges), 0)
    last = bounds.find(keys, np.array([count - 1]), ask)[0]
    with objects.writer(ROWS_KEY, 8 * count) as out:
        for rows in _not_above(keys, store.rows, last):
            out.write(memoryview(rows.astype("<u8").tobytes()))
    progress.end()
    virtual.write(
        place,
        "chosen",
        {**shown.settings, **settings},
        shown.arrays,
        shown.attributes,
        key_rows=(0, store.rows),
        marker={"population": store.rows, "source": settings["asked"]["source"]},
    )


def _not_above(keys: Keys, rows: int, last: U64) -> Iterator[U64]:
    """The rows whose keys are at most a given one, in source order."""
    hi, lo, row = last
    for start in range(0, rows, _SLICE):
        words = keys.hi(start, min(start + _SLICE, rows))
        found = np.flatnonzero(words <= hi).astype(np.uint64) + np.uint64(start)
        tied = found[words[found - np.uint64(start)] == hi]
        if len(tied):
            their = keys.lo_at(tied)
            above = tied[(their > lo) | ((their == lo) & (tied > row))]
            found = np.setdiff1d(found, above, assume_unique=True)
        yield found


@virtual.reader("chosen")
class Chosen:
    """Reads chosen rows of a store: neighbours together, and small gaps rather than twice."""

    def __init__(self, place: Place, settings: dict[str, Any]) -> None:
        self._rows = Concat(place, settings)
        self._objects = open_objects(place)
        self._gap = GAP_BYTES if self._objects.is_local else REMOTE_GAP_BYTES

    def numbers(self, start: int, stop: int) -> U64:
        rows = np.empty(stop - start, "<u8")
        self._objects.read([Extent(ROWS_KEY, 8 * start, [rows.data.cast("B")])])
        return rows

    def read(self, name: str, start: int, out: U8) -> None:
        rows, width = self.numbers(start, start + len(out)).astype(np.int64), out.shape[1]
        most = max(1, SPAN_BYTES // width)
        a = 0
        far = np.flatnonzero(np.diff(rows) * width > self._gap) + 1
        for end in [*far.tolist(), len(rows)]:
            while a < end:
                first = int(rows[a])
                b = min(int(np.searchsorted(rows, first + most)), end)
                if rows[b - 1] - first == b - 1 - a:
                    self._rows.read(name, first, out[a:b])
                else:
                    span = np.empty((int(rows[b - 1]) - first + 1, width), np.uint8)
                    self._rows.read(name, first, span)
                    np.take(span, rows[a:b] - first, axis=0, out=out[a:b], mode="clip")
                a = b

    def inventory(self, names: Sequence[str]) -> virtual.Behind:
        found = self._rows.inventory(names)
        parts = found.marker["parts"]
        return found if len(parts) > 1 else virtual.Behind(parts[0]["identity"], {}, found.places)


def _there(
    store: Dataset, target: str, start: int, stop: int, copy: bool, storage_options: dict[str, Any] | None
) -> bool:
    """Is this very copy finished, by a split that was stopped?  Refuses whatever else is in the way."""
    place = as_place(target, storage_options)
    marker = read_marker(objects := open_objects(place))
    if marker is not None and copy and store.shuffled:
        whole = store.root_marker or {}
        ours = {
            "rows": stop - start,
            "seed": whole["seed"],
            "source_identity": whole["source_identity"],
            "first_rank": whole.get("first_rank", 0) + store.start + start,
        }
        if {k: marker.get(k) for k in ours} == ours:
            return True
    if marker is not None or (not copy and next(iter(objects.list("")), None) is not None):
        raise DestinationExistsError(f"{target} exists already; nothing was cut")
    return False


def _part(
    store: Dataset,
    target: str,
    start: int,
    stop: int,
    copy: bool,
    crew: Executor,
    progress: Progress,
    storage_options: dict[str, Any] | None,
) -> Dataset:
    if not copy:
        return write_view(target, store, start, stop, storage_options=storage_options)
    place = as_place(target, storage_options)
    source = Place(f"{place.url.rstrip('/')}.part", place.options)
    ranged = replace(store, start=store.start + start, rows=stop - start)
    marker, asked = store.root_marker or {}, Request.of(seed=0, source_row=False)
    facts: dict[str, Any] = {"kind": "copy", "marker": {"kind": "collection"}}
    names = sorted(store.fields)
    if store.shuffled:
        facts["marker"] = {
            "source": marker["source"],
            "source_identity": marker["source_identity"],
            "population": marker.get("population", marker["rows"]),
            "first_rank": marker.get("first_rank", 0) + ranged.start,
            **({"parts": marker["parts"]} if "parts" in marker else {}),
        }
        asked = Request.of(seed=marker["seed"], key_bits=marker.get("key_bits"), source_row=False)
        if SOURCE_ROW in names:  # then the engine's own provenance, with keys checked on the way
            names.remove(SOURCE_ROW)
            facts["kind"], asked = "merge", asked.changed(source_row=True)
    reader = "merge" if facts["kind"] == "merge" else "concat"
    write_concat(source, [ranged], names, reader=reader, **facts)
    layout = layout_of(store)
    wanted = asked.changed(fields=names, **layout)
    execute(prepare(source, place, wanted, crew), crew, progress)
    open_objects(source).delete_prefix("")
    return open_dataset(target, storage_options=storage_options)


def _rows_of(name: str, share: Share, rows: int) -> float | None:
    """How many rows a share asks for, fractions included; None for the rest."""
    if share == "rest":
        return None
    if isinstance(share, (bool, str)) or not share >= 0:
        raise RequestError(f'part {name}: {share!r} is no number of rows, no fraction and not "rest"')
    if isinstance(share, int):
        return share
    if share > 1:
        raise RequestError(f"part {name}: a fraction is at most 1, got {share}; write counts as whole numbers")
    return share * rows
