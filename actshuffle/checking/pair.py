"""The two stores that `verify` compares, as its tasks see them, and the faults that they find."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from actshuffle.arrays.field import Field
from actshuffle.arrays.source import Source
from actshuffle.arraytypes import U64
from actshuffle.checking.keyorder import order_of
from actshuffle.errors import words_of
from actshuffle.ordering.keys import Keys
from actshuffle.storage.place import Place

SLICE_BYTES = 32 << 20  # bytes of rows held at a time


@dataclass(frozen=True)
class Problem:
    """One fault, and its place."""

    kind: str  # "missing", "order", "rows", "unreadable", "metadata"
    where: str  # the object's key, or the array's name
    detail: str

    def __str__(self) -> str:
        return f"{self.where}: {self.detail}"


def unreadable(rows: tuple[int, int], err: Exception) -> Problem:
    """The fault of some output rows, of which it is not known which object cannot be read."""
    return Problem("unreadable", f"output rows {rows[0]:,} to {rows[1]:,}", words_of(err))


def object_key(field: Field, number: int) -> str:
    return field.object_key.format(number)


def slice_rows(row_bytes: int) -> int:
    """Rows of one width that are held at a time."""
    return max(1, SLICE_BYTES // row_bytes)


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

    @property
    def row_bytes(self) -> int:
        return sum(field.row_bytes for field in self.fields)

    @property
    def outputs(self) -> tuple[Field, ...]:
        """All arrays of the destination."""
        return self.fields if self.source_row is None else (*self.fields, self.source_row)

    def rows_of(self, store: Source, start: int, stop: int) -> U64:
        """The source row of each output row: as recorded, or else by the seed."""
        if self.source_row is None:
            return order_of(self.keys, self.rows)[start:stop]
        data = np.empty((stop - start, 8), np.uint8)
        store.read(self.source_row, start, data)
        return data.view("<u8")[:, 0]

    def order_problem(self, row: int) -> Problem:
        """The fault of an output row whose key does not exceed the one before."""
        if self.source_row is None:
            return Problem("order", "the order", f"keys do not ascend at output row {row:,}")
        size = self.source_row.source_chunk_rows
        where, last = (object_key(self.source_row, r // size) for r in (row, max(row - 1, 0)))
        since = "" if where == last else f", the first after {last}"
        return Problem("order", where, f"keys do not ascend at output row {row:,}{since}")

    def differing_rows(self, number: int, store: Source, start: int, rows: U64) -> NDArray[np.int64]:
        """The output rows from ``start`` on whose bytes differ from source rows ``rows``, of one field."""
        field, theirs = self.fields[number], self.source_fields[number]
        source = Source(self.source, self.fill_missing)
        wrong = [np.zeros(0, np.int64)]
        for a in range(0, len(rows), step := slice_rows(field.row_bytes)):
            part = rows[a : a + step]
            ours = np.empty((len(part), field.row_bytes), np.uint8)
            store.read(field, start + a, ours)
            valid = part < np.uint64(self.rows)
            expected = np.zeros_like(ours)
            for i in np.argsort(part, kind="stable"):  # in source order, so that each chunk is decoded once
                if valid[i]:
                    source.read(theirs, int(part[i]), expected[i : i + 1])
            wrong.append(start + a + np.flatnonzero((ours != expected).any(axis=1) | ~valid))
        return np.concatenate(wrong)
