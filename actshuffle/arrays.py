"""Zarr arrays in, Zarr arrays out: what the source holds, how its rows are read, how output is written.

Where chunk files are nothing but the bytes of their rows (no compression, no sharding, rows not cut),
rows go between file and our buffers directly: one copy, by the kernel.  Everything else goes through
zarr, one source chunk or one output object at a time, so that memory stays what the plan says.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.abc.store import ByteRequest
from zarr.buffer import cpu
from zarr.codecs import Crc32cCodec
from zarr.dtype import data_type_registry
from zarr.errors import ZarrUserWarning
from zarr.storage import MemoryStore

from actshuffle import virtual
from actshuffle.bfloat16 import BFloat16
from actshuffle.digest import U8
from actshuffle.errors import ActshuffleError, FormatError, RequestError, SourceError
from actshuffle.guard import View, coding_of
from actshuffle.keys import U64
from actshuffle.objects import Objects, open_objects, wait
from actshuffle.reading import Extent, two_readers
from actshuffle.types import Field, Job, Place

data_type_registry.register(BFloat16._zarr_v3_name, BFloat16)  # also when not pip-installed

OUR_GROUP = "_actshuffle"  # receipts while running; the completion marker when done
SOURCE_ROW = "source_row"
CODECS = ("none", "crc32c", "zstd")


def open_node(place: Place) -> zarr.Array[Any] | zarr.Group:
    """The array or group at a place, read-only, or a `SourceError` that says what is there instead."""
    try:
        path = "" if virtual.describe(place) is None else virtual.ARRAYS
        node = zarr.open(View(open_objects(place), str(place)), path=path, mode="r")
        if not isinstance(node.metadata.attributes, dict):
            raise SourceError(f"attributes of {place} are no JSON object")
        return node
    except (FileNotFoundError, NotADirectoryError) as err:
        if open_objects(place).size("") is None and "://" not in place.url:
            raise SourceError(f"no such source: {place.url}") from err
        if next(iter(open_objects(place).list(OUR_GROUP)), None) is not None:
            raise SourceError(f"{place.url} is half done, or damaged: there is no zarr.json") from err
        raise SourceError(f"not a Zarr array or group (no zarr.json, .zarray or .zgroup): {place.url}") from err
    except ActshuffleError:
        raise
    except Exception as err:  # whatever zarr makes of damaged metadata
        raise _unreadable(place, err) from err


def _unreadable(place: Place, err: Exception) -> SourceError:
    text = str(err) if len(str(err)) < 500 else str(err)[:500] + " ..."
    return SourceError(f"cannot read Zarr metadata of {place}: {type(err).__name__}: {text}")


def source_arrays(place: Place, names: Sequence[str] | None = None) -> dict[str, zarr.Array[Any]]:
    """The arrays to shuffle together, by output name; checked to be fixed-width and of equal length."""
    node = open_node(place)
    if isinstance(node, zarr.Array):
        if names not in (None, ["data"], ("data",)):
            raise RequestError(f"{place.url} is one array; fields {names} cannot be chosen from it")
        arrays = {"data": node}
    else:
        members = _members(place, node)
        groups = sorted(k for k, v in members.items() if isinstance(v, zarr.Group) and k != OUR_GROUP)
        arrays = {k: v for k, v in sorted(members.items()) if isinstance(v, zarr.Array)}
        if names is not None:
            absent = sorted(set(names) - set(arrays))
            if absent:
                raise RequestError(f"no array named {absent[0]!r} in {place.url}; it has {sorted(arrays)}")
            arrays = {k: arrays[k] for k in sorted(set(names))}
        elif groups:
            raise SourceError(
                f"{place.url} holds groups {groups} beside its arrays, which would be left out: "
                "give the path of one group, or choose arrays with --fields"
            )
        if not arrays:
            raise SourceError(f"no arrays in {place.url}")
    for name, array in arrays.items():
        _check_array(place, name, array)
    lengths = {name: array.shape[0] for name, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{k}: {v:,}" for k, v in lengths.items())
        raise SourceError(f"arrays of unequal length in {place.url} ({listed}); choose some with --fields")
    return arrays


def _members(place: Place, group: zarr.Group) -> dict[str, zarr.Array[Any] | zarr.Group]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ZarrUserWarning)  # stray files beside arrays are not ours to judge
        try:
            return dict(group.members())
        except ActshuffleError:
            raise
        except Exception as err:
            raise _unreadable(place, err) from err


def _check_array(place: Place, name: str, array: zarr.Array[Any]) -> None:
    where = f"array {name!r} of {place}"
    if name == OUR_GROUP or not _is_plain(name) or array.path.rsplit("/", 1)[-1] not in (name, ""):
        raise SourceError(f"{where}: its name cannot be that of an array in the output")
    if not isinstance(array.metadata.attributes, dict):
        raise SourceError(f"{where} has attributes that are no JSON object")
    if array.ndim == 0:
        raise SourceError(f"{where} is a scalar, it has no rows; choose arrays with --fields")
    dtype = array.dtype
    if dtype.hasobject or dtype.kind in "OT" or dtype.itemsize == 0:
        raise SourceError(f"{where} has dtype {dtype}, whose items have no fixed width; it cannot be shuffled")
    if 0 in array.shape[1:]:
        raise SourceError(f"{where} has shape {array.shape}: its rows are empty")
    if min(*array.shape, *object_grid(array)) < 0 or min(*object_grid(array), *array.chunks) < 1:
        raise SourceError(f"{where} has shape {array.shape} in chunks of {object_grid(array)}")
    coding_of(array, where)


def _is_plain(name: str) -> bool:
    """May this be a key on any store?"""
    return name.isprintable() and name not in ("", ".", "..") and not set(name) & set("/\\")


def source_field(name: str, array: zarr.Array[Any]) -> Field:
    """A source array as the engine sees it."""
    row_shape = tuple(array.shape[1:])
    grid = object_grid(array)
    raw = is_raw(array) and not array.path.startswith(virtual.ARRAYS)
    key = array.metadata.encode_chunk_key((_MARK, *(0 for _ in row_shape)))
    template = (f"{_literal(array.path)}/" if array.path else "") + key.replace(str(_MARK), "{}")
    row_bytes = array.dtype.itemsize * math.prod(row_shape)
    # Through zarr, enough chunks at a time to keep its decoders busy, and no more for memory's sake.
    chunks = max(1, READ_BYTES // max(1, array.chunks[0] * row_bytes))
    return Field(
        name=name,
        source=array.path,
        row_bytes=row_bytes,
        row_shape=row_shape,
        source_chunk_rows=grid[0],
        read_rows=grid[0]
        if raw
        else (min(chunks * array.chunks[0], grid[0]) if array.shards else chunks * array.chunks[0]),
        source_key=template if raw else "",
        object_key=template,
    )


# Decoded bytes of one read through zarr; twice as many are no faster, and take 24 MB more.
READ_BYTES = 8 << 20


def _literal(text: str) -> str:
    """Text that `str.format` leaves as it is."""
    return text.replace("{", "{{").replace("}", "}}")


_MARK = 987654321  # a chunk number that no other part of a key can hold


def object_grid(array: zarr.Array[Any]) -> tuple[int, ...]:
    """Shape of one stored object: a shard where there are shards, else a chunk."""
    return tuple(array.shards or array.chunks)


def is_raw(array: zarr.Array[Any]) -> bool:
    """Are chunk files the plain little-endian bytes of whole rows, in order?"""
    grid = object_grid(array)
    if grid[1:] != tuple(array.shape[1:]) or array.dtype != array.dtype.newbyteorder("<"):
        return False
    meta: dict[str, Any] = dict(array.metadata.to_dict())
    if array.metadata.zarr_format == 2:
        plain = not meta.get("compressor") and not meta.get("filters")
        return plain and (meta.get("order") == "C" or array.ndim == 1)
    codecs: list[dict[str, Any]] = [c if isinstance(c, dict) else c.to_dict() for c in meta["codecs"]]
    endian = (codecs[0].get("configuration") or {}).get("endian", "little")
    return len(codecs) == 1 and codecs[0]["name"] == "bytes" and str(endian) in ("little", "Endian.little")


def source_buffer(arrays: Sequence[zarr.Array[Any]], *, remote: bool = False) -> int:
    """Bytes held while rows are decoded through zarr (encoded, decoded, converted) or fetched."""
    fields = [source_field("", a) for a in arrays if remote or not is_raw(a)]
    return max((3 * f.read_rows * f.row_bytes for f in fields), default=0)


def output_field(
    field: Field, array: zarr.Array[Any] | None, rows: int, chunk_rows: int, object_rows: int, codec: str
) -> Field:
    """The field with its output array's metadata; ``array`` None makes the ``source_row`` array."""
    if array is None:
        dtype, fill, attributes, dims = np.dtype("<u8"), 0, {}, None
    else:
        bf16 = array.metadata.to_dict().get("data_type") == "bfloat16"
        dtype = BFloat16() if bf16 else array.dtype.newbyteorder("<")  # type: ignore[assignment]
        fill, attributes, dims = array.fill_value, dict(array.attrs), _dimension_names(array)
        attributes.pop("_ARRAY_DIMENSIONS", None)
        if array.dtype.kind == "V" and object_rows != chunk_rows:
            raise RequestError(
                f"zarr cannot shard arrays of dtype {array.dtype} ({field.name!r}): give --chunks-per-shard 1, "
                "or leave the array out with --fields"
            )
    if dims is None:
        dims = ["row", *(f"{field.name}_{i + 1}" for i in range(len(field.row_shape)))]
    memory = MemoryStore()
    zarr.create_array(
        memory,
        name=field.name,
        shape=(rows, *field.row_shape),
        dtype=dtype,
        chunks=(chunk_rows, *field.row_shape),
        fill_value=fill,
        attributes=attributes,
        shards=None if object_rows == chunk_rows else (object_rows, *field.row_shape),
        compressors={"none": None, "crc32c": [Crc32cCodec()], "zstd": "auto"}[codec],
        filters=None,
        dimension_names=dims,
        # A flat key: with "/" every chunk of a matrix would be a directory of its own.
        chunk_key_encoding={"name": "default", "separator": "."},
    )
    text = wait(memory.get(f"{field.name}/zarr.json", cpu.buffer_prototype))
    assert text is not None
    return Field(
        **{
            **vars(field),
            "metadata": text.to_bytes().decode(),
            "chunk_rows": chunk_rows,
            "object_rows": object_rows,
            "raw_output": codec == "none" and object_rows == chunk_rows,
            "object_key": f"{_literal(field.name)}/c.{{}}" + ".0" * len(field.row_shape),
        }
    )


