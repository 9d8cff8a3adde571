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
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from actshuffle import Dataset, Loader, open_dataset, read_stats, watch
from actshuffle.errors import ActshuffleError, FormatError, RequestError, words_of
from actshuffle.units import counted
from saetrain.compute.ahead import Cursor
from saetrain.compute.mesh import Mesh
from saetrain.config import Config
from saetrain.errors import DataError
from saetrain.norms import Norm, norm_from, side_by_side
from saetrain.settings import split_names

GRADIENTS = "grad_"  # with the name of an array of activations: the gradient of the loss with respect to it
DOCUMENT_NAMES = ("document", "documents", "document_id", "document_ids", "doc", "doc_id", "doc_ids")
HEAVY_SHARE = 0.05  # of the squared norm: from here on heavy rows are named
SAMPLE_ROWS = 65_536  # for statistics where the store has none


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


class Arrays(Source, Protocol):
    """A source of several arrays: `field` names those that go in, as A,B, and `read` gives them side by side."""

    target: str  # the arrays that are rebuilt, where they are others
    d_out: int

    def statistics(self, array: str = "") -> tuple[np.ndarray[Any, Any], float]:
        """Those of one array."""
        ...


class Batch(NamedTuple):
    rows: Tensor  # [rows, d_in]: raw activations of this replica
    documents: Tensor | None  # [rows read by this rank]: ids of their documents
    targets: Tensor | None = None  # [rows, d_out]: what a transcoder rebuilds


