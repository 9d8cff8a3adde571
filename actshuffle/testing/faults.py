"""Stores that fail on purpose.

Every operation on a place goes through `actshuffle.storage.objects.open_objects`.  `Faults` steps in there,
numbers the operations, and lets a schedule decide which of them go wrong and how::

    error    refused before anything happens (EIO)
    full     a write finds no room (ENOSPC); any other operation is refused
    lost     it happens, and the answer gets lost on the way back
    slow     it takes a while
    stale    a read sees the state before the last write
    kill     the process dies before it happens; nothing the process does afterwards has any effect
    late     the process dies right after it happens
    torn     the process dies in the middle: half an object, where a store is not atomic
    power    the machine dies: writes and deletions that were not settled may be undone, objects kept in
             memory are gone
    silent   half an object is written, and the store reports success

    >>> faults = Faults(at({3: "kill"}))
    >>> with faults:                                             # doctest: +SKIP
    ...     actshuffle.shuffle("src.zarr", "dst.zarr", seed=1)
    Traceback (most recent call last):
    actshuffle.testing.faults.Killed: operation 3: put level1/blocks/c.0.0
"""

from __future__ import annotations

import asyncio
import errno
import fnmatch
import logging
import os
import random
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self, cast

import zarr

from actshuffle.arrays.guard import View
from actshuffle.engine.scratch import MEMORY_FOLDER
from actshuffle.errors import StorageError
from actshuffle.storage.directio import Extent
from actshuffle.storage.files import LocalObjects, Writer, typed
from actshuffle.storage.objects import Objects, wrapped
from actshuffle.storage.objects import open_objects as open_objects  # the door that `Faults` guards
from actshuffle.storage.place import Place

KINDS = ("error", "full", "lost", "slow", "stale", "kill", "late", "torn", "power", "silent")
DEADLY = ("kill", "late", "torn", "power")
HONEST = tuple(k for k in KINDS if k != "silent")  # after these a run ends in the exact output
# The methods of `Objects` that are numbered, `put` and `writer` aside, and their names in the log.
NUMBERED = {name: name for name in ("get", "size", "read", "list", "names", "delete", "delete_prefix", "settle")}
NUMBERED |= {"read_rows": "read", "mapped": "read", "sizes": "list"}


class Killed(BaseException):
    """Stands for the death of the process."""


class Operation(NamedTuple):
    """One call on a place: ``name`` is put or one of the values of `NUMBERED`."""

    number: int  # from 0
    name: str
    url: str
    key: str


Schedule = Callable[[Operation], str | None]


def at(faults: Mapping[int, str]) -> Schedule:
    """Schedule faults by the number of the operation."""
    return lambda operation: faults.get(operation.number)


def drawn(seed: int, rate: float, kinds: Sequence[str] = HONEST) -> Schedule:
    """Schedule faults at random: each operation fails with probability ``rate``, in one of the ``kinds``."""
    dice = random.Random(seed)
    return lambda _: dice.choice(kinds) if dice.random() < rate else None


def matching(pattern: str, kind: str, times: int = 1) -> Schedule:
    """Schedule a fault for the first ``times`` operations whose ``"name key"`` matches, as ``"put level1/*"``."""
    left = [times]

    def decide(operation: Operation) -> str | None:
        if not left[0] or not fnmatch.fnmatch(f"{operation.name} {operation.key}", pattern):
            return None
        left[0] -= 1
        return kind

    return decide


@dataclass
class Faults:
    """Make operations of this process fail inside the block, as the schedule says.

    Attributes
    ----------
    schedule : gives the kind of fault of an operation, or None.
    real : deaths are real: this process gets SIGKILL.
    seconds : duration of a slow call.
    seed : decides what the schedule does not: where a write is torn, which writes a power failure undoes.
    log : all operations, each with its fault or None.
    """

    schedule: Schedule = field(default=lambda _: None)
    real: bool = False
    seconds: float = 0.0
    seed: int = 0
    log: list[tuple[Operation, str | None]] = field(default_factory=list)
    dead: str = ""  # the operation at which the process died

    def __post_init__(self) -> None:
        self.dice = random.Random(self.seed)
        self._stack = ExitStack()
        self._before: dict[tuple[str, str], bytes | None] = {}  # by url and key, for stale reads
        self._undo: list[tuple[str, Objects, str, bytes | None]] = []  # url, objects, key, data
        self._in_memory: dict[str, Objects] = {}  # by url: gone with the machine

    def __enter__(self) -> Self:
        self._stack.enter_context(wrapped(self.wrap))
        log = logging.getLogger("asyncio")  # which would report deaths inside zarr's event loop
        self._stack.callback(log.setLevel, log.level)
        log.setLevel(logging.CRITICAL)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:  # calls that zarr began beside the one that failed are still under way
            with suppress(Exception):
                zarr.open(_Pause(self.wrap(LocalObjects(Path()), Place("")), "nowhere"), mode="r")
        self._stack.close()

    def install(self) -> None:
        """Make operations fail for the rest of this process."""
        self.__enter__()

    def wrap(self, objects: Objects, place: Place) -> Objects:
        if place.url.startswith(f"{MEMORY_FOLDER}/actshuffle-"):
            self._in_memory[place.url] = objects
        return cast(Objects, _Faulty(self, objects, place.url))

    def next(self, name: str, url: str, key: str) -> str | None:
        """Number an operation and return its fault."""
        if self.dead:
            raise Killed(self.dead)
        operation = Operation(len(self.log), name, url, key)
        kind = self.schedule(operation)
        self.log.append((operation, kind))
        return kind

    def die(self, kind: str) -> None:
        """End this process, or raise `Killed` in its place."""
        number, name, _, key = self.log[-1][0]
        self.dead = f"operation {number}: {name} {key} ({kind})"
        if kind == "power":
            for url, objects, changed, before in reversed(self._undo):
                if self.dice.random() < 0.5:
                    objects.delete(changed) if before is None else objects.put(changed, before)
                    self._before.pop((url, changed), None)
            for objects_in_memory in self._in_memory.values():
                objects_in_memory.delete_prefix("")
        if self.real:
            os.kill(os.getpid(), signal.SIGKILL)
        raise Killed(self.dead)

    def changing(self, objects: Objects, url: str, key: str) -> None:
        """Remember an object before it changes."""
        before = objects.get(key)
        self._before[url, key] = before
        if objects.is_local:
            self._undo.append((url, objects, key, before))

    def before(self, url: str, key: str) -> tuple[bool, bytes | None]:
        """Whether a key has changed, and the object that a stale read sees of it."""
        return (url, key) in self._before, self._before.get((url, key))

    def settled(self, url: str, prefixes: Sequence[str]) -> None:
        self._undo = [u for u in self._undo if u[0] != url or not any(u[2].startswith(p) for p in prefixes)]


