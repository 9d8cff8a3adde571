"""Reports of progress from a run to its observer.  The library itself prints nothing."""

from __future__ import annotations

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
