"""How the values of options are read, and which are allowed; a refusal is a usage error that names the flag."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click

from actshuffle import parse_bytes
from actshuffle.errors import ActshuffleError
from saetrain.settings import COUNT_OR_NONE, DOMAINS, MOST, NOT_NEGATIVE, POSITIVE_COUNT, Domain


class Held(click.ParamType[Any]):
    """The values of a domain, read by a function that raises for texts that it cannot read."""

    def __init__(self, name: str, read: Callable[[str], Any], domain: Domain) -> None:
        self.name, self._read, self._domain = name, read, domain

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):  # a default
            return value
        try:
            found = self._read(value)
        except (ActshuffleError, ValueError, OverflowError):
            found = None
        if found is None or not self._domain.holds(found):
            self.fail(f"must be {self._domain.words}, got {value!r}", param, ctx)
        return found


class Location(click.Path):
    """A path, which has at least one character; there or not.  With `url`, a URL too, which stays a text as it is."""

    def __init__(self, *, folder: bool = False, url: bool = False) -> None:
        super().__init__(path_type=Path, file_okay=not folder)
        self._url = url

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("a path has at least one character", param, ctx)
        if self._url and "://" in str(value):
            return value
        return super().convert(value, param, ctx)


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def _size(text: str) -> int:
    return parse_bytes(text)


def _origin(text: str) -> str:
    """An origin as browsers send it."""
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.netloc or parts.path.strip("/") or parts.query:
        raise ValueError(text)
    return f"{parts.scheme}://{parts.netloc}"


COUNT, POSITIVE = Held("integer", int, COUNT_OR_NONE), Held("integer", int, POSITIVE_COUNT)
REAL = Held("float", float, NOT_NEGATIVE)
MULTIPLE = Held("float", float, Domain("0, for none, or a finite number above 1", lambda x: x == 0 or 1 < x < math.inf))
HEAT = Held("float", float, Domain("a number from 0 to below 100", lambda x: 0 <= x < 100))
PENALTY = Held("float", float, Domain("a number above 0 and below 100", lambda x: 0 < x < 100))
ABOVE_0 = Held("float", float, Domain("a finite number above 0", lambda x: 0 < x < math.inf))
NUMBERS = Held(
    "numbers",
    _numbers,
    Domain("finite numbers with commas between them, like 0.15,0.3", lambda found: all(map(math.isfinite, found))),
)
SIZE = Held(
    "size", _size, Domain("a size from 1 byte to 2^63 - 1 bytes, like 4GB or 512MiB", lambda size: 1 <= size <= MOST)
)
TEXT = Held("text", str, Domain("a text of at least one character", bool))
ORIGIN = Held("origin", _origin, Domain("scheme, host and port, as http://localhost:8041", bool))
DEVICE = Held("device", str, DOMAINS["device"])
PATH, FOLDER = Location(), Location(folder=True)
PLACE, PLACE_OF_FOLDER = Location(url=True), Location(folder=True, url=True)
