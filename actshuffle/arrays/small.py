"""Small arrays and groups for records: Zarr v3 documents that are written whole and read whole."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.buffer import cpu
from zarr.storage import MemoryStore

from actshuffle.errors import FormatError
from actshuffle.storage.objects import Objects
from actshuffle.storage.remote import wait


def group_metadata(attributes: dict[str, Any]) -> bytes:
    """Text of a Zarr v3 group's ``zarr.json``."""
    document = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
    return json.dumps(document, indent=2).encode()


def put_array(objects: Objects, name: str, array: NDArray[Any]) -> dict[str, bytes]:
    """Store a small array as a Zarr v3 array in one chunk; returns the bytes stored, by key."""
    memory, files = MemoryStore(), dict[str, bytes]()
    zarr.create_array(
        memory,
        name=name,
        data=array,
        chunks=tuple(max(1, s) for s in array.shape),
        compressors=None,
        filters=None,
        chunk_key_encoding={"name": "default", "separator": "."},
        config={"write_empty_chunks": True},
    )
    for key in [f"{name}/c." + ".".join("0" * array.ndim), f"{name}/zarr.json"]:
        data = wait(memory.get(key, cpu.buffer_prototype))
        if data is not None:
            files[key] = data.to_bytes()
            objects.put(key, files[key])
    return files


def get_array(objects: Objects, name: str) -> NDArray[Any] | None:
    """The array that `put_array` stored, or None; raises `FormatError` if it is damaged."""
    text, data = objects.get(f"{name}/zarr.json"), None
    if text is None:
        return None
    try:
        meta = json.loads(text)
        shape, dtype = tuple(meta["shape"]), np.dtype(meta["data_type"]).newbyteorder("<")
        data = objects.get(f"{name}/c." + ".".join("0" * len(shape)))
        if 0 in shape:
            return np.zeros(shape, dtype)
        return np.frombuffer(data or b"", dtype).reshape(shape)
    except (ValueError, KeyError, TypeError) as err:
        raise FormatError(f"{name} is damaged ({err}); delete it and run again") from err
