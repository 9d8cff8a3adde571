"""Write output arrays, one whole object (a chunk or a shard) at a time; each object has one writer."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import zarr
from zarr.abc.store import ByteRequest

from actshuffle.arrays.field import Field
from actshuffle.arrays.guard import View
from actshuffle.arraytypes import U8
from actshuffle.storage.objects import Objects, open_objects
from actshuffle.storage.place import Place


def write_object(place: Place, field: Field, number: int, rows: U8, count: int, *, fsync: bool) -> None:
    """Write object ``number`` of an array from ``rows``, the buffer of a whole object with ``count`` rows in use."""
    if field.raw_output:
        rows[count:] = 0  # beyond the end of the array; every chunk file has full size
        open_objects(place, fsync=fsync).put(field.object_key.format(number), rows.data.cast("B"))
        return
    array = coded_array(place, field, fsync)
    start = number * field.object_rows
    typed = rows[:count].reshape(-1).view(array.dtype.newbyteorder("<"))
    array[start : start + count] = typed.reshape(count, *field.row_shape)


@lru_cache(maxsize=16)
def coded_array(place: Place, field: Field, fsync: bool) -> zarr.Array[Any]:
    objects = open_objects(place, fsync=fsync)
    store = _Staged(objects, field)
    # Set here, since zarr ignores the argument when it opens an array.
    with zarr.config.set({"array.write_empty_chunks": True}):
        return zarr.open_array(store, path=field.name, mode="r+")


class _Staged(View):
    """The destination as zarr sees it: with metadata that is not published yet, and writes through `Objects`.

    It shows no chunk, so that zarr adds nothing to an object that a killed writer left.
    """

    supports_writes = True

    def __init__(self, objects: Objects, field: Field) -> None:
        super().__init__(objects, field.name)
        self._field = field

    async def get(self, key: str, prototype: Any, byte_range: ByteRequest | None = None) -> Any:
        if key == f"{self._field.name}/zarr.json":
            return prototype.buffer.from_bytes(self._field.metadata.encode())
        return None

    async def set(self, key: str, value: Any) -> None:
        data = memoryview(value.as_numpy_array()).cast("B")
        await self.call(self.objects.put, key, data)
