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

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from actshuffle.arrays import readers, virtual
from actshuffle.arrays.marker import read_marker
from actshuffle.arrays.names import SOURCE_ROW
from actshuffle.arraytypes import U8, U64
from actshuffle.building.joining import (
    Concat,
    begun_as_stored,
    check_alike,
    layout_of,
    leaving_nothing,
    sources_of,
    write_concat,
)
from actshuffle.engine.prepare import check_places
from actshuffle.engine.request import Request
from actshuffle.engine.run import Result, copy_through
from actshuffle.errors import DestinationExistsError, RequestError, ResumeMismatchError
from actshuffle.executors import Executor, Serial
from actshuffle.executors.choice import as_executor
from actshuffle.jobs.locks import Locks
from actshuffle.loading.dataset import Dataset, open_dataset
from actshuffle.loading.documents import shifts_of
from actshuffle.loading.ranks import Ranks, first_where
from actshuffle.loading.views import followed, identity_of
from actshuffle.ordering.digest import from_hex, to_hex
from actshuffle.progress import Progress, Silent
from actshuffle.storage.exchange import exchange
from actshuffle.storage.objects import open_objects
from actshuffle.storage.place import Place, as_place, local_path
from actshuffle.units import counted, format_bytes, format_seconds, switches


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
    progress: Progress | None = None,
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
    switches(again=again, renumber=renumber, overwrite=overwrite, fsync=fsync)
    started, crew, shown = (
        time.perf_counter(),
        as_executor(Serial() if executor is None else executor),
        progress or Silent(),
    )
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
    with Locks() as locks:
        locks.take(place if out is None else target)
        store = whole(open_dataset(dst, storage_options=storage_options))
        assert store.marker is not None
        asked = Request.of(
            seed=store.marker["seed"],
            memory=memory,
            fields=sorted(store.marker["fields"]),
            chunk_rows=chunk_rows,
            scratch=scratch,
            key_bits=store.marker.get("key_bits"),
            **request,
        )
        check_alike([store, fresh], asked.fields)
        has = _sources(parts_of(store))
        added = _sources(sources_of(fresh.root, asked.fields or (), fresh.start, fresh.rows)[0])
        if done := _done_before(place, target, has, added, asked, again=again, overwrite=overwrite):
            return Appended(done.path, done.rows, fresh.rows, done.nbytes, 0.0, done_before=True)
        if not again and (there := {part["source"] for part in has} & {part["source"] for part in added}):
            raise RequestError(_there_already(store, min(there), has, added))
        if out is not None or overwrite or _parts_at(target) != [*has, *added]:  # else only the exchange is left to do
            copy = partial(copy_through, executor=crew, progress=shown, locks=locks, fsync=fsync)
            shift = shifts_of([store, fresh], asked.fields or ())[1] if renumber else {}
            if not overwrite and begun_as_stored(target.beside(".new"), fresh):
                shift = {}  # an earlier version has begun it
            helpers = target.beside(".new"), _sorted_at(target, asked), target.beside(".merge")
            with leaving_nothing(target, *helpers):
                ordered = _sort_new(store, fresh, target, asked, locks, copy, shift)
                _merge(store, ordered, target, asked, partial(copy, overwrite=overwrite), bool(shift))
            for leftover in helpers[:2]:
                open_objects(leftover).delete_prefix("")
        if out is None:
            exchange(target, place)
            open_objects(target).delete_prefix("")
        grown_store = open_dataset(dst if out is None else out, storage_options=storage_options)
    return Appended(grown_store.path, grown_store.rows, fresh.rows, grown_store.nbytes, time.perf_counter() - started)


def _done_before(
    place: Place,
    target: Place,
    has: list[dict[str, Any]],
    added: list[dict[str, Any]],
    asked: Request,
    *,
    again: bool,
    overwrite: bool,
) -> Dataset | None:
    """The store to which an earlier run has added these rows, or None.  Refuses a target with anything else."""
    if target != place.beside(".grown"):
        there = _parts_at(target)
        if overwrite or read_marker(open_objects(target)) is None:
            return None
        store = open_dataset(target.url, storage_options=json.loads(target.options))
        if there != [*has, *added] or _laid_out_otherwise(store, asked):
            raise DestinationExistsError(
                f"{target} is finished with other rows or other chunks; choose another path, or --overwrite replaces it"
            )
        return store
    last_step = len(has) > len(added) and has == [*_parts_at(target), *added]  # was the exchange of an earlier run
    starts = range(1, len(has) - len(added) + 1) if not again else ()
    if not last_step and not any(has[start : start + len(added)] == added for start in starts):
        return None
    store = open_dataset(place.url, storage_options=json.loads(place.options))
    if changed := _laid_out_otherwise(store, asked):
        raise RequestError(
            f"{place} holds these rows already, with other {changed}; give --again to add them once more"
        )
    if last_step:
        open_objects(target).delete_prefix("")
    return store


