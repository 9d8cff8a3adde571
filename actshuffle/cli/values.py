"""How the values of options are read, and which are allowed; a refusal is a usage error that names the flag."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import click

from actshuffle.errors import ActshuffleError, RequestError, words_of
from actshuffle.limits import MOST
from actshuffle.units import parse_bytes, parse_count


class Parsed(click.ParamType[Any]):
    """An option read by one of our own functions, whose refusal becomes a usage error."""

    def __init__(self, name: str, parse: Callable[[str], Any]) -> None:
        self.name, self._parse = name, parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return self._parse(value) if isinstance(value, str) else value
        except (ActshuffleError, ValueError, OverflowError) as err:
            self.fail(words_of(err), param, ctx)


class FilePath(click.Path):
    """A path or URL, which has at least one character."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("a path has at least one character", param, ctx)
        return super().convert(value, param, ctx)


def count(least: int) -> Parsed:
    """The type of whole numbers from ``least`` to `MOST`."""

    def parse(text: str) -> int:
        value = parse_count(text)
        if not least <= value <= MOST:
            raise RequestError(f"must be a whole number from {least} to 2^63 - 1, got {text}")
        return value

    return Parsed("count", parse)


def number(domain: str, allows: Callable[[float], bool], name: str = "float") -> Parsed:
    """The type of the numbers that ``allows`` accepts: those of a domain."""

    def parse(text: str) -> float:
        with suppress(ValueError):
            if allows(value := float(text)):
                return value
        raise RequestError(f"must be {domain}, got {text!r}")

    return Parsed(name, parse)


def integers(each: str, wanted: str) -> Parsed:
    """The type of whole numbers with commas between them, each of which matches a pattern."""

    def parse(text: str) -> tuple[int, ...]:
        if not re.fullmatch(f"{each}(,{each})*", text):
            raise RequestError(f"write {wanted}; got {text!r}")
        return tuple(map(int, text.split(",")))

    return Parsed("numbers", parse)


def _text(text: str) -> str:
    if not text:
        raise RequestError("must have at least one character")
    return text


def _size(text: str) -> int:
    value = parse_bytes(text)
    if not 1 <= value <= MOST:
        raise RequestError(f"must be from 1 byte to 2^63 - 1 bytes, got {text}")
    return value


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as err:
        raise RequestError(f"not JSON: {err}") from None
    if not isinstance(value, dict):
        raise RequestError('must be a JSON object like {"anon": true}')
    return value


def _stragglers(text: str) -> tuple[float, float]:
    with suppress(ValueError):
        share, times = (float(part) for part in text.split(":"))
        if 0 <= share <= 1 and 1 <= times < math.inf:
            return share, times
    raise RequestError(
        f"write stragglers as a share of the tasks (0 to 1) and how many times as long they take (1 or more), like "
        f"0.01:4, got {text!r}"
    )


def _share(text: str) -> tuple[str, int | float | str]:
    name, equals, share = text.rpartition("=")
    if not equals or not name:
        raise RequestError(f"write a part as NAME=SHARE, like train.zarr=0.9; got {text!r}")
    if share == "rest":
        return name, share
    if re.fullmatch(r"[0-9_]+", share):
        return name, int(share)
    try:
        value = float(share.removesuffix("%")) / (100 if share.endswith("%") else 1)
    except ValueError:
        raise RequestError(f"{share!r} is no count, no fraction and not rest") from None
    return name, int(value) if value > 1 and value.is_integer() else value


def _renamed(text: str) -> tuple[str, str]:
    column, equals, name = text.rpartition("=")
    if not equals or not column or not name:
        raise RequestError(f"write a name as COLUMN=ARRAY, like token_ids=token; got {text!r}")
    return column, name


def _list(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if not all(names):
        raise RequestError(f"write names with commas between them, like a,b; got {text!r}")
    return names


def _part(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise RequestError(f"write a part as I/N, like 1/4, with I from 1 to N; got {text!r}")
    return int(match[1]), int(match[2])


SIZE, RATE = Parsed("size", _size), Parsed("rate", lambda text: _size(text.strip().removesuffix("/s")))
COUNT, POSITIVE = count(0), count(1)
REAL = number("a finite number of at least 0", lambda value: 0 <= value < math.inf)
REAL_ABOVE_0 = number("a finite number above 0", lambda value: 0 < value < math.inf)
MULTIPLE = number("0, for none, or a finite number above 1", lambda value: value == 0 or 1 < value < math.inf)
FRACTION = number("a number between 0 and 1", lambda value: 0 < value < 1, "fraction")
TEXT, PATH = Parsed("text", _text), FilePath()
SHARE, RENAMED, PART = Parsed("NAME=SHARE", _share), Parsed("COLUMN=ARRAY", _renamed), Parsed("I/N", _part)
NUMBERS = integers(r"\d{1,9}", "whole numbers from 0, like 3,5")
SHAPE = integers(r"[1-9]\d{0,18}", "a shape as whole numbers from 1, like 4096, or 12,64")
LIST = Parsed("names", _list)
JSON, STRAGGLERS = Parsed("JSON", _json_object), Parsed("stragglers", _stragglers)
