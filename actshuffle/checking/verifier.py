"""Check that dst is src in the order of its seed, from the two stores alone, with code that `run` does not use.

Full: one streaming pass over each store, in any number of tasks.

1. Every object that dst's metadata promises is there.
2. ``source_row`` lies in 0 .. n - 1 and its keys strictly ascend over all n rows.  Keys are a total
   order, so then no row occurs twice, all occur, and ``source_row`` *is* the order.
3. For each field, the 128-bit sum of hashes of (source row, row bytes) over dst, taken with
   ``source_row``, equals the sum over src, taken with 0 .. n - 1: then row by row the bytes agree,
   but for odds of 2^-33 per altered row at worst (digest.py).

When a sum is off, the digests kept per output object say where to look, and rows compared one by one
confirm it.  Quick: the same for random stretches of dst, rows compared byte for byte.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from itertools import groupby, islice
from pathlib import Path
from threading import Event
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from actshuffle.arrays.field import Field
from actshuffle.arrays.inventory import look, take_inventory
from actshuffle.arrays.metadata import ZarrArray, source_arrays, source_field
from actshuffle.arrays.names import DIGESTS, SOURCE_ROW
from actshuffle.arrays.small import get_array
from actshuffle.arrays.source import Source
from actshuffle.arraytypes import U64
from actshuffle.checking.keyorder import check_ascent, descents, full_keys, order_of
from actshuffle.checking.subject import refuse_others, refuse_part_of_sources, subject
from actshuffle.errors import ActshuffleError, FormatError, RequestError, SourceError
from actshuffle.executors import Executor, Threads
from actshuffle.executors.choice import as_executor
from actshuffle.html import page
from actshuffle.jobs.running import sweep
from actshuffle.ordering.digest import RowHash
from actshuffle.ordering.keys import Keys
from actshuffle.ordering.mixing import MixingAccumulator, MixingReport, as_html
from actshuffle.progress import Progress, Silent
from actshuffle.storage.objects import open_objects
from actshuffle.storage.place import Place, as_place
from actshuffle.units import counted, format_bytes, format_seconds, switches

T = TypeVar("T")
SLICE_BYTES = 32 << 20  # bytes of rows held at a time
TASK_BYTES = 1 << 30
PARTS = 4  # tasks of a worker, at least, so that they end together
STRETCH = 16  # rows of a quick check's stretch
COMPARED = 64  # damaged objects of a field whose rows are compared one by one
SHOWN = 10  # rows named per damaged object
LISTED = 1000  # missing objects named per array
ORDER_ROWS = 1 << 27  # without source_row the order is made in memory, 40 bytes a row


@dataclass(frozen=True)
class Problem:
    """One fault, and its place."""

    kind: str  # "missing", "order", "rows", "unreadable", "metadata"
    where: str  # the object's key, or the array's name
    detail: str

    def __str__(self) -> str:
        return f"{self.where}: {self.detail}"


@dataclass(frozen=True)
class VerifyReport:
    """The verdict.  ``checked`` is the number of rows checked; ``notes`` are no faults."""

    rows: int
    checked: int
    nbytes: int
    quick: bool
    seconds: float
    problems: tuple[Problem, ...]
    notes: tuple[str, ...] = ()
    mixing: MixingReport | None = None

    @property
    def ok(self) -> bool:
        return not self.problems and (self.mixing is None or self.mixing.passed)

    def _repr_html_(self) -> str:
        """The verdict on a shuffled store, with its faults."""
        verdict = "verified: dst is src in the order of its seed" if self.ok else "NOT verified"
        facts: dict[str, object] = {
            "rows": f"{self.checked:,} of {self.rows:,} looked at",
            "took": f"{format_bytes(self.nbytes)} in {format_seconds(self.seconds)}",
        }
        facts |= {f"note {i}": note for i, note in enumerate(self.notes, 1)}
        rows = [(p.kind, p.where, p.detail) for p in self.problems[:100]]
        whole = page(verdict, facts, ("problem", "where", "what"), rows, verdict=self.ok)
        return whole if self.mixing is None else whole + as_html(self.mixing)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "ok": self.ok,
            "rows": self.rows,
            "checked": self.checked,
            "quick": self.quick,
            "bytes": self.nbytes,
            "seconds": self.seconds,
            "problems": [vars(p) for p in self.problems],
            "notes": list(self.notes),
            "mixing": self.mixing and self.mixing.as_dict(),
        }

    def __str__(self) -> str:
        how = f"{self.checked:,} of {self.rows:,} rows sampled" if self.quick else f"all {self.rows:,} rows"
        took = f"{format_bytes(self.nbytes)} in {format_seconds(self.seconds)}"
        lines = []
        if self.problems:
            lines.append(f"NOT the shuffle it claims to be ({how}, {took}); {len(self.problems)} found:")
            lines += [f"  {p}" for p in self.problems[:20]]
            if len(self.problems) > 20:
                lines.append(f"  ... and {len(self.problems) - 20} more")
        else:
            lines.append(f"verified: dst is src in the order of its seed ({how}, {took})")
        lines += [f"note: {note}" for note in self.notes]
        if self.mixing is not None:
            lines.append(self.mixing.table())
        return "\n".join(lines)


@dataclass(frozen=True)
class Pair:
    """Two stores to compare, as a task needs them."""

    source: Place
    destination: Place
    keys: Keys
    rows: int
    names: tuple[str, ...]
    source_fields: tuple[Field, ...]
    fields: tuple[Field, ...]  # of the destination, seen as a source to read
    source_row: Field | None
    fill_missing: bool


def verify(
    src: str | Path,
    dst: str | Path,
    *,
    quick: bool = False,
    mixing: bool = False,
    sample_rows: int = 4096,
    executor: Executor | None = None,
    storage_options: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> VerifyReport:
    """Check that ``dst`` is a complete, exact shuffle of ``src``, or a view of one.

    A view has no rows of its own: its marker is checked, and then the whole store that has them.  A grown store is
    checked against the concatenation of all its sources.

    ``quick`` compares about ``sample_rows`` random rows; ``mixing`` adds the two-sided statistics of
    `actshuffle.ordering.mixing`.  Damage is reported, not raised.  Runs on threads of this process unless
    given an executor.

    Raises
    ------
    IncompleteStoreError : dst has no completion marker.
    SourceError, RequestError : there is nothing to compare, or ``dst`` is of a kind that has no source to be compared
        with: a collection, a sample, a copied range; the message says what checks it.
    """
    switches(quick=quick, mixing=mixing)
    started, progress = time.perf_counter(), progress or Silent()
    workers: Executor = as_executor(Threads() if executor is None else executor)
    source, given = as_place(src, storage_options), as_place(dst, storage_options)
    destination, marker, faults, notes = subject(source, given)
    altered = [Problem("metadata", *fault) for fault in faults]
    names = tuple(marker["fields"])
    try:
        refuse_others(given, marker)
        theirs = source_arrays(source, names)
        refuse_part_of_sources(source, given, marker, next(iter(theirs.values())).shape[0])
    except RequestError:
        if not altered:  # else it may have been a shuffle of this source once
            raise
        theirs = {}
    try:
        ours = source_arrays(destination, (*names, SOURCE_ROW) if marker.get("source_row") else names)
    except (SourceError, RequestError) as err:
        altered.append(Problem("metadata", str(dst), str(err)))
        theirs = {}
    if not theirs:
        return VerifyReport(marker["rows"], 0, 0, quick, time.perf_counter() - started, tuple(altered), tuple(notes))
    identity, gappy = take_inventory(source, theirs, fill_missing=marker["fill_missing"])
    if identity != marker["source_identity"]:
        notes.append("the source's metadata or object sizes are not those of the run")
    problems = list(_metadata_problems(theirs, ours, names, marker["rows"]))
    for array in ours.values():
        # Not all of them: metadata that was altered may promise any number of objects.
        lost = list(islice((f for f in look(destination, array) if f.problem), LISTED))
        problems += [Problem("missing", f.key, f.problem) for f in lost]
        if len(lost) == LISTED:
            notes.append(f"of what {array.path} lacks no more than {LISTED:,} objects are named")
    fields = {k: source_field(k, a) for k, a in theirs.items()}
    pair = Pair(
        source,
        destination,
        Keys(marker["seed"], *marker.get("key_bits", (64, 64))),
        marker["rows"],
        names,
        # A missing chunk has no file to read: leave that array to zarr, which makes up fill values.
        tuple(replace(fields[k], source_key="") if k in gappy else fields[k] for k in names),
        tuple(source_field(k, ours[k]) for k in names),
        source_field(SOURCE_ROW, ours[SOURCE_ROW]) if marker["source_row"] else None,
        marker["fill_missing"],
    )
    if pair.source_row is None and pair.rows > ORDER_ROWS:
        raise RequestError(
            f"without source_row, verify sorts {pair.rows:,} keys in memory; the limit is {ORDER_ROWS:,}"
        )
    checked, nbytes, scored = 0, 0, None
    if not problems:
        check = _quick if quick else _full
        with _beside(_mixing, pair) if mixing else nullcontext() as scores:
            checked, nbytes, found = check(pair, workers, progress, sample_rows)
            problems += found
            if scores and not problems:  # else the rows, which it reads too, need not be an order at all
                try:
                    scored = scores()
                except ValueError as err:  # the quick check does not prove that it is a permutation
                    problems.append(Problem("order", SOURCE_ROW, str(err)))
    return VerifyReport(
        pair.rows, checked, nbytes, quick, time.perf_counter() - started, (*altered, *problems), tuple(notes), scored
    )


def _full(pair: Pair, executor: Executor, progress: Progress, _sample: int) -> tuple[int, int, list[Problem]]:
    row_bytes = sum(f.row_bytes for f in pair.fields)
    total = np.zeros((2, len(pair.fields), 2), np.uint64)
    by_object: list[dict[int, U64]] = [{} for _ in pair.fields]
    parts = _parts(pair, executor.workers)
    found: dict[int, Part] = {}
    calls = [(pair, side, start, stop) for _, start, stop in parts for side in (0, 1)]
    size, all_bytes = lambda part: (part.stop - part.start) * row_bytes, 2 * pair.rows * row_bytes
    for part in sweep("verify", check_range, calls, executor, progress, size, all_bytes):
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
    for output in (*pair.fields, *([pair.source_row] if pair.source_row else [])):
        problems += _padding_problems(pair, output)
    return pair.rows, all_bytes, problems


@dataclass
class Part:
    """What one task found in rows ``[start, stop)`` of src (side 0) or dst (1).

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
    row_bytes = sum(f.row_bytes for f in pair.fields)
    family = max(1, TASK_BYTES // row_bytes, -(-pair.rows // 10_000))
    rows = _slice_rows(pair)
    step = max(1, round(pair.rows / (PARTS * workers * rows))) * rows
    return [
        (number, a, min(a + step, start + family, pair.rows))
        for number, start in enumerate(range(0, pair.rows, family))
        for a in range(start, min(start + family, pair.rows), step)
    ]


def _slice_rows(pair: Pair) -> int:
    return max(1, SLICE_BYTES // max(f.row_bytes for f in pair.fields))


def _in_order(pair: Pair, parts: list[tuple[int, Part]]) -> Iterator[Problem]:
    """The problems of dst, as if each family had been looked at by one task; then those between families."""
    seams, last, previous = [], None, -1
    for family, members in groupby(parts, key=lambda one: one[0]):
        problems: list[Problem] = []
        for _, part in members:
            theirs = list(part.problems)
            if part.ends is not None:
                if last is not None and not tuple(last) < tuple(part.ends[0]):
                    found = _order_problem(pair, part.begins)
                    if family != previous:
                        seams.append(_order_problem(pair, part.start))
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
    for a in range(start, stop, step := _slice_rows(pair)):
        b = min(a + step, stop)
        try:
            if side == 0:
                rows = np.arange(a, b, dtype=np.uint64)
            else:
                rows = _rows_of(pair, store, a, b)
                broken, ends = check_ascent(pair.keys, rows, pair.rows, None if part.ends is None else part.ends[1])
                if part.ends is None:
                    part.begins, part.before, part.ends = a, len(part.problems), ends
                part.ends = np.stack([part.ends[0], ends[1]])
                room = max(0, SHOWN - len(part.problems))
                part.problems += [_order_problem(pair, a + int(at)) for at in broken[:room]]
            for number, field in enumerate(fields):
                row_hash = RowHash(pair.keys.seed, 1 + number, field.row_bytes)
                _add(part.sums[number], row_hash.hashes_of_parts(store.tiles(field, a, b), rows), a, field)
        except ActshuffleError as err:
            if side == 0:
                raise
            part.problems += list(_unreadable(pair, store, a, b)) or [
                Problem("unreadable", f"output rows {a:,} to {b:,}", str(err))
            ]
    return part


def _add(sums: dict[int, U64], hashes: U64, first: int, field: Field) -> None:
    """Add the hashes of rows from ``first`` on to the digests of their objects."""
    size = field.source_chunk_rows
    for at in range(first // size, -(-(first + len(hashes)) // size)):
        part = hashes[max(at * size - first, 0) : (at + 1) * size - first]
        sums[at] = sums.get(at, np.zeros(2, np.uint64)) + part.sum(axis=0, dtype=np.uint64)


def _unreadable(pair: Pair, store: Source, start: int, stop: int) -> Iterator[Problem]:
    """The objects of dst that hold any of some rows and cannot be read."""
    for field in (*pair.fields, *([pair.source_row] if pair.source_row else [])):
        size = field.source_chunk_rows
        for number in range(start // size, -(-stop // size)):
            a, b = number * size, min((number + 1) * size, pair.rows)
            step = max(1, SLICE_BYTES // field.row_bytes)
            try:
                for at in range(a, b, step):
                    rows = np.empty((min(step, b - at), field.row_bytes), np.uint8)
                    store.read(field, at, rows)
            except ActshuffleError as err:
                yield Problem("unreadable", _object_key(field, number), str(err))


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
        yield Problem("rows", _object_key(field, at), "is not what was written")
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
        wrong = _differing_rows(pair, number, store, start, _rows_of(pair, store, start, stop))
    except ActshuffleError as err:
        return [Problem("unreadable", _object_key(field, at), str(err))]
    if not len(wrong):
        return []
    shown = ", ".join(f"{int(r):,}" for r in wrong[:SHOWN]) + (", ..." if len(wrong) > SHOWN else "")
    differ = "differs from its" if len(wrong) == 1 else "differ from their"
    detail = f"{counted(len(wrong), 'row')} {differ} source: {shown}"
    return [Problem("rows", _object_key(field, at), detail)]


def _differing_rows(pair: Pair, number: int, store: Source, start: int, rows: U64) -> NDArray[np.int64]:
    """The output rows from ``start`` on whose bytes differ from source rows ``rows``, int64."""
    field, theirs = pair.fields[number], pair.source_fields[number]
    source = Source(pair.source, pair.fill_missing)
    step = max(1, SLICE_BYTES // field.row_bytes)
    wrong = []
    for a in range(0, len(rows), step):
        part = rows[a : a + step]
        ours = np.empty((len(part), field.row_bytes), np.uint8)
        store.read(field, start + a, ours)
        valid = part < np.uint64(pair.rows)
        expected = np.zeros_like(ours)
        for i in np.argsort(part, kind="stable"):  # in source order, so that each chunk is decoded once
            if valid[i]:
                source.read(theirs, int(part[i]), expected[i : i + 1])
        wrong.append(start + a + np.flatnonzero((ours != expected).any(axis=1) | ~valid))
    return np.concatenate(wrong) if wrong else np.zeros(0, np.int64)


def _quick(pair: Pair, executor: Executor, progress: Progress, sample: int) -> tuple[int, int, list[Problem]]:
    """Check random stretches of dst: keys ascend and are near their expected rank, rows equal those of the source."""
    rng = np.random.default_rng()
    count = max(1, min(sample, pair.rows) // STRETCH) if pair.rows else 0
    starts = np.unique(rng.integers(0, max(1, pair.rows - STRETCH + 1), count))
    row_bytes = sum(f.row_bytes for f in pair.fields)
    calls, size = [(pair, int(s)) for s in starts], lambda part: part[0] * row_bytes
    problems, checked = [], 0
    for rows, found in sweep(
        "verify (quick)", check_stretch, calls, executor, progress, size, len(starts) * STRETCH * row_bytes
    ):
        problems += found
        checked += rows
    return checked, 2 * checked * row_bytes, problems


def check_stretch(pair: Pair, start: int) -> tuple[int, list[Problem]]:
    """One stretch of the quick check."""
    stop, store = min(start + STRETCH, pair.rows), Source(pair.destination)
    problems = []
    try:
        rows = _rows_of(pair, store, start, stop)
        keys = full_keys(pair.keys, rows)
        broken = descents(keys, rows, pair.rows, None)
        if not len(broken) and pair.keys.hi_bits == 64:
            # The r-th of n uniform keys lies within a few standard deviations of r / n.
            off = np.abs(keys[:, 0] / 2.0**64 - (np.arange(start, stop) + 1) / (pair.rows + 1))
            broken = np.flatnonzero(off > 8 * 0.5 / np.sqrt(pair.rows + 2))
        for at in broken[:1]:
            problems.append(_order_problem(pair, start + int(at)))
        for number, field in enumerate(pair.fields):
            for row in _differing_rows(pair, number, store, start, rows):
                key = _object_key(field, int(row) // field.source_chunk_rows)
                problems.append(Problem("rows", key, f"row {int(row):,} differs from its source"))
    except ActshuffleError as err:
        problems.append(Problem("unreadable", f"output rows {start:,} to {stop:,}", str(err)))
    return stop - start, problems


@contextmanager
def _beside(work: Callable[[Pair, Event], T], pair: Pair) -> Iterator[Callable[[], T]]:
    """Work on another thread; yields a function that waits for its result.  It is told to stop when the block ends."""
    over = Event()
    with ThreadPoolExecutor(1, "actshuffle-beside") as pool:
        try:
            yield pool.submit(work, pair, over).result
        finally:
            over.set()


def _mixing(pair: Pair, over: Event) -> MixingReport:
    widest = max(range(len(pair.fields)), key=lambda i: pair.fields[i].row_bytes)
    stream = MixingAccumulator(
        pair.rows,
        src_chunk_rows=pair.source_fields[widest].source_chunk_rows,
        dst_chunk_rows=pair.fields[widest].source_chunk_rows,
    )
    store, step = Source(pair.destination), SLICE_BYTES // 8
    for a in range(0, pair.rows, step):
        if over.is_set():
            break
        stream.update(a, _rows_of(pair, store, a, min(a + step, pair.rows)))
    return stream.report()


def _rows_of(pair: Pair, store: Source, start: int, stop: int) -> U64:
    """The source row of each output row: as recorded, or else by the seed."""
    if pair.source_row is None:
        return order_of(pair.keys, pair.rows)[start:stop]
    data = np.empty((stop - start, 8), np.uint8)
    store.read(pair.source_row, start, data)
    return data.view("<u8")[:, 0]


def _order_problem(pair: Pair, row: int) -> Problem:
    if pair.source_row is None:
        return Problem("order", "the order", f"keys do not ascend at output row {row:,}")
    size = pair.source_row.source_chunk_rows
    where, last = (_object_key(pair.source_row, r // size) for r in (row, max(row - 1, 0)))
    since = "" if where == last else f", the first after {last}"
    return Problem("order", where, f"keys do not ascend at output row {row:,}{since}")


def _object_key(field: Field, number: int) -> str:
    return field.object_key.format(number)


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


def _metadata_problems(
    theirs: dict[str, ZarrArray], ours: dict[str, ZarrArray], names: tuple[str, ...], rows: int
) -> Iterator[Problem]:
    for name, a, b in ((k, theirs[k], ours[k]) for k in names):
        if a.shape != b.shape or a.shape[0] != rows:
            yield Problem("metadata", name, f"shape is {b.shape}, the source's {a.shape}, the marker's rows {rows:,}")
        elif a.dtype.newbyteorder("<") != b.dtype.newbyteorder("<"):
            yield Problem("metadata", name, f"dtype is {b.dtype}, the source's {a.dtype}")
