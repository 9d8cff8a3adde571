"""Grow a shuffled store: the result equals a shuffle of old and new rows from scratch.

Keys depend on row numbers alone, so old rows keep their keys and thus their order.  New rows are numbered
on from the old ones and fall in between.  Only the new rows are shuffled; then the two sorted stores are
merged, one output leaf at a time::

    old, sorted      |--------a1--------|------a2------|---
    new, sorted      |--b1--|----b2----|---
    output leaves    |  leaf 1: a1 + b1      |  leaf 2: a2 + b2      | ...

A look at a few keys finds where a leaf's share of each input begins (the "merge path" of Odeh, Green,
Mwassi, Shmueli, Birk, 2012), so leaves are independent tasks.  The old data is read once and written once.

The grown store is written beside the old one, which stays unchanged until the last step exchanges the
names of the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from actshuffle.arrays import readers, virtual
from actshuffle.arrays.marker import read_marker
from actshuffle.arrays.names import SOURCE_ROW
from actshuffle.arraytypes import U8, U64
from actshuffle.building import joining
from actshuffle.engine.prepare import check_places
from actshuffle.engine.request import Request
from actshuffle.engine.run import copy_through
from actshuffle.errors import DestinationExistsError, RequestError, ResumeMismatchError
from actshuffle.executors import Executor
from actshuffle.html import page
from actshuffle.jobs.work import Work
from actshuffle.loading.dataset import Dataset, open_dataset, open_place
from actshuffle.loading.documents import shifts_of
from actshuffle.loading.ranks import Ranks, first_where
from actshuffle.loading.views import identity_of
from actshuffle.ordering.digest import from_hex, to_hex
from actshuffle.progress import Progress
from actshuffle.progress.display import shown
from actshuffle.storage.objects import open_objects
from actshuffle.storage.place import Place, as_place, local_path
from actshuffle.storage.syscalls import exchange
from actshuffle.units import counted, format_bytes, format_seconds, switches

Parts = list[dict[str, Any]]  # the sources of a store, as its marker records them


@dataclass(frozen=True)
class Appended:
    """The outcome of an append.  ``done_before``: an earlier run had appended these rows already."""

    destination: str
    rows: int
    added: int
    nbytes: int
    seconds: float
    done_before: bool = False

    def __str__(self) -> str:
        if self.done_before:
            size = f"{counted(self.added, 'row')} appended before, {self.rows:,} in all"
            return f"{self.destination}: already finished, {size}"
        return (
            f"{self.destination}: {counted(self.added, 'row')} appended, {self.rows:,} in all, "
            f"{format_bytes(self.nbytes)}, {format_seconds(self.seconds)}"
        )

    def _repr_html_(self) -> str:
        facts = {"store": self.destination, "rows": f"{self.rows:,}", "appended": f"{self.added:,}"}
        facts["time"] = "already finished" if self.done_before else format_seconds(self.seconds)
        return page("Appended", facts | {"bytes": format_bytes(self.nbytes)})


@shown
def append(
    dst: str | Path,
    new: str | Path,
    out: str | Path | None = None,
    *,
    memory: str | int | None = None,
    chunk_rows: int | None = None,
    scratch: str | Path | None = None,
    again: bool = False,
    renumber: bool = True,
    overwrite: bool = False,
    executor: Executor | None = None,
    progress: Progress | bool = True,
    fsync: bool = True,
    storage_options: dict[str, Any] | None = None,
    **request: Any,
) -> Appended:
    """Add the rows of ``new`` to the shuffled store ``dst``, or write old and new together to ``out``.

    The result equals ``shuffle(concat([old source, new]), seed=the old seed)`` byte for byte.  Memory, disk and
    chunks are as in `actshuffle.shuffle`; by default chunks are those of ``dst``.  A stopped append resumes when
    it is called again.  ``again`` allows rows that are in ``dst`` already; ``overwrite`` starts over, and
    replaces a store at ``out``.  ``renumber`` is as in `actshuffle.concat`: new documents are numbered on from the old.

    Raises
    ------
    RequestError : ``dst`` is no whole shuffle with its ``source_row``, or was made of ``new``.  (Rows that were
        appended before, and have not changed since, are no error: nothing is left to do.)
    DestinationInUseError : another process is writing the destination.
    SourceError : ``new`` has other arrays than ``dst``.
    """
    switches(again=again, renumber=renumber)
    work = Work.of(executor, progress, overwrite=overwrite, fsync=fsync)
    place = as_place(dst, storage_options)
    grown = place.beside(".grown")
    target = grown if out is None else as_place(out, storage_options)
    if out is None and local_path(place) is None:
        raise RequestError(
            f"{place} cannot be replaced in one step, since it is not on a local disk: give another place"
        )
    fresh = open_dataset(new, incomplete=True, storage_options=storage_options)
    check_places(fresh.root, target, None)
    if out is not None:
        check_places(place, target, None)
    with work.locks:
        work.locks.take(place if out is None else target)
        store = whole(open_dataset(dst, storage_options=storage_options))
        assert store.marker is not None
        before = {"seed": store.marker["seed"], "key_bits": store.marker.get("key_bits")}
        asked = Request.among(locals(), fields=sorted(store.marker["fields"]), **before, **request)
        joining.check_alike([store, fresh], asked.fields)
        has = _sources(parts_of(store.marker))
        added = _sources(joining.sources_of(fresh.root, asked.fields or (), fresh.start, fresh.rows)[0])
        if done := _done_before(place, target, has, added, asked, again=again, overwrite=overwrite):
            return Appended(done.path, done.rows, fresh.rows, done.nbytes, 0.0, done_before=True)
        if not again and (there := {part["source"] for part in has} & {part["source"] for part in added}):
            raise RequestError(_there_already(store, min(there), has, added))
        if out is not None or overwrite or _parts_at(target) != [*has, *added]:  # else only the exchange is left to do
            shift = shifts_of([store, fresh], asked.fields or ())[1] if renumber else {}
            if not overwrite and joining.begun_as_stored(target.beside(".new"), fresh):
                shift = {}  # an earlier version has begun it
            helpers = target.beside(".new"), _sorted_at(target, asked), target.beside(".merge")
            with joining.leaving_nothing(target, *helpers):
                ordered = _sort_new(store, fresh, target, asked, work, shift)
                _merge(store, ordered, target, asked, work, bool(shift))
            for leftover in helpers[:2]:
                open_objects(leftover).delete_prefix("")
        if out is None:
            exchange(target, place)
            open_objects(target).delete_prefix("")
        grown_store = open_dataset(dst if out is None else out, storage_options=storage_options)
    return Appended(grown_store.path, grown_store.rows, fresh.rows, grown_store.nbytes, work.seconds)


def _done_before(
    place: Place, target: Place, has: Parts, added: Parts, asked: Request, *, again: bool, overwrite: bool
) -> Dataset | None:
    """The store to which an earlier run has added these rows, or None.  Refuses a target with anything else."""
    if target != place.beside(".grown"):
        there = _parts_at(target)
        if overwrite or read_marker(open_objects(target)) is None:
            return None
        store = open_place(target)
        if there != [*has, *added] or _laid_out_otherwise(store, asked):
            raise DestinationExistsError(
                f"{target} is finished with other rows or other chunks; choose another path, or --overwrite replaces it"
            )
        return store
    last_step = len(has) > len(added) and has == [*_parts_at(target), *added]  # was the exchange of an earlier run
    starts = range(1, len(has) - len(added) + 1) if not again else ()
    if not last_step and not any(has[start : start + len(added)] == added for start in starts):
        return None
    store = open_place(place)
    if changed := _laid_out_otherwise(store, asked):
        raise RequestError(
            f"{place} holds these rows already, with other {changed}; give --again to add them once more"
        )
    if last_step:
        open_objects(target).delete_prefix("")
    return store


def _laid_out_otherwise(store: Dataset, asked: Request) -> str:
    """The names of the settings that were given and that a finished store does not have: "chunk_rows", or none."""
    layout = joining.layout_of(store)
    return " and ".join(name for name in sorted(layout) if name in asked.given and getattr(asked, name) != layout[name])


def _there_already(store: Dataset, source: str, has: Parts, added: Parts) -> str:
    changed = [part for part in added if part["source"] == source and part not in has]
    since = ", and has changed since (or other rows of it were taken)" if changed else ""
    return f"{source} is in {store.path} already{since}; give --again to add it once more"


def whole(store: Dataset) -> Dataset:
    """The store, if it is all of a shuffle and knows where its rows came from."""
    marker = store.marker
    if marker is None or store.kind != "shuffle" or marker.get("population", store.rows) != store.rows:
        raise RequestError(
            f"{store.path} is not the whole of a shuffle (it is a {store.kind}); rows can be appended to "
            "the output of run or of append"
        )
    if not marker["source_row"]:
        raise RequestError(f"{store.path} was written without source_row, which tells its keys")
    return store


def parts_of(marker: dict[str, Any]) -> Parts:
    """The sources that a shuffled store's rows came from, in the order of their numbers, with their identities."""
    alone = {"source": marker["source"], "rows": marker["rows"], "identity": marker["source_identity"]}
    return list(marker.get("parts", [alone]))


