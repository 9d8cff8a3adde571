"""The rows of one task in memory, column by column, and their way from the source."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from actshuffle.arrays.source import Source
from actshuffle.arraytypes import U8, U64
from actshuffle.engine.job import Job, Kind
from actshuffle.ordering.digest import RowHash
from actshuffle.storage.buffers import Arena, padded


@dataclass(frozen=True)
class Columns:
    """m rows: hi words and source rows, each uint64 ``(m,)``, and per field uint8 ``(m, row_bytes)``."""

    hi: U64
    source_row: U64
    fields: tuple[U8, ...]

    @classmethod
    def allocate(cls, job: Job, arena: Arena, rows: int) -> Columns:
        hi, source_row = arena.take((rows,), np.uint64), arena.take((rows,), np.uint64)
        return cls(hi, source_row, tuple(arena.take((rows, f.row_bytes)) for f in job.fields))

    def parts(self) -> list[U8]:
        """All columns as uint8 ``(m, width)``, in spill order."""
        return [self.hi.view(np.uint8).reshape(-1, 8), self.source_row.view(np.uint8).reshape(-1, 8), *self.fields]

    def rows(self, start: int, stop: int) -> Columns:
        """Views of rows ``[start, stop)``."""
        fields = tuple(field[start:stop] for field in self.fields)
        return Columns(self.hi[start:stop], self.source_row[start:stop], fields)

    def hashes(self, job: Job, of: Iterable[int] | None = None) -> Iterator[U64]:
        """Row hashes, uint64 ``(m, 2)``, of the hi words (number 0) and the fields (from 1), or of those in ``of``."""
        hashed = [self.parts()[0], *self.fields]
        for number in range(len(hashed)) if of is None else of:
            part = hashed[number]
            yield RowHash(job.keys.seed, number, part.shape[1]).hashes(part, self.source_row)

    @staticmethod
    def nbytes(job: Job, rows: int) -> int:
        """Bytes of an arena that holds the columns of some rows."""
        widths = [8, 8, *(f.row_bytes for f in job.fields)]
        return sum(padded(rows * w) for w in widths)

    def read_source(self, job: Job, start: int) -> Iterator[tuple[Sequence[int], int, int]]:
        """Fill the columns from source row ``start`` on.

        Yields (parts, a, b) when these parts (0: hi words; then fields from 1) of rows ``[a, b)`` are filled.
        """
        stop = start + len(self.hi)
        source = Source(job.source, job.fill_missing, plain=job.is_plain)
        self.source_row[:] = numbers = source.numbers(start, stop)
        first, last = int(numbers[0]), int(numbers[-1])
        if not job.kind.sorts:
            self.hi[:] = 0  # a copy does not sort
        elif job.kind is Kind.SHUFFLE and last - first == len(numbers) - 1:  # a shuffle's numbers ascend
            self.hi[:] = job.keys.hi(first, last + 1)
        else:
            self.hi[:] = job.keys.hi_at(numbers)
        yield [0], 0, len(self.hi)
        for number, field in enumerate(job.fields):
            for a, b in source.parts(field, start, self.fields[number]):
                yield [1 + number], a, b
