"""Exact samples without a full shuffle: rows chosen by their keys, then shuffled.

A sample of m rows equals the first m rows of the full shuffle under the same seed, byte for byte: they
are the rows with the m smallest keys.  The m-th smallest key follows from the keys alone (bounds.py); then
a run reads and shuffles only the rows up to it::

    keys of all rows  ->  key of rank m  ->  rows up to it, in source order  ->  a run on these rows

Cost: about 25 ns for each row of the source, and the usual cost of a run for m rows.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actshuffle.arrays import readers, virtual
from actshuffle.arrays.marker import read_marker
from actshuffle.arrays.names import RUN_KEY, SOURCE_ROW
from actshuffle.arraytypes import U8, U64
from actshuffle.building.joining import Concat, part_of, present
from actshuffle.engine.prepare import check_places
from actshuffle.engine.request import Request
from actshuffle.engine.run import Result, copy_through
from actshuffle.errors import RequestError, SourceError
from actshuffle.executors import Executor, Serial
from actshuffle.jobs.work import Work
from actshuffle.loading.dataset import Dataset, open_dataset
from actshuffle.ordering import bounds
from actshuffle.ordering.keys import Keys
from actshuffle.progress import Progress
from actshuffle.progress.display import shown
from actshuffle.storage.directio import Extent
from actshuffle.storage.objects import open_objects
from actshuffle.storage.place import Place, as_place, public_url
from actshuffle.units import counted, whole

ROWS_KEY = "_actshuffle/rows"  # the chosen rows, ascending, as little-endian uint64
REMOTE_GAP_BYTES = 1 << 20
GAP_BYTES = 16 << 10  # smaller gaps between chosen rows are read through
SPAN_BYTES = 4 << 20  # bytes read at a time
_SLICE = 1 << 18  # keys made at a time


@shown
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
    progress: Progress | bool = True,
    fsync: bool = True,
    storage_options: dict[str, Any] | None = None,
    **request: Any,
) -> Result:
    """Write an exactly uniform sample of ``rows`` rows of ``src``, in exactly uniform random order.

    The sample equals the first ``rows`` rows of ``shuffle(src, seed=seed)`` byte for byte.  Other arguments are as in
    `actshuffle.shuffle`.  A stopped sample resumes when it is called again.
    """
    work = Work.of(executor, progress, overwrite=overwrite, fsync=fsync)
    wanted = Request.among(locals(), **request)
    source, target = as_place(src, storage_options), as_place(dst, storage_options)
    check_places(source, target, wanted.scratch)
    store = open_dataset(src, incomplete=True, storage_options=storage_options)
    if not 0 < whole("rows", rows) <= store.rows:
        raise RequestError(f"cannot take {rows:,} of the {counted(store.rows, 'row')} of {store.path}")
    if wanted.source_row and SOURCE_ROW in (store.fields if fields is None else fields):
        others = ",".join(sorted(set(store.fields) - {SOURCE_ROW}))
        raise RequestError(
            f"{store.path} has an array named {SOURCE_ROW!r} already (is it shuffled?), the name of the sample's "
            f"provenance: leave it out with --fields {others}"
        )
    with work.locks:
        work.locks.take(target)
        return _sample(store, rows, source, target, wanted, work)


def _sample(store: Dataset, rows: int, source: Place, target: Place, wanted: Request, work: Work) -> Result:
    seed = wanted.seed
    marker = None if work.overwrite else read_marker(open_objects(target))
    if marker is not None and seed is None:  # finished: the same again has the same seed
        seed = marker.get("seed")
    names = tuple(sorted(store.fields if wanted.fields is None else set(wanted.fields)))
    chosen = target.beside(".chosen")
    asked = {"rows": rows, "of": store.rows, "source": public_url(source.url), "names": list(names)}
    before = (virtual.describe(chosen) or {}).get("settings", {})
    if before.get("asked") == asked and seed in (None, before["seed"]) and not work.overwrite:
        seed = int(before["seed"])  # the same again, which resumes
    else:
        seed = secrets.randbits(63) if seed is None else seed
        keys = Keys(seed, *wanted.key_bits)
        _choose(chosen, store, keys, names, rows, {"asked": asked, "seed": seed}, work)
    wanted = wanted.changed(seed=seed, fields=names)
    try:
        return copy_through(chosen, target, wanted, work)
    except (RequestError, SourceError):
        if open_objects(target).size(RUN_KEY) is None:  # else the same sample again resumes
            open_objects(chosen).delete_prefix("")
        raise


def _choose(
    place: Place, store: Dataset, keys: Keys, names: tuple[str, ...], count: int, settings: dict[str, Any], work: Work
) -> None:
    """Write a virtual source of the rows with the smallest keys, in source order."""
    objects = open_objects(place)
    objects.delete_prefix("")
    shown = present(place, [store], names, rows=count)
    step = bounds.COUNT_ROWS
    ranges = [(a, min(a + step, store.rows)) for a in range(0, store.rows, step)]
    where: Executor = work.crew if len(ranges) > 1 else Serial()

    def ask(query: bounds.Query) -> Iterator[NDArray[Any]]:
        for part in where.map(bounds.answer, ((keys, a, b, query) for a, b in ranges)):
            work.progress.advance(0, True)
            yield part

    work.progress.begin("choosing rows", len(ranges), 0)
    last = bounds.find(keys, np.array([count - 1]), ask)[0]
    with objects.writer(ROWS_KEY, 8 * count) as out:
        for rows in _not_above(keys, store.rows, last):
            out.write(memoryview(rows.astype("<u8").tobytes()))
    work.progress.end()
    settings = {**shown.settings, **settings}
    marker = {"population": store.rows, "source": settings["asked"]["source"]}
    facts: dict[str, Any] = {"key_rows": (0, store.rows), "marker": marker}
    virtual.write(place, "chosen", settings, shown.arrays, shown.attributes, **facts)


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


@readers.reader("chosen")
class Chosen:
    """Reads chosen rows of a store; neighbours come in one read, together with small gaps between them."""

    def __init__(self, place: Place, settings: dict[str, Any]) -> None:
        self._rows = Concat(place, settings)
        self._objects = open_objects(place)
        self._gap = GAP_BYTES if self._objects.is_local else REMOTE_GAP_BYTES

    def chosen(self, start: int, stop: int) -> U64:
        """The rows of the store that are rows ``[start, stop)`` here."""
        rows = np.empty(stop - start, "<u8")
        self._objects.read([Extent(ROWS_KEY, 8 * start, [rows.data.cast("B")])])
        return rows

    def numbers(self, start: int, stop: int) -> U64:
        return self.chosen(start, stop)

    def read(self, name: str, start: int, out: U8) -> None:
        rows, width = self.chosen(start, start + len(out)).astype(np.int64), out.shape[1]
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

    def inventory(self, names: Sequence[str]) -> readers.Backing:
        found = self._rows.inventory(names)
        parts = found.marker["parts"]
        return found if len(parts) > 1 else readers.Backing(parts[0]["identity"], {}, found.places)


@readers.reader("part of a shuffle")
class PartOfShuffle(Chosen):
    """Reads chosen rows of a shuffled store, which keep the numbers of their source."""

    def __init__(self, place: Place, settings: dict[str, Any]) -> None:
        super().__init__(place, settings)
        (entry,) = settings["parts"]
        self._shuffled = part_of(place, entry)

    def numbers(self, start: int, stop: int) -> U64:
        rows, pieces, at = self.chosen(start, stop).astype(np.int64), list[U64](), 0
        while at < len(rows):
            end = int(np.searchsorted(rows, rows[at] + _SLICE))
            span = self._shuffled.read(SOURCE_ROW, int(rows[at]), int(rows[end - 1]) + 1)
            pieces.append(span[rows[at:end] - rows[at]])
            at = end
        return np.concatenate(pieces)
