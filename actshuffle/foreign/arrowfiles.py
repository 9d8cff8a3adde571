"""Columns of numbers in parquet files, and in the Arrow files of Hugging Face ``datasets`` folders.

A list column is an array if all its lists have one length, and a list of lists likewise (datasets'
Array2D); that is checked where it is read, in every group of rows.  Nothing but pyarrow is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actshuffle.arrays.source import row_bytes_of
from actshuffle.arraytypes import U8
from actshuffle.errors import SourceError
from actshuffle.extras import need
from actshuffle.foreign.table import FileColumn, FilePart, Table


class ArrowFiles(Table):
    """Reads columns group by group (a row group of parquet, a record batch of Arrow)."""

    def __init__(self, kind: str, options: dict[str, Any]) -> None:
        super().__init__(options)
        self._open = lru_cache(maxsize=8)(_open_parquet if kind == "parquet" else _open_arrow)
        self._dense = lru_cache(maxsize=2)(self._decoded)  # reads go on where the last one stopped

    def columns(self, files: Sequence[Path]) -> Iterator[FileColumn]:
        for file in files:
            found = self._open(str(file))
            if not found.ends or found.ends[-1] == 0:
                continue
            group = int(np.flatnonzero(found.ends)[0])  # the first that has items
            for name in found.names:
                if not _numeric(found.type_of(name)):
                    continue
                first = self._dense(str(file), group, name)
                part = FilePart(str(file), name, found.ends[-1])
                yield FileColumn(name, first.dtype.newbyteorder("<").str, first.shape[1:], (part,))

    def left_out(self, files: Sequence[Path]) -> dict[str, str]:
        opened = [self._open(str(file)) for file in files]
        return {n: str(f.type_of(n)) for f in opened for n in f.names if not _numeric(f.type_of(n))}

    def group_items(self, files: Sequence[Path]) -> int:
        return max((int(np.diff([0, *self._open(str(f)).ends]).max(initial=1)) for f in files), default=1)

    def read(self, part: FilePart, start: int, out: U8) -> None:
        found, name = self._open(part.file), str(part.at)
        stop, at = start + len(out), start
        while at < stop:
            group = int(np.searchsorted(found.ends, at, side="right"))
            first = found.ends[group - 1] if group else 0
            rows = self._dense(part.file, group, name)[at - first : stop - first]
            data = row_bytes_of(rows)
            if data.shape[1] != out.shape[1]:
                raise SourceError(
                    f"mixed widths: items {at:,} on of {name!r} in {part.file} have shape {rows.shape[1:]}, "
                    f"{data.shape[1]:,} bytes, those before them {out.shape[1]:,}"
                )
            out[at - start : at - start + len(data)] = data
            at += len(data)

    def _decoded(self, file: str, group: int, name: str) -> NDArray[Any]:
        return _as_array(self._open(file).column(group, name), f"{name!r} in {file}")


class _Parquet:
    def __init__(self, file: str) -> None:
        parquet = need("pyarrow.parquet", "import")
        self._file = _tried(lambda: parquet.ParquetFile(file), file)
        counts = [self._file.metadata.row_group(i).num_rows for i in range(self._file.num_row_groups)]
        self.ends: list[int] = np.cumsum(counts).tolist()
        self._schema = self._file.schema_arrow
        self.names: list[str] = self._schema.names

    def type_of(self, name: str) -> Any:
        return self._schema.field(name).type

    def column(self, group: int, name: str) -> Any:
        table = _tried(lambda: self._file.read_row_group(group, columns=[name]), name)
        return table.column(0).combine_chunks()


class _Arrow:
    def __init__(self, file: str) -> None:
        pa = need("pyarrow", "import")
        source = pa.memory_map(file)
        try:
            reader = pa.ipc.open_stream(source)
        except pa.ArrowInvalid:
            reader = _tried(lambda: pa.ipc.open_file(source), file)
        # Batches of a mapped file hold no copies: only their places are kept here.
        self._batches = _tried(lambda: pa.Table.from_batches(list(_batches(reader)), reader.schema), file).to_batches()
        self.ends: list[int] = np.cumsum([b.num_rows for b in self._batches]).tolist()
        self._schema = reader.schema
        self.names: list[str] = self._schema.names

    def type_of(self, name: str) -> Any:
        return self._schema.field(name).type

    def column(self, group: int, name: str) -> Any:
        return self._batches[group].column(self._schema.get_field_index(name))


def _open_parquet(file: str) -> _Parquet | _Arrow:
    return _Parquet(file)


def _open_arrow(file: str) -> _Parquet | _Arrow:
    return _Arrow(file)


def _batches(reader: Any) -> Iterator[Any]:
    if hasattr(reader, "num_record_batches"):
        yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
    else:
        yield from reader


def _storage(kind: Any) -> Any:
    return kind.storage_type if hasattr(kind, "storage_type") else kind


def _numeric(kind: Any) -> bool:
    types = need("pyarrow", "import").types
    kind = _storage(kind)
    while types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        kind = _storage(kind.value_type)
    return bool(types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind))


def _as_array(values: Any, where: str) -> NDArray[Any]:
    """An Arrow array of numbers, or of nested lists of one length, as numpy's."""
    pa, compute = need("pyarrow", "import"), need("pyarrow.compute", "import")
    count, shape = len(values), []
    while True:
        if isinstance(values, pa.ExtensionArray):
            values = values.storage
        if values.null_count:
            raise SourceError(f"column {where} has {values.null_count:,} missing values")
        if pa.types.is_fixed_size_list(values.type):
            shape.append(values.type.list_size)
        elif pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
            lengths = compute.min_max(compute.list_value_length(values)).as_py()
            if lengths["min"] != lengths["max"]:
                raise SourceError(
                    f"mixed widths: lists of column {where} have from {lengths['min']:,} to {lengths['max']:,} values"
                )
            shape.append(lengths["max"] or 0)
        else:
            break
        values = values.flatten()
    data: NDArray[Any] = values.to_numpy(zero_copy_only=False)
    return data.reshape(count, *shape)


def _tried(action: Any, file: str) -> Any:
    try:
        return action()
    except (OSError, ValueError) as err:  # pyarrow's errors are ValueErrors
        raise SourceError(f"cannot read {file}: {err}") from err