class _Faulty:
    """`Objects` whose operations go through `Faults`; calls that are not numbered pass through."""

    in_order = True  # View then calls it in its own thread, so that operations have the same numbers each time

    def __init__(self, faults: Faults, inner: Objects, url: str) -> None:
        self._faults, self._inner, self._url = faults, inner, url

    def __getattr__(self, method: str) -> Any:
        call = getattr(self._inner, method)
        return partial(self._do, method, call) if method in NUMBERED else call

    def _do(self, method: str, call: Callable[..., Any], first: Any, *args: Any) -> Any:
        """Number a call, and make it, fail, or both.  ``first`` is its key, prefix, prefixes or extents."""
        faults, url = self._faults, self._url
        if isinstance(first, str):
            key = first
        elif method in ("settle", "mapped"):
            key = ",".join(first)
        else:
            key = first[0].key if first else ""
        kind = faults.next(NUMBERED[method], url, key)
        if kind in ("error", "full"):
            raise _refused("error", url, key)
        if kind in ("kill", "torn", "power"):
            faults.die(kind)
        if kind == "slow":
            time.sleep(faults.seconds)
        changed, before = faults.before(url, key)
        if kind == "stale" and changed and method in ("get", "size", "read"):
            if method == "read":
                raise _refused("error", url, key)
            return before if method == "get" or before is None else len(before)
        if method == "delete":
            faults.changing(self._inner, url, key)
        if method == "delete_prefix" and not faults.real:  # a process that really dies needs no memory of it
            for inside in sorted(self._inner.list(key)):
                faults.changing(self._inner, url, inside)
        result = call(first, *args)
        if method in ("list", "sizes"):
            result = iter(sorted(result))
        if method == "settle":
            faults.settled(url, first)
        if kind == "late":
            faults.die(kind)
        if kind == "lost":
            raise _refused("error", url, key)
        return result

    def is_cached(self, key: str, *offsets: int) -> bool:
        """False, since the true answer would give the same story other operations."""
        return False

    def reading(self, extents: Sequence[Extent]) -> Callable[[], None]:
        return partial(self.read, extents)

    def put(self, key: str, data: bytes | memoryview) -> None:
        with self.writer(key, len(data)) as out:
            out.write(memoryview(data))

    @contextmanager
    def writer(self, key: str, size: int) -> Iterator[Writer]:
        kind = self._faults.next("put", self._url, key)
        if kind == "error":
            raise _refused(kind, self._url, key)
        if kind in ("kill", "power"):
            self._leave_partial(key, size)
            self._faults.die(kind)
        if kind == "slow":
            time.sleep(self._faults.seconds)
        self._faults.changing(self._inner, self._url, key)
        if kind in ("torn", "silent"):
            cut = self._faults.dice.randrange(max(1, size))
            with self._inner.writer(key, cut) as out:
                yield _Cut(out, cut)
            if kind == "torn":
                self._faults.die(kind)
            return
        with self._inner.writer(key, size) as out:
            yield _Full(self._url, key) if kind == "full" else out
            if kind == "full":
                raise _refused(kind, self._url, key)
        if kind == "late":
            self._faults.die(kind)
        if kind == "lost":
            raise _refused("error", self._url, key)

    def _leave_partial(self, key: str, size: int) -> None:
        """Leave behind the temporary file of a killed writer, half written, on a local disk."""
        if isinstance(self._inner, LocalObjects):
            path = self._inner.root / f"{key}.{self._faults.dice.getrandbits(64):016x}.actshuffle-partial"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"\xa5" * (size // 2))


class _Pause(View):
    """An empty store whose reads let the other calls in zarr's event loop finish first."""

    async def get(self, *_: Any) -> None:
        for _turn in range(200):
            await asyncio.sleep(0)


class _Cut:
    """Passes on the first ``size`` bytes only."""

    def __init__(self, out: Writer, size: int) -> None:
        self._out, self._left = out, size

    def write(self, part: memoryview) -> None:
        head = part.cast("B")[: self._left]
        self._out.write(head)
        self._left -= len(head)


class _Full:
    """A disk without room."""

    def __init__(self, url: str, key: str) -> None:
        self._url, self._key = url, key

    def write(self, part: memoryview) -> None:
        raise _refused("full", self._url, self._key)


def _refused(kind: str, url: str, key: str) -> StorageError:
    number = errno.ENOSPC if kind == "full" else errno.EIO
    try:
        with typed(url, key):
            raise OSError(number, os.strerror(number))
    except StorageError as err:
        return err
