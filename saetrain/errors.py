"""Every error a user of saetrain can meet.

::

    SaetrainError            exit
    ├── ConfigError          2     the settings contradict each other or the data
    ├── DataError            2     the store is unfinished, of the wrong width, or holds NaNs
    ├── CheckpointError      1     no checkpoint, or a damaged one
    └── ExchangeError        2     another tool's file that cannot be read, or a model it cannot hold
"""

from __future__ import annotations

from typing import ClassVar


class SaetrainError(Exception):
    """Base of all errors raised on purpose by saetrain."""

    exit_code: ClassVar[int] = 1


class ConfigError(SaetrainError, ValueError):
    exit_code = 2


class DataError(SaetrainError):
    exit_code = 2


class CheckpointError(SaetrainError):
    pass


class ExchangeError(SaetrainError):
    exit_code = 2
