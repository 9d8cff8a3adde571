"""Every error a user of saetrain can meet.

::

    SaetrainError            code              exit
    ├── ConfigError          bad-request       2     the settings contradict each other or the data
    ├── DataError            bad-source        2     the store is unfinished, of the wrong width, or holds NaNs
    ├── DivergedError        diverged          1     the loss or the FVU says that training went wrong
    ├── CheckpointError      bad-checkpoint    1     a checkpoint is damaged
    │   └── NoCheckpointError                  2     there is none
    └── ExchangeError        bad-exchange      2     another tool's file is unreadable, or cannot hold the model

The codes that actshuffle has too mean the same there.
"""

from __future__ import annotations

from typing import ClassVar

from actshuffle.errors import in_python


class SaetrainError(Exception):
    """Base of all errors that saetrain raises on purpose."""

    def __str__(self) -> str:
        return in_python(self.on_command_line)

    @property
    def on_command_line(self) -> str:
        """The message, with the options of the command line."""
        return super().__str__()

    code: ClassVar[str] = "error"
    exit_code: ClassVar[int] = 1


class ConfigError(SaetrainError, ValueError):
    code = "bad-request"
    exit_code = 2


class DataError(SaetrainError):
    code = "bad-source"
    exit_code = 2


class DivergedError(SaetrainError):
    code = "diverged"


class CheckpointError(SaetrainError):
    code = "bad-checkpoint"


class NoCheckpointError(CheckpointError):
    exit_code = 2


class ExchangeError(SaetrainError):
    code = "bad-exchange"
    exit_code = 2
