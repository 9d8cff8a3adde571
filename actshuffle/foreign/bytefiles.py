"""Files of other formats as tables: find their columns, and read ranges of their items.

::

    .npy, .bin        the bytes of the items behind a header, or behind none: read straight into memory
    .safetensors      the same, the header a JSON object
    .pt .pth          torch tensors, loaded with weights_only and mapped: no code of theirs is run
    .parquet .arrow   columns of numbers, or of lists of numbers of one length, decoded by pyarrow

A *column* has items; an item is whatever the file holds along its first axis: a number, a vector, or a
sequence of vectors.  Several files are parts of the same columns, in the order given.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from actshuffle.arraytypes import U8
from actshuffle.errors import RequestError, SourceError
from actshuffle.extras import need
from actshuffle.foreign.table import FileColumn, FilePart, Table

_SAFETENSORS = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "bfloat16",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "|i1",
    "U64": "<u8",
    "U32": "<u4",
    "U16": "<u2",
    "U8": "|u1",
    "BOOL": "|b1",
}
_HEADER_LIMIT = 100 << 20  # bytes; a longer safetensors header is refused, as by its own library


class _Bytes(Table):
    """Formats whose items lie in the file as they do in memory."""

    def read(self, part: FilePart, start: int, out: U8) -> None:
        offset = int(part.at) + start * out.shape[1]
        view = memoryview(out.reshape(-1).data)
        fd = os.open(part.file, os.O_RDONLY)
        try:
            while len(view):
                got = os.preadv(fd, [view], offset)
                if got == 0:
                    raise SourceError(f"{part.file} ends at byte {offset:,}, more was expected: truncated")
                view, offset = view[got:], offset + got
        finally:
            os.close(fd)


class Npy(_Bytes):
    """``numpy.save`` files.  A file is a column, named after the file."""

    def columns(self, files: Sequence[Path]) -> Iterator[FileColumn]:
        for file in files:
            with file.open("rb") as f:
                try:
                    version = np.lib.format.read_magic(f)
                    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
                    shape, fortran, dtype = read[version](f)
                except (ValueError, KeyError) as err:
                    raise SourceError(f"{file} is no .npy file that can be read: {err}") from err
                offset = f.tell()
            _check_dtype(file, dtype)
            if not shape:
                raise SourceError(f"{file} holds a single number, it has no rows")
            if fortran and len(shape) > 1:
                raise SourceError(f"{file} is stored column by column (Fortran order); save it in C order")
            swap = dtype.itemsize if dtype.byteorder == ">" else 0
            if swap and dtype.kind == "c":
                raise SourceError(f"{file} has big-endian complex numbers; save it little-endian")
            part = FilePart(str(file), offset, shape[0], swap)
            yield _complete(file, FileColumn("", dtype.newbyteorder("<").str, shape[1:], (part,)))


class Raw(_Bytes):
    """Files of items alone, such as ``numpy.memmap`` leaves, whose type and shape the user must give."""

    def columns(self, files: Sequence[Path]) -> Iterator[FileColumn]:
        dtype, shape = self.options.get("dtype"), self.options.get("row_shape")
        if dtype is None or shape is None:
            raise RequestError(f"{files[0]} has no header: give --dtype and --row-shape")
        try:
            name = dtype if dtype == "bfloat16" else np.dtype(dtype).newbyteorder("<").str
        except TypeError as err:
            raise RequestError(f"{dtype!r} is no type: {err}") from err
        for file in files:
            column = FileColumn("", name, tuple(shape), (FilePart(str(file), 0, 0),))
            items, rest = divmod(file.stat().st_size, max(1, column.item_bytes))
            if rest:
                raise SourceError(
                    f"{file} has {file.stat().st_size:,} bytes, no whole number of rows of "
                    f"{column.item_bytes:,} ({dtype}, shape {tuple(shape)})"
                )
            yield replace(column, parts=(FilePart(str(file), 0, items),))


class Safetensors(_Bytes):
    """Tensors by name, whose bytes follow a JSON header."""

    def columns(self, files: Sequence[Path]) -> Iterator[FileColumn]:
        for file in files:
            with file.open("rb") as f:
                size = int.from_bytes(f.read(8), "little")
                if not 0 < size <= min(_HEADER_LIMIT, file.stat().st_size - 8):
                    raise SourceError(f"{file} is no safetensors file: header of {size:,} bytes")
                try:
                    header = json.loads(f.read(size))
                    header.pop("__metadata__", None)
                    found = [
                        (name, _SAFETENSORS[t["dtype"]], tuple(t["shape"]), *t["data_offsets"])
                        for name, t in sorted(header.items())
                    ]
                except (ValueError, KeyError, TypeError, AttributeError) as err:
                    raise SourceError(f"{file} has a damaged header, or a type of no use here: {err}") from err
            for name, dtype, shape, start, stop in found:
                if not shape:
                    continue  # a lone number
                part = FilePart(str(file), 8 + size + start, shape[0])
                column = FileColumn(name, dtype, shape[1:], (part,))
                if stop - start != column.items * column.item_bytes:
                    raise SourceError(f"{file}: tensor {name!r} has {stop - start:,} bytes for shape {shape}")
                yield _complete(file, column)


class Torch(Table):
    """``torch.save`` files of a tensor, or of a dict of tensors."""

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__(options)
        self._load = lru_cache(maxsize=4)(_load_tensors)

    def columns(self, files: Sequence[Path]) -> Iterator[FileColumn]:
        for file in files:
            for name, tensor in sorted(self._load(str(file)).items()):
                if tensor.ndim == 0:
                    continue
                dtype = str(tensor.dtype).removeprefix("torch.")
                try:
                    known = dtype if dtype == "bfloat16" else np.dtype(dtype).newbyteorder("<").str
                except TypeError:
                    raise SourceError(f"{file} has a tensor of type {dtype}, of no use here") from None
                part = FilePart(str(file), name, tensor.shape[0])
                yield FileColumn(name, known, tuple(tensor.shape[1:]), (part,))

    def read(self, part: FilePart, start: int, out: U8) -> None:
        torch = need("torch", "train")
        rows = self._load(part.file)[str(part.at)][start : start + len(out)].contiguous()
        out[:] = rows.reshape(len(out), -1).view(torch.uint8).numpy()


def _load_tensors(file: str) -> dict[str, Any]:
    torch = need("torch", "train")
    try:
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as err:  # its own complaints are of many kinds
        raise SourceError(
            f"{file} holds more than tensors, or is damaged; only what torch loads with weights_only is "
            f"read: {str(err).splitlines()[0]}"
        ) from err
    tensors = {"": found} if isinstance(found, torch.Tensor) else found
    if not isinstance(tensors, dict) or not all(
        isinstance(k, str) and isinstance(v, torch.Tensor) and v.layout == torch.strided for k, v in tensors.items()
    ):
        raise SourceError(f"{file} holds neither a tensor nor a dict of tensors")
    return tensors


def _check_dtype(file: Path, dtype: np.dtype[Any]) -> None:
    if dtype.hasobject or dtype.kind not in "biufc" or dtype.itemsize > 16 or dtype == np.dtype("longdouble"):
        raise SourceError(f"{file} has items of type {dtype}; numbers of fixed width are needed")


def _complete(file: Path, column: FileColumn) -> FileColumn:
    part = column.parts[0]
    have, expected = file.stat().st_size, int(part.at) + part.items * column.item_bytes
    if have < expected:
        raise SourceError(f"{file} has {have:,} bytes of {expected:,}: truncated")
    return column
