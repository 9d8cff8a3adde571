"""The arrays of one or more stores that a loader reads side by side, and their names in a batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from actshuffle.arraytypes import I64, U8
from actshuffle.errors import RequestError
from actshuffle.loading.dataset import Dataset, open_dataset
from actshuffle.loading.fieldinfo import FieldInfo
from actshuffle.units import counted, several

Store = str | Path | Dataset
Stores = Store | Sequence[Store] | Mapping[str, Store]


@dataclass(frozen=True)
class Column:
    """One array of a batch."""

    name: str  # in the batch
    dataset: Dataset
    field: str  # in the store

    @property
    def info(self) -> FieldInfo:
        return self.dataset.fields[self.field]


@dataclass(frozen=True)
class Layout:
    """The layout of the columns of some rows in one block of memory, one after the other."""

    columns: tuple[Column, ...]

    @property
    def row_bytes(self) -> int:
        return sum(c.info.row_bytes for c in self.columns)

    def nbytes(self, rows: int) -> int:
        return self.offsets(rows)[-1]

    def offsets(self, rows: int) -> list[int]:
        """Where each column begins, and the end."""
        return [0, *accumulate(-(-rows * column.info.row_bytes // 64) * 64 for column in self.columns)]

    def spans(self, rows: int, a: int, b: int) -> Iterator[tuple[Column, int, int]]:
        """The bytes of rows ``[a, b)`` of each column in a block of ``rows``."""
        for column, offset in zip(self.columns, self.offsets(rows), strict=False):
            width = column.info.row_bytes
            yield column, offset + a * width, offset + b * width

    def batch_of(self, memory: U8, rows: int, a: int, b: int) -> dict[str, NDArray[Any]]:
        """Rows ``[a, b)`` of a block of ``rows`` as arrays by name: views."""
        return {
            column.name: memory[start:stop].view(column.info.dtype).reshape(b - a, *column.info.row_shape)
            for column, start, stop in self.spans(rows, a, b)
        }


def open_stores(stores: Stores, *, incomplete: bool, storage_options: dict[str, Any] | None) -> dict[str, Dataset]:
    """The stores by prefix; a single store has the prefix "".  All must hold the same rows in the same order."""
    if isinstance(stores, str | Path | Dataset):
        named: Iterable[tuple[str, Store]] = [("", stores)]
    elif isinstance(stores, Mapping):
        named = stores.items()
    else:
        named = [(_stem(store), store) for store in several("stores", stores, of="paths or datasets")]
    found: dict[str, Dataset] = {}
    for prefix, store in named:
        if prefix in found:
            raise RequestError(f"two stores are called {prefix!r}; give a dict {{name: store}}")
        if not isinstance(store, Dataset):
            store = open_dataset(store, incomplete=incomplete, storage_options=storage_options)
        found[prefix] = store
    if not found:
        raise RequestError("no store was given")
    first = next(iter(found.values()))
    for other in found.values():
        if other.order != first.order:
            raise RequestError(
                f"{first.path} ({_order_of(first)}) and {other.path} ({_order_of(other)}) do not hold "
                "the same rows in the same order, so they cannot be read side by side; shuffle them as "
                "one group, or with the same seed"
            )
    return found


def choose(datasets: Mapping[str, Dataset], fields: Iterable[str] | None) -> Layout:
    """The columns: all, or those named, either as they are in the batch or as they are in each store."""
    every = {
        (f"{prefix}/{name}" if prefix else name): Column(f"{prefix}/{name}" if prefix else name, dataset, name)
        for prefix, dataset in datasets.items()
        for name in dataset.fields
    }
    if fields is None:
        return Layout(tuple(every.values()))
    if isinstance(fields, str):
        fields = [fields]
    chosen: dict[str, Column] = {}
    for name in several("fields", fields, of="names"):
        hits = [every[name]] if name in every else [c for c in every.values() if c.field == name]
        if not hits:
            raise RequestError(f"no array named {name!r}; there are {sorted(every)}")
        chosen |= {column.name: column for column in hits}
    if not chosen:
        raise RequestError("no fields were chosen")
    return Layout(tuple(chosen.values()))


def widest(datasets: Iterable[Dataset]) -> FieldInfo:
    """The widest array of all."""
    return max((f for d in datasets for f in d.fields.values()), key=lambda f: f.row_bytes)


def source_rows(dataset: Dataset, rows: I64) -> I64:
    """Where rows of a store came from; a store without ``source_row`` is its own source."""
    if not dataset.shuffled or "source_row" not in dataset.fields:
        return rows
    found: I64 = dataset.take("source_row", rows).astype("i8")
    return found


def _stem(store: Store) -> str:
    path = store.path if isinstance(store, Dataset) else str(store)
    return path.rstrip("/").rsplit("/", 1)[-1].removesuffix(".zarr")


def _order_of(dataset: Dataset) -> str:
    if not dataset.shuffled:
        return f"{counted(dataset.rows, 'row')} as they were made"
    return f"{counted(dataset.rows, 'row')} from {dataset.start:,}, seed {dataset.order[1]}"
