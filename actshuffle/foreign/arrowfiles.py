"""Columns of numbers in parquet files, and in the Arrow files of Hugging Face ``datasets`` folders.

Types and shapes come from the schema, and lengths of lists from the counts of a parquet file, so that nothing is
decoded before there is a plan.  Items are then decoded a few at a time, column by column, each from where the last
read of it stopped; a read further back begins at its group again (a row group of parquet, a record batch of Arrow).
That lists have one length is checked where they are read.  Nothing but pyarrow is needed.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from actshuffle.arrays.source import row_bytes_of
from actshuffle.arraytypes import U8
from actshuffle.errors import SourceError
from actshuffle.extras import need
from actshuffle.foreign.arrowtypes import Layout, layout_of, numbers_of
from actshuffle.foreign.table import FileColumn, FilePart, Table
from actshuffle.units import counted

_VALUES = 1 << 16  # numbers that are decoded at a time, of one item at least
_BUFFER = 256 << 10  # bytes of a parquet file that are read at a time
# Bytes per number while parquet decodes it: levels, the growing array, and the dense one.  Measured, with some room.
_PER_VALUE, _COPIES = 24, 4
_STREAM = 2 << 20  # bytes of a column that is open


class Stream(NamedTuple):
    """A column of a file that is being read: items from ``at`` on are to come, those of ``held`` first."""

    file: str
    at: int
    held: Any
    rest: Iterator[Any]


class ArrowFiles(Table):
    """Reads columns of parquet files, or of Arrow files and streams."""

    def __init__(self, kind: str, options: dict[str, Any]) -> None:
        super().__init__(options)
        opened: Callable[[str], _Parquet | _Arrow] = _Parquet if kind == "parquet" else _Arrow
        self._open = lru_cache(maxsize=8)(opened)
        self._streams: dict[str, Stream] = {}

    def columns(self, files: Sequence[Path]) -> Iterator[FileColumn]:
        for file in files:
            found = self._open(str(file))
            if not found.count:
                continue
            for name, layout in found.layouts.items():
                if isinstance(layout, str):
                    continue
                shape = self._shape(found, str(file), name, layout)
                part = FilePart(str(file), name, found.count)
                yield FileColumn(name, layout.dtype, shape, (part,), tensor=bool(layout.shape))

    def _shape(self, found: _Parquet | _Arrow, file: str, name: str, layout: Layout) -> tuple[int, ...]:
        """The shape of an item: of the type, by counts, or that of the first one."""
        known = tuple(size for size in layout.item_shape if size is not None)
        if len(known) == len(layout.item_shape):
            return known
        length = found.list_length(name) if len(layout.item_shape) == 1 else None
        if length is not None:
            return (length,)
        first = _held(Stream(file, 0, None, found.batches(name, 0, 1)), name).slice(0, 1)
        return numbers_of(first, layout, f"{name!r} in {file}").shape[1:]

    def left_out(self, files: Sequence[Path]) -> dict[str, str]:
        layouts = [self._open(str(file)).layouts for file in files]
        return {name: held for found in layouts for name, held in found.items() if isinstance(held, str)}

    def decoded_bytes(self, columns: Sequence[FileColumn]) -> int:
        return sum(
            max(self._open(part.file).decoded_bytes(str(part.at), column) for part in column.parts)
            for column in columns
        )

    def read(self, part: FilePart, start: int, out: U8) -> None:
        name, found = str(part.at), self._open(part.file)
        layout = found.layouts[name]
        assert isinstance(layout, Layout)
        items = max(1, _VALUES * np.dtype(layout.dtype).itemsize // out.shape[1])
        stream, done = self._at(found, part.file, name, start, items), 0
        while done < len(out):
            held = _held(stream, name)
            some = held.slice(0, min(items, len(out) - done))
            rows = row_bytes_of(numbers_of(some, layout, f"{name!r} in {part.file}"))
            if rows.shape[1] != out.shape[1]:
                raise SourceError(
                    f"mixed widths: items {stream.at:,} on of {name!r} in {part.file} have "
                    f"{counted(rows.shape[1], 'byte')}, "
                    f"others have {out.shape[1]:,}"
                )
            out[done : done + len(rows)] = rows
            done += len(rows)
            stream = stream._replace(at=stream.at + len(rows), held=held.slice(len(rows)))
        self._streams[name] = stream

    def _at(self, found: _Parquet | _Arrow, file: str, name: str, start: int, items: int) -> Stream:
        """The stream of a column from some item on."""
        group = int(np.searchsorted(found.ends, start, side="right"))
        first = found.ends[group - 1] if group else 0
        stream = self._streams.pop(name, None)
        if stream is None or stream.file != file or not first <= stream.at <= start:
            stream = Stream(file, first, None, found.batches(name, group, items))
        while stream.at < start:
            held = _held(stream, name)
            skipped = min(len(held), start - stream.at)
            stream = stream._replace(at=stream.at + skipped, held=held.slice(skipped))
        return stream


def _held(stream: Stream, name: str) -> Any:
    """The items that come first: those at hand, or the next ones with any."""
    if stream.held is not None and len(stream.held):
        return stream.held
    with _reading(stream.file):
        for values in stream.rest:
            if len(values):
                return values
    raise SourceError(f"{stream.file} ends at item {stream.at:,} of {name!r}: truncated")


class _Parquet:
    def __init__(self, file: str) -> None:
        parquet = need("pyarrow.parquet", "import")
        with _reading(file):
            self._file = parquet.ParquetFile(file, buffer_size=_BUFFER, pre_buffer=False)
            schema = self._file.schema_arrow
        self._path, self._metadata = file, self._file.metadata
        counts = [self._metadata.row_group(i).num_rows for i in range(self._file.num_row_groups)]
        self.ends: list[int] = np.cumsum(counts, dtype=np.int64).tolist()
        self.count = self.ends[-1] if self.ends else 0
        self.layouts = {field.name: layout_of(field) for field in schema}
        leaves = np.cumsum([0, *(_leaves(field.type) for field in schema)]).tolist()
        self._leaf = dict(zip(schema.names, leaves, strict=False))

    def batches(self, name: str, group: int, items: int) -> Iterator[Any]:
        groups = range(group, self._file.num_row_groups)
        for batch in self._file.iter_batches(items, row_groups=groups, columns=[name], use_threads=False):
            yield batch.column(name)

    def list_length(self, name: str) -> int | None:
        """The length of the lists of the first group, if it may be one; nothing is decoded."""
        first = next(i for i, end in enumerate(self.ends) if end)
        length, rest = divmod(self._chunk(first, name).num_values, self._metadata.row_group(first).num_rows)
        return None if rest else length

    def decoded_bytes(self, name: str, column: FileColumn) -> int:
        groups = [i for i, rows in enumerate(np.diff([0, *self.ends])) if rows]
        page = max((self._page_bytes(group, name) for group in groups), default=0)
        values = max(_VALUES, math.prod(column.shape))
        return 2 * page + values * (_PER_VALUE + _COPIES * np.dtype(column.dtype).itemsize) + _STREAM

    def _chunk(self, group: int, name: str) -> Any:
        return self._metadata.row_group(group).column(self._leaf[name])

    def _page_bytes(self, group: int, name: str) -> int:
        """The bytes of the first pages of a column, compressed and not: writers make all of one size."""
        chunk = self._chunk(group, name)
        places = {chunk.data_page_offset, chunk.dictionary_page_offset} - {None}
        with Path(self._path).open("rb") as file:
            sizes = [_sizes(file, place) for place in places]
        whole: int = chunk.total_compressed_size + chunk.total_uncompressed_size
        return min(whole, sum(whole if size is None else size for size in sizes))


class _Arrow:
    def __init__(self, file: str) -> None:
        pa = need("pyarrow", "import")
        self._path, self._packed, counts = file, False, []
        with _reading(file), pa.memory_map(file) as source:
            source.seek(8 if source.read(6) == b"ARROW1" else 0)
            for message in pa.ipc.MessageReader.open_stream(source):
                if message.type == "record batch":
                    count, packed = _record_batch(message.metadata.to_pybytes())
                    counts.append(count)
                    self._packed |= packed
        with _reading(file), self._reader([]) as reader:
            schema = reader.schema
        self._index = {name: n for n, name in enumerate(schema.names)}
        self._largest = max(counts, default=0)
        self.ends: list[int] = np.cumsum(counts, dtype=np.int64).tolist()
        self.count = self.ends[-1] if self.ends else 0
        self.layouts = {field.name: layout_of(field) for field in schema}

    def batches(self, name: str, group: int, items: int) -> Iterator[Any]:
        with self._reader([self._index[name]]) as reader:
            yield from (batch.column(0) for batch in _batches(reader, group))

    def list_length(self, name: str) -> int | None:
        return None

    def decoded_bytes(self, name: str, column: FileColumn) -> int:
        batch = self._largest * column.item_bytes if self._packed else 0  # else it is mapped
        values = max(_VALUES, math.prod(column.shape))
        return 2 * batch + 3 * values * np.dtype(column.dtype).itemsize

    def _reader(self, fields: list[int]) -> Any:
        """A reader of some fields, or of all if none is named."""
        pa = need("pyarrow", "import")
        options = pa.ipc.IpcReadOptions(included_fields=fields, use_threads=False)
        source = pa.memory_map(self._path)
        try:
            return pa.ipc.open_stream(source, options=options)
        except pa.ArrowInvalid:
            return pa.ipc.open_file(source, options=options)


def _batches(reader: Any, first: int) -> Iterator[Any]:
    """The batches of a file or a stream from one of them on."""
    if hasattr(reader, "num_record_batches"):
        yield from (reader.get_batch(i) for i in range(first, reader.num_record_batches))
    else:
        yield from (batch for number, batch in enumerate(reader) if number >= first)


def _record_batch(message: bytes) -> tuple[int, bool]:
    """The rows of a record batch, and whether it is compressed, from its header (a flatbuffer)."""

    def field(table: int, number: int) -> int:
        """Where a field of a table lies, 0 if it is absent."""
        index = table - struct.unpack_from("<i", message, table)[0]
        size = struct.unpack_from("<H", message, index)[0]
        offset = struct.unpack_from("<H", message, index + 4 + 2 * number)[0] if 4 + 2 * number < size else 0
        return table + offset if offset else 0

    header = field(struct.unpack_from("<I", message)[0], 2)
    batch = header + struct.unpack_from("<I", message, header)[0]
    rows = field(batch, 0)
    return struct.unpack_from("<q", message, rows)[0] if rows else 0, field(batch, 3) != 0


def _leaves(kind: Any) -> int:
    """Columns of a parquet file that a column of some Arrow type takes."""
    kind = getattr(kind, "storage_type", kind)
    return sum(_leaves(kind.field(i).type) for i in range(kind.num_fields)) or 1


def _sizes(file: Any, place: int) -> int | None:
    """The compressed and uncompressed bytes of a parquet page, from the first three fields of its header."""
    file.seek(place)
    data: bytes = file.read(64)
    at, values = 0, list[int]()
    for _ in range(3):
        if data[at : at + 1] != b"\x15":  # Thrift's compact form: the next field, an integer in 7-bit groups
            return None
        at, value, shift = at + 1, 0, 0
        while True:
            value, shift, more = value | (data[at] & 0x7F) << shift, shift + 7, data[at] & 0x80
            at += 1
            if not more:
                break
        values.append(value >> 1)
    return values[1] + values[2]


@contextmanager
def _reading(file: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as err:  # pyarrow's errors are ValueErrors
        raise SourceError(f"cannot read {file}: {err}") from err
