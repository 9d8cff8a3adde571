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
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from threading import Event
from typing import Any, TypeVar

import numpy as np

from actshuffle.arrays.inventory import look, take_inventory
from actshuffle.arrays.marker import array_names
from actshuffle.arrays.metadata import ZarrArray, source_arrays, source_field
from actshuffle.arrays.names import SOURCE_ROW
from actshuffle.arrays.source import Source
from actshuffle.checking.fullcheck import compare_all
from actshuffle.checking.keyorder import descents, full_keys
from actshuffle.checking.pair import Pair, Problem, object_key, slice_rows, unreadable
from actshuffle.checking.subject import refuse_others, refuse_part_of_sources, subject
from actshuffle.errors import ActshuffleError, RequestError, SourceError, in_python, words_of
from actshuffle.executors import Executor, Threads
from actshuffle.executors.choice import as_executor
from actshuffle.html import page
from actshuffle.jobs.running import sweep
from actshuffle.ordering.keys import Keys
from actshuffle.ordering.mixing import MixingAccumulator, MixingReport, as_html
from actshuffle.progress import Progress, observer
from actshuffle.progress.display import shown
from actshuffle.storage.place import as_place
from actshuffle.units import counted, format_bytes, format_seconds, switches

T = TypeVar("T")
STRETCH = 16  # rows of a quick check's stretch
LISTED = 1000  # missing objects named per array
ORDER_ROWS = 1 << 27  # without source_row the order is made in memory, 40 bytes a row


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
        rows = [(p.kind, p.where, in_python(p.detail)) for p in self.problems[:100]]
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
        return in_python(self.on_command_line)

    @property
    def on_command_line(self) -> str:
        """The verdict with its problems, in which the options of the command line are named."""
        how = (
            f"{self.checked:,} of {counted(self.rows, 'row')} sampled"
            if self.quick
            else f"all {counted(self.rows, 'row')}"
        )
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


@shown
def verify(
    src: str | Path,
    dst: str | Path,
    *,
    quick: bool = False,
    mixing: bool = False,
    sample_rows: int = 4096,
    executor: Executor | None = None,
    storage_options: dict[str, Any] | None = None,
    progress: Progress | bool = True,
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
    started, progress = time.perf_counter(), observer(progress)
    workers: Executor = as_executor(executor, Threads)
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
        ours = source_arrays(destination, array_names(marker))
    except (SourceError, RequestError) as err:
        altered.append(Problem("metadata", str(dst), words_of(err)))
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
    checked, scored = 0, None
    if not problems:
        with _beside(_mixing, pair) if mixing else nullcontext() as scores:
            if quick:
                checked, found = _quick(pair, workers, progress, sample_rows)
            else:
                checked, found = pair.rows, compare_all(pair, workers, progress)
            problems += found
            if scores and not problems:  # else the rows, which it reads too, need not be an order at all
                try:
                    scored = scores()
                except ValueError as err:  # the quick check does not prove that it is a permutation
                    problems.append(Problem("order", SOURCE_ROW, words_of(err)))
    nbytes, seconds = 2 * checked * pair.row_bytes, time.perf_counter() - started
    return VerifyReport(pair.rows, checked, nbytes, quick, seconds, (*altered, *problems), tuple(notes), scored)


def _quick(pair: Pair, executor: Executor, progress: Progress, sample: int) -> tuple[int, list[Problem]]:
    """Check random stretches of dst: keys ascend and are near their expected rank, rows equal those of the source."""
    rng = np.random.default_rng()
    count = max(1, min(sample, pair.rows) // STRETCH) if pair.rows else 0
    starts = np.unique(rng.integers(0, max(1, pair.rows - STRETCH + 1), count))
    calls = [(pair, int(start)) for start in starts]
    size, total = lambda part: part[0] * pair.row_bytes, len(starts) * STRETCH * pair.row_bytes
    found = list(sweep("verify (quick)", check_stretch, calls, executor, progress, size, total))
    return sum(rows for rows, _ in found), [problem for _, problems in found for problem in problems]


def check_stretch(pair: Pair, start: int) -> tuple[int, list[Problem]]:
    """One stretch of the quick check."""
    stop, store = min(start + STRETCH, pair.rows), Source(pair.destination)
    problems = []
    try:
        rows = pair.rows_of(store, start, stop)
        keys = full_keys(pair.keys, rows)
        broken = descents(keys, rows, pair.rows, None)
        if not len(broken) and pair.keys.hi_bits == 64:
            # The r-th of n uniform keys lies within a few standard deviations of r / n.
            off = np.abs(keys[:, 0] / 2.0**64 - (np.arange(start, stop) + 1) / (pair.rows + 1))
            broken = np.flatnonzero(off > 8 * 0.5 / np.sqrt(pair.rows + 2))
        for at in broken[:1]:
            problems.append(pair.order_problem(start + int(at)))
        for number, field in enumerate(pair.fields):
            for row in pair.differing_rows(number, store, start, rows):
                key = object_key(field, int(row) // field.source_chunk_rows)
                problems.append(Problem("rows", key, f"row {int(row):,} differs from its source"))
    except ActshuffleError as err:
        problems.append(unreadable((start, stop), err))
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
    src, dst = (fields[widest].source_chunk_rows for fields in (pair.source_fields, pair.fields))
    stream = MixingAccumulator(pair.rows, src_chunk_rows=src, dst_chunk_rows=dst)
    store, step = Source(pair.destination), slice_rows(8)
    for a in range(0, pair.rows, step):
        if over.is_set():
            break
        stream.update(a, pair.rows_of(store, a, min(a + step, pair.rows)))
    return stream.report()


def _metadata_problems(
    theirs: dict[str, ZarrArray], ours: dict[str, ZarrArray], names: tuple[str, ...], rows: int
) -> Iterator[Problem]:
    for name, a, b in ((k, theirs[k], ours[k]) for k in names):
        if a.shape != b.shape or a.shape[0] != rows:
            yield Problem("metadata", name, f"shape is {b.shape}, the source's {a.shape}, the marker's rows {rows:,}")
        elif a.dtype.newbyteorder("<") != b.dtype.newbyteorder("<"):
            yield Problem("metadata", name, f"dtype is {b.dtype}, the source's {a.dtype}")