def _sources(parts: Parts) -> Parts:
    """The identity of a source, without the numbers of its documents, which depend on the sources before it."""
    return [{name: part[name] for name in ("source", "rows", "identity")} for part in parts]


def _sort_new(
    store: Dataset, fresh: Dataset, target: Place, asked: Request, work: Work, shift: dict[str, int]
) -> Dataset:
    """The new rows in the order of their keys, as a store."""
    first, stop = store.rows, store.rows + fresh.rows
    base, place = target.beside(".new"), _sorted_at(target, asked)
    if place != target.beside(".new-sorted"):
        work.locks.take(place)  # others may have a destination of this name elsewhere
    facts: dict[str, Any] = {"key_rows": (first, stop), "marker": {"first_row": first}}
    joining.write_concat(base, [fresh], asked.fields, first_row=first, shifts=[shift] if shift else None, **facts)
    found, marker = virtual.inventory(base, asked.fields or ()), read_marker(open_objects(place))
    there = marker and (marker["seed"], marker.get("first_row"), marker["source_identity"])
    if found is None or there != (asked.seed, first, found[0]):  # else an earlier run has sorted these same rows
        wanted = asked.changed(chunk_rows=None)
        try:
            copy_through(base, place, wanted, replace(work, overwrite=marker is not None), keep=True)
        except ResumeMismatchError:  # an append of something else left this behind
            copy_through(base, place, wanted, replace(work, overwrite=True), keep=True)
    return open_place(place)


