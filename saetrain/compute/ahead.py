"""Batches whose copy to the GPU runs beside the step before.

::

    stream of copies     copy 2 . . . | copy 3 . . . | copy 4          from page-locked memory
    stream of the step        step 1 ........ | step 2 ........ | step 3

The copy of batch 2 begins when the step of batch 1 is handed out; the step of batch 2 waits for it on the GPU, the
driver does not.  So one more batch lies on the GPU than without.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

Batch = dict[str, Any]


class Cursor(Protocol):
    """Batches of this rank, from a position that can be saved and restored."""

    @property
    def wait_seconds(self) -> float:
        """Spent waiting for rows so far."""
        ...

    def __iter__(self) -> Iterator[Batch]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Copies(Protocol):
    """Copies the tensors of a batch to a device."""

    def begin(self, tensor: Tensor) -> Tensor: ...
    def mark(self) -> Any: ...
    def wait(self, mark: Any, batch: Batch) -> None: ...


class SideStream:
    """Copies to a CUDA device on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def begin(self, tensor: Tensor) -> Tensor:
        with torch.cuda.stream(self.stream):
            return tensor.to(self.device, non_blocking=True)

    def mark(self) -> torch.cuda.Event:
        return cast(torch.cuda.Event, self.stream.record_event())

    def wait(self, mark: torch.cuda.Event, batch: Batch) -> None:
        """Let the stream of the step wait for the copies before `mark`, and keep their memory until it has used it."""
        current = torch.cuda.current_stream(self.device)
        current.wait_event(mark)
        for value in batch.values():
            if isinstance(value, Tensor):
                value.record_stream(current)


class _Next(NamedTuple):
    batch: Batch
    mark: Any
    state: dict[str, Any]  # of the batches, after this one


class Ahead:
    """The same batches in the same order, on a device; its state is that of the batch that was given out last."""

    def __init__(self, cursor: Cursor, copies: Copies) -> None:
        self.cursor, self.copies = cursor, copies
        self._state: dict[str, Any] | None = None

    @property
    def wait_seconds(self) -> float:
        return self.cursor.wait_seconds

    def state_dict(self) -> dict[str, Any]:
        return self.cursor.state_dict() if self._state is None else self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.cursor.load_state_dict(state)
        self._state = None

    def __iter__(self) -> Iterator[Batch]:
        if self._state is not None:  # an earlier pass was left, and had read a batch that it did not give out
            self.cursor.load_state_dict(self._state)
        self._state = self.cursor.state_dict()
        cursor = iter(self.cursor)
        following = self._begun(cursor)
        while following is not None:
            batch, mark, state = following
            following, fault = None, None
            try:
                following = self._begun(cursor)
            except Exception as error:  # of the next batch: this one can still be used
                fault = error
            self.copies.wait(mark, batch)
            self._state = state
            given = [batch]
            del batch
            yield given.pop()  # nothing of it is kept here
            if fault is not None:
                raise fault

    def _begun(self, cursor: Iterator[Batch]) -> _Next | None:
        batch = next(cursor, None)
        if batch is None:
            return None
        state = self.cursor.state_dict()
        copied = {k: self.copies.begin(v) if isinstance(v, Tensor) else v for k, v in batch.items()}
        return _Next(copied, self.copies.mark(), state)


def ahead(cursor: Cursor, device: torch.device) -> Cursor:
    """The batches themselves where nothing is to be copied, else with copies that run beside the step before."""
    return Ahead(cursor, SideStream(device)) if device.type == "cuda" else cursor
