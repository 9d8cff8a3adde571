"""Read ranges of rows of one store straight into memory, for `actshuffle.loading.dataset`."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial

import numpy as np

from actshuffle.arrays.field import Field
from actshuffle.arrays.metadata import ZarrArray, source_field
from actshuffle.arrays.source import Source
from actshuffle.arraytypes import U8
from actshuffle.errors import MissingChunkError, StorageError, words_of
from actshuffle.storage.directio import Extent
from actshuffle.storage.place import Place

PIECE_BYTES = 4 << 20  # bytes that are decoded at a time of a shard with small inner chunks
KEPT_PIECES = 4  # decoded pieces of each field that are kept


def stored_field(name: str, array: ZarrArray) -> Field:
    """The field of an array to read by; of shards, it decodes pieces of a few inner chunks and not the whole."""
    found = source_field(name, array)
    if found.source_key:
        return found
    chunk, whole = array.chunks[0], found.source_chunk_rows
    piece = chunk * max(1, PIECE_BYTES // (chunk * found.row_bytes))
    return replace(found, source_chunk_rows=min(piece, whole))


class RowReader:
    """Reads of one store by one process."""

    def __init__(self, place: Place, rows: int) -> None:
        self.process = os.getpid()  # locks and event loops do not outlive a fork
        self._rows = rows
        self._source = Source(place)
        self._pieces = _Pieces()

    def reading(
        self, stored: Field, ranges: Sequence[tuple[int, int]], flat: U8, *, once: bool = False
    ) -> Callable[[], None]:
        """A call that reads row ranges one after the other into ``flat``, uint8 of exactly their bytes.

        All preparation is done here, so that little but reading is left to the thread that makes the call.
        """
        view, at = memoryview(flat.data), 0
        extents: list[Extent] = []
        calls: list[Callable[[], None]] = []
        width = stored.row_bytes
        for start, stop in ranges:
            end = at + (stop - start) * width
            if stored.source_key:
                extents += stored.extents(start, stop, view[at:end], once=once)
            else:
                calls.append(partial(self._decode, stored, start, stop, flat[at:end].reshape(-1, width)))
            at = end
        if extents:
            calls.append(self._source.objects.reading(extents))

        def read() -> None:
            try:
                for call in calls:
                    call()
            except StorageError as err:
                if isinstance(err.__cause__, FileNotFoundError):
                    raise MissingChunkError(f"a chunk is missing: {words_of(err)}") from err
                raise

        return read

    def is_cached(self, stored: Field, row: int) -> bool:
        """True if a read of the row would come straight from the page cache."""
        if not stored.source_key:
            return False
        key, offset, _ = next(stored.spans(row, row + 1))
        return self._source.objects.is_cached(key, offset)

    def _decode(self, stored: Field, start: int, stop: int, out: U8) -> None:
        """Decode whole pieces straight into ``out``; of pieces at the edges, copy the rows in the range."""
        step = stored.source_chunk_rows
        first, last = -(-start // step) * step, stop // step * step
        if first < last:
            self._source.read(stored, first, out[first - start : last - start])
        for a, b in [(start, min(first, stop)), (max(last, first), stop)]:
            if a < b:
                low = a // step * step
                piece = self._pieces.get((stored.name, low), partial(self._piece, stored, low))
                out[a - start : b - start] = piece[a - low : b - low]

    def _piece(self, stored: Field, first: int) -> U8:
        rows = min(stored.source_chunk_rows, self._rows - first)
        out = np.empty((rows, stored.row_bytes), np.uint8)
        self._source.read(stored, first, out)
        return out


class _Pieces:
    """The last few decoded pieces of each field.  Two threads that want the same one decode it once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: OrderedDict[tuple[str, int], Future[U8]] = OrderedDict()

    def get(self, key: tuple[str, int], make: Callable[[], U8]) -> U8:
        with self._lock:
            future = self._held.get(key)
            mine = future is None
            if future is None:
                future = self._held[key] = Future()
                same = [k for k in self._held if k[0] == key[0]]
                for old in same[:-KEPT_PIECES]:
                    del self._held[old]
            self._held.move_to_end(key)
        if mine:
            try:
                future.set_result(make())
            except BaseException as err:
                with self._lock:
                    self._held.pop(key, None)
                future.set_exception(err)
        return future.result()
