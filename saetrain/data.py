"""Rows to train on: `Source`, the interface the trainer needs, and `Store`, which gives it to an actshuffle store.

::

    rows     0 ...................... train | n ... held out       the tail of a shuffled store is a random sample
    a step   batch_size rows; rank r of w reads the r-th of w adjacent parts, and the tensor-parallel ranks
             of a replica share theirs: each row is read once, whatever the number of ranks
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from actshuffle import Dataset, Loader, open_dataset, read_stats, watch
from actshuffle.errors import ActshuffleError, FormatError, RequestError
from saetrain.compute.mesh import Mesh
from saetrain.config import Config
from saetrain.errors import DataError
from saetrain.model import Norm, norm_from

GRADIENTS = "grad_"  # with the name of an array of activations: the gradient of the loss with respect to it
DOCUMENT_NAMES = ("document", "documents", "document_id", "document_ids", "doc", "doc_id", "doc_ids")
HEAVY_SHARE = 0.05  # of the squared norm: from here on heavy rows are named
SAMPLE_ROWS = 65_536  # for statistics where the store has none


class Cursor(Protocol):
    """Batches of this rank, from a position that can be saved and restored."""

    wait_seconds: float  # spent waiting for rows so far

    def __iter__(self) -> Iterator[dict[str, Any]]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Source(Protocol):
    """Rows by number, and batches of the first of them."""

    name: str
    rows: int
    d_in: int
    field: str
    document_field: str | None

    def statistics(self) -> tuple[np.ndarray[Any, Any], float]:
        """The mean row [d_in], and the sum over columns of the variance."""
        ...

    def read(self, field: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of an array."""
        ...

    def batches(self, rows: int, config: Config, mesh: Mesh) -> Cursor:
        """Endless batches of the first `rows` rows, each row once per epoch."""
        ...


class Batch(NamedTuple):
    rows: Tensor  # [rows, d_in]: raw activations of this replica
    documents: Tensor | None  # [rows read by this rank]: ids of their documents