def _dimension_names(array: zarr.Array[Any]) -> list[str | None] | None:
    if array.metadata.zarr_format == 2:
        names = array.attrs.get("_ARRAY_DIMENSIONS")
        return list(names) if isinstance(names, list) and len(names) == array.ndim else None
    names = array.metadata.dimension_names
    return None if names is None or None in names else list(names)


class Source:
    """Reads rows of a job's source."""

    def __init__(self, place: Place, fill_missing: bool = False) -> None:
        self.place = place
        self.objects = open_objects(place)
        self._elsewhere = virtual.open_reader(place)
        self._store = View(self.objects, str(place), strict=not fill_missing)
        self._arrays: dict[str, zarr.Array[Any]] = {}

    def read(self, field: Field, start: int, out: U8) -> None:
        """Rows ``[start, start + len(out))`` into ``out``, uint8 ``(m, row_bytes)``, contiguous."""
        for _ in self.parts(field, start, out):
            pass

    def parts(self, field: Field, start: int, out: U8) -> Iterator[tuple[int, int]]:
        """The same, a part at a time; yields which rows of ``out`` are there, ``(first, stop)``."""
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
        """Two chunks at a time, straight from their files."""
        stop, step = start + len(out), field.source_chunk_rows
        edges = [start, *range((start // step + 1) * step, stop, step), stop]
        parts = list(pairwise(edges)) if len(out) else []
        with two_readers(self.objects.read, out.nbytes) as read:
            for two in (parts[at : at + 2] for at in range(0, len(parts), 2)):
                extents = [
                    Extent(
                        field.source_key.format(a // step),
                        a % step * field.row_bytes,
                        [out[a - start : b - start].data.cast("B")],
                        once=True,
                    )
                    for a, b in two
                ]
                read(extents)
                yield two[0][0] - start, two[-1][1] - start

    def numbers(self, start: int, stop: int) -> U64:
        """What rows ``[start, stop)`` are called in ``source_row``."""
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
        except Exception as err:  # any codec's own complaint
            raise SourceError(
                f"cannot decode rows {start:,} to {stop:,} of {field.source or 'the array'} in "
                f"{self.place.url}: {type(err).__name__}: {err}"
            ) from err
        return row_bytes_of(rows)


def row_bytes_of(rows: NDArray[Any]) -> U8:
    """An array's rows as little-endian bytes, uint8 ``(m, row_bytes)``."""
    little = np.ascontiguousarray(rows, dtype=rows.dtype.newbyteorder("<"))
    width = little.dtype.itemsize * math.prod(little.shape[1:])
    return np.frombuffer(little.data if len(little) else b"", np.uint8).reshape(len(little), width)


class Output:
    """Writes whole output objects of a job, each with one writer."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.objects: Objects = open_objects(job.destination, fsync=job.fsync)

    def write(self, field: Field, number: int, rows: U8, count: int) -> None:
        """Object ``number`` from ``rows``, a whole object's buffer of which ``count`` rows are in use."""
        if field.raw_output:
            rows[count:] = 0  # beyond the end of the array; every chunk file has full size
            self.objects.put(field.object_key.format(number), rows.data.cast("B"))
            return
        array = coded_array(self.job, field)
        start = number * field.object_rows
        typed = rows[:count].reshape(-1).view(array.dtype.newbyteorder("<"))
        array[start : start + count] = typed.reshape(count, *field.row_shape)


@lru_cache(maxsize=16)
def coded_array(job: Job, field: Field) -> zarr.Array[Any]:
    objects = open_objects(job.destination, fsync=job.fsync)
    store = _Staged(objects, field)
    # Not as an argument, which is ignored when an array is opened.
    with zarr.config.set({"array.write_empty_chunks": True}):
        return zarr.open_array(store, path=field.name, mode="r+")


class _Staged(View):
    """The destination as it will be: metadata that is not published yet, and writes made our way.

    No chunk is there until we write it, and none is read back: what a killed writer left is not to be
    added to.
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


def group_metadata(attributes: dict[str, Any]) -> bytes:
    """Text of a Zarr v3 group's ``zarr.json``."""
    document = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
    return json.dumps(document, indent=2).encode()


def put_array(objects: Objects, name: str, array: NDArray[Any]) -> dict[str, bytes]:
    """Store a small array of our own as a Zarr v3 array in one chunk; returns what was put, by key."""
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
    """What `put_array` stored, or None; `FormatError` when it is damaged."""
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
