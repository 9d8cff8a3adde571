"""Stores that fail on purpose, and runs that can be repeated to the last operation.

Every operation on a place goes through `actshuffle.storage.objects.open_objects`.  `Faults` steps in there,
numbers the operations, and lets a schedule decide which of them go wrong and how::

    error    refused before anything happened (EIO)
    full     a write finds no room (ENOSPC); anything else is refused
    lost     it happened, and the answer got lost on the way back
    slow     it takes a while
    stale    a read sees what was there before the last write
    kill     the process dies before it happens; nothing that it does afterwards has any effect
    late     the process dies right after it happened
    torn     the process dies in the middle: half an object, where a store is not atomic
    power    the machine dies: writes and deletions that were not settled may be undone, what was kept in
             memory is gone
    silent   half an object is written, and the store says that all is well

    >>> faults = Faults(at({3: "kill"}))
    >>> with faults:                                             # doctest: +SKIP
    ...     actshuffle.shuffle("src.zarr", "dst.zarr", seed=1)
    Traceback (most recent call last):
    actshuffle.testing.Killed: operation 3: put level1/blocks/c.0.0

`simulate` makes whole stories out of one number: a small store, a plan, runs in which things go wrong,
and the run that brings it to its end, which must be the exact output.  The same number tells the same
story, operation by operation.
"""

from __future__ import annotations

import asyncio
import errno
import fnmatch
import logging
import math
import os
import random
import shutil
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self, TypeVar

import numpy as np
import zarr
from numpy.typing import NDArray

from actshuffle.arrays.guard import View
from actshuffle.arrays.names import OUR_GROUP
from actshuffle.arrays.output import coded_array
from actshuffle.checking.verifier import verify
from actshuffle.engine import tasks
from actshuffle.engine.job import Job
from actshuffle.engine.prepare import prepare
from actshuffle.engine.request import Request
from actshuffle.engine.run import Result, execute
from actshuffle.engine.scratch import MEMORY_FOLDER, memory_beside, scratch_place
from actshuffle.errors import ActshuffleError, DestinationExistsError, FormatError, InfeasibleError, StorageError
from actshuffle.executors import Serial
from actshuffle.ordering.keys import Keys
from actshuffle.progress import Silent
from actshuffle.storage import buffers
from actshuffle.storage.directio import Extent
from actshuffle.storage.files import LocalObjects, Writer, typed
from actshuffle.storage.objects import Objects, open_objects, wrapped
from actshuffle.storage.place import Place, as_place

T = TypeVar("T")
KINDS = ("error", "full", "lost", "slow", "stale", "kill", "late", "torn", "power", "silent")
DEADLY = ("kill", "late", "torn", "power")
HONEST = tuple(k for k in KINDS if k != "silent")  # after these a run ends in the exact output


class Killed(BaseException):
    """The process died here, as far as anybody can tell."""


class Operation(NamedTuple):
    """One call on a place: ``name`` is get, put, read, size, list, names, delete, delete_prefix or settle."""

    number: int  # counts from 0
    name: str
    url: str
    key: str


Schedule = Callable[[Operation], str | None]


def at(faults: Mapping[int, str]) -> Schedule:
    """Faults by the number of the operation."""
    return lambda operation: faults.get(operation.number)


def drawn(seed: int, rate: float, kinds: Sequence[str] = HONEST) -> Schedule:
    """Faults at random: each operation fails with probability ``rate``, in one of some ways."""
    dice = random.Random(seed)
    return lambda _: dice.choice(kinds) if dice.random() < rate else None


def matching(pattern: str, kind: str, times: int = 1) -> Schedule:
    """The first ``times`` operations whose ``"name key"`` matches, as in ``"put level1/blocks/*"``."""
    left = [times]

    def decide(operation: Operation) -> str | None:
        if not left[0] or not fnmatch.fnmatch(f"{operation.name} {operation.key}", pattern):
            return None
        left[0] -= 1
        return kind

    return decide


