"""Metadata of Zarr arrays: the arrays of a source, the way their rows are read, and the arrays of the output.

Where chunk files are the plain bytes of their rows (no compression, no shards, rows not cut), rows go between file
and buffer directly: one copy, by the kernel.  Everything else goes through zarr, a few source chunks or one output
object at a time, so that memory stays within the plan.
"""

from __future__ import annotations

import json
import math
import warnings
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
import zarr
from zarr.buffer import cpu
from zarr.errors import ZarrUserWarning
from zarr.storage import MemoryStore

from actshuffle.arrays import virtual
from actshuffle.arrays.codecs import CODECS
from actshuffle.arrays.field import Field
from actshuffle.arrays.guard import COPIES, View, coding_of
from actshuffle.arrays.names import OUR_GROUP
from actshuffle.bfloat16 import BFloat16
from actshuffle.errors import ActshuffleError, RequestError, SourceError
from actshuffle.limits import STORE_BYTES
from actshuffle.storage.objects import Objects, open_objects
from actshuffle.storage.place import Place, local_path
from actshuffle.storage.remote import wait
from actshuffle.units import counted

ZarrArray: TypeAlias = zarr.Array[Any]  # the name by which rooms that do not import zarr know its arrays


def open_node(place: Place) -> ZarrArray | zarr.Group:
    """The array or group at a place, read-only; raises `SourceError` if there is none."""
    try:
        path = "" if virtual.describe(place) is None else virtual.ARRAYS
        node = zarr.open(View(open_objects(place), str(place)), path=path, mode="r")
        if not isinstance(node.metadata.attributes, dict):
            raise SourceError(f"attributes of {place} are no JSON object")
        return node
    except (FileNotFoundError, NotADirectoryError) as err:
        if open_objects(place).size("") is None and "://" not in place.url:
            raise SourceError(f"no such source: {place.url}") from err
        if (file := local_path(place)) is not None and file.is_file():
            zipped = "a zip file: unpack it first, and give the folder"
            what = zipped if zipfile.is_zipfile(file) else "a file: import reads those of other formats"
            raise SourceError(f"a Zarr store is a folder, and {place.url} is {what}") from err
        if next(iter(open_objects(place).list(OUR_GROUP)), None) is not None:
            raise SourceError(f"{place.url} is half done, or damaged: there is no zarr.json") from err
        raise SourceError(f"not a Zarr array or group (no zarr.json, .zarray or .zgroup): {place.url}") from err
    except ActshuffleError:
        raise
    except Exception as err:  # zarr raises many kinds for damaged metadata
        raise _unreadable(place, err) from err


def is_group(node: ZarrArray | zarr.Group) -> bool:
    """True for a group of arrays, False for an array alone."""
    return isinstance(node, zarr.Group)


def _unreadable(place: Place, err: Exception) -> SourceError:
    text = str(err) if len(str(err)) < 500 else str(err)[:500] + " ..."
    return SourceError(f"cannot read Zarr metadata of {place}: {type(err).__name__}: {text}")


def source_arrays(place: Place, names: Sequence[str] | None = None) -> dict[str, ZarrArray]:
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
        elif lost := sorted(path for path in _listed(open_objects(place)) if path.split("/")[0] not in members):
            raise SourceError(
                f"the consolidated metadata of {place.url} lists array {lost[0]!r}, which has no metadata of its own: "
                "it is lost, or was deleted and not unlisted; choose arrays with --fields, or consolidate again"
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


def _members(place: Place, group: zarr.Group) -> dict[str, ZarrArray | zarr.Group]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ZarrUserWarning)  # stray files beside arrays do no harm
        try:
            return dict(group.members())
        except ActshuffleError:
            raise
        except Exception as err:
            raise _unreadable(place, err) from err


def _listed(objects: Objects) -> set[str]:
    """Paths of the arrays that the consolidated metadata of a group lists; empty where there is none."""
    group = json.loads(objects.get("zarr.json") or objects.get(COPIES) or b"{}")
    copies = group.get("consolidated_metadata", group if "zarr_consolidated_format" in group else None)
    listed = copies.get("metadata") if isinstance(copies, dict) else None
    if not isinstance(listed, dict):
        return set()
    if copies is group:  # v2 lists documents
        return {key.removesuffix("/.zarray") for key in listed if key.endswith("/.zarray")}
    return {k for k, v in listed.items() if isinstance(v, dict) and v.get("node_type") == "array"}


def _check_array(place: Place, name: str, array: ZarrArray) -> None:
    where = f"array {name!r} of {place}"
    plain = name.isprintable() and name not in ("", ".", "..") and not set(name) & set("/\\")  # part of a key anywhere
    if name == OUR_GROUP or not plain or array.path.rsplit("/", 1)[-1] not in (name, ""):
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


