"""The loader's torch side: tensors of batches, and the `IterableDataset` face.  Imports torch.

Only ever imported on request: `import actshuffle` does not need torch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from actshuffle.errors import RequestError
from actshuffle.loading.columns import Layout
from actshuffle.loading.passes import Board, PassName
from actshuffle.loading.prefetch import Loan


def check_types(layout: Layout) -> None:
    """Refuse fields that no tensor can hold."""
    for column in layout.columns:
        try:
            torch.from_numpy(np.empty(0, column.info.dtype))
        except TypeError as err:
            raise RequestError(
                f"torch has no type for {column.name!r} ({column.info.dtype_name}); choose other fields"
            ) from err


def can_pin() -> bool:
    return bool(torch.cuda.is_available())


def lend_pinned(nbytes: int) -> Loan:
    """Page-locked memory.  Torch takes it back when no tensor uses it, nor a copy to a GPU that is still
    under way, and lends it again."""
    tensor = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    return Loan(tensor.numpy(), tensor)


def batch_of(layout: Layout, loan: Loan, rows: int, a: int, b: int) -> dict[str, torch.Tensor]:
    """Rows ``[a, b)`` of a block of ``rows`` as tensors by name: views; bfloat16 under its own type."""
    pinned = isinstance(loan.owner, torch.Tensor)
    found = {}
    for column, start, stop in layout.spans(rows, a, b):
        info = column.info
        if pinned:  # slices of one tensor, so that torch knows what block a copy reads
            dtype = torch.bfloat16 if info.bfloat16 else torch.from_numpy(np.empty(0, info.dtype)).dtype
            tensor = loan.owner[start:stop].view(dtype).view(b - a, *info.row_shape)
        else:
            plain = np.dtype(np.int16) if info.bfloat16 else info.dtype
            tensor = torch.from_numpy(loan.memory[start:stop].view(plain).reshape(b - a, *info.row_shape))
            tensor = tensor.view(torch.bfloat16) if info.bfloat16 else tensor
        found[column.name] = tensor
    return found


class Batches(Protocol):
    """The part of a loader that a `TorchDataset` uses: batches, and a place among them."""

    def __iter__(self) -> Iterator[dict[str, Any]]: ...
    def seek(self, epoch: int) -> None: ...
    def share_steps(self, worker: int, workers: int) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...
    def _pass_end(self, epoch: int) -> int: ...


class TorchDataset(IterableDataset[dict[str, torch.Tensor]]):
    """A loader as torch's data loaders want it: whole batches, so give them ``batch_size=None``.

    Worker k of w yields every w-th batch from the k-th on, and torch takes from workers in turn, so
    batches come in the order of the loader itself with any number of workers.

    A pass begins with the epoch that `set_epoch` named, in workers that live on (``persistent_workers``) too;
    without a call it begins where the last finished pass ended, and where a broken off one began.  ``state_dict``
    and ``load_state_dict`` are the loader's, and what StatefulDataLoader calls, here or in each worker; the
    state of a worker fits only as many workers.  `set_epoch` of the very epoch in which a loaded state lies
    keeps the state.
    """

    def __init__(self, loader: Batches) -> None:
        super().__init__()
        self.loader = loader
        self._board = Board(loader.state_dict())
        self._passes = 0  # begun in this process
        self._loaded: dict[str, Any] | None = None  # what a worker was given to begin its next pass with

    def set_epoch(self, epoch: int) -> None:
        """Begin the next passes with this epoch."""
        waiting = self._board.waiting()
        if waiting is not None and waiting["epoch"] == epoch:
            return  # the place in this epoch that a loaded state names
        self.loader.seek(epoch)
        self._board.move(self.loader.state_dict())

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        if getattr(sys._getframe(1).f_locals.get("self"), "auto_collation", False):  # torch's fetcher, which calls this
            raise RequestError(
                "each item is a whole batch, and a DataLoader whose batch_size is a number, 1 by default, would put "
                "another axis before it: give DataLoader(dataset, batch_size=None)"
            )
        worker = get_worker_info()
        self._passes += 1
        crew, workers = (os.getpid(), 1) if worker is None else (worker.seed - worker.id, worker.num_workers)
        name = PassName(crew, self._passes)
        start = self._board.begin(name, workers)
        if self._loaded is not None:
            start, self._loaded = self._loaded, None
        self.loader.load_state_dict(start)
        if worker is not None:
            self.loader.share_steps(worker.id, worker.num_workers)
        return self._pass(name, start)

    def _pass(self, name: PassName, start: dict[str, Any]) -> Iterator[dict[str, torch.Tensor]]:
        yield from self.loader
        end = self.loader._pass_end(start["epoch"])
        self._board.finish(name, {**start, "epoch": end, "row": 0, "skip": 0, "stride": 1})

    def state_dict(self) -> dict[str, Any]:
        return self.loader.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loader.load_state_dict(state)
        if get_worker_info() is None:
            self._board.move(self.loader.state_dict())
        else:
            self._loaded = self.loader.state_dict()