@dataclass
class Faults:
    """Inside the block, operations of this process fail as the schedule says.

    Attributes
    ----------
    schedule : what goes wrong with an operation; None for nothing.
    real : deaths are real: this process gets SIGKILL.
    seconds : how long a slow call takes.
    seed : of what is not in the schedule: where a write is torn, what a power failure undoes.
    log : all operations, with what went wrong.
    """

    schedule: Schedule = field(default=lambda _: None)
    real: bool = False
    seconds: float = 0.0
    seed: int = 0
    log: list[tuple[Operation, str | None]] = field(default_factory=list)
    dead: str = ""

    def __post_init__(self) -> None:
        self.dice = random.Random(self.seed)
        self._stack = ExitStack()
        self._before: dict[tuple[str, str], bytes | None] = {}  # what a stale read sees
        self._undo: list[tuple[str, LocalObjects, str, bytes | None]] = []  # not settled, by url
        self._in_memory: dict[str, Objects] = {}  # by url: gone with the machine

    def __enter__(self) -> Self:
        self._stack.enter_context(wrapped(self.wrap))
        log = logging.getLogger("asyncio")  # deaths inside zarr's event loop are no news
        self._stack.callback(log.setLevel, log.level)
        log.setLevel(logging.CRITICAL)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:  # what zarr had begun beside what failed is still under way
            with suppress(Exception):
                zarr.open(_Pause(_Faulty(self, LocalObjects(Path()), ""), "nowhere"), mode="r")
        self._stack.close()

    def install(self) -> None:
        """From now on, for the rest of this process."""
        self.__enter__()

    def wrap(self, objects: Objects, place: Place) -> Objects:
        if place.url.startswith(f"{MEMORY_FOLDER}/actshuffle-"):
            self._in_memory[place.url] = objects
        return _Faulty(self, objects, place.url)

    def next(self, name: str, url: str, key: str) -> str | None:
        """Number an operation and say what is to go wrong with it."""
        if self.dead:
            raise Killed(self.dead)
        operation = Operation(len(self.log), name, url, key)
        kind = self.schedule(operation)
        self.log.append((operation, kind))
        return kind

    def die(self, kind: str) -> None:
        """End this process, or what passes for it."""
        number, name, _, key = self.log[-1][0]
        self.dead = f"operation {number}: {name} {key} ({kind})"
        if kind == "power":
            for url, objects, changed, before in reversed(self._undo):
                if self.dice.random() < 0.5:
                    _restore(objects, changed, before)
                    self._before.pop((url, changed), None)
            for objects_in_memory in self._in_memory.values():
                objects_in_memory.delete_prefix("")
        if self.real:
            os.kill(os.getpid(), signal.SIGKILL)
        raise Killed(self.dead)

    def changing(self, objects: Objects, url: str, key: str) -> None:
        """Remember what is there before it changes."""
        before = objects.get(key)
        self._before[url, key] = before
        if isinstance(objects, LocalObjects):
            self._undo.append((url, objects, key, before))

    def before(self, url: str, key: str) -> tuple[bool, bytes | None]:
        """What a stale read sees of a key, if it changed at all."""
        return (url, key) in self._before, self._before.get((url, key))

    def settled(self, url: str, prefixes: Sequence[str]) -> None:
        self._undo = [u for u in self._undo if u[0] != url or not any(u[2].startswith(p) for p in prefixes)]


def _restore(objects: LocalObjects, key: str, before: bytes | None) -> None:
    if before is None:
        objects.delete(key)
    else:
        objects.put(key, before)


