"""Read rows of a source: from chunk files that are plain bytes of rows, else through zarr or a virtual reader."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice
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
from actshuffle.limits import STORE_PIECE, STORE_REQUESTS
from actshuffle.storage.buffers import arena, padded
from actshuffle.storage.directio import two_readers
from actshuffle.storage.objects import open_objects
from actshuffle.storage.place import Place

TILE_BYTES = 2 << 20  # in the last-level cache; larger pieces are no quicker, smaller ones cost more calls
LOOKS = 4  # rows by which the page cache is judged


class Source:
    """Reads rows of a job's source."""

    def __init__(self, place: Place, fill_missing: bool = False) -> None:
        self.place = place
        self.objects = open_objects(place)
        self._elsewhere = virtual.open_reader(place)
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
        """Read two objects at a time straight from their files, or from a store as many as it sends at once."""
        if not len(out):
            return
        extents = field.extents(start, start + len(out), out.data.cast("B"), once=True)
        first, at_once = 0, 2
        if not self.objects.is_local:
            at_once = max(2, STORE_REQUESTS * STORE_PIECE // (field.source_chunk_rows * field.row_bytes))
        with two_readers(self.objects.read, out.nbytes) as read:
            while some := [*islice(extents, at_once)]:
                read(some)
                stop = first + sum(e.views[0].nbytes for e in some) // field.row_bytes
                yield first, stop
                first = stop

    def tiles(self, field: Field, start: int, stop: int) -> Iterator[tuple[int, U8]]:
        """Rows ``[start, stop)`` in order, in pieces that share one piece of memory: (rows before it, its rows).

        What the page cache holds comes in pieces of `TILE_BYTES`, which are still in the processor's cache when the
        caller looks at them.  Anything else comes in one piece, as a disk, a server or a codec does best.
        """
        step = max(1, TILE_BYTES // field.row_bytes)
        tiled = stop - start > step and self._in_page_cache(field, start, stop)
        step = step if tiled else stop - start
        memory = arena().reset(padded(step * field.row_bytes)).take((step, field.row_bytes))
        for at in range(start, stop, step):
            rows = memory[: min(step, stop - at)]
            if tiled:
                self.objects.read([*field.extents(at, at + len(rows), rows.data.cast("B"))])
            else:
                self.read(field, at, rows)
            yield at - start, rows

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


def row_bytes_of(rows: NDArray[Any]) -> U8:
    """An array's rows as little-endian bytes, uint8 ``(m, row_bytes)``."""
    little = np.ascontiguousarray(rows, dtype=rows.dtype.newbyteorder("<"))
    width = little.dtype.itemsize * math.prod(little.shape[1:])
    return little.reshape(-1).view(np.uint8).reshape(len(little), width)
