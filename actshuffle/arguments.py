"""Arguments of functions that the command line cannot produce: one clear refusal for a value of the wrong kind."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Integral
from os import PathLike
from typing import Any

from actshuffle.errors import RequestError


def whole(name: str, value: Any, least: int = 0) -> int:
    """A whole number of at least ``least``, Python's or numpy's; True is none."""
    if not isinstance(value, Integral) or isinstance(value, bool) or int(value) < least:
        raise RequestError(f"{name} must be a whole number of at least {least}, got {repr(value)[:60]}")
    return int(value)


def several(name: str, value: Any, *, of: str) -> list[Any]:
    """The items of a list or another iterable; text is no list of its letters, and a path none of its parts."""
    if isinstance(value, str | bytes | PathLike) or not isinstance(value, Iterable):
        raise RequestError(f"{name} must be a list of {of}, got {repr(value)[:60]}")
    return list(value)


def switches(**values: Any) -> None:
    """Refuse anything but True and False: a text such as "no" would count as yes."""
    for name, value in values.items():
        if not isinstance(value, bool):
            raise RequestError(f"{name} must be True or False, got {repr(value)[:60]}")
