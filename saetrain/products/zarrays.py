"""Arrays of a store that tasks write chunk by chunk through a job's objects: Zarr version 3, a checksum in each chunk.

A chunk that is missing reads as its fill value, which no finished store holds: NaN, or the largest or smallest number.
So a reader can tell it from data.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec
from zarr.storage import MemoryStore

FILLS: Mapping[str, float | int] = {"f": np.nan, "u": -1, "i": -1}  # by kind; -1 is the largest of an unsigned type


@dataclass(frozen=True)
class Array:
    """An array of the store, in chunks of `chunk` rows; `about` defines its content."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    chunk: int
    about: str = field(default="", compare=False)

    @property
    def fill(self) -> Any:
        dtype = np.dtype(self.dtype)
        return np.array(FILLS[dtype.kind]).astype(dtype)[()]

    def _created(self) -> tuple[Any, dict[str, Any]]:
        held: dict[str, Any] = {}
        array = zarr.create_array(
            MemoryStore(held),
            name=self.name,
            shape=self.shape,
            dtype=self.dtype,
            chunks=(min(self.chunk, self.shape[0]), *self.shape[1:]),
            compressors=[Crc32cCodec()],
            fill_value=self.fill,
            attributes={"about": self.about},
            config={"write_empty_chunks": True},
        )
        return array, held

    def metadata(self) -> tuple[str, bytes]:
        """The key and the content of its zarr.json."""
        key = f"{self.name}/zarr.json"
        return key, self._created()[1][key].to_bytes()

    def encoded(self, number: int, rows: np.ndarray) -> tuple[str, bytes]:
        """The key and the content of chunk `number`, of these rows."""
        array, held = self._created()
        array[number * self.chunk : number * self.chunk + len(rows)] = rows
        key = f"{self.name}/c/{number}" + "/0" * (len(self.shape) - 1)
        return key, held[key].to_bytes()


def group_metadata(attributes: dict[str, Any]) -> bytes:
    """The content of a group's zarr.json."""
    return json.dumps({"zarr_format": 3, "node_type": "group", "attributes": attributes}, indent=1).encode()
