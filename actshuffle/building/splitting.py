"""Parts of a store: splits and heads, as views that copy nothing, or as stores.

A row range of a shuffled store is a uniform sample of its rows, so a split by ranges is a random split.
It is a *view*: a marker that names the store and the range.  ``copy`` makes it a separate store.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np

from actshuffle.arrays.marker import read_marker
from actshuffle.arrays.names import SOURCE_ROW
from actshuffle.building.joining import layout_of, write_concat
from actshuffle.engine.request import Request
from actshuffle.engine.run import copy_through
from actshuffle.errors import DestinationExistsError, RequestError
from actshuffle.executors import Executor, Serial
from actshuffle.executors.choice import as_executor
from actshuffle.jobs.locks import Locks
from actshuffle.loading.dataset import Dataset, open_dataset, open_finished_or_plain, write_view
from actshuffle.progress import Progress, Silent
from actshuffle.storage.objects import open_objects
from actshuffle.storage.place import as_place
from actshuffle.units import switches

SHOWN_ROWS = 10_000

Share = int | float | str


def shares(rows: int, parts: Mapping[str, Share]) -> dict[str, tuple[int, int]]:
    """Row ranges, one after the other, by name.

    An int is a number of rows, a float a fraction of all rows, and "rest" (at most once) all remaining rows.
    Fractions are rounded where they end, so fractions that add up to one leave out no row.

    >>> shares(1000, {"train": 0.9, "test": 50, "spare": "rest"})
    {'train': (0, 900), 'test': (900, 950), 'spare': (950, 1000)}
    """
    if not isinstance(parts, Mapping) or not parts:
        raise RequestError("give at least one part, as a dict of sizes by name")
    if list(parts.values()).count("rest") > 1:
        raise RequestError("only one part can be the rest")
    wanted = {name: _rows_of(name, share, rows) for name, share in parts.items()}
    total = sum(w for w in wanted.values() if w is not None)
    if total > rows + 1e-9 * rows:
        raise RequestError(f"{total:,.0f} rows are asked for in total, and there are {rows:,}")
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

    Each part becomes a view, or with ``copy`` a separate store, at its path (under ``folder``).  A range of a
    store that is not shuffled is no random sample, so it is refused unless ``ordered``.
    """
    switches(copy=copy, ordered=ordered)
    store = open_dataset(path, storage_options=storage_options)
    if not store.shuffled and not ordered:
        raise RequestError(
            f"{store.path} is not shuffled, so a range of its rows is no random sample: shuffle it "
            "first, or accept its order with --ordered"
        )
    crew, shown = as_executor(Serial() if executor is None else executor), progress or Silent()
    cuts = {
        name: (name if folder is None else f"{str(folder).rstrip('/')}/{name}", *share)
        for name, share in shares(store.rows, parts).items()
    }
    with Locks() as locks:
        for target, _, _ in sorted(cuts.values(), reverse=True):  # a.b before a, which would count as its holder
            locks.take(as_place(target, storage_options))
        there = {name for name, cut in cuts.items() if _there(store, *cut, copy, storage_options)}
        return {
            name: open_dataset(cut[0], storage_options=storage_options)
            if name in there
            else _part(store, *cut, copy, crew, shown, locks, storage_options)
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
    """The first rows of each array, as text for people."""
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


def _there(
    store: Dataset, target: str, start: int, stop: int, copy: bool, storage_options: dict[str, Any] | None
) -> bool:
    """True if a stopped split finished this same copy.  Refuses anything else that is in the way."""
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
    locks: Locks,
    storage_options: dict[str, Any] | None,
) -> Dataset:
    if not copy:
        return write_view(target, store, start, stop, storage_options=storage_options)
    place = as_place(target, storage_options)
    source = place.beside(".part")
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
        if SOURCE_ROW in names:  # the engine writes it again, and checks keys on the way
            names.remove(SOURCE_ROW)
            facts["kind"], asked = "merge", asked.changed(source_row=True)
    reader = "merge" if facts["kind"] == "merge" else "concat"
    write_concat(source, [ranged], names, reader=reader, **facts)
    copy_through(source, place, asked.changed(fields=names, **layout_of(store)), crew, progress, locks)
    return open_dataset(target, storage_options=storage_options)


def _rows_of(name: str, share: Share, rows: int) -> float | None:
    """How many rows a share asks for, fractions included; None for the rest."""
    if share == "rest":
        return None
    if not isinstance(share, Real) or isinstance(share, bool) or not share >= 0:
        raise RequestError(f'part {name}: {share!r} is no number of rows, no fraction and not "rest"')
    if isinstance(share, Integral):
        return int(share)
    if share > 1:
        raise RequestError(f"part {name}: a fraction is at most 1, got {share}; write counts as whole numbers")
    return float(share) * rows