def source_field(name: str, array: ZarrArray) -> Field:
    """A source array as the engine sees it."""
    row_shape = tuple(array.shape[1:])
    grid = object_grid(array)
    raw = is_raw(array) and not array.path.startswith(virtual.ARRAYS)
    key = array.metadata.encode_chunk_key((_MARK, *(0 for _ in row_shape)))
    template = (f"{_literal(array.path)}/" if array.path else "") + key.replace(str(_MARK), "{}")
    row_bytes = array.dtype.itemsize * math.prod(row_shape)
    # Enough chunks at a time to keep the decoders of zarr busy, and no more, for the sake of memory.
    read_rows = array.chunks[0] * max(1, READ_BYTES // max(1, array.chunks[0] * row_bytes))
    return Field(
        name=name,
        source=array.path,
        row_bytes=row_bytes,
        row_shape=row_shape,
        source_chunk_rows=grid[0],
        read_rows=grid[0] if raw else min(read_rows, grid[0]) if array.shards else read_rows,
        source_key=template if raw else "",
        object_key=template,
    )


# Decoded bytes of one read through zarr; twice as many are no faster and take 24 MB more memory.
READ_BYTES = 8 << 20


def _literal(text: str) -> str:
    """Text escaped for `str.format`."""
    return text.replace("{", "{{").replace("}", "}}")


_MARK = 987654321  # a chunk number that no other part of a key can hold


def object_grid(array: ZarrArray) -> tuple[int, ...]:
    """Shape of one stored object: a shard where there are shards, else a chunk."""
    return tuple(array.shards or array.chunks)


def is_raw(array: ZarrArray) -> bool:
    """True if chunk files are the plain little-endian bytes of whole rows, in order."""
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


def is_bfloat16(array: ZarrArray) -> bool:
    """True for bfloat16, which numpy sees as ``uint16``."""
    return array.metadata.to_dict().get("data_type") == "bfloat16"


def source_buffer(arrays: Sequence[ZarrArray], *, remote: bool = False) -> int:
    """Bytes held while zarr decodes rows (encoded, decoded, converted), or while they are on their way from a store."""
    fields = [source_field("", a) for a in arrays if not is_raw(a)]
    return max((3 * f.read_rows * f.row_bytes for f in fields), default=STORE_BYTES if remote else 0)


def output_field(
    field: Field, array: ZarrArray | None, rows: int, chunk_rows: int, object_rows: int, codec: str
) -> Field:
    """The field with its output array's metadata; ``array`` None makes the ``source_row`` array."""
    if array is None:
        dtype, fill, attributes, dims = np.dtype("<u8"), 0, {}, None
    else:
        dtype = BFloat16() if is_bfloat16(array) else array.dtype.newbyteorder("<")  # type: ignore[assignment]
        fill, attributes, dims = array.fill_value, dict(array.attrs), _dimension_names(array)
        attributes.pop("_ARRAY_DIMENSIONS", None)
        if array.dtype.kind == "V" and object_rows != chunk_rows:
            raise RequestError(
                f"zarr cannot shard arrays of dtype {array.dtype} ({field.name!r}): give --chunks-per-shard 1, "
                "or leave the array out with --fields"
            )
    coding = CODECS[codec]
    if chunk_rows * field.row_bytes > coding.most_bytes:
        raise RequestError(
            f"a chunk of {field.name!r} has {counted(chunk_rows * field.row_bytes, 'byte')}, codec {codec} takes "
            f"{coding.most_bytes:,} at most: give less --chunk-rows"
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
        compressors=None if coding.raw else coding.chain(field.row_bytes // math.prod(field.row_shape)),
        filters=None,
        dimension_names=dims,
        # A flat key: with "/" every chunk of a matrix would need a directory.
        chunk_key_encoding={"name": "default", "separator": "."},
    )
    text = wait(memory.get(f"{field.name}/zarr.json", cpu.buffer_prototype))
    assert text is not None
    return replace(
        field,
        metadata=text.to_bytes().decode(),
        chunk_rows=chunk_rows,
        object_rows=object_rows,
        raw_output=coding.raw and object_rows == chunk_rows,
        object_key=f"{_literal(field.name)}/c.{{}}" + ".0" * len(field.row_shape),
    )


def metadata_of(name: str, dtype: str, shape: Sequence[int], rows: int, chunk: int = 1, codec: str = "none") -> str:
    """``zarr.json`` of an array of rows of some shape; ``dtype`` is numpy's name or "bfloat16"."""
    array = zarr.create_array(
        MemoryStore(),
        shape=(rows, *shape),
        chunks=(chunk, *(max(1, s) for s in shape)),
        dtype=BFloat16() if dtype == "bfloat16" else np.dtype(dtype),
        compressors=None,
    )
    return output_field(source_field(name, array), array, rows, chunk, chunk, codec).metadata


def _dimension_names(array: ZarrArray) -> list[str | None] | None:
    if array.metadata.zarr_format == 2:
        names = array.attrs.get("_ARRAY_DIMENSIONS")
        return list(names) if isinstance(names, list) and len(names) == array.ndim else None
    names = array.metadata.dimension_names
    return None if names is None or None in names else list(names)
