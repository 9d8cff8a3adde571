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
from actshuffle.foreign.table import FileColumn, FilePart, Table, unreadable
from actshuffle.units import counted

_SAFETENSORS = {"BF16": "bfloat16", "F16": "<f2", "F32": "<f4", "F64": "<f8", "BOOL": "|b1", "I8": "|i1", "U8": "|u1"}
_SAFETENSORS |= {"I16": "<i2", "I32": "<i4", "I64": "<i8", "U16": "<u2", "U32": "<u4", "U64": "<u8"}
_TORCH = {"bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"}
_TORCH |= {"float16", "bfloat16", "float32", "float64", "complex64", "complex128"}
_MAGIC = {  # what files of other formats begin with
    b"\x93NUMPY": "a .npy file",
    b"PK\x03\x04": "a zip archive, as torch and numpy.savez write them",
    b"PAR1": "a parquet file",
    b"ARROW1": "an Arrow file",
    b"\x89HDF": "an HDF5 file",
    b"\x1f\x8b": "a gzip file",
    b"\x28\xb5\x2f\xfd": "a zstd file",
}
_PIECE = 4 << 20  # bytes that are copied at a time where they must be
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
                    yield unreadable("", file, f"{file} is no .npy file that can be read: {err}")
                    continue
                offset = f.tell()
            name, swap, fault = self._type(file, dtype)
            if not shape:
                fault = f"{file} holds a single number, it has no rows"
            elif fortran and len(shape) > 1:
                fault = f"{file} is stored column by column (Fortran order); save it in C order"
            if fault:
                yield unreadable("", file, fault)
            else:
                part = FilePart(str(file), offset, shape[0], swap)
                yield _complete(file, FileColumn("", name, shape[1:], (part,)))

    def _type(self, file: Path, dtype: np.dtype[Any]) -> tuple[str, int, str]:
        """The name of a type, the width of its numbers where they are to be turned round, and what is wrong with it."""
        told = self.options.get("dtype")
        if dtype == np.dtype("V2") and told == "bfloat16":
            return told, 0, ""
        if dtype.kind == "V" and not dtype.names:
            hint = "give --dtype bfloat16 if it is that" if dtype.itemsize == 2 else "save it as another type"
            return "", 0, f"{file} has items of type {dtype}, as numpy saves types that it does not know; {hint}"
        if not _is_number(dtype):
            return "", 0, f"{file} has items of type {dtype}; numbers of fixed width are needed"
        name, swap = _little(dtype)
        if told is not None and _named_type(told) != (name, swap):
            return "", 0, f"{file} says that its items are {dtype}, and --dtype says {told}: leave --dtype out"
        return name, swap, ""


class Raw(_Bytes):
    """Files of items alone, such as ``numpy.memmap`` leaves, whose type and shape the user must give."""

    def columns(self, files: Sequence[Path]) -> Iterator[FileColumn]:
        dtype, shape = self.options.get("dtype"), self.options.get("row_shape")
        if dtype is None or shape is None:
            raise RequestError(f"{files[0]} has no header: give --dtype and --row-shape")
        if min(shape, default=1) < 1:
            raise RequestError(f"rows of shape {tuple(shape)} make no sense: all of --row-shape must be 1 or more")
        name, swap = _named_type(dtype)
        for file in files:
            column = FileColumn("", name, tuple(shape), (FilePart(str(file), 0, 0, swap),))
            size = file.stat().st_size
            items, rest = divmod(size, column.item_bytes)
            with file.open("rb") as f:
                head = f.read(8)
            known = next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), None)
            fault = ""
            if known is not None:
                fault = f"{file} has a header: it is {known}, and not numbers alone"
            elif rest:
                fault = (
                    f"{file} has {counted(size, 'byte')}, no whole number of rows of {column.item_bytes:,} "
                    f"({dtype}, shape {tuple(shape)})"
                )
            yield replace(column, parts=(FilePart(str(file), 0, items, swap),), fault=fault)


class Safetensors(_Bytes):
    """Tensors by name, whose bytes follow a JSON header."""

    def columns(self, files: Sequence[Path]) -> Iterator[FileColumn]:
        for file in files:
            base, header = _header(file)
            for name, (dtype, shape, start, stop) in header.items():
                if not shape:
                    continue
                if dtype not in _SAFETENSORS:
                    yield unreadable(name, file, f"{file}: tensor {name!r} has the type {dtype}, of no use here")
                    continue
                part = FilePart(str(file), base + start, shape[0])
                column = FileColumn(name, _SAFETENSORS[dtype], shape[1:], (part,))
                if stop - start != column.items * column.item_bytes:
                    fault = f"{file}: tensor {name!r} has {counted(stop - start, 'byte')} for shape {shape}"
                    yield replace(column, fault=fault)
                else:
                    yield _complete(file, column)

    def left_out(self, files: Sequence[Path]) -> dict[str, str]:
        return {name: "a single number" for file in files for name, found in _header(file)[1].items() if not found[1]}