def _laid_out_otherwise(store: Dataset, asked: Request) -> str:
    """The names of the settings that were given and that a finished store does not have: "chunk_rows", or none."""
    layout = layout_of(store)
    return " and ".join(name for name in sorted(layout) if name in asked.given and getattr(asked, name) != layout[name])


def _there_already(store: Dataset, source: str, has: list[dict[str, Any]], added: list[dict[str, Any]]) -> str:
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


def parts_of(store: Dataset) -> list[dict[str, Any]]:
    """The sources that a shuffled store's rows came from, in the order of their numbers, with their identities."""
    assert store.marker is not None
    return _parts(store.marker)


def _parts(marker: dict[str, Any]) -> list[dict[str, Any]]:
    alone = {"source": marker["source"], "rows": marker["rows"], "identity": marker["source_identity"]}
    return list(marker.get("parts", [alone]))


def _sources(parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The identity of a source, without the numbers of its documents, which depend on the sources before it."""
    return [{name: part[name] for name in ("source", "rows", "identity")} for part in parts]


def _sort_new(
    store: Dataset,
    fresh: Dataset,
    target: Place,
    asked: Request,
    locks: Locks,
    copy: Callable[..., Result],
    shift: dict[str, int],
) -> Dataset:
    """The new rows in the order of their keys, as a store."""
    first, stop = store.rows, store.rows + fresh.rows
    base, place = target.beside(".new"), _sorted_at(target, asked)
    if place != target.beside(".new-sorted"):
        locks.take(place)  # others may have a destination of this name elsewhere
    facts: dict[str, Any] = {"key_rows": (first, stop), "marker": {"first_row": first}}
    write_concat(base, [fresh], asked.fields, first_row=first, shifts=[shift] if shift else None, **facts)
    found, marker = virtual.inventory(base, asked.fields or ()), read_marker(open_objects(place))
    if marker is None or found is None or not _is_sorted(marker, asked.seed, first, found[0]):
        wanted = asked.changed(chunk_rows=None)
        try:
            copy(base, place, wanted, overwrite=marker is not None, keep=True)
        except ResumeMismatchError:  # an append of something else left this behind
            copy(base, place, wanted, overwrite=True, keep=True)
    return open_dataset(place.url, storage_options=json.loads(place.options))


def _sorted_at(target: Place, asked: Request) -> Place:
    """The place in which an append sorts the new rows."""
    place = target.beside(".new-sorted")
    if asked.scratch is None or "://" in asked.scratch:
        return place
    return Place(str(Path(asked.scratch).absolute() / place.url.rsplit("/", 1)[-1]))


def _is_sorted(marker: dict[str, Any], seed: int | None, first_row: int, identity: str) -> bool:
    """True if an earlier run sorted these same rows, and left this marker."""
    there = marker["seed"], marker.get("first_row"), marker["source_identity"]
    return there == (seed, first_row, identity)


def _merge(
    store: Dataset, ordered: Dataset, target: Place, asked: Request, copy: Callable[..., Result], renumbered: bool
) -> None:
    """Write the old store and the new rows, both in the order of their keys, as one to ``target``."""
    assert store.marker is not None
    assert ordered.marker is not None
    parts = [*parts_of(store), *parts_of(ordered)]
    grown = {"source": parts[0]["source"], "grown": store.rows, "parts": parts, "source_identity": identity_of(parts)}
    both = [store.marker["fields"], ordered.marker["fields"]]
    sums = {k: to_hex(from_hex(both[0][k]["sum"]) + from_hex(both[1][k]["sum"])) for k in both[0]}
    source = target.beside(".merge")
    write_concat(
        source,
        [store, ordered],
        asked.fields,
        reader="merge",
        shifts=[{}, {}] if renumbered else None,  # to list the documents of both; numbers have moved already
        kind="merge",
        sums=sums,
        marker=grown,
    )
    copy(source, target, asked.filled(**layout_of(store)))


@readers.reader("merge")
class Merge:
    """Reads sorted stores as one sorted store, range by range; inside a range, rows come input by input."""

    def __init__(self, place: Place, settings: dict[str, Any]) -> None:
        self._rows = Concat(place, settings)
        self._inputs: list[Ranks] = []
        for entry in settings["parts"]:
            found = followed(place, entry["store"])
            data = open_dataset(found.url, storage_options=json.loads(found.options))
            start, stop = int(entry["start"]), int(entry["stop"])
            self._inputs.append(Ranks(replace(data, start=data.start + start, rows=stop - start)))
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


def _parts_at(place: Place) -> list[dict[str, Any]]:
    """The sources of a finished shuffle's rows; empty if there is none at the place."""
    marker = read_marker(open_objects(place))
    return [] if marker is None or marker["kind"] != "shuffle" else _sources(_parts(marker))
