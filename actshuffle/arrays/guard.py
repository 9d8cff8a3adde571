"""Check stores that others wrote before zarr sees them.

Zarr believes everything it reads.  So all its reads of a place come through here, which refuses

- metadata that is no UTF-8 JSON, is absurdly large, or gives a value twice (readers differ on which one counts);
- codecs beyond the list below: numcodecs can unpickle, which runs code from the store;
- chunks that would unpack to more than their place in the array: a few bytes of zstd or gzip can ask for terabytes.
  Where the packed bytes declare their size, that is checked; otherwise they are unpacked once, up to the limit, and
  discarded.

Consolidated metadata, a group's copy of its arrays' metadata, is out of date once an array has grown.  zarr never
sees it, so that each array is read by its own metadata.  files.py refuses links out of the root, devices and pipes.
"""

from __future__ import annotations

import asyncio
import bz2
import json
import lzma
import math
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import numpy as np
import zarr
from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest

from actshuffle.errors import MissingChunkError, SourceError, StorageError
from actshuffle.storage.directio import Extent
from actshuffle.storage.objects import Objects
from actshuffle.units import counted

T = TypeVar("T")
METADATA_NAMES = {"zarr.json", ".zarray", ".zgroup", ".zattrs", ".zmetadata"}
COPIES = ".zmetadata"  # Zarr v2's copies of the metadata below a group; v3 keeps them in the group's own document
METADATA_BYTES = 64 << 20
MEMBERS = 100_000  # names in a group's folder, each of which zarr asks for metadata

_UNPACKERS = {"zstd", "blosc", "lz4", "gzip", "zlib", "bz2", "lzma"}
_AT_THE_END = {"crc32c", "fletcher32"}  # checksums that follow their data
_SAME_SIZE = {"bytes", "transpose", "shuffle", "delta", "bitround", "quantize", "endian"}
_OTHER = {"fixedscaleoffset", "astype", "packbits", "crc32", "adler32", "jenkins_lookup3"}
_GROWTH = 16  # most bytes that a filter which changes the type makes of one: int8 to complex128


class Coding(NamedTuple):
    """How the chunks of an array are packed.

    ``packed`` names the codec that decodes first ("" if none), ``limit`` is the most bytes that it may give,
    ``index_bytes`` the length of a shard's index (0: no shards), at its start or end.
    """

    packed: str
    limit: int
    index_bytes: int = 0
    index_first: bool = False


