"""Check every object of the source before the first byte is read.

Zarr reads an absent chunk as fill values, and a truncated one may fail hours into a run.  So: every
chunk that the metadata promises must be there; where its size is known in advance it must have it; and
the index of every shard must name all inner chunks and stay inside its file.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from actshuffle.arrays import virtual
from actshuffle.arrays.guard import stored_bytes
from actshuffle.arrays.metadata import ZarrArray, object_grid
from actshuffle.errors import MissingChunkError, RequestError, SourceError
from actshuffle.storage.directio import Extent
from actshuffle.storage.objects import Objects, open_objects
from actshuffle.storage.place import Place
from actshuffle.units import counted

FILLED = 10_000_000  # most chunks of an array with gaps
INDEX_BYTES = 64 << 20  # most bytes of the index of a shard
_EMPTY = (1 << 64) - 1  # a shard index's mark for an absent inner chunk


def take_inventory(place: Place, arrays: dict[str, ZarrArray], *, fill_missing: bool = False) -> tuple[str, set[str]]:
    """Check every object; return the source's identity and the arrays that have missing chunks.

    The identity is a digest of the metadata and of the keys and sizes of all objects.  Without
    ``fill_missing``, the first missing or damaged object raises `MissingChunkError` with its key.
    """
    if fill_missing and virtual.describe(place) is not None:
        raise RequestError(f"{place.url} has no chunks of its own that could be filled")
    if (behind := virtual.inventory(place, list(arrays))) is not None:
        return behind[0], set()
    seal, gappy = hashlib.sha256(), set()
    for name, array in arrays.items():
        seal.update(json.dumps([name, array.metadata.to_dict()], default=str, sort_keys=True).encode())
        for found in look(place, array, fill_missing=fill_missing):
            if found.problem:
                hint = (
                    ". Zarr reads absent chunks as fill values; if they were left out because they hold "
                    "nothing else, give --missing-chunks fill"
                )
                raise MissingChunkError(found.problem + hint * found.absent)
            if found.size is None:
                gappy.add(name)
            seal.update(f"{found.key} {found.size}\n".encode())
    return seal.hexdigest()[:32], gappy


class Found(NamedTuple):
    """One expected object: its size (None: absent, -1: unknown) and its fault, if it has one."""

    key: str
    size: int | None
    problem: str = ""
    absent: bool = False


def look(place: Place, array: ZarrArray, *, fill_missing: bool = False) -> Iterator[Found]:
    """Every object that an array's metadata promises, checked as far as that is possible without reading its data."""
    objects = open_objects(place)
    sizes = dict(objects.sizes(array.path))
    shard, known = _shard_codec(array), stored_bytes(array)
    full = math.prod(object_grid(array)) * array.dtype.itemsize
    # No codec makes more bytes than this; a larger file is a trap.
    inner = math.prod(s // c for s, c in zip(object_grid(array), array.chunks, strict=True))
    most = 2 * full + 64 * inner + (1 << 20)
    counts = [-(-n // c) for n, c in zip(array.shape, object_grid(array), strict=True)]  # objects along each axis
    if fill_missing and math.prod(counts) > FILLED:
        raise SourceError(
            f"{array.path or 'the array'} of {place} has {counted(math.prod(counts), 'chunk')}, of which "
            f"{len(sizes):,} may be there; no more than {FILLED:,} are filled"
        )
    for where in _places(counts):
        key = (f"{array.path}/" if array.path else "") + array.metadata.encode_chunk_key(where)
        size, here = sizes.get(key), f"{key} of {place.url}"
        problem, absent = "", False
        if size is None:
            absent = not fill_missing
            problem = f"chunk {here} is missing" if absent else ""
        elif size == 0:
            problem = f"chunk {here} is empty"
        elif known is not None and size not in (known, -1):
            problem = f"chunk {here} has {counted(size, 'byte')} instead of {known:,}"
        elif size > most:
            problem = f"chunk {here} has {counted(size, 'byte')}, too many for {counted(full, 'byte')} of rows"
        elif shard is not None and size > 0:
            fault, absent = _shard_fault(objects, array, shard, where, key, size, fill_missing)
            problem = fault and f"shard {here} {fault}"
        yield Found(key, size, problem, absent)


def _places(counts: list[int]) -> Iterator[tuple[int, ...]]:
    """All places of a grid, in order.  Unlike `itertools.product` it lists no axis, since a grid may be forged."""
    if not counts:
        yield ()
        return
    for first in range(counts[0]):
        for rest in _places(counts[1:]):
            yield first, *rest


def _shard_codec(array: ZarrArray) -> dict[str, Any] | None:
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


def _shard_fault(
    objects: Objects, array: ZarrArray, settings: dict[str, Any], at: tuple[int, ...], key: str, size: int, fill: bool
) -> tuple[str, bool]:
    """The fault that a shard's index shows, if any, and whether inner chunks are absent."""
    inner = settings["chunk_shape"]
    per = [s // c for s, c in zip(object_grid(array), inner, strict=True)]
    length = 16 * math.prod(per) + 4
    if length > INDEX_BYTES:
        return f"has {math.prod(per):,} inner chunks, more than are read", False
    if size < length:
        return f"has {size:,} bytes, less than its index of {length:,}: truncated", False
    raw = bytearray(length)
    objects.read([Extent(key, size - length, [memoryview(raw)])])
    table = np.frombuffer(raw[:-4], "<u8").reshape(*per, 2)
    # An edge shard need not hold the chunks that lie wholly outside the array.
    inside = np.ones(per, bool)
    for axis, (n, c, i, s) in enumerate(zip(per, inner, at, object_grid(array), strict=True)):
        keep = i * s + np.arange(n) * c < array.shape[axis]
        inside &= keep.reshape([-1 if a == axis else 1 for a in range(len(per))])
    absent = (table[..., 0] == _EMPTY) & inside
    if absent.any() and not fill:
        first = tuple(int(x) for x in np.argwhere(absent)[0])
        return f"lacks inner chunk {first} ({int(absent.sum()):,} in all)", True
    present = table[inside & ~absent]
    room = np.uint64(size - length)  # compared one by one: their sum may wrap round
    beyond = (present[:, 0] > room) | (present[:, 1] > room - np.minimum(present[:, 0], room))
    return ("is truncated: its index points past its end" if beyond.any() else ""), False