def _sorted_at(target: Place, asked: Request) -> Place:
    """The place in which an append sorts the new rows."""
    place = target.beside(".new-sorted")
    if asked.scratch is None or "://" in asked.scratch:
        return place
    return Place(str(Path(asked.scratch).absolute() / place.url.rsplit("/", 1)[-1]))


def _merge(store: Dataset, ordered: Dataset, target: Place, asked: Request, work: Work, renumbered: bool) -> None:
    """Write the old store and the new rows, both in the order of their keys, as one to ``target``."""
    assert store.marker is not None
    assert ordered.marker is not None
    parts = [*parts_of(store.marker), *parts_of(ordered.marker)]
    grown = {"source": parts[0]["source"], "parts": parts, "source_identity": identity_of(parts)}
    both = [store.marker["fields"], ordered.marker["fields"]]
    sums = {k: to_hex(from_hex(both[0][k]["sum"]) + from_hex(both[1][k]["sum"])) for k in both[0]}
    source = target.beside(".merge")
    shifts: list[dict[str, int]] | None = [{}, {}] if renumbered else None  # lists documents, already moved
    facts: dict[str, Any] = {"kind": "merge", "sums": sums, "marker": grown}
    joining.write_concat(source, [store, ordered], asked.fields, reader="merge", shifts=shifts, **facts)
    copy_through(source, target, asked.filled(**joining.layout_of(store)), work)


@readers.reader("merge")
class Merge:
    """Reads sorted stores as one sorted store, range by range; inside a range, rows come input by input."""

    def __init__(self, place: Place, settings: dict[str, Any]) -> None:
        self._rows = joining.Concat(place, settings)
        self._inputs = [Ranks(joining.part_of(place, entry)) for entry in settings["parts"]]
        self._cut = lru_cache(maxsize=64)(self._found)

    def numbers(self, start: int, stop: int) -> U64:
        ranges = zip(self._inputs, self._cut(start), self._cut(stop), strict=True)
        return np.concatenate([ranks.data.read(SOURCE_ROW, a, b) for ranks, a, b in ranges])

    def read(self, name: str, start: int, out: U8) -> None:
        at = first = 0
        for ranks, a, b in zip(self._inputs, self._cut(start), self._cut(start + len(out)), strict=True):
            self._rows.read(name, first + a, out[at : at + b - a])
            at, first = at + b - a, first + ranks.data.rows

    def inventory(self, names: Sequence[str]) -> readers.Backing:
        return self._rows.inventory(names)

    def _found(self, rank: int) -> tuple[int, ...]:
        """How many of the first ``rank`` rows of the result come from each input (one, or two)."""
        if len(self._inputs) == 1:
            return (rank,)
        old, new = self._inputs
        least, most = max(0, rank - new.data.rows), min(rank, old.data.rows)
        count = first_where(least, most, lambda i: old.key(i) > new.key(rank - i - 1))
        return count, rank - count


def _parts_at(place: Place) -> Parts:
    """The sources of a finished shuffle's rows; empty if there is none at the place."""
    marker = read_marker(open_objects(place))
    return [] if marker is None or marker["kind"] != "shuffle" else _sources(parts_of(marker))
