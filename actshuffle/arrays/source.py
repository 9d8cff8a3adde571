"""Read rows of a source: from chunk files that are plain bytes of rows, else through zarr or a virtual reader."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import cycle, islice
from random import randrange
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from actshuffle.arrays import virtual
from actshuffle.arrays.field import Field
from actshuffle.arrays.guard import View
from actshuffle.arraytypes import U8, U64
from actshuffle.errors import ActshuffleError, SourceError
from actshuffle.limits import HUGE, PAGE, STORE_PIECE, STORE_REQUESTS
from actshuffle.storage.buffers import arena, padded
from actshuffle.storage.directio import Extent, Read, ahead, pieces, two_readers
from actshuffle.storage.objects import open_objects
from actshuffle.storage.place import Place

TILE_BYTES = 4 << 20  # in the last-level cache; larger pieces are no quicker, smaller ones cost more calls
AHEAD_BYTES = 8 << 20  # of one request to a disk; meanwhile the caller looks at the piece before
LOOKS = 4  # rows by which the page cache is judged


class Source:
    """Reads rows of a job's source.  ``plain``: it is known to be no virtual one, so that nobody need look."""

    def __init__(self, place: Place, fill_missing: bool = False, *, plain: bool = False) -> None:
        self.place = place
        self.objects = open_objects(place)
        self._elsewhere = None if plain else virtual.open_reader(place)
        self._store = View(self.objects, str(place), strict=not fill_missing)
        self._arrays: dict[str, zarr.Array[Any]] = {}

    def read(self, field: Field, start: int, out: U8) -> None:
        """Read rows ``[start, start + len(out))`` into ``out``, uint8 ``(m, row_bytes)``, contiguous."""
        for _ in self.parts(field, start, out):
            pass

    def parts(self, field: Field, start: int, out: U8) -> Iterator[tuple[int, int]]:
        """`read` in parts; yields the range ``(first, stop)`` of rows of ``out`` that each part has filled."""
        if self._elsewhere is not None:
            self._elsewhere.read(field.name, start, out)
            yield 0, len(out)
            return
        if field.source_key:
            yield from self._raw_parts(field, start, out)
            return
        stop, step = start + len(out), field.read_rows
        for part in range(start // step, -(-stop // step)):
            a, b = max(start, part * step), min(stop, (part + 1) * step)
            out[a - start : b - start] = self._decode(field, a, b)
            yield a - start, b - start

    def _raw_parts(self, field: Field, start: int, out: U8) -> Iterator[tuple[int, int]]:
        """Read two objects at a time straight from their files; from a store, pieces of objects in two batches, one of
        which is on its way while the other is looked at."""
        if not len(out):
            return
        extents = field.extents(start, start + len(out), out.data.cast("B"), once=True)
        if self.objects.is_local:
            with two_readers(self.objects.read, out.nbytes) as read:
                yield from _filled(field.row_bytes, _in_turn(read, _batches(extents, 2)))
        else:
            parts = (part for extent in extents for part in pieces(extent, STORE_PIECE))
            yield from _filled(field.row_bytes, ahead(self.objects.read, _batches(parts, STORE_REQUESTS // 2)))

    def tiles(self, field: Field, start: int, stop: int) -> Iterator[tuple[int, U8]]:
        """Read rows ``[start, stop)`` in order; yields pieces of them, each with the number of rows before it.

        A piece is valid until the caller asks for the next one.

        What the page cache holds comes in pieces of `TILE_BYTES`, which are still in the processor's cache when the
        caller looks at them; what lies on a disk in pieces of `AHEAD_BYTES`, of which the next is read meanwhile.
        Anything else comes in one piece, as a server or a codec does best.
        """
        plain = self._elsewhere is None and field.source_key and self.objects.is_local
        if not plain or (stop - start) * field.row_bytes <= TILE_BYTES:
            rows = arena().reset(padded((stop - start) * field.row_bytes)).take((stop - start, field.row_bytes))
            self.read(field, start, rows)
            yield 0, rows
        elif self._in_page_cache(field, start, stop):
            for at, rows in _turns(field, start, stop, TILE_BYTES, 1):
                self.objects.read([*field.extents(at, at + len(rows), rows.data.cast("B"))])
                yield at - start, rows
        else:
            made = list[tuple[int, U8]]()

            def batches() -> Iterator[list[Extent]]:
                for at, rows in _turns(field, start, stop, AHEAD_BYTES, 2):
                    made.append((at - start, rows))
                    yield [*field.extents(at, at + len(rows), rows.data.cast("B"), once=True)]

            for _ in ahead(self.objects.read, batches()):
                yield made.pop(0)

    def _in_page_cache(self, field: Field, start: int, stop: int) -> bool:
        """True if the page cache seems to hold plain bytes of some rows: looks at a few of them."""
        if self._elsewhere is not None or not field.source_key:
            return False
        at = [randrange(start, stop) for _ in range(LOOKS)]
        return all(self.objects.is_cached(*next(field.spans(row, row + 1))[:2]) for row in at)

    def numbers(self, start: int, stop: int) -> U64:
        """The numbers of rows ``[start, stop)`` in ``source_row``, uint64."""
        if self._elsewhere is not None:
            return self._elsewhere.numbers(start, stop)
        return np.arange(start, stop, dtype=np.uint64)

    def _decode(self, field: Field, start: int, stop: int) -> U8:
        try:
            if field.source not in self._arrays:
                node = zarr.open(self._store, path=field.source, mode="r")
                assert isinstance(node, zarr.Array)
                self._store.watch(node)
                self._arrays[field.source] = node
            rows = np.asarray(self._arrays[field.source][start:stop])
        except ActshuffleError:
            raise
        except Exception as err:  # each codec raises its own kinds
            raise SourceError(
                f"cannot decode rows {start:,} to {stop:,} of {field.source or 'the array'} in "
                f"{self.place.url}: {type(err).__name__}: {err}"
            ) from err
        return row_bytes_of(rows)


def _turns(field: Field, start: int, stop: int, nbytes: int, count: int) -> Iterator[tuple[int, U8]]:
    """Cut rows ``[start, stop)`` into ranges of some ``nbytes``; yields where each begins, and memory for its rows.

    ``count`` pieces of memory take turns.  Ranges hold whole pages where rows allow that, as O_DIRECT does best.
    """
    even = PAGE // math.gcd(PAGE, field.row_bytes)
    step = min(max(1, nbytes // field.row_bytes // even * even or nbytes // field.row_bytes), stop - start)
    memory = arena().reset(count * padded(step * field.row_bytes), huge_from=HUGE)
    pieces = cycle([memory.take((step, field.row_bytes)) for _ in range(count)])
    for at, piece in zip(range(start, stop, step), pieces, strict=False):
        yield at, piece[: min(step, stop - at)]


def _batches(extents: Iterator[Extent], size: int) -> Iterator[list[Extent]]:
    while some := [*islice(extents, size)]:
        yield some


def _in_turn(read: Read, batches: Iterable[list[Extent]]) -> Iterator[list[Extent]]:
    for batch in batches:
        read(batch)
        yield batch


def _filled(row_bytes: int, batches: Iterable[Sequence[Extent]]) -> Iterator[tuple[int, int]]:
    """The ranges of rows that are whole after each batch that has been read."""
    nbytes = first = 0
    for batch in batches:
        nbytes += sum(len(view) for extent in batch for view in extent.views)
        yield first, nbytes // row_bytes
        first = nbytes // row_bytes


def row_bytes_of(rows: NDArray[Any]) -> U8:
    """An array's rows as little-endian bytes, uint8 ``(m, row_bytes)``."""
    little = np.ascontiguousarray(rows, dtype=rows.dtype.newbyteorder("<"))
    width = little.dtype.itemsize * math.prod(little.shape[1:])
    return little.reshape(-1).view(np.uint8).reshape(len(little), width)