def coding_of(array: zarr.Array[Any], where: str) -> Coding:
    """The coding of an array's chunks; raises `SourceError` with the name of a codec that is refused."""
    meta = array.metadata.to_dict()
    itemsize = array.dtype.itemsize
    if array.metadata.zarr_format == 2:
        filters = [described(c) for c in meta.get("filters") or ()]  # type: ignore[union-attr]
        chain = filters + [described(c) for c in (meta.get("compressor"),) if c]
        return Coding(*_checked(chain, math.prod(array.chunks) * itemsize, where))
    if meta.get("storage_transformers"):
        raise SourceError(f"{where} is stored by way of storage transformers; it is not read")
    chain = [described(c) for c in meta["codecs"]]  # type: ignore[union-attr]
    if not any(name == "sharding_indexed" for name, _ in chain):
        return Coding(*_checked(chain, math.prod(array.chunks) * itemsize, where))
    (name, settings), *others = chain
    inner = [described(c) for c in settings.get("codecs", ())]
    index = [n for n, _ in map(described, settings.get("index_codecs", ()))]
    if others or name != "sharding_indexed" or any(n == name for n, _ in inner):
        raise SourceError(f"{where} wraps its shards in other codecs, or in shards; it is not read")
    if index not in (["bytes"], ["bytes", "crc32c"]):
        raise SourceError(f"{where} has shards whose index is packed with {index}; it is not read")
    count = math.prod(s // c for s, c in zip(array.shards or (), array.chunks, strict=True))
    packed, limit = _checked(inner, math.prod(array.chunks) * itemsize, where)
    first = "start" in str(settings.get("index_location", "end"))
    return Coding(packed, limit, 16 * count + 4 * (index[-1] == "crc32c"), first)


def stored_bytes(array: zarr.Array[Any]) -> int | None:
    """Bytes of every stored chunk where no codec packs them, else None."""
    meta = array.metadata.to_dict()
    if array.metadata.zarr_format == 2:
        plain, names = not meta.get("filters") and not meta.get("compressor"), []
    else:
        names = [described(c)[0] for c in meta["codecs"]]  # type: ignore[union-attr]
        plain = set(names) <= {"bytes", "transpose", "crc32c"}
    full = math.prod(array.chunks) * array.dtype.itemsize + 4 * names.count("crc32c")
    return full if plain else None


def described(codec: Any) -> tuple[str, dict[str, Any]]:
    """Name and settings of a codec, from an object or the JSON of either format."""
    for method in ("to_dict", "get_config"):
        if hasattr(codec, method):
            codec = getattr(codec, method)()
            break
    settings = dict(codec.get("configuration") or codec)
    name = str(codec.get("name") or codec.get("id"))
    return name.removeprefix("numcodecs."), settings


def _checked(chain: list[tuple[str, dict[str, Any]]], size: int, where: str) -> tuple[str, int]:
    for name, settings in chain:
        if name not in _UNPACKERS | _AT_THE_END | _SAME_SIZE | _OTHER:
            raise SourceError(f"{where} is stored with codec {name!r}, which actshuffle does not run")
        for key in ("dtype", "astype", "encode_dtype", "decode_dtype"):
            if isinstance(settings.get(key), str) and np.dtype(settings[key]).hasobject:
                raise SourceError(f"{where}: codec {name!r} makes Python objects; it is not run")
    at = [i for i, (name, _) in enumerate(chain) if name in _UNPACKERS]
    outside = {name for name, _ in chain[at[0] + 1 :]} if at else set()
    if outside - _AT_THE_END or chain[at[0] if at else 0 :][:1] == [("lzma", {"format": 3})]:
        listed = " then ".join(name for name, _ in chain)
        raise SourceError(f"{where} is packed with {listed}, whose size cannot be told in advance")
    growth = _GROWTH if any(name in _OTHER for name, _ in chain) else 1
    return (chain[at[0]][0] if at else ""), growth * size + 1024


def check_chunk(data: bytes, packed: str, limit: int, where: str) -> None:
    """Refuse a packed chunk that would unpack to more than ``limit`` bytes."""
    size = _unpacked_size(data, packed, limit)
    if size > limit:
        raise SourceError(
            f"chunk {where} unpacks to {'more than ' * (size == limit + 1)}"
            f"{counted(size, 'byte')}, its array has room for {limit - 1024:,}"
        )


def _unpacked_size(data: bytes, packed: str, limit: int) -> int:
    """Bytes that a chunk unpacks to, as far as its header tells; 0 if it is damaged, which its codec reports better."""
    if packed == "blosc":
        return int.from_bytes(data[4:8], "little") if len(data) >= 16 else 0
    if packed == "lz4":
        return int.from_bytes(data[:4], "little")
    if packed == "zstd":
        return _zstd_size(data)
    if packed in ("gzip", "zlib"):
        return _counted(lambda: zlib.decompressobj(zlib.MAX_WBITS | 32), data, limit)
    if packed == "bz2":
        return _counted(bz2.BZ2Decompressor, data, limit)
    if packed == "lzma":
        return _counted(lambda: lzma.LZMADecompressor(memlimit=1 << 28), data, limit)
    return 0


def _counted(make: Callable[[], Any], data: bytes, limit: int) -> int:
    """Unpack stream after stream, discard the bytes and count them; stop past the limit."""
    total, piece = 0, 1 << 20
    try:
        while data and total <= limit:
            unpacker, rest = make(), data
            while not unpacker.eof and total <= limit:
                out = unpacker.decompress(rest, piece)
                total += len(out)
                rest = getattr(unpacker, "unconsumed_tail", b"")
                if not out and not rest and not unpacker.eof:
                    return total  # cut short
            data = unpacker.unused_data
    except (OSError, EOFError, zlib.error, lzma.LZMAError, MemoryError):
        return 0
    return min(total, limit + 1)


def _zstd_size(data: bytes) -> int:
    """The size that a zstd frame (RFC 8878) declares, else the most that its blocks can hold."""
    if data[:4] != b"\x28\xb5\x2f\xfd" or len(data) < 6:
        return 0
    flags = data[4]
    single, at = bool(flags & 0x20), 5
    at += (not single) + (0, 1, 2, 4)[flags & 3]
    width = (1 if single else 0, 2, 4, 8)[flags >> 6]
    if width:
        return int.from_bytes(data[at : at + width], "little") + (256 if width == 2 else 0)
    total = 0
    while at + 3 <= len(data):
        header = int.from_bytes(data[at : at + 3], "little")
        last, kind, size = header & 1, header >> 1 & 3, header >> 3
        total += size if kind < 2 else 128 << 10
        at += 3 + (1 if kind == 1 else size)
        if last:
            break
    return total


def check_document(data: bytes, where: str) -> None:
    """Refuse metadata that is not one unambiguous JSON document in UTF-8."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [k for k, _ in pairs]
            twice = next(k for k in names if names.count(k) > 1)
            raise SourceError(f"{where} says {twice[:80]!r} twice, and readers differ on which counts")
        return found

    try:
        json.loads(data.decode(), object_pairs_hook=once)
    except (ValueError, RecursionError) as err:
        raise SourceError(f"{where} is not JSON in UTF-8: {err}") from err


def without_copies(key: str, data: bytes) -> bytes | None:
    """A metadata document without consolidated metadata, which nobody updates when an array grows."""
    if key.rsplit("/", 1)[-1] == COPIES:
        return None
    document = json.loads(data)
    if not isinstance(document, dict) or document.pop("consolidated_metadata", None) is None:
        return data
    return json.dumps(document).encode()


class View(Store):
    """A place as a read-only Zarr store, through `Objects`, which checks all that zarr reads.

    ``strict``: an absent chunk is an error and not a fill value.
    """

    supports_writes = False
    supports_deletes = False
    supports_listing = True

    def __init__(self, objects: Objects, name: str, *, strict: bool = False) -> None:
        super().__init__(read_only=not self.supports_writes)
        self.objects, self.name, self.strict = objects, name, strict
        self._codings: dict[str, Coding] = {}

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = Store.__hash__

    def __str__(self) -> str:
        return self.name

    __repr__ = __str__

    def watch(self, array: zarr.Array[Any]) -> None:
        """Check the chunks of an array from now on, before zarr unpacks them."""
        self._codings[array.path] = coding_of(array, f"array {array.path!r} of {self.name}")

    async def get(self, key: str, prototype: Any, byte_range: ByteRequest | None = None) -> Any:
        data = await self.call(self._get, key, byte_range)
        return None if data is None else prototype.buffer.from_bytes(data)

    async def call(self, function: Callable[..., T], *args: Any) -> T:
        """Make a blocking call in another thread; in this one if the objects must be called in order."""
        if getattr(self.objects, "in_order", False):
            return function(*args)
        return await asyncio.to_thread(function, *args)

    def _get(self, key: str, wanted: ByteRequest | None) -> bytes | None:
        where = f"{key} of {self.name}"
        if key.rsplit("/", 1)[-1] in METADATA_NAMES:
            size = self.objects.size(key)
            if size is not None and size > METADATA_BYTES:
                raise SourceError(f"{where} has {counted(size, 'byte')}; metadata of that size is not read")
            data = None if size is None else self.objects.get(key)
            if data is not None:
                check_document(data, where)
            return data if data is None else without_copies(key, data)
        data = self.objects.get(key) if wanted is None else self._range(key, wanted)
        if data is None and self.strict:
            raise MissingChunkError(f"chunk {where} is missing")
        if data is not None:
            for piece, coding in self._packed(key, data, wanted):
                check_chunk(piece, coding.packed, coding.limit, where)
        return data

    def _range(self, key: str, wanted: ByteRequest) -> bytes | None:
        if isinstance(wanted, RangeByteRequest):
            start, stop = wanted.start, wanted.end
        else:
            size = self.objects.size(key)
            if size is None:
                return None
            stop = size
            start = wanted.offset if isinstance(wanted, OffsetByteRequest) else size - wanted.suffix
        if start < 0 or stop < start:
            raise SourceError(f"{key} of {self.name} is too short for bytes {start:,} to {stop:,}")
        data = bytearray(stop - start)
        try:
            self.objects.read([Extent(key, start, [memoryview(data)])])
        except StorageError as err:
            if isinstance(err.__cause__, FileNotFoundError):
                return None
            raise
        return bytes(data)

    def _packed(self, key: str, data: bytes, wanted: ByteRequest | None) -> Iterator[tuple[bytes, Coding]]:
        """The packed chunks among the bytes read of an object."""
        paths = [p for p in self._codings if not p or key.startswith(p + "/")]
        if not paths or not (coding := self._codings[max(paths, key=len)]).packed:
            return
        if not coding.index_bytes:
            yield data, coding
        elif wanted is None:
            at = 0 if coding.index_first else max(0, len(data) - coding.index_bytes)
            table = np.frombuffer(data[at : at + coding.index_bytes // 16 * 16], "<u8")
            for offset, size in table[: len(table) // 2 * 2].reshape(-1, 2).tolist():
                if offset < len(data):
                    yield data[offset : offset + size], coding
        elif not isinstance(wanted, SuffixByteRequest) and len(data) != coding.index_bytes:
            yield data, coding

    async def get_partial_values(self, prototype: Any, key_ranges: Any) -> list[Any]:
        return [await self.get(key, prototype, wanted) for key, wanted in key_ranges]

    async def exists(self, key: str) -> bool:
        return await self.call(self.objects.size, key) is not None

    async def list(self) -> AsyncIterator[str]:
        for key in await self.call(lambda: [*self.objects.list("")]):
            yield key

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        for key in await self.call(lambda: [*self.objects.list(prefix)]):
            yield key

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        names = await self.call(self.objects.names, prefix.rstrip("/"))
        if len(names) > MEMBERS:
            raise SourceError(
                f"{prefix or 'the top'} of {self.name} holds {len(names):,} names; no group has so many arrays"
            )
        for name in names:
            yield name

    async def set(self, key: str, value: Any) -> None:
        raise NotImplementedError("read-only")

    async def delete(self, key: str) -> None:
        raise NotImplementedError("read-only")
