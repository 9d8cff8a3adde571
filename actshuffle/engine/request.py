"""The request of a user: one field of `Request` for each knob.

A knob defines how its values are read, which values it takes, its default, and its help.  The public functions, the
command line and the check of a half-done run's ``run.json`` all follow this one definition::

    "2GB", "auto", 1e6   -- Request.of -->   Request   -- to_json -->   run.json   -- Request.recorded -->   Request
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from numbers import Real
from pathlib import PurePath
from typing import Any, Literal, NamedTuple

from actshuffle.arrays.codecs import CODECS
from actshuffle.arrays.names import RUN_KEY
from actshuffle.errors import FormatError, RequestError, words_of
from actshuffle.limits import MOST
from actshuffle.planning.planner import MAX_LEVELS
from actshuffle.units import parse_bytes, parse_count


class Kind(NamedTuple):
    """A kind of value.  ``read`` returns a value that it cannot read unchanged, and ``allows`` then refuses it."""

    name: str
    domain: str  # the end of "NAME must be ..."
    allows: Callable[[Any], bool]
    read: Callable[[Any], Any] = lambda value: value  # text, or a value from Python
    metavar: str | None = None  # in the help; by default the name in capitals
    choices: tuple[str, ...] = ()  # all values, as text


class Knob(NamedTuple):
    """One field of `Request`."""

    argument: str  # its name in Python; with hyphens, on the command line
    field: str  # its name in run.json
    kind: Kind
    default: Any
    help: str
    shown: str  # the default, in words

    @property
    def option(self) -> str:
        """Its name on the command line."""
        return "--" + self.argument.replace("_", "-")

    def parsed(self, value: Any) -> Any:
        try:
            return self.kind.read(value)
        except RequestError as err:
            raise RequestError(f"{self.option}: {words_of(err)}") from err

    def check(self, value: Any) -> None:
        if not self.kind.allows(value):
            raise RequestError(f"{self.option} must be {self.kind.domain}, got {repr(value)[:60]}")


def _whole(least: int, most: float = MOST) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and least <= value <= most


def _number(read: Callable[[Any], int]) -> Callable[[Any], Any]:
    return lambda value: read(value) if isinstance(value, str | Real) and not isinstance(value, bool) else value


def _is_names(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(name, str) and name for name in value)


def _names(value: Any) -> Any:
    if isinstance(value, str):
        return tuple(name.strip() for name in value.split(","))
    return tuple(value) if isinstance(value, Iterable) else value


_REFUSE_OR_FILL = {"refuse": False, "fill": True}

SIZE = Kind("size", "more than 0 bytes and less than 2^63", _whole(1), _number(parse_bytes))
ROOM = Kind("size", "0 bytes or more and less than 2^63", _whole(0), _number(parse_bytes))
COUNT = Kind("count", "a positive whole number below 2^63", _whole(1), _number(parse_count))
SEED = Kind("count", "a non-negative whole number", _whole(0, math.inf))
LEVELS = Kind(
    "levels",
    f"auto or 1 to {MAX_LEVELS}",
    lambda value: value == "auto" or (_whole(1)(value) and value <= MAX_LEVELS),
    lambda value: int(value) if isinstance(value, str) and value.isdecimal() else value,
    "N",
)
SWITCH = Kind("switch", "True or False", lambda value: isinstance(value, bool))
MISSING = SWITCH._replace(
    domain="refuse or fill",
    read=lambda value: _REFUSE_OR_FILL.get(value, value) if isinstance(value, str) else value,
    choices=tuple(_REFUSE_OR_FILL),
)
_CODECS = ", ".join(CODECS)
CODEC = Kind("codec", f"one of {_CODECS}", lambda v: v in tuple(CODECS), metavar="NAME", choices=tuple(CODECS))
NAMES = Kind("names", "names of arrays, like act,token", _is_names, _names, "A,B")
FOLDER = Kind(
    "path",
    "a folder or a URL",
    lambda value: isinstance(value, str),
    lambda value: str(value) if isinstance(value, PurePath) else value,
)
BITS = Kind("bits", "two numbers of bits, 0 to 64", lambda value: len(value) == 2 and set(value) <= {*range(65)}, tuple)

_SOFT = {"tasks_wanted", "tasks_per_worker"}  # set by the machine or the cluster: no reason to refuse a resume


def _knob(kind: Kind, help: str = "", shown: str = "", default: Any = None, argument: str = "") -> Any:
    return dataclasses.field(default=default, metadata={"kind": kind, "help": help, "shown": shown, "name": argument})


@dataclass(frozen=True)
class Request:
    """The value of every knob, given or by default, and the names of those that were ``given``.

    Made by `of` or `recorded`.  None stands for a value that is drawn, or follows from the data and the machine.
    """

    seed: int | None = _knob(SEED, "Seed of the order.", "drawn, and recorded in the output")
    levels: int | Literal["auto"] = _knob(LEVELS, "Number of passes over the data.", "auto, the cheapest way", "auto")
    memory: int | None = _knob(SIZE, "Most memory that one worker uses.", "a share of the machine, 2GiB at most")
    block_bytes: int | None = _knob(SIZE, "Size of the rows of one task (M).", "as --memory allows")
    run_bytes: int | None = _knob(SIZE, "Least size that is read in one piece (P).", "256KiB; 4MiB if remote")
    spill_memory: int = _knob(
        ROOM, "Keep up to this much of the spill in memory (tmpfs), on top of --memory per worker.", "what is free", 0
    )
    gather: bool = _knob(
        SWITCH,
        "Make one pass without spill, from a source that fits into this machine's memory.",
        "where it is cheapest",
        default=False,
    )
    random_reads: bool = _knob(
        SWITCH,
        "Make one pass without spill, with each row read from the disk where it lies.",
        "where the disk is fast enough",
        default=False,
    )
    chunk_rows: int | None = _knob(COUNT, "Rows per chunk of the widest array.", "about 32MiB")
    chunks_per_shard: int | None = _knob(COUNT, "Chunks per shard.", "1; more beyond 10^6 chunks")
    codec: str = _knob(CODEC, f"Codec of the output arrays: {_CODECS}.", "none", "none")
    fields: tuple[str, ...] | None = _knob(NAMES, "Arrays to take.", "all")
    source_row: bool = _knob(SWITCH, "Also write the source row of each row.", "yes", True)
    fill_missing: bool = _knob(
        MISSING, "Refuse absent chunks of the source, or take them as fill values.", "refuse", False, "missing_chunks"
    )
    scratch: str | None = _knob(FOLDER, "Folder or URL of the intermediate data.", "beside the output")
    # Not for users: the machine or the cluster sets the first two, and tests the last.
    tasks_wanted: int = _knob(COUNT, default=1)
    tasks_per_worker: int = _knob(COUNT, default=1)  # that share the memory
    key_bits: tuple[int, int] = _knob(BITS, default=(64, 64))
    given: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        for name in sorted(self.given):
            KNOBS[name].check(getattr(self, name))

    @classmethod
    def of(cls, **given: Any) -> Request:
        """The request of values as people write them, like "2GB"; None counts as not given."""
        values: dict[str, Any] = {}
        for name, value in given.items():
            if value is not None:
                knob = _NAMED.get(name)  # the constructor refuses names that no knob has
                values[knob.field if knob else name] = knob.parsed(value) if knob else value
        if values.get("random_reads") and not values.setdefault("gather", True):
            raise RequestError("--random-reads is a way to gather rows: leave --no-gather out")
        return cls(**values, given=frozenset(values))

    @classmethod
    def among(cls, arguments: Mapping[str, Any], **others: Any) -> Request:
        """The request in the arguments of a function that have the name of a knob; ``others`` come before them."""
        return cls.of(**{knob.argument: arguments.get(knob.argument) for knob in KNOBS.values()} | others)

    @classmethod
    def recorded(cls, document: Any) -> Request:
        """The request that a run.json holds, with each value checked, and none read from text."""
        if not isinstance(document, dict) or "seed" not in document:
            raise FormatError(f"{RUN_KEY} is damaged: it names no seed; --overwrite starts again")
        if unknown := set(document) - set(KNOBS):
            raise FormatError(f"{RUN_KEY} is damaged: no {min(unknown)[:40]} is known; --overwrite starts again")
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in document.items()}
        try:
            return cls(**values, given=frozenset(values))
        except (RequestError, TypeError) as err:
            raise FormatError(f"{RUN_KEY} is damaged: {words_of(err)}; --overwrite starts again") from err

    def to_json(self) -> dict[str, Any]:
        """The given values, as run.json records them."""
        values = {name: getattr(self, name) for name in self.given}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def changed(self, **values: Any) -> Request:
        """The request with other values for some knobs; None makes a knob not given."""
        return Request.of(**{**{name: getattr(self, name) for name in self.given}, **values})

    def filled(self, **values: Any) -> Request:
        """The request with these values for knobs that were not given."""
        return self.changed(**{name: value for name, value in values.items() if name not in self.given})

    def against(self, before: Request) -> str:
        """How this differs from an earlier request, in words; only values that a user gives count."""
        was, now = before.to_json(), self.to_json()
        differing = [k for k in sorted(now) if k not in _SOFT and getattr(self, k) != getattr(before, k)]
        if self.levels == "auto" and "levels" in differing:  # the planner chose that number then
            differing.remove("levels")
        return "; ".join(f"{k} was {was.get(k)!r}, now {now[k]!r}" for k in differing)


KNOBS = {
    f.name: Knob(m["name"] or f.name, f.name, m["kind"], f.default, m["help"], m["shown"])
    for f in dataclasses.fields(Request)
    if (m := f.metadata)
}
_NAMED = {**KNOBS, **{knob.argument: knob for knob in KNOBS.values()}}
