"""Observers of a run: the events that a run and its tasks report."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol


class Progress(Protocol):
    """An observer of the stages of a run.  The driver calls its methods in order."""

    def begin(self, stage: str, tasks: int, nbytes: int) -> None:
        """A stage starts ("boundaries", "level 1 of 3", "clearing", "verify"...), which moves ``nbytes`` of rows."""

    def advance(self, nbytes: int, fresh: bool) -> None:
        """A task is done; ``fresh`` is False if an earlier run had done it."""

    def end(self) -> None:
        """The stage is over."""


class Silent:
    """An observer that ignores everything."""

    def begin(self, stage: str, tasks: int, nbytes: int) -> None: ...

    def advance(self, nbytes: int, fresh: bool) -> None: ...

    def end(self) -> None: ...


def observer(given: Progress | bool | None) -> Progress:
    """The observer that a function was given, or one that ignores everything.

    `actshuffle.progress.display.shown` has put a display in the place of True.
    """
    return Silent() if given is None or isinstance(given, bool) else given


_HEARD: list[Callable[[int], None]] = []  # what listens in this process


def done_within(tokens: int) -> None:
    """Tell whoever listens in this process that so many tokens more of a task are done."""
    for listener in _HEARD:
        listener(tokens)


@contextmanager
def heard_by(progress: Progress, row_bytes: int) -> Iterator[None]:
    """Pass what `done_within` tells to an observer, if it has a method ``within(nbytes, tokens)``, as ours has."""
    within = getattr(progress, "within", None)
    if within is None:
        yield
        return

    def listener(tokens: int) -> None:
        within(tokens * row_bytes, tokens)

    _HEARD.append(listener)
    try:
        yield
    finally:
        _HEARD.remove(listener)
