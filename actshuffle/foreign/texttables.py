"""Columns of text in parquet, Arrow and CSV files, value by value; and zstd.  Needs pyarrow."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from actshuffle.errors import SourceError
from actshuffle.extras import need
from actshuffle.units import counted

_VALUES = 1024  # that are decoded at a time
_CSV_BYTES = 64 << 20  # read at a time; a record must fit in


def unpacked_zstd(file: Path) -> IO[bytes]:
    """The contents of a zstd file, of all its frames."""
    stream: IO[bytes] = need("pyarrow", "collect").input_stream(str(file), compression="zstd")
    return stream


def column_texts(file: Path, kind: str, column: str) -> Iterator[str]:
    """The values of a column of text of a parquet or Arrow file."""
    return _texts(file, column, _parquet(file, column) if kind == "parquet" else _arrow(file, column))


def csv_texts(file: Path, opener: Callable[[], IO[bytes]], encoding: str, delimiter: str, column: str) -> Iterator[str]:
    """The values of a column of text of a CSV file, whose first record names the columns."""
    return _texts(file, column, _csv(file, opener, encoding, delimiter, column))


def _texts(file: Path, column: str, chunks: Iterator[Any]) -> Iterator[str]:
    pa, number = need("pyarrow", "collect"), 0
    try:
        for values in chunks:
            for value in values.to_pylist():
                if value is None:
                    raise SourceError(f"{file}: row {number:,} has no {column!r}; leave such rows out")
                yield value
                number += 1
    except (pa.ArrowException, csv.Error) as err:
        raise SourceError(f"cannot read {file}: {err}") from err


def _parquet(file: Path, column: str) -> Iterator[Any]:
    with need("pyarrow.parquet", "collect").ParquetFile(file) as found:
        _check(file, found.schema_arrow, column)
        for batch in found.iter_batches(_VALUES, columns=[column]):
            yield batch.column(0)


def _arrow(file: Path, column: str) -> Iterator[Any]:
    pa = need("pyarrow", "collect")
    with pa.memory_map(str(file)) as source:
        streamed = source.read(4) == b"\xff\xff\xff\xff"
        source.seek(0)
        with pa.ipc.open_stream(source) if streamed else pa.ipc.open_file(source) as reader:
            _check(file, reader.schema, column)
            for batch in reader if streamed else map(reader.get_batch, range(reader.num_record_batches)):
                values = batch.column(column)
                yield from (values.slice(at, _VALUES) for at in range(0, len(values), _VALUES))


def _csv(file: Path, opener: Callable[[], IO[bytes]], encoding: str, delimiter: str, column: str) -> Iterator[Any]:
    pa, reading = need("pyarrow", "collect"), need("pyarrow.csv", "collect")
    with io.TextIOWrapper(opener(), encoding, newline="") as text:
        names = next(csv.reader(text, delimiter=delimiter), [])
    schema = pa.schema([(name, pa.string()) for name in names])
    _check(file, schema, column)
    with opener() as data:
        yield from (
            batch.column(0)
            for batch in reading.open_csv(
                data,
                reading.ReadOptions(block_size=_CSV_BYTES, encoding=encoding, use_threads=False),
                reading.ParseOptions(delimiter=delimiter, newlines_in_values=True),
                reading.ConvertOptions(column_types=schema, include_columns=[column]),
            )
        )


def _check(file: Path, schema: Any, column: str) -> None:
    types = need("pyarrow", "collect").types
    if (count := schema.names.count(column)) != 1:
        has = f"{counted(count, 'column')} {column!r}" if count else f"no column {column!r}"
        raise SourceError(f"{file}: {has} in {', '.join(map(repr, schema.names)) or 'nothing'}; --field names another")
    kind = schema.field(column).type
    kind = kind.value_type if types.is_dictionary(kind) else kind
    if str(kind) not in ("string", "large_string", "string_view"):
        raise SourceError(f"{file}: column {column!r} holds {kind}, which is no text; --field names another")
