"""The full check of `verify`: one streaming pass over each store, in any number of tasks; see verifier.py."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from actshuffle.arrays.field import Field
from actshuffle.arrays.names import DIGESTS
from actshuffle.arrays.small import get_array
from actshuffle.arrays.source import Source
from actshuffle.arraytypes import U64
from actshuffle.checking.keyorder import check_ascent
from actshuffle.checking.pair import Pair, Problem, object_key, slice_rows, unreadable
from actshuffle.errors import ActshuffleError, FormatError, words_of
from actshuffle.executors import Executor
from actshuffle.jobs.running import sweep
from actshuffle.ordering.digest import RowHash
from actshuffle.progress import Progress
from actshuffle.storage.objects import open_objects
from actshuffle.units import counted

TASK_BYTES = 1 << 30
PARTS = 4  # tasks of a worker, at least, so that they end together
COMPARED = 64  # damaged objects of a field whose rows are compared one by one
SHOWN = 10  # rows named per damaged object


def compare_all(pair: Pair, executor: Executor, progress: Progress) -> list[Problem]:
    """The faults of dst, by one pass over each store."""
    total = np.zeros((2, len(pair.fields), 2), np.uint64)
    by_object: list[dict[int, U64]] = [{} for _ in pair.fields]
    parts = _parts(pair, executor.workers)
    found: dict[int, Part] = {}
    calls = [(pair, side, start, stop) for _, start, stop in parts for side in (0, 1)]
    size, total_bytes = lambda part: (part.stop - part.start) * pair.row_bytes, 2 * pair.rows * pair.row_bytes
    for part in sweep("verify", check_range, calls, executor, progress, size, total_bytes):
        for number, sums in enumerate(part.sums):
            for at, one in sums.items():
                total[part.side, number] += one
                if part.side:
                    by_object[number][at] = by_object[number].get(at, np.zeros(2, np.uint64)) + one
        if part.side:
            found[part.start] = part
    problems = list(_in_order(pair, [(family, found[start]) for family, start, _ in parts]))
    whole = not any(p.kind == "unreadable" for p in problems)
    for number, field in enumerate(pair.fields):
        if (total[0, number] != total[1, number]).any():
            located = _locate(pair, executor, number, field, by_object[number], whole)
            problems += [p for p in located if p.kind != "unreadable"]
    for output in pair.outputs:
        problems += _padding_problems(pair, output)
    return problems


@dataclass
class Part:
    """The findings of one task in rows ``[start, stop)`` of src (side 0) or dst (1).

    ``sums`` are digests per field by object number, uint64 ``(2,)``.  Of dst, ``ends`` are the keys of the first and
    the last row that could be read, uint64 ``(2, 3)``; the first is row ``begins``, before which there were
    ``before`` problems.
    """

    side: int
    start: int
    stop: int
    sums: list[dict[int, U64]]
    problems: list[Problem]
    ends: U64 | None = None
    begins: int = 0
    before: int = 0


def _parts(pair: Pair, workers: int) -> list[tuple[int, int, int]]:
    """Ranges of rows, each with the number of its family: enough for all workers, and of whole slices.

    A report names `SHOWN` rows out of order per family, so families do not depend on the number of workers.
    """
    family = max(1, TASK_BYTES // pair.row_bytes, -(-pair.rows // 10_000))
    rows = _widest_slice(pair)
    step = max(1, round(pair.rows / (PARTS * workers * rows))) * rows
    return [
        (number, a, min(a + step, start + family, pair.rows))
        for number, start in enumerate(range(0, pair.rows, family))
        for a in range(start, min(start + family, pair.rows), step)
    ]


def _widest_slice(pair: Pair) -> int:
    return slice_rows(max(field.row_bytes for field in pair.fields))


def _in_order(pair: Pair, parts: list[tuple[int, Part]]) -> Iterator[Problem]:
    """The problems of dst, as if each family had been looked at by one task; then those between families."""
    seams, last, previous = [], None, -1
    for family, members in groupby(parts, key=lambda one: one[0]):
        problems: list[Problem] = []
        for _, part in members:
            theirs = list(part.problems)
            if part.ends is not None:
                if last is not None and not tuple(last) < tuple(part.ends[0]):
                    found = pair.order_problem(part.begins)
                    if family != previous:
                        seams.append(pair.order_problem(part.start))
                    elif found not in theirs:  # a row that the source does not have is named already
                        theirs.insert(part.before, found)
                last, previous = part.ends[1], family
            for problem in theirs:
                if problem.kind != "order" or len(problems) < SHOWN:
                    problems.append(problem)
        yield from problems
    yield from seams


def check_range(pair: Pair, side: int, start: int, stop: int) -> Part:
    """Digests of rows ``[start, stop)`` of src (side 0) or dst (1) by object, and for dst their order."""
    place, fields = (pair.source, pair.source_fields) if side == 0 else (pair.destination, pair.fields)
    store = Source(place, pair.fill_missing and side == 0)
    part = Part(side, start, stop, [{} for _ in fields], [])
    for a in range(start, stop, step := _widest_slice(pair)):
        b = min(a + step, stop)
        try:
            if side == 0:
                rows = np.arange(a, b, dtype=np.uint64)
            else:
                rows = pair.rows_of(store, a, b)
                broken, ends = check_ascent(pair.keys, rows, pair.rows, None if part.ends is None else part.ends[1])
                if part.ends is None:
                    part.begins, part.before, part.ends = a, len(part.problems), ends
                part.ends = np.stack([part.ends[0], ends[1]])
                room = max(0, SHOWN - len(part.problems))
                part.problems += [pair.order_problem(a + int(at)) for at in broken[:room]]
            for number, field in enumerate(fields):
                row_hash = RowHash(pair.keys.seed, 1 + number, field.row_bytes)
                _add(part.sums[number], row_hash.hashes_of_parts(store.tiles(field, a, b), rows), a, field)
        except ActshuffleError as err:
            if side == 0:
                raise
            part.problems += list(_unreadable(pair, store, a, b)) or [unreadable((a, b), err)]
    return part


def _add(sums: dict[int, U64], hashes: U64, first: int, field: Field) -> None:
    """Add the hashes of rows from ``first`` on to the digests of their objects."""
    size = field.source_chunk_rows
    for at in range(first // size, -(-(first + len(hashes)) // size)):
        part = hashes[max(at * size - first, 0) : (at + 1) * size - first]
        sums[at] = sums.get(at, np.zeros(2, np.uint64)) + part.sum(axis=0, dtype=np.uint64)


def _unreadable(pair: Pair, store: Source, start: int, stop: int) -> Iterator[Problem]:
    """The objects of dst that hold any of some rows and cannot be read."""
    for field in pair.outputs:
        size = field.source_chunk_rows
        for number in range(start // size, -(-stop // size)):
            a, b = number * size, min((number + 1) * size, pair.rows)
            step = slice_rows(field.row_bytes)
            try:
                for at in range(a, b, step):
                    rows = np.empty((min(step, b - at), field.row_bytes), np.uint8)
                    store.read(field, at, rows)
            except ActshuffleError as err:
                yield Problem("unreadable", object_key(field, number), words_of(err))


def _locate(
    pair: Pair, executor: Executor, number: int, field: Field, found: dict[int, U64], whole: bool
) -> Iterator[Problem]:
    """Locate the objects of a field that are not as they were written, and confirm them row by row.

    Unless ``whole``, the sums lack rows that cannot be read, and need not mean anything.
    """
    recorded = None
    with suppress(FormatError):  # reported elsewhere
        recorded = get_array(open_objects(pair.destination), f"{DIGESTS}/{pair.names[number]}")
    known = recorded is not None and max(found, default=-1) < len(recorded)
    differing = [at for at in sorted(found) if known and (recorded[at] != found[at]).any()]  # type: ignore[index]
    if not differing and whole:
        since = ", though every object is as it was written: has the source changed?" if known else ""
        yield Problem("rows", pair.names[number], f"its rows are not the source's{since}")
    for at in differing[COMPARED:] if whole else ():
        yield Problem("rows", object_key(field, at), "is not what was written")
    calls = ((pair, number, at) for at in (differing[:COMPARED] or sorted(found)[:COMPARED]))
    for problems in executor.map(compare_object, calls):
        yield from problems


def compare_object(pair: Pair, number: int, at: int) -> list[Problem]:
    """Compare rows of one output object with the source rows that they claim to be, byte for byte."""
    field = pair.fields[number]
    start = at * field.source_chunk_rows
    stop = min(start + field.source_chunk_rows, pair.rows)
    store = Source(pair.destination)
    try:
        wrong = pair.differing_rows(number, store, start, pair.rows_of(store, start, stop))
    except ActshuffleError as err:
        return [Problem("unreadable", object_key(field, at), words_of(err))]
    if not len(wrong):
        return []
    shown = ", ".join(f"{int(r):,}" for r in wrong[:SHOWN]) + (", ..." if len(wrong) > SHOWN else "")
    differ = "differs from its" if len(wrong) == 1 else "differ from their"
    detail = f"{counted(len(wrong), 'row')} {differ} source: {shown}"
    return [Problem("rows", object_key(field, at), detail)]


def _padding_problems(pair: Pair, field: Field) -> Iterator[Problem]:
    """Check that the last object, where it is plain bytes, holds zeros behind its rows."""
    unused = -pair.rows % field.source_chunk_rows
    if not field.source_key or not unused:
        return
    tail = np.ones(unused * field.row_bytes, np.uint8)
    extents = [*field.extents(pair.rows, pair.rows + unused, tail.data)]
    open_objects(pair.destination).read(extents)
    if tail.any():
        yield Problem("rows", extents[0].key, "holds more than zeros behind its last row")
