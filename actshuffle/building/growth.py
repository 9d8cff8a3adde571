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

import ctypes
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from actshuffle.arrays import readers, virtual
from actshuffle.arrays.codecs import name_of
from actshuffle.arrays.guard import described
from actshuffle.arrays.marker import read_marker
from actshuffle.arrays.metadata import source_arrays
from actshuffle.arrays.names import SOURCE_ROW
from actshuffle.arraytypes import U8, U64
from actshuffle.building.joining import Concat, combined, write_concat
from actshuffle.engine.prepare import check_places
from actshuffle.engine.request import Request
from actshuffle.engine.run import Result, copy_through
from actshuffle.errors import RequestError, ResumeMismatchError
from actshuffle.executors import Executor, Serial
from actshuffle.executors.choice import as_executor
from actshuffle.loading.dataset import Dataset, open_dataset
from actshuffle.loading.ranks import Ranks, first_where
from actshuffle.loading.views import followed
from actshuffle.ordering.digest import from_hex, to_hex
from actshuffle.progress import Progress, Silent
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
            return f"{self.destination}: the {counted(self.added, 'row')} had been appended; {self.rows:,} in all"
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
    replaces a store at ``out``.

    Raises
    ------
    RequestError : ``dst`` is no whole shuffle with its ``source_row``, or has these rows already.
    SourceError : ``new`` has other arrays than ``dst``.
    """
    switches(overwrite=overwrite, fsync=fsync)
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
    store = whole(open_dataset(dst, storage_options=storage_options))
    fresh = open_dataset(new, incomplete=True, storage_options=storage_options)
    has, added = _rows_from(place), (fresh.path, fresh.rows)
    if out is None and len(has) > 1 and has == [*_rows_from(grown), added]:
        open_objects(grown).delete_prefix("")  # the last step of an earlier run
        return Appended(store.path, store.rows, fresh.rows, store.nbytes, 0.0, done_before=True)
    if not again and any(source == fresh.path for source, _ in has):
        raise RequestError(f"{fresh.path} is in {store.path} already; give --again to add it once more")
    check_places(fresh.root, target, None)
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
    if out is not None or overwrite or _rows_from(target) != [*has, added]:  # else only the exchange is left to do
        copy = partial(copy_through, executor=crew, progress=shown, fsync=fsync)
        ordered = _sort_new(store, fresh, target, asked, copy)
        _merge(store, ordered, target, asked, partial(copy, overwrite=overwrite))
        for leftover in (target.beside(".new"), ordered.place):
            open_objects(leftover).delete_prefix("")
    if out is None:
        exchange(target, place)
        open_objects(target).delete_prefix("")
    done = open_dataset(dst if out is None else out, storage_options=storage_options)
    return Appended(done.path, done.rows, fresh.rows, done.nbytes, time.perf_counter() - started)


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


def _parts(store: Dataset) -> list[dict[str, Any]]:
    """The sources that a shuffled store's rows came from, in the order of their numbers."""
    assert store.marker is not None
    alone = {"source": store.marker["source"], "rows": store.rows, "identity": store.marker["source_identity"]}
    return list(store.marker.get("parts", [alone]))


def _sort_new(store: Dataset, fresh: Dataset, target: Place, asked: Request, copy: Callable[..., Result]) -> Dataset:
    """The new rows in the order of their keys, as a store."""
    first, stop = store.rows, store.rows + fresh.rows
    base, place = target.beside(".new"), target.beside(".new-sorted")
    if asked.scratch is not None and "://" not in asked.scratch:
        place = Place(str(Path(asked.scratch).absolute() / place.url.rsplit("/", 1)[-1]))
    write_concat(base, [fresh], asked.fields, first_row=first, key_rows=(first, stop), marker={"first_row": first})
    found, marker = virtual.inventory(base, asked.fields or ()), read_marker(open_objects(place))
    if marker is None or found is None or not _is_sorted(marker, asked.seed, first, found[0]):
        wanted = asked.changed(chunk_rows=None)
        try:
            copy(base, place, wanted, overwrite=marker is not None, keep=True)
        except ResumeMismatchError:  # an append of something else left this behind
            copy(base, place, wanted, overwrite=True, keep=True)
    return open_dataset(place.url, storage_options=json.loads(place.options))


def _is_sorted(marker: dict[str, Any], seed: int | None, first_row: int, identity: str) -> bool:
    """True if an earlier run sorted these same rows, and left this marker."""
    there = marker["seed"], marker.get("first_row"), marker["source_identity"]
    return there == (seed, first_row, identity)


def _merge(store: Dataset, ordered: Dataset, target: Place, asked: Request, copy: Callable[..., Result]) -> None:
    """Write the old store and the new rows, both in the order of their keys, as one to ``target``."""
    assert store.marker is not None
    assert ordered.marker is not None
    parts = [*_parts(store), *_parts(ordered)]
    both = [store.marker["fields"], ordered.marker["fields"]]
    sums = {k: to_hex(from_hex(both[0][k]["sum"]) + from_hex(both[1][k]["sum"])) for k in both[0]}
    source = target.beside(".merge")
    write_concat(
        source,
        [store, ordered],
        asked.fields,
        reader="merge",
        kind="merge",
        sums=sums,
        marker={
            "source": parts[0]["source"],
            "parts": parts,
            "source_identity": combined([part["identity"] for part in parts]),
        },
    )
    copy(source, target, asked.filled(**layout_of(store)))


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


def _rows_from(place: Place) -> list[tuple[str, int]]:
    """The sources of a finished shuffle's rows, and how many of each; empty if there is none."""
    marker = read_marker(open_objects(place))
    if marker is None or marker["kind"] != "shuffle":
        return []
    parts = marker.get("parts", [{"source": marker["source"], "rows": marker["rows"]}])
    return [(part["source"], part["rows"]) for part in parts]


def exchange(grown: Place, old: Place) -> None:
    """Exchange the names of two local folders, in one step where the system can (Linux: renameat2)."""
    first, second = local_path(grown), local_path(old)
    assert first is not None
    assert second is not None
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "renameat2"):
        here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
        if libc.renameat2(here, os.fsencode(first), here, os.fsencode(second), swap) == 0:
            return
    aside = second.with_name(f"{second.name}.before")  # in three steps where it cannot
    second.rename(aside)
    first.rename(second)
    aside.rename(first)
