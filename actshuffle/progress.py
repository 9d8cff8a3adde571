"""What a run tells whoever watches it.  The library itself prints nothing."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives the stages of a run.  Called from the driver, in order."""

    def begin(self, stage: str, tasks: int, nbytes: int) -> None:
        """A stage starts ("boundaries", "level 1 of 3", "clearing", "verify"...); nbytes of rows will pass."""

    def advance(self, nbytes: int, fresh: bool) -> None:
        """A task is done; ``fresh`` is False if it had been done by an earlier run."""

    def end(self) -> None:
        """The stage is over."""


class Silent:
    """No display."""

    def begin(self, stage: str, tasks: int, nbytes: int) -> None: ...

    def advance(self, nbytes: int, fresh: bool) -> None: ...

    def end(self) -> None: ...
