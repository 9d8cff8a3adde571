"""Cursor whose copy to the GPU runs beside the step before.

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
    """How tensors of a batch get to a device."""

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
        for tensor in batch.values():
            tensor.record_stream(current)


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
        self._state = self.cursor.state_dict()
        held: _Next | None = None
        for batch in self.cursor:
            state = self.cursor.state_dict()
            copied = {name: self.copies.begin(tensor) for name, tensor in batch.items()}
            following = _Next(copied, self.copies.mark(), state)
            del batch  # its memory is free for rows to come once the copy is done
            if held is not None:
                yield self._given(held)
            held = following
        if held is not None:
            yield self._given(held)

    def _given(self, found: _Next) -> Batch:
        self.copies.wait(found.mark, found.batch)
        self._state = found.state
        return found.batch


def ahead(cursor: Cursor, device: torch.device) -> Cursor:
    """The batches themselves where nothing is to be copied, else with copies that run beside the step before."""
    return Ahead(cursor, SideStream(device)) if device.type == "cuda" else cursor