class Store:
    """A finished actshuffle store as a Source."""

    def __init__(self, path: str | Path, config: Config) -> None:
        self.config = config
        try:
            self.data: Dataset = open_dataset(path, incomplete=config.incomplete)
        except ActshuffleError as error:
            raise DataError(words_of(error)) from error
        self.name, self.rows = str(path), self.data.rows
        self.field = config.field or self._only_field()
        self.target = "" if config.output == self.field else config.output
        inputs, outputs = split_names(self.field), split_names(self.target)
        arrays = list(dict.fromkeys((*inputs, *outputs)))
        for name in filter(None, (*arrays, config.document_field)):
            if name not in self.data.fields:
                raise DataError(f"no array {name!r} in {path}; it has {sorted(self.data.fields)}")
        self.shapes = {name: self._row_shape(name) for name in arrays}
        self.row_shape = self.shapes[inputs[0]] if len(inputs) == 1 else ()
        self.d_in = sum(math.prod(self.shapes[name]) for name in inputs)
        self.d_out = sum(math.prod(self.shapes[name]) for name in outputs or inputs)
        names = [config.document_field] if config.document_field else DOCUMENT_NAMES
        self.document_field = next((n for n in names if n in self.data.fields), None)
        self._watch = watch(self.data, filter(None, (*arrays, self.document_field)))

    def _row_shape(self, name: str) -> tuple[int, ...]:
        info = self.data.fields[name]
        if not info.row_shape or not (info.dtype.kind == "f" or info.bfloat16):
            raise DataError(
                f"{name!r} in {self.name} has rows of shape {info.row_shape} and type {info.dtype_name}; "
                "activations need rows of one axis of floating-point numbers, or of several, which are flattened"
            )
        return tuple(int(n) for n in info.row_shape)

    def _only_field(self) -> str:
        real = {n: f for n, f in self.data.fields.items() if f.dtype.kind == "f" or f.bfloat16}
        axes = {n: len(f.row_shape) for n, f in real.items() if not n.startswith(GRADIENTS)}
        found = [n for n, count in axes.items() if count == 1] or [n for n, count in axes.items() if count > 1]
        if len(found) != 1:
            raise DataError(
                f"{self.name} has {counted(len(found), 'array')} that could be activations "
                f"({', '.join(found) or 'none'}); "
                "choose with --field"
            )
        return found[0]

    @property
    def identity(self) -> str:
        """The same for copies of a finished store on several machines, and another for other rows."""
        return self.data.identity

    @property
    def origin(self) -> dict[str, Any]:
        """The model that the rows came from and the prefix of its windows, where `actshuffle collect` recorded them."""
        model, rules = (self.data.attributes.get(name) for name in ("model", "row_filter"))
        if not (isinstance(model, dict) and isinstance(model.get("name"), str) and isinstance(rules, dict)):
            return {}
        name, prefix = model["name"], rules.get("prefix")
        if name.startswith(("/", ".", "~")):  # a folder of this machine
            name = Path(name).resolve().name
        return {
            "model": {"name": name, "layers": model.get("layers", 0)},
            "prefix": prefix["token"] if isinstance(prefix, dict) else None,
        }

    @property
    def location(self) -> str:
        """The path as it is from any folder; a URL is one already."""
        return self.name if "://" in self.name else str(Path(self.name).resolve())

    def check_unchanged(self) -> None:
        """Raise a `DataError` if the store was written to since it was opened."""
        try:
            self._watch.check()
        except ActshuffleError as error:
            raise DataError(words_of(error)) from error

    def statistics(self, array: str = "") -> tuple[np.ndarray[Any, Any], float]:
        """The statistics that `actshuffle stats` recorded with the store, else those of a sample of its rows."""
        name = array or self.field
        try:
            known: Any = read_stats(self.data)[name]
        except (RequestError, FormatError, KeyError):
            known = None
        if known is not None:
            if known.nans or known.infs:
                row, column = known.first_nan or known.first_inf or (0, 0)
                raise DataError(
                    f"{name!r} in {self.name} holds {known.nans:,} NaNs and {known.infs:,} infinite "
                    f"numbers; the first is in row {row:,}, column {column}"
                )
            return known.mean.reshape(-1).astype(np.float64), float(known.variance.sum(dtype=np.float64))
        # The first rows of a shuffled store are a random sample; any other store gives 64 runs from all over it.
        runs = 1 if self.data.shuffled else 64
        each = max(min(self.rows, SAMPLE_ROWS) // runs, 1)
        shift, count, total, square = np.zeros(1), 0, np.zeros(math.prod(self.shapes[name])), 0.0
        for run in range(runs):
            first = run * (self.rows // runs)
            for at in range(first, min(first + each, self.rows), 4096):
                part = self.read(name, at, min(at + 4096, first + each, self.rows)).double()
                check_finite(part, self.name, name, at)
                if not count:
                    shift = part.mean(0).numpy()  # a large mean would cost digits
                part -= torch.from_numpy(shift)
                count, total = count + len(part), total + part.sum(0).numpy()
                square += float(part.square().sum())
        mean = total / count
        return mean + shift, square / count - float(mean @ mean)

    def flattening(self) -> str:
        """A sentence if rows have several axes, which training flattens, else an empty text."""
        told = (
            f"rows of {name!r} have the shape {shape}; training sees each as {counted(math.prod(shape), 'number')}"
            for name, shape in self.shapes.items()
            if len(shape) > 1
        )
        return "; ".join(told)

    def warning(self) -> str:
        """A sentence if the recorded statistics say that a few rows rule the squared norm, else an empty text."""
        told = []
        for name in self.shapes:
            try:
                known: Any = read_stats(self.data)[name]
            except (RequestError, FormatError, KeyError):
                continue
            rows, share = known.heavy
            if share >= HEAVY_SHARE:
                told.append(
                    f"warning: {rows:,} of {counted(known.count, 'row')} of {name!r} have over 10 times the "
                    f"median norm and "
                    f"hold {share:.1%} of the squared norm: the FVU describes them; see that of the median row and by "
                    "norm"
                )
        return "; ".join(told)

    def read(self, field: str, start: int, stop: int) -> Tensor:
        return read_columns(self.data, field, start, stop, flat=field == self.field or field == self.target)

    def batches(self, rows: int, config: Config, mesh: Mesh) -> Cursor:
        fields = [*self.shapes, *([self.document_field] if self.document_field else [])]
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
            raise DataError(words_of(error)) from error


def read_columns(data: Dataset, field: str, start: int, stop: int, *, flat: bool) -> Tensor:
    """Rows [start, stop) of one array, or of those in A,B side by side; `flat` ones have one axis."""
    parts = []
    for name in split_names(field) if field not in data.fields else [field]:
        found = data.read(name, start, stop)
        if flat:
            found = found.reshape(len(found), -1)
        wide = data.fields[name].bfloat16
        parts.append(torch.from_numpy(found.view(np.int16)).view(torch.bfloat16) if wide else torch.from_numpy(found))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def target_of(source: Source) -> str:
    """The arrays that are rebuilt, where they are others than those that go in, else an empty text."""
    return str(getattr(source, "target", ""))  # a source need not have it


def check_finite(rows: Tensor, name: str, field: str, first: int) -> None:
    """Refuse NaNs and infinities, and name the first; `first` is the number of the first row."""
    if bool(torch.isfinite(rows.sum())):  # one pass; a sum that overflows needs the closer look below
        return
    bad = (~torch.isfinite(rows)).nonzero()
    if len(bad):
        row, column = (int(v) for v in bad[0])
        raise DataError(
            f"{field!r} in {name}: row {first + row:,}, column {column} is {float(rows[row, column])} "
            f"({len(bad):,} such numbers in these {counted(len(rows), 'row')})"
        )


def norms_of(source: Source) -> tuple[Norm, Norm | None]:
    """Of what goes in, and of what is rebuilt where that is something else."""
    target = target_of(source)
    if not target and len(split_names(source.field)) < 2:
        return norm_from(*source.statistics()), None
    known = cast(Arrays, source)
    both = [[norm_from(*known.statistics(n)) for n in split_names(names)] for names in (source.field, target) if names]
    return side_by_side(both[0]), side_by_side(both[1]) if target else None


def sample(source: Source, norm: Norm, rows: int, mesh: Mesh, field: str = "") -> Tensor:
    """The first rows, normalised, from which variants initialise; the same on every rank."""
    name = field or source.field
    raw = source.read(name, 0, min(rows, source.rows))
    check_finite(raw, source.name, name, 0)
    return norm(raw.to(mesh.device))


def stream(source: Source, cursor: Cursor, mesh: Mesh) -> Iterator[Batch]:
    """The batches of this replica: its tensor-parallel ranks each read a part of the rows, and share it."""
    target = target_of(source)
    for batch in cursor:
        documents = batch[source.document_field] if source.document_field else None
        made = Batch(_shared(batch, source.field, mesh), documents, _shared(batch, target, mesh) if target else None)
        del batch  # or the parts would lie beside the rows that were joined
        yield made
        del made


def _shared(batch: dict[str, Any], field: str, mesh: Mesh) -> Tensor:
    """The replica's rows of the arrays side by side, of which each tensor-parallel rank has read a part."""
    parts = [batch[name].to(mesh.device, non_blocking=True).flatten(1) for name in split_names(field)]
    mine = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    return mesh.gather(mine, "tp", "rows").reshape(-1, mine.shape[1])
