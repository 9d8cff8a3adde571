"""One pass and no spill: every leaf picks its rows from a source that lies in the machine's memory.

Where the page cache has room for the whole source, rows need no intermediate.  A leaf finds its rows from
their keys alone, and takes them from the source::

    source, in the page cache    | r0 r1 r2 r3 r4 r5 r6 r7 r8 ...
    rows of one leaf                   .     .        .
    output object                | r6 r1 r4 ...     in key order

So the source is read once from the disk, in order (`warm`), and the output is written once: the bytes of a
copy.  One look at all keys (`look`) finds the rows of all leaves; it leaves them in scratch, 16 bytes a row::

    keys/7       first key words of a range of rows, then their numbers, both grouped by bin (ordering/lookup.py)
    keys/runs    int64 (leaves, 1 + 2 * ranges): the bins of each leaf
    keys/total   the digests of all first key words, and of the rows that were decoded

Rows that lie in no plain file of this machine, since a codec packs them or a store holds them, are decoded once into
its memory (`stage`), and lie there as files of plain rows until the run ends.

The source's files are mapped side by side, so that a field is one array, and each row is copied from the page cache
into the buffer that is written.  Where the system refuses to map them, rows are read: each by itself or,
where the rows of a leaf lie closer together than some `READ_BYTES`, by a look at the whole column.

A disk that serves single rows fast enough needs no page cache: rows that do not fit into memory are then read
`apart`, each from where it lies (storage/rows.py).

Copies: a row is copied once in memory on its way in, and none on the way out.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from actshuffle.arrays.field import Field
from actshuffle.arrays.source import Source
from actshuffle.arraytypes import I64, U8, U64
from actshuffle.engine.job import Job, is_hex
from actshuffle.engine.scratch import memory_objects
from actshuffle.errors import ConservationError, FormatError
from actshuffle.jobs.records import sealed, unsealed
from actshuffle.ordering import lookup
from actshuffle.ordering.digest import RowHash, from_hex, to_hex
from actshuffle.ordering.keys import Keys
from actshuffle.planning.tree import Plan
from actshuffle.storage.buffers import Arena, arena, kept, lean_heap, padded, pages
from actshuffle.storage.directio import Extent
from actshuffle.storage.mapping import MappedFiles
from actshuffle.storage.objects import Objects, open_objects
from actshuffle.storage.rows import read_apart, rows_per_second, tried_rows

READ_BYTES = 16 << 10  # bytes that the page cache copies in the time that one more read costs
KEY_ROWS = 1 << 18  # keys hashed at a time
LOOK_ROW = 60  # bytes of memory that a look at the keys needs for a row
RANGES = 256  # ranges of rows that are looked at, if memory allows so few
AT_ONCE = 1 << 15  # rows requested by separate reads at a time
PIECE = 1 << 20  # bytes of a column read at a time
LOOKS = 8  # samples of the page cache, for each object
READING = "reading"  # the stage that reads the source into the page cache
KEYS = "keys"  # the stage that looks at all keys, and its folder in scratch
DECODING = "decoding"  # the stage that brings rows into memory
WARM_BYTES = 256 << 20  # bytes that one task reads


class Gather:
    """Takes the rows of one leaf from the source of a job."""

    def __init__(self, job: Job) -> None:
        self.job, self._homes = job, homes(job)
        self._mapped: list[MappedFiles | None] = [None] * len(job.fields)
        if not job.plan.apart:
            # Rows in memory take it up, even when they are deleted, as long as a process has them mapped.
            self._mapped = map_fields(job) if job.plan.staged else kept(map_fields, job)
        for mapped in self._mapped:
            if mapped is not None:
                mapped.check()
        self._columns: dict[int, U8] = {}  # picked in advance

    def nbytes(self, rows: int) -> int:
        """Bytes of an arena that `find` needs for a leaf of some rows."""
        return sum(padded(rows * self.job.fields[number].row_bytes) for number in self._narrow())

    def find(self, leaf: int, memory: Arena) -> tuple[U64, U64]:
        """The first key words and the source rows of a leaf, in key order; `read` then has what it needs."""
        hi, self._rows = find_rows(self.job, leaf)
        order = np.argsort(self._rows) if self._narrow() else None
        for number in self._narrow():
            objects, field = self._homes[number]
            found = memory.take((len(hi), field.row_bytes))
            read_column(objects, field, self._rows[order], found)
            self._columns[number] = np.empty_like(found)
            self._columns[number][order] = found
        return hi, self._rows

    def read(self, number: int, start: int, stop: int, out: U8) -> None:
        """Fill ``out`` with rows ``[start, stop)`` of the leaf, of one field."""
        (objects, field), rows, mapped = self._homes[number], self._rows[start:stop], self._mapped[number]
        if mapped is not None:
            mapped.take(field.mapped_at(rows), out)
        elif number in self._columns:
            out[:] = self._columns[number][start:stop]
        else:
            read_rows(objects, field, rows, out, apart=self.job.plan.apart)

    def _narrow(self) -> list[int]:
        """Numbers of the fields of which a leaf reads the whole column."""
        unmapped = [n for n, mapped in enumerate(self._mapped) if mapped is None]
        return [n for n in unmapped if self.job.fields[n].row_bytes * self.job.plan.leaves <= READ_BYTES]


def map_fields(job: Job) -> list[MappedFiles | None]:
    """The files of plain rows, field by field; None for a field whose files cannot be mapped."""
    found = list[MappedFiles | None]()
    for objects, field in homes(job):
        keys = [key for key, _, _ in field.spans(0, job.plan.rows)]
        found.append(objects.mapped(keys, field.source_chunk_rows * field.row_bytes, field.slot_bytes))
    return found


def homes(job: Job) -> list[tuple[Objects, Field]]:
    """Where the rows of each field lie in plain files: in the source, or in memory, where a task decoded them."""
    source, memory = open_objects(job.source, direct=job.plan.apart), memory_objects(job)
    found = list[tuple[Objects, Field]]()
    for number, field in enumerate(job.fields):
        if memory is None or (field.source_key and source.is_local):
            found.append((source, field))
            continue
        step, leaf_rows = field.source_chunk_rows, job.plan.leaf_rows
        step = leaf_rows // step * step if step <= leaf_rows else leaf_rows  # fits into a task's memory
        found.append((memory, replace(field, source_key=f"rows/{number}.{{}}", source_chunk_rows=step)))
    return found


def stage_calls(job: Job) -> list[tuple[Job, int, int]]:
    """The calls of `stage` that decode all rows which lie in no plain files."""
    return [
        (job, number, at)
        for number, (_, field) in enumerate(homes(job))
        if field != job.fields[number]
        for at in range(-(-job.plan.rows // field.source_chunk_rows))
    ]


def stage(job: Job, number: int, at: int) -> tuple[int, U64, int]:
    """Decode some rows of a field into memory, unless they are there; returns the field, their digest, their bytes.

    They are there if a record of this job follows them, as a receipt follows the data of a task.
    """
    objects, field = homes(job)[number]
    key, step = field.source_key.format(at), field.source_chunk_rows
    start, stop = at * step, min((at + 1) * step, job.plan.rows)
    size, nbytes = step * field.row_bytes, (stop - start) * field.row_bytes
    body = unsealed(objects.get(f"{key}.json"))
    if body is not None and body.get("job") == job.identity and objects.size(key) == size:
        return number, from_hex(body["sum"]), nbytes
    rows = arena().reset(padded(nbytes)).take((stop - start, field.row_bytes))
    with lean_heap():
        Source(job.source, job.fill_missing, plain=job.is_plain).read(job.fields[number], start, rows)
    numbers = np.arange(start, stop, dtype=np.uint64)
    total = RowHash(job.keys.seed, 1 + number, field.row_bytes).total(rows, numbers)
    with objects.writer(key, size) as out:
        out.write(rows.data.cast("B"))
    objects.put(f"{key}.json", sealed({"job": job.identity, "sum": to_hex(total)}))
    return number, total, nbytes


# --- Keys -----------------------------------------------------------------------------------------------------


def look_calls(job: Job) -> list[tuple[Job, int]]:
    """The calls of `look` that cover all rows."""
    return [(job, number) for number in range(-(-job.plan.rows // _range_rows(job.plan)))]


def look(job: Job, number: int) -> tuple[int, I64, U64]:
    """Look at the keys of one range of rows, and store them by bin.

    Returns the range's number, the cuts between its bins, int64 ``(bins + 1,)``, and the digest of its keys.
    """
    step = _range_rows(job.plan)
    start, stop = number * step, min((number + 1) * step, job.plan.rows)
    hi = job.keys.hi(start, stop)
    words, cuts = lookup.binned(hi, start, lookup.bin_bits(job.plan.leaves))
    _scratch(job).put(f"{KEYS}/{number}", words.reshape(-1).view(np.uint8).data)
    return number, cuts, _keys_total(job.keys, hi, start)


def write_runs(job: Job, looks: Iterable[tuple[int, I64, U64]], staged: Iterable[tuple[int, U64, int]]) -> None:
    """Store what the leaves need to know of all looks, and the digests of what was looked at and decoded.

    Both come in any order.
    """
    plan, found = job.plan, sorted(looks, key=lambda one: one[0])
    ranks = np.minimum(np.arange(plan.leaves + 1, dtype=np.int64) * plan.leaf_rows, plan.rows)
    if found:
        table = lookup.runs(np.array([cuts for _, cuts, _ in found]), ranks)
        _scratch(job).put(f"{KEYS}/runs", table.astype("<i8").tobytes())
    total = sum((total for _, _, total in found), np.zeros(2, np.uint64))
    sums: dict[str, U64] = {}
    for number, digest, _ in staged:
        sums[job.fields[number].name] = sums.get(job.fields[number].name, np.zeros(2, np.uint64)) + digest
    body = {"job": job.identity, "keys": to_hex(total), "fields": {name: to_hex(s) for name, s in sums.items()}}
    job.at_scratch.put(f"{KEYS}/total", sealed(body))  # durable: a run whose leaves are all done looks at no keys
    job.at_scratch.settle([KEYS])


def find_rows(job: Job, leaf: int) -> tuple[U64, U64]:
    """First key words and numbers of a leaf's rows in key order, uint64 ``(m,)`` each, from the looks at all keys."""
    plan, objects = job.plan, _scratch(job)
    step = _range_rows(plan)
    ranges = -(-plan.rows // step)
    first, stop = plan.bucket_ranks(plan.levels - 1, leaf)
    line = np.empty(1 + 2 * ranges, "<i8")
    objects.read([Extent(f"{KEYS}/runs", leaf * line.nbytes, [line.view(np.uint8).data])])
    skip, begins, ends = first - int(line[0]), line[1 : 1 + ranges], line[1 + ranges :]
    size = np.minimum(step, plan.rows - step * np.arange(ranges))
    counts = ends - begins
    if (begins < 0).any() or (counts < 0).any() or (ends > size).any() or not 0 <= skip <= counts.sum() - stop + first:
        raise _other_rows(leaf, stop - first)
    words, at, extents = np.empty((2, int(counts.sum())), "<u8"), 0, list[Extent]()
    for number, (begin, count, rows) in enumerate(zip(begins.tolist(), counts.tolist(), size.tolist(), strict=True)):
        for row in range(2):
            view = words[row, at : at + count].view(np.uint8).data
            extents.append(Extent(f"{KEYS}/{number}", 8 * (row * rows + begin), [view]))
        at += count
    objects.read(extents)
    if (words[1] >= plan.rows).any():
        raise _other_rows(leaf, stop - first)
    return lookup.picked(job.keys, words, skip, stop - first)


def check_whole(job: Job, keys: U64, sums: dict[str, str]) -> None:
    """Check that a gather wrote every row once, by the digest of its keys, and every decoded row as it was decoded.

    ``sums`` are the digests of all rows of each field that was written.
    """
    body = unsealed(_scratch(job).get(f"{KEYS}/total"))
    if body is None or body.get("job") != job.identity or not is_hex(body.get("keys"), 32):
        if job.plan.staged:
            raise FormatError(f"{KEYS}/total in {job.scratch} is gone or damaged; --overwrite starts again")
        ranges = ((start, min(start + KEY_ROWS, job.plan.rows)) for start in range(0, job.plan.rows, KEY_ROWS))
        totals = (_keys_total(job.keys, job.keys.hi(start, stop), start) for start, stop in ranges)
        body = {"keys": to_hex(sum(totals, np.zeros(2, np.uint64)))}
    if to_hex(keys) != body["keys"]:
        raise ConservationError(
            "the leaves do not hold every row exactly once; nothing was published: --overwrite starts again"
        )
    if wrong := sorted(name for name, digest in body.get("fields", {}).items() if sums.get(name) != digest):
        raise ConservationError(
            f"rows of {', '.join(wrong)} are not those that were decoded into memory; nothing was published: "
            "--overwrite starts again"
        )


def _keys_total(keys: Keys, hi: U64, start: int) -> U64:
    """Digest of the first key words of the rows from ``start`` on, to which the digests of the leaves must add up."""
    total, row_hash = np.zeros(2, np.uint64), RowHash(keys.seed, 0, 8)
    for first in range(0, len(hi), KEY_ROWS):
        words = hi[first : first + KEY_ROWS].view(np.uint8).reshape(-1, 8)
        total += row_hash.total(words, np.arange(start + first, start + first + len(words), dtype=np.uint64))
    return total


def _range_rows(plan: Plan) -> int:
    """Rows that are looked at by one task: those of a leaf, or of several if leaves are many and memory allows."""
    fit = max(1, plan.model.spill_row_bytes // LOOK_ROW)
    return max(plan.leaf_rows * min(-(-plan.leaves // RANGES), fit), 1)


def _scratch(job: Job) -> Objects:
    """The scratch; a run that has leaves to do makes the keys in it again, so that they need not be durable."""
    return open_objects(job.scratch, fsync=False)


def _other_rows(leaf: int, rows: int) -> FormatError:
    return FormatError(
        f"leaf {leaf} has other rows than the {rows:,} of the plan: the keys in scratch are damaged; "
        "run again to look at them anew"
    )


# --- Rows -----------------------------------------------------------------------------------------------------


def read_column(objects: Objects, field: Field, rows: U64, out: U8) -> None:
    """Read ascending rows of a field, and every row between them, and pick them into uint8 ``(m, row_bytes)``."""
    width = field.row_bytes
    piece = np.empty((max(1, PIECE // width), width), np.uint8)
    at = 0
    while at < len(rows):
        first = int(rows[at])
        end = at + int(np.searchsorted(rows[at:], np.uint64(first + len(piece))))
        part = piece[: int(rows[end - 1]) - first + 1]
        objects.read([*field.extents(first, first + len(part), part.data.cast("B"))])
        picked = (rows[at:end] - np.uint64(first)).astype(np.intp)
        np.take(part, picked, axis=0, out=out[at:end], mode="clip")
        at = end


def read_rows(objects: Objects, field: Field, rows: U64, out: U8, *, apart: bool = False) -> None:
    """Read any rows of a field, in the order given, by one read each, into uint8 ``(m, row_bytes)``.

    ``apart``: from the disk, by many threads.
    """
    width, view = field.row_bytes, out.data.cast("B")
    for start in range(0, len(rows), AT_ONCE):
        goal, lots = view[start * width :], field.scattered(rows[start : start + AT_ONCE].astype(np.int64))
        if apart:
            read_apart(objects, width, lots, goal)
            continue
        for key, offsets, goals in lots:
            objects.read_rows(key, width, offsets, goal, goals)


def rate_apart(objects: Objects, field: Field, rows: int, seconds: float) -> float:
    """Rows of a field that the disk gives in a second, each from a random place, by trying for some ``seconds``."""

    def read(some: U64) -> None:
        read_rows(objects, field, some, memory[: len(some)], apart=True)

    memory = pages(tried_rows(field.row_bytes) * field.row_bytes).reshape(-1, field.row_bytes)
    return rows_per_second(read, rows, field.row_bytes, seconds)


def warm_calls(job: Job) -> list[tuple[Job, Field, int, int]]:
    """The calls of `warm` that cover all plain files of the source."""
    calls = []
    for (_, home), field in zip(homes(job), job.fields, strict=True):
        objects = -(-job.plan.rows // field.source_chunk_rows) if home == field else 0
        some = max(1, WARM_BYTES // (field.source_chunk_rows * field.row_bytes))
        calls += [(job, field, at, min(at + some, objects)) for at in range(0, objects, some)]
    return calls


def warm(job: Job, field: Field, first: int, stop: int) -> int:
    """Read objects of the source in order into the page cache, unless they are there; return their bytes."""
    objects, step, total = open_objects(job.source), field.source_chunk_rows, 0
    piece = memoryview(bytearray(PIECE))
    for key, _, size in field.spans(first * step, min(stop * step, job.plan.rows)):
        # The places are random, since a look at an absent page brings it into the cache.
        if not objects.is_cached(key, *(secrets.randbelow(size) for _ in range(LOOKS))):
            for at in range(0, size, PIECE):
                objects.read([Extent(key, at, [piece[: min(PIECE, size - at)]])])
        total += size
    return total
