"""A look at every object of the source before the first byte is read.

Zarr reads an absent chunk as fill values, and a truncated one may fail hours into a run.  So: every
chunk that the metadata promises must be there; where its size is known in advance it must have it; and
the index of every shard must name all inner chunks and stay inside its file.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import zarr

from actshuffle.arrays import is_raw, object_grid
from actshuffle.errors import MissingChunkError
from actshuffle.objects import Extent, LocalObjects, Objects, open_objects
from actshuffle.types import Place

_EMPTY = (1 << 64) - 1  # a shard index's mark for an absent inner chunk


def take_inventory(
    place: Place, arrays: dict[str, zarr.Array[Any]], *, fill_missing: bool = False
) -> tuple[str, set[str]]:
    """Check every object; return the source's identity and the arrays that have missing chunks.

    The identity is a digest of the metadata and of the keys and sizes of all objects.  Without
    ``fill_missing``, the first missing or damaged object raises `MissingChunkError` with its key.
    """
    objects, seal, gappy = open_objects(place), hashlib.sha256(), set()
    for name, array in arrays.items():
        seal.update(json.dumps([name, array.metadata.to_dict()], default=str, sort_keys=True).encode())
        sizes = _sizes(objects, array.path)
        raw, shard = is_raw(array), _shard_codec(array)
        full = math.prod(object_grid(array)) * array.dtype.itemsize
        for where, key in _expected_keys(array):
            size = sizes.get(key)
            if size is None:
                if not fill_missing:
                    raise MissingChunkError(
                        f"chunk {key} of {place.url} is missing. Zarr would read it as fill values; if it "
                        "was left out because it holds nothing else, give --missing-chunks fill"
                    )
                gappy.add(name)
                continue
            if raw and size not in (full, -1):
                raise MissingChunkError(f"chunk {key} of {place.url} has {size:,} bytes instead of {full:,}")
            if size == 0:
                raise MissingChunkError(f"chunk {key} of {place.url} is empty")
            if shard is not None and size > 0:
                _check_shard(objects, place, array, shard, where, key, size, fill_missing)
            seal.update(f"{key} {size}\n".encode())
    return seal.hexdigest()[:32], gappy


def _sizes(objects: Objects, path: str) -> dict[str, int]:
    """Size by key of what is under a path; -1 where the store does not tell sizes with names."""
    if isinstance(objects, LocalObjects):
        return {key: objects.size(key) or 0 for key in objects.list(path)}
    return dict.fromkeys(objects.list(path), -1)


def _expected_keys(array: zarr.Array[Any]) -> Iterator[tuple[tuple[int, ...], str]]:
    grid = object_grid(array)
    counts = [-(-n // c) for n, c in zip(array.shape, grid, strict=True)]
    for where in itertools.product(*map(range, counts)):
        key = array.metadata.encode_chunk_key(where)
        yield where, f"{array.path}/{key}" if array.path else key


def _shard_codec(array: zarr.Array[Any]) -> dict[str, Any] | None:
    """The sharding codec's settings when its index has the usual form, at the end with a crc32c."""
    if not array.shards:
        return None
    codec = json.loads(json.dumps(array.metadata.to_dict(), default=_plain))["codecs"][0]
    settings: dict[str, Any] = codec["configuration"]
    names = [c["name"] for c in settings.get("index_codecs", [])]
    usual = settings.get("index_location", "end") == "end" and names == ["bytes", "crc32c"]
    return settings if usual else None


def _plain(value: Any) -> Any:
    return value.to_dict() if hasattr(value, "to_dict") else str(value)


def _check_shard(
    objects: Objects, place: Place, array: zarr.Array[Any], settings: dict[str, Any],
    where: tuple[int, ...], key: str, size: int, fill_missing: bool,
) -> None:  # fmt: skip
    inner = settings["chunk_shape"]
    per = [s // c for s, c in zip(object_grid(array), inner, strict=True)]
    length = 16 * math.prod(per) + 4
    if size < length:
        raise MissingChunkError(
            f"shard {key} of {place.url} has {size:,} bytes, less than its index of {length:,}: truncated"
        )
    raw = bytearray(length)
    objects.read([Extent(key, size - length, [memoryview(raw)])])
    table = np.frombuffer(raw[:-4], "<u8").reshape(*per, 2)
    # An edge shard need not hold the chunks that lie wholly outside the array.
    inside = np.ones(per, bool)
    for axis, (n, c, i, s) in enumerate(zip(per, inner, where, object_grid(array), strict=True)):
        keep = i * s + np.arange(n) * c < array.shape[axis]
        inside &= keep.reshape([-1 if a == axis else 1 for a in range(len(per))])
    absent = (table[..., 0] == _EMPTY) & inside
    if absent.any() and not fill_missing:
        first = tuple(int(x) for x in np.argwhere(absent)[0])
        raise MissingChunkError(
            f"shard {key} of {place.url} lacks inner chunk {first} ({int(absent.sum()):,} in all); if "
            "chunks were left out because they hold only fill values, give --missing-chunks fill"
        )
    present = table[inside & ~absent]
    beyond = present[:, 0] + present[:, 1] > np.uint64(size - length)
    if beyond.any():
        raise MissingChunkError(f"shard {key} of {place.url} is truncated: its index points past its end")