def _header(file: Path) -> tuple[int, dict[str, tuple[str, tuple[int, ...], int, int]]]:
    """Where the tensors of a safetensors file begin; and of each its type, its shape, and its bytes from there on."""
    with file.open("rb") as f:
        size = int.from_bytes(f.read(8), "little")
        if not 0 < size <= min(_HEADER_LIMIT, file.stat().st_size - 8):
            raise SourceError(f"{file} is no safetensors file: header of {counted(size, 'byte')}")
        try:
            header = json.loads(f.read(size))
            header.pop("__metadata__", None)
            found = {}
            for name, tensor in sorted(header.items()):
                start, stop = map(int, tensor["data_offsets"])
                found[name] = (str(tensor["dtype"]), tuple(map(int, tensor["shape"])), start, stop)
        except (ValueError, LookupError, TypeError, AttributeError) as err:
            raise SourceError(f"{file} has a damaged header: {err}") from err
    return 8 + size, found


class Torch(Table):
    """``torch.save`` files of a tensor, or of a dict with tensors."""

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__(options)
        self._load = lru_cache(maxsize=4)(_load_tensors)

    def columns(self, files: Sequence[Path]) -> Iterator[FileColumn]:
        for file in files:
            for name, tensor in sorted(self._load(str(file))[0].items()):
                dtype = str(tensor.dtype).removeprefix("torch.")
                if str(tensor.layout) != "torch.strided" or tensor.is_nested or tensor.is_quantized:
                    form = "nested" if tensor.is_nested else "quantized" if tensor.is_quantized else tensor.layout
                    yield unreadable(name, file, f"{file}: tensor {name!r} is {form}; save it as a dense one")
                elif dtype not in _TORCH:
                    yield unreadable(name, file, f"{file}: tensor {name!r} has the type {dtype}, of no use here")
                else:
                    part = FilePart(str(file), name, tensor.shape[0])
                    known = dtype if dtype == "bfloat16" else _little(np.dtype(dtype))[0]
                    yield FileColumn(name, known, tuple(tensor.shape[1:]), (part,))

    def left_out(self, files: Sequence[Path]) -> dict[str, str]:
        return {name: what for file in files for name, what in self._load(str(file))[1].items()}

    def read(self, part: FilePart, start: int, out: U8) -> None:
        torch = need("torch", "train")
        rows = self._load(part.file)[0][str(part.at)][start : start + len(out)]
        step = max(1, _PIECE // out.shape[1])
        for at in range(0, len(out), step):  # a tensor that is transposed, conjugated or negated is copied
            piece = rows[at : at + step].resolve_conj().resolve_neg().contiguous()
            out[at : at + step] = piece.reshape(len(piece), -1).view(torch.uint8).numpy()


def _load_tensors(file: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The tensors with rows of a file by name; and what else is in it."""
    torch = need("torch", "train")
    try:
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as err:  # its own complaints are of many kinds
        raise SourceError(
            f"{file} holds more than tensors, or is damaged; only what torch loads with weights_only is "
            f"read: {str(err).splitlines()[0]}"
        ) from err
    everything = found if isinstance(found, dict) else {"": found}
    tensors = {k: v for k, v in everything.items() if isinstance(k, str) and isinstance(v, torch.Tensor)}
    if not tensors:
        raise SourceError(f"{file} holds neither a tensor nor a dict of tensors")
    left_out = {str(k): type(v).__name__ for k, v in everything.items() if k not in tensors}
    single = {k: "a single number" for k, v in tensors.items() if v.ndim == 0}
    return {k: v for k, v in tensors.items() if v.ndim}, left_out | single


def _is_number(dtype: np.dtype[Any]) -> bool:
    return dtype.kind in "biufc" and dtype.itemsize <= 16 and dtype != np.dtype("longdouble")


def _little(dtype: np.dtype[Any]) -> tuple[str, int]:
    """The little-endian name of a type, and the width of its numbers if they are big-endian, else 0."""
    width = dtype.itemsize // 2 if dtype.kind == "c" else dtype.itemsize
    return dtype.newbyteorder("<").str, width if dtype.byteorder == ">" else 0


def _named_type(name: str) -> tuple[str, int]:
    """The same for a type that the user names."""
    if name == "bfloat16":
        return name, 0
    try:
        dtype = np.dtype(name)
    except TypeError as err:
        raise RequestError(f"{name!r} is no type: {err}") from err
    if not _is_number(dtype):
        raise RequestError(f"{name!r} is no type of numbers of fixed width, such as float16, bfloat16 or int32")
    return _little(dtype)


def _complete(file: Path, column: FileColumn) -> FileColumn:
    part = column.parts[0]
    have, expected = file.stat().st_size, int(part.at) + part.items * column.item_bytes
    return (
        replace(column, fault=f"{file} has {counted(have, 'byte')} of {expected:,}: truncated")
        if have < expected
        else column
    )