class Store:
    """A finished actshuffle store as a Source."""

    def __init__(self, path: str | Path, config: Config) -> None:
        self.config = config
        try:
            self.data: Dataset = open_dataset(path, incomplete=config.incomplete)
        except ActshuffleError as error:
            raise DataError(f"{type(error).__name__}: {error}") from error
        self.name, self.rows = str(path), self.data.rows
        self.field = config.field or self._only_field()
        for name in filter(None, (self.field, config.document_field)):
            if name not in self.data.fields:
                raise DataError(f"no array {name!r} in {path}; it has {sorted(self.data.fields)}")
        info = self.data.fields[self.field]
        if not info.row_shape or not (info.dtype.kind == "f" or info.bfloat16):
            raise DataError(
                f"{self.field!r} in {path} has rows of shape {info.row_shape} and type {info.dtype_name}; "
                "activations need rows of one axis of floating-point numbers, or of several, which are flattened"
            )
        self.row_shape = tuple(int(n) for n in info.row_shape)
        self.d_in = math.prod(self.row_shape)
        names = [config.document_field] if config.document_field else DOCUMENT_NAMES
        self.document_field = next((n for n in names if n in self.data.fields), None)
        self._watch = watch(self.data, filter(None, (self.field, self.document_field)))

    def _only_field(self) -> str:
        real = {n: f for n, f in self.data.fields.items() if f.dtype.kind == "f" or f.bfloat16}
        axes = {n: len(f.row_shape) for n, f in real.items() if not n.startswith(GRADIENTS)}
        found = [n for n, count in axes.items() if count == 1] or [n for n, count in axes.items() if count > 1]
        if len(found) != 1:
            raise DataError(
                f"{self.name} has {len(found)} arrays that could be activations ({', '.join(found) or 'none'}); "
                "choose with --field"
            )
        return found[0]

    @property
    def location(self) -> str:
        """The path as it is from any folder; a URL is one already."""
        return self.name if "://" in self.name else str(Path(self.name).resolve())

    def check_unchanged(self) -> None:
        """Raise a `DataError` if the store was written to since it was opened."""
        try:
            self._watch.check()
        except ActshuffleError as error:
            raise DataError(str(error)) from error

    def statistics(self) -> tuple[np.ndarray[Any, Any], float]:
        """The statistics that `actshuffle stats` recorded with the store, else those of a sample of its rows."""
        try:
            known: Any = read_stats(self.data)[self.field]
        except (RequestError, FormatError, KeyError):
            known = None
        if known is not None:
            if known.nans or known.infs:
                row, column = known.first_nan or known.first_inf or (0, 0)
                raise DataError(
                    f"{self.field!r} in {self.name} holds {known.nans:,} NaNs and {known.infs:,} infinite "
                    f"numbers; the first is in row {row:,}, column {column}"
                )
            return known.mean.reshape(-1).astype(np.float64), float(known.variance.sum(dtype=np.float64))
        # The first rows of a shuffled store are a random sample; any other store gives 64 runs from all over it.
        runs = 1 if self.data.shuffled else 64
        each = max(min(self.rows, SAMPLE_ROWS) // runs, 1)
        shift, count, total, square = np.zeros(self.d_in), 0, np.zeros(self.d_in), 0.0
        for run in range(runs):
            first = run * (self.rows // runs)
            for at in range(first, min(first + each, self.rows), 4096):
                part = self.read(self.field, at, min(at + 4096, first + each, self.rows)).double()
                check_finite(part, self.name, self.field, at)
                if not count:
                    shift = part.mean(0).numpy()  # a large mean would cost digits
                part -= torch.from_numpy(shift)
                count, total = count + len(part), total + part.sum(0).numpy()
                square += float(part.square().sum())
        mean = total / count
        return mean + shift, square / count - float(mean @ mean)

    def flattening(self) -> str:
        """A sentence if rows have several axes, which training flattens, else an empty text."""
        if len(self.row_shape) == 1:
            return ""
        return f"rows of {self.field!r} have the shape {self.row_shape}; training sees each as {self.d_in:,} numbers"

    def warning(self) -> str:
        """A sentence if the recorded statistics say that a few rows rule the squared norm, else an empty text."""
        try:
            known: Any = read_stats(self.data)[self.field]
        except (RequestError, FormatError, KeyError):
            return ""
        rows, share = known.heavy
        if share < HEAVY_SHARE:
            return ""
        return (
            f"warning: {rows:,} of {known.count:,} rows of {self.field!r} have over 10 times the median norm and hold "
            f"{share:.1%} of the squared norm: the FVU describes them; see that of the median row and by norm"
        )

    def read(self, field: str, start: int, stop: int) -> Tensor:
        found = self.data.read(field, start, stop)
        if field == self.field:
            found = found.reshape(len(found), -1)
        if self.data.fields[field].bfloat16:
            return torch.from_numpy(found.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(found)

    def batches(self, rows: int, config: Config, mesh: Mesh) -> Cursor:
        fields = [self.field] + ([self.document_field] if self.document_field else [])
        try:
            return Loader(
                replace(self.data, rows=rows),
                config.batch_size,
                fields=fields,
                rank=mesh.rank,
                world_size=mesh.world,
                epochs=None,
                seed=config.seed,
                drop_last=True,
                as_torch=True,
                pin=mesh.device.type == "cuda",
                buffer_rows=None if config.buffer_rows < 0 else config.buffer_rows,
            )
        except ActshuffleError as error:
            raise DataError(str(error)) from error


def check_finite(rows: Tensor, name: str, field: str, first: int) -> None:
    """Refuse NaNs and infinities, and name the first; `first` is the number of the first row."""
    if bool(torch.isfinite(rows.sum())):  # one pass; a sum that overflows needs the closer look below
        return
    bad = (~torch.isfinite(rows)).nonzero()
    if len(bad):
        row, column = (int(v) for v in bad[0])
        raise DataError(
            f"{field!r} in {name}: row {first + row:,}, column {column} is {float(rows[row, column])} "
            f"({len(bad):,} such numbers in these {len(rows):,} rows)"
        )


def norm_of(source: Source) -> Norm:
    return norm_from(*source.statistics())


def sample(source: Source, norm: Norm, rows: int, mesh: Mesh) -> Tensor:
    """The first rows, normalised, from which variants initialise; the same on every rank."""
    raw = source.read(source.field, 0, min(rows, source.rows))
    check_finite(raw, source.name, source.field, 0)
    return norm(raw.to(mesh.device))


def stream(source: Source, cursor: Cursor, mesh: Mesh) -> Iterator[Batch]:
    """The batches of this replica: its tensor-parallel ranks each read a part of the rows, and share it."""
    for batch in cursor:
        mine = batch[source.field].to(mesh.device, non_blocking=True).flatten(1)
        rows = mesh.gather(mine, "tp", "rows").reshape(-1, mine.shape[1])
        documents = batch[source.document_field] if source.document_field else None
        yield Batch(rows, documents)
