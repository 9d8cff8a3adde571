"""Parts of a store: splits and heads, as views that copy nothing, or as stores.

A row range of a shuffled store is a uniform sample of its rows, so a split by ranges is a random split.
It is a *view*: a marker that names the store and the range.  ``copy`` makes it a separate store.

A range holds other rows once the store has grown.  A split *by a rule* (`actshuffle.ordering.lots`) keeps its rows: the
lot of a document or of a source row decides its part, whatever comes later::

    collection    part = a folder that names its rows, which `run` reads; with ``copy`` a collection
    shuffled      part = a shuffled store of its own (``copy``), whose rows keep their keys and so their order
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actshuffle.arrays import virtual
from actshuffle.arrays.inventory import take_inventory
from actshuffle.arrays.marker import read_marker
from actshuffle.arrays.metadata import source_arrays
from actshuffle.arrays.names import SOURCE_ROW
from actshuffle.arraytypes import U64
from actshuffle.building.joining import layout_of, present, write_concat
from actshuffle.building.sampling import ROWS_KEY
from actshuffle.engine.request import Request
from actshuffle.engine.run import copy_through
from actshuffle.errors import DestinationExistsError, RequestError
from actshuffle.executors import Executor
from actshuffle.jobs.work import Work
from actshuffle.loading.dataset import Dataset, open_dataset, open_finished_or_plain, write_view
from actshuffle.loading.documents import DOCUMENT
from actshuffle.ordering.lots import RULE, Share, edges, in_share, lots, shares
from actshuffle.progress import Progress
from actshuffle.progress.display import shown
from actshuffle.seals import seal
from actshuffle.storage.objects import open_objects
from actshuffle.storage.place import Place, as_place, public_url
from actshuffle.units import counted, switches, whole

STEP_ROWS = 1 << 20  # rows whose lots are drawn at a time
BY = ("document", "row")


@shown
def split(
    path: str | Path,
    parts: Mapping[str, Share],
    *,
    by: str | None = None,
    seed: int = 0,
    folder: str | Path | None = None,
    copy: bool = False,
    ordered: bool = False,
    executor: Executor | None = None,
    progress: Progress | bool = True,
    storage_options: dict[str, Any] | None = None,
) -> dict[str, Dataset]:
    """Cut a shuffled store into contiguous ranges; ``parts`` maps paths to shares (see `shares`).

    Each part becomes a view, or with ``copy`` a separate store, at its path (under ``folder``).  A range of a
    store that is not shuffled is no random sample, so it is refused unless ``ordered``.

    ``by="document"`` or ``"row"`` cuts any store by a rule instead: the number of a document, or of a row in the
    source, and ``seed`` decide the part, so an appended store splits as before, and parts of one split share no
    document (or row).  Shares are fractions and "rest".  A part of a collection is a folder that names rows, for
    `shuffle`; that of a shuffled store is shuffled, and needs ``copy``.
    """
    switches(copy=copy, ordered=ordered)
    work = Work.of(executor, progress)
    if by is not None:
        if ordered and by in BY:
            raise RequestError("--ordered is for ranges of rows; a split by a rule takes stores of any order")
        return _split_by(path, parts, by, whole("seed", seed), folder, copy, work, storage_options)
    if seed:
        raise RequestError("a seed belongs to a split by a rule: give --by document or --by row too")
    store = open_dataset(path, storage_options=storage_options)
    if not store.shuffled and not ordered:
        raise RequestError(
            f"{store.path} is not shuffled, so a range of its rows is no random sample: shuffle it "
            "first, or accept its order with --ordered"
        )
    cuts = {name: (_under(folder, name), *share) for name, share in shares(store.rows, parts).items()}
    for name, (_, start, stop) in cuts.items():
        if start == stop and parts[name] != 0:
            raise RequestError(
                f"part {name}: {parts[name]} of the {counted(store.rows, 'row')} of {store.path} is no row: leave that "
                "part out, or give it a larger share or a number of rows"
            )
    with work.locks:
        for target, _, _ in sorted(cuts.values(), reverse=True):  # a.b before a, which would count as its holder
            work.locks.take(as_place(target, storage_options))
        there = {name for name, cut in cuts.items() if _there(store, *cut, copy, storage_options)}
        return {
            name: open_dataset(cut[0], storage_options=storage_options)
            if name in there
            else _part(store, *cut, copy, work, storage_options)
            for name, cut in cuts.items()
        }


def note_on_ranges(parts: Mapping[str, Dataset]) -> str:
    """A sentence if these are ranges of a grown store, where rows move from part to part; else an empty text."""
    for part in parts.values():
        marker = part.root_marker or {}
        sources = marker.get("parts", [])
        # A grown store names its first source, the shuffle of a concatenation names the concatenation.
        if len(sources) > 1 and marker["source"] == sources[0]["source"] and "split" not in marker:
            return (
                f"an append has made {counted(marker['rows'], 'row')} of {len(sources)} sources, so ranges of the "
                "store hold other rows than before it: rows that an earlier split held out can be in a training part "
                "now. Parts --by document or --by row keep their rows"
            )
    return ""


@shown
def head(
    path: str | Path,
    rows: int,
    out: str | Path,
    *,
    copy: bool = False,
    ordered: bool = False,
    executor: Executor | None = None,
    progress: Progress | bool = True,
    storage_options: dict[str, Any] | None = None,
) -> Dataset:
    """The first rows of a store: of a shuffled one, a uniform sample without replacement."""
    options: dict[str, Any] = {"executor": executor, "progress": progress, "storage_options": storage_options}
    return split(path, {str(out): rows}, copy=copy, ordered=ordered, **options)[str(out)]


def _under(folder: str | Path | None, name: str) -> str:
    return name if folder is None else f"{str(folder).rstrip('/')}/{name}"


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
    store: Dataset, target: str, start: int, stop: int, copy: bool, work: Work, storage_options: dict[str, Any] | None
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
    copy_through(source, place, asked.changed(fields=names, **layout_of(store)), work)
    return open_dataset(target, storage_options=storage_options)


# --- By a rule ------------------------------------------------------------------------------------


def _split_by(
    path: str | Path,
    parts: Mapping[str, Share],
    by: str,
    seed: int,
    folder: str | Path | None,
    copy: bool,
    work: Work,
    storage_options: dict[str, Any] | None,
) -> dict[str, Dataset]:
    if by not in BY:
        raise RequestError(f"a split is by {' or '.join(map(repr, BY))}, got {by!r}")
    cuts = edges(parts)
    store = open_finished_or_plain(path, storage_options=storage_options)
    if store.shuffled and not copy:
        raise RequestError(
            f"{store.path} is shuffled, and a part of it by {by} is no range of its rows: give --copy to make stores "
            "of the parts, or split the source of the shuffle, which copies nothing, and run each part"
        )
    column = _numbered_by(store, by)
    earlier = store.attributes.get("split")
    earlier = earlier if isinstance(earlier, list) else []
    if any(isinstance(e, dict) and (e.get("by"), e.get("seed")) == (by, seed) for e in earlier):
        raise RequestError(
            f"{store.path} is a part of a split by {by} with seed {seed} itself, and the same lots would decide again: "
            "give another --seed"
        )
    rule = {"rule": RULE, "by": by, "array": column, "seed": seed}
    facts = {name: {**rule, "from": start, "to": stop} for name, (start, stop) in cuts.items()}
    places = {name: as_place(_under(folder, name), storage_options) for name in cuts}
    names = sorted(store.fields)
    identity, _ = take_inventory(store.root, source_arrays(store.root, names))
    made = {
        name: seal([identity, store.start, store.rows, names, copy, facts[name], store.attributes]) for name in cuts
    }
    with work.locks:
        for place in sorted(places.values(), key=lambda place: place.url, reverse=True):
            work.locks.take(place)
        todo = [name for name in cuts if not _made_before(places[name], made[name])]
        counts = _counted(store, column, seed, {name: cuts[name] for name in todo})
        if empty := [name for name in todo if not counts[name]]:
            raise _too_few(store, column, by, empty[0], cuts[empty[0]])
        for name in todo:
            source = places[name].beside(".part") if copy else places[name]
            _name_rows(source, store, facts[name], earlier, counts[name], made[name], copy)
            if copy:
                merges, layout = store.shuffled, layout_of(store)
                own = (store.root_marker or {}) if merges else {}
                request = Request.of(seed=own.get("seed", 0), key_bits=own.get("key_bits"), source_row=merges, **layout)
                copy_through(source, places[name], request, work)
    return {
        name: open_dataset(place.url, incomplete=not copy, storage_options=storage_options)
        for name, place in places.items()
    }


def _numbered_by(store: Dataset, by: str) -> str | None:
    """The array of the numbers that a rule goes by; None for the rows of a store that is its own source."""
    if store.shuffled and SOURCE_ROW not in store.fields:
        raise RequestError(f"{store.path} was written without source_row, which tells its keys: split its source")
    if by == "row":
        return SOURCE_ROW if store.shuffled else None
    name = next((name for name in DOCUMENT if name in store.fields), None)
    if name is None or store.fields[name].row_shape or store.fields[name].dtype.kind not in "iu":
        raise RequestError(
            f"{store.path} has no array of document numbers ({', '.join(DOCUMENT)}), only {sorted(store.fields)}; "
            "split --by row"
        )
    return name


def _made_before(place: Place, made: str) -> bool:
    """True if the same split finished this part.  Refuses anything else that is in the way."""
    objects = open_objects(place)
    marker, described = read_marker(objects), virtual.describe(place)
    if marker is not None or described is not None:
        found = marker.get("made") if marker is not None else (described or {})["settings"].get("filtered")
        if found != made:
            raise DestinationExistsError(f"{place} exists already, with other rows; nothing was cut")
        return True
    begun = virtual.describe(place.beside(".part"))
    if begun is None and next(iter(objects.list("")), None) is not None:
        raise DestinationExistsError(f"{place} exists already; nothing was cut")
    return False


def _lots(store: Dataset, column: str | None, seed: int) -> Iterator[tuple[int, U64]]:
    """The lots of all rows, a range at a time, each with its first row."""
    for start in range(0, store.rows, STEP_ROWS):
        stop = min(start + STEP_ROWS, store.rows)
        numbers: NDArray[Any] = np.arange(store.start + start, store.start + stop)
        if column is not None:
            numbers = store.read(column, start, stop)
        yield start, lots(seed, numbers)


def _counted(store: Dataset, column: str | None, seed: int, cuts: Mapping[str, tuple[float, float]]) -> dict[str, int]:
    """The number of rows in each part."""
    counts = dict.fromkeys(cuts, 0)
    for _, words in _lots(store, column, seed) if cuts else ():
        for name, cut in cuts.items():
            counts[name] += int(np.count_nonzero(in_share(words, *cut)))
    return counts


def _too_few(store: Dataset, column: str | None, by: str, name: str, cut: tuple[float, float]) -> RequestError:
    """The refusal of a part whose share holds no lot of the store."""
    count = store.rows
    if by == "document" and column is not None:
        steps = (store.read(column, at, min(at + STEP_ROWS, store.rows)) for at in range(0, store.rows, STEP_ROWS))
        count = len(set().union(*(np.unique(numbers).tolist() for numbers in steps)))
    share = cut[1] - cut[0]
    rows = f"--by row, which cuts its {counted(store.rows, 'row')}, " if by == "document" and store.rows > 1 else ""
    return RequestError(
        f"no {by} of {store.path} falls into {name}: the store has {counted(count, by)}, and a share of {share:.6g} "
        f"takes {share * count:.3g} of {'it' if count == 1 else 'them'} on average; give {rows}that part a larger "
        "share or none, or another --seed"
    )


def _name_rows(
    place: Place, store: Dataset, facts: dict[str, Any], earlier: list[Any], count: int, made: str, copy: bool
) -> None:
    """Write a virtual source of the rows of one part, in the order of the store."""
    objects, marker = open_objects(place), store.root_marker or {}
    names = sorted(set(store.fields) - ({SOURCE_ROW} if store.shuffled else set()))
    shown = present(place, [store], names, rows=count)
    with objects.writer(ROWS_KEY, 8 * count) as out:
        for start, words in _lots(store, facts["array"], facts["seed"]):
            rows = np.flatnonzero(in_share(words, facts["from"], facts["to"])) + start
            out.write(memoryview(rows.astype("<u8").tobytes()))
    told: dict[str, Any] = {}
    if copy:
        told = {"split": facts, "made": made, "source": public_url(store.root.url), "kind": "collection"}
    if store.shuffled:
        told |= {name: marker[name] for name in ("source", "source_identity", "parts") if name in marker}
        told |= {"population": marker.get("population", marker["rows"]), "kind": "shuffle"}
    reader = "part of a shuffle" if store.shuffled else "filtered"
    settings, attributes = {**shown.settings, "filtered": made}, {**store.attributes, "split": [*earlier, facts]}
    copied = {"kind": "merge" if store.shuffled else "copy", "stage": "split"} if copy else {}
    virtual.write(place, reader, settings, shown.arrays, attributes, **copied, marker=told)