class _Faulty:
    """`Objects` whose operations go through `Faults`."""

    in_order = True  # so that numbers mean the same each time

    def __init__(self, faults: Faults, inner: Objects, url: str) -> None:
        self._faults, self._inner, self._url = faults, inner, url

    def _do(self, name: str, key: str, call: Callable[[], T], stale: Callable[[], T] | None = None) -> T:
        """Count a call, and do it, or not, or not quite."""
        kind = self._faults.next(name, self._url, key)
        if kind in ("error", "full"):
            raise _refused("error", self._url, key)
        if kind in ("kill", "torn", "power"):
            self._faults.die(kind)
        if kind == "slow":
            time.sleep(self._faults.seconds)
        if kind == "stale" and stale is not None and self._faults.before(self._url, key)[0]:
            return stale()
        result = call()
        if kind == "late":
            self._faults.die(kind)
        if kind == "lost":
            raise _refused("error", self._url, key)
        return result

    def get(self, key: str) -> bytes | None:
        def stale() -> bytes | None:
            return self._faults.before(self._url, key)[1]

        return self._do("get", key, lambda: self._inner.get(key), stale)

    def size(self, key: str) -> int | None:
        def stale() -> int | None:
            data = self._faults.before(self._url, key)[1]
            return None if data is None else len(data)

        return self._do("size", key, lambda: self._inner.size(key), stale)

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
        """What a killed writer leaves on a local disk: a temporary file, half written."""
        if isinstance(self._inner, LocalObjects):
            path = self._inner.root / f"{key}.{self._faults.dice.getrandbits(64):016x}.actshuffle-partial"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"\xa5" * (size // 2))

    def reading(self, extents: Sequence[Extent]) -> Callable[[], None]:
        return partial(self.read, extents)

    def read(self, extents: Sequence[Extent]) -> None:
        def stale() -> None:
            raise _refused("error", self._url, extents[0].key)

        key = extents[0].key if extents else ""
        self._do("read", key, lambda: self._inner.read(extents), stale)

    def read_rows(self, key: str, width: int, offsets: Sequence[int], out: memoryview, goals: Sequence[int]) -> None:
        self._do("read", key, lambda: self._inner.read_rows(key, width, offsets, out, goals))

    def list(self, prefix: str) -> Iterator[str]:
        return iter(self._do("list", prefix, lambda: sorted(self._inner.list(prefix))))

    def sizes(self, prefix: str) -> Iterator[tuple[str, int]]:
        return iter(self._do("list", prefix, lambda: sorted(self._inner.sizes(prefix))))

    def names(self, prefix: str) -> Sequence[str]:
        return self._do("names", prefix, lambda: self._inner.names(prefix))

    def delete(self, key: str) -> None:
        def call() -> None:
            self._faults.changing(self._inner, self._url, key)
            self._inner.delete(key)

        self._do("delete", key, call)

    def delete_prefix(self, prefix: str) -> None:
        def call() -> None:
            if not self._faults.real:  # whoever really dies forgets
                for key in sorted(self._inner.list(prefix)):
                    self._faults.changing(self._inner, self._url, key)
            self._inner.delete_prefix(prefix)

        self._do("delete_prefix", prefix, call)

    def settle(self, prefixes: Sequence[str]) -> None:
        def call() -> None:
            self._inner.settle(prefixes)
            self._faults.settled(self._url, prefixes)

        self._do("settle", ",".join(prefixes), call)

    def free_bytes(self) -> int | None:
        return self._inner.free_bytes()


class _Pause(View):
    """An empty store that lets others in zarr's event loop go first, until they are done."""

    async def get(self, *_: Any) -> None:
        for _turn in range(200):
            await asyncio.sleep(0)


class _Cut:
    """Passes on the first bytes alone."""

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


def new_process() -> None:
    """Forget what a process keeps, as one that is started afresh has."""
    tasks.boundaries.cache_clear()
    coded_array.cache_clear()
    buffers.release()


# --- Small stores and plans, from dice or from hypothesis ---------------------------------------------


class Choice(Protocol):
    """Where decisions come from."""

    def among(self, options: Sequence[T]) -> T: ...
    def between(self, low: int, high: int) -> int: ...


class Dice:
    """Decisions from a seed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def among(self, options: Sequence[T]) -> T:
        return options[self._random.randrange(len(options))]

    def between(self, low: int, high: int) -> int:
        return self._random.randint(low, high)


@dataclass(frozen=True)
class ArraySpec:
    """One array of a small source."""

    name: str
    dtype: str
    row_shape: tuple[int, ...]
    chunk_rows: int
    codec: str  # "none", "zstd", "crc32c" or "sharded"

    @property
    def row_bytes(self) -> int:
        return np.dtype(self.dtype).itemsize * math.prod(self.row_shape)

    def data(self, rows: int) -> NDArray[Any]:
        """Random bits, the same each time."""
        bits = np.random.default_rng([rows, *self.name.encode()]).bytes(rows * self.row_bytes)
        return np.frombuffer(bits, self.dtype).reshape(rows, *self.row_shape)


@dataclass(frozen=True)
class StoreSpec:
    """A small source: a group of arrays, or one bare array."""

    rows: int
    arrays: tuple[ArraySpec, ...]
    bare: bool
    zarr_format: int

    @property
    def row_bytes(self) -> int:
        return sum(a.row_bytes for a in self.arrays)

    def write(self, path: Path) -> None:
        if not self.bare:
            zarr.create_group(path, zarr_format=self.zarr_format, attributes={"made by": "testing"})  # type: ignore[arg-type]
        for spec in self.arrays:
            _write_array(path, "" if self.bare else spec.name, spec, self.rows, self.zarr_format)


def _write_array(path: Path, name: str, spec: ArraySpec, rows: int, zarr_format: int) -> None:
    settings: dict[str, Any] = {"chunks": (spec.chunk_rows, *spec.row_shape), "compressors": None}
    if spec.codec == "zstd":
        settings["compressors"] = "auto"
    elif spec.codec == "crc32c" and zarr_format == 3:
        settings["compressors"] = [zarr.codecs.Crc32cCodec()]
    elif spec.codec == "sharded" and zarr_format == 3:
        settings["shards"] = (2 * spec.chunk_rows, *spec.row_shape)
    array = zarr.create_array(
        path,
        name=name or None,
        shape=(rows, *spec.row_shape),
        dtype=spec.dtype,
        filters=None,
        zarr_format=zarr_format,  # type: ignore[arg-type]
        config={"write_empty_chunks": True},
        **settings,
    )
    if rows:
        array[...] = spec.data(rows)


def choose_store(choice: Choice) -> StoreSpec:
    """A store of few rows, of any kind that the engine takes."""
    bare = choice.among([False, False, True])
    specs = tuple(
        ArraySpec(
            name="data" if bare else f"f{number}",
            dtype=choice.among(["<f4", "<u2", "|u1", "<f8", "<i8"]),
            row_shape=choice.among([(), (3,), (2, 2), (5,)]),
            chunk_rows=choice.between(1, 12),
            codec=choice.among(["none", "none", "zstd", "crc32c", "sharded"]),
        )
        for number in range(1 if bare else choice.between(1, 3))
    )
    return StoreSpec(choice.between(0, 60), specs, bare, choice.among([3, 3, 2]))


def choose_plan(choice: Choice, store: StoreSpec) -> dict[str, Any]:
    """Arguments of a run over a small store, feasible ones: fields of `actshuffle.engine.prepare.Request`."""
    levels = choice.between(1, 4)
    chunk_rows = choice.between(1, 6)
    least = max(chunk_rows, 4, -(-store.rows // 6))
    most = least if levels > 1 else max(store.rows, chunk_rows, 1)
    plan = {
        "levels": levels,
        "block_bytes": choice.between(most, 2 * most) * store.row_bytes,
        "run_bytes": 1,
        "chunk_rows": chunk_rows,
        "codec": choice.among(["none", "none", "crc32c", "zstd"]),
        "chunks_per_shard": choice.among([1, 1, 2]) if most >= 2 * chunk_rows else 1,
        "source_row": choice.among([True, True, False]),
        "tasks_wanted": choice.between(1, 4),
        "spill_memory": choice.among([0, 0, 1, 2]) * store.rows * (store.row_bytes + 16) // 2,
    }
    if choice.among([False, False, True]) and all(spec.codec == "none" for spec in store.arrays):
        plan |= {"gather": True, "levels": "auto", "spill_memory": 0}
    return plan


def stores() -> Any:
    """Hypothesis strategy of `StoreSpec`."""
    from hypothesis import strategies as st

    @st.composite
    def store(draw: Callable[[Any], Any]) -> StoreSpec:
        return choose_store(_Drawn(draw))

    return store()


def plans(store: StoreSpec) -> Any:
    """Hypothesis strategy of the arguments of a run over ``store``."""
    from hypothesis import strategies as st

    @st.composite
    def plan(draw: Callable[[Any], Any]) -> dict[str, Any]:
        return choose_plan(_Drawn(draw), store)

    return plan()


class _Drawn:
    """Decisions by hypothesis, which can make them simpler."""

    def __init__(self, draw: Callable[[Any], Any]) -> None:
        self._draw = draw

    def among(self, options: Sequence[T]) -> T:
        from hypothesis import strategies as st

        found: T = self._draw(st.sampled_from(options))
        return found

    def between(self, low: int, high: int) -> int:
        from hypothesis import strategies as st

        return int(self._draw(st.integers(low, high)))


# --- The check, and the simulator ---------------------------------------------------------------------


def differences(src: Path, dst: Path, seed: int) -> list[str]:
    """In what ``dst`` is not ``src`` in the order of its seed, by zarr and the oracle alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        node = zarr.open(src, mode="r")
        before = {"data": node} if isinstance(node, zarr.Array) else dict(node.arrays())
        try:
            after = dict(zarr.open_group(dst, mode="r").arrays())
        except Exception as err:  # whatever zarr makes of damaged metadata
            return [f"cannot be opened: {type(err).__name__}: {err}"]
        found = [f"array {name} is absent" for name in sorted(set(before) - set(after))]
        rows = next(iter(before.values())).shape[0]
        order = Keys(seed).order(rows)
        expected: dict[str, NDArray[Any]] = {"source_row": order.astype("<u8")}
        expected |= {name: np.asarray(array[...])[order] for name, array in before.items()}
        for name, array in after.items():
            if name not in expected:
                found.append(f"array {name} is not of the source")
            elif array.nchunks_initialized < array.nchunks:
                found.append(f"array {name} lacks chunks")
            elif (problem := _difference(array, expected[name])) is not None:
                found.append(f"array {name} {problem}")
    return found


def _difference(array: zarr.Array[Any], expected: NDArray[Any]) -> str | None:
    try:
        now = np.asarray(array[...])
    except Exception as err:  # any codec's own complaint
        return f"cannot be read: {type(err).__name__}: {err}"
    if now.shape != expected.shape or now.dtype != expected.dtype.newbyteorder("<"):
        return f"has shape {now.shape} and dtype {now.dtype}"
    return None if now.tobytes() == expected.astype(now.dtype).tobytes() else "differs"


def leftovers(dst: Path) -> list[str]:
    """What a finished run should have cleared away: scratch beside dst and in memory, receipts, files
    half written."""
    place = scratch_place(as_place(dst), None)
    scratch, memory = Path(place.url), Path(memory_beside(place).url)
    ours = dst / OUR_GROUP
    paths = [scratch, memory, ours / "run.json", ours / "receipts"]
    return [str(p) for p in (*paths, *dst.rglob("*.actshuffle-partial")) if p.exists()]


@dataclass(frozen=True)
class Story:
    """What happened under one seed."""

    seed: int
    store: StoreSpec
    plan: dict[str, Any]
    attempts: tuple[str, ...]  # how each run ended
    operations: tuple[tuple[int, str, str, str | None], ...]  # number, name, key, fault
    caught: bool  # a store lied, and verify told

    def __str__(self) -> str:
        return f"seed {self.seed}: {self.store}, {self.plan}; " + "; ".join(self.attempts)


class SimulationError(AssertionError):
    """The simulator found what must not be."""


def simulate(seed: int, folder: Path, *, kinds: Sequence[str] = HONEST, rate: float = 0.03, attempts: int = 8) -> Story:
    """Run a small shuffle in which things go wrong until it is done, and check that it is right.

    Every attempt must end in the exact output, in an error of ours, or in death; then the next one
    begins, with fewer faults, the last with none.  ``silent`` among the ``kinds`` weakens the promise:
    what is not the exact output must then be caught by `verify`.  Raises `SimulationError`, which
    names the seed.
    """
    choice = Dice(seed)
    store = choose_store(choice)
    plan = choose_plan(choice, store)
    src, dst = folder / "src.zarr", folder / "dst.zarr"
    store.write(src)
    ends: list[str] = []
    told: list[tuple[int, str, str, str | None]] = []

    def fail(what: str) -> SimulationError:
        shutil.rmtree(memory_beside(scratch_place(as_place(dst), None)).url, ignore_errors=True)
        story = Story(seed, store, plan, tuple(ends), (), False)
        again = f"simulate({seed}, folder, kinds={tuple(kinds)}, rate={rate}, attempts={attempts})"
        return SimulationError(f"{what}\nto see it again: actshuffle.testing.{again}\n{story}")

    try:
        prepared(src, dst, seed, **plan)
    except InfeasibleError:
        plan["levels"] = "auto"
    overwrite = False
    for attempt in range(attempts + 2):
        chance = rate * 0.7**attempt if attempt < attempts else 0.0
        faults = Faults(drawn(hash((seed, attempt)), chance, kinds), seed=seed + attempt)
        new_process()
        try:
            with faults, zarr.config.set({"async.concurrency": 1}):
                run(src, dst, seed, overwrite=overwrite, **plan)
            end = "done"
        except Killed as death:
            end = f"killed at {death}"
        except DestinationExistsError as err:
            end = "done" if "finished" in str(err) else f"DestinationExistsError: {err}"
        except ActshuffleError as err:
            end = f"{type(err).__name__}: {err}"
        except Exception as err:
            raise fail(f"attempt {attempt} ended in {type(err).__name__}: {err}") from err
        ends.append(end)
        told += [(o.number, o.name, o.key, kind) for o, kind in faults.log]
        if end == "done":
            break
        # A torn claim is no claim; that the user is told, and what they are told to do they do.
        overwrite = end.startswith(FormatError.__name__) and "--overwrite" in end
        if attempt == attempts and not overwrite:
            break
    if ends[-1] != "done":
        raise fail("a run without faults did not finish")
    new_process()
    found, alarm = differences(src, dst, seed), _alarm(src, dst)
    if found and not ("silent" in kinds and alarm):
        raise fail(f"not the exact output: {'; '.join(found)}")
    if alarm and "silent" not in kinds:  # beside the rows, which may be right, the records may be torn
        raise fail(f"a false alarm: {alarm}")
    if (left := leftovers(dst)) and not found:
        raise fail(f"left behind: {left}")
    return Story(seed, store, plan, tuple(ends), tuple(told), bool(found))


def _alarm(src: Path, dst: Path) -> str:
    """What `verify` has to say against a store."""
    try:
        report = verify(src, dst)
    except ActshuffleError as err:
        return str(err)
    return "" if report.ok else str(report)


def run(src: Path, dst: Path, seed: int, *, overwrite: bool = False, **plan: Any) -> Result:
    """A serial run without fsync, in one block unless told otherwise."""
    return execute(prepared(src, dst, seed, overwrite=overwrite, **plan), Serial(), Silent())


def prepared(src: Path, dst: Path, seed: int, *, overwrite: bool = False, **plan: Any) -> Job:
    """The job of such a run."""
    request = Request(**({"seed": seed, "block_bytes": 1 << 30, "run_bytes": 1} | plan))
    return prepare(as_place(src), as_place(dst), request, most_memory=lambda: 1 << 30, overwrite=overwrite, fsync=False)


__all__ = [
    "DEADLY",
    "HONEST",
    "KINDS",
    "Faults",
    "Killed",
    "Operation",
    "SimulationError",
    "Story",
    "at",
    "differences",
    "drawn",
    "leftovers",
    "matching",
    "open_objects",
    "plans",
    "run",
    "simulate",
    "stores",
]
