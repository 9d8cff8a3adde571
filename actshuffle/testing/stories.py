"""Small stores and plans, and runs over them that can be repeated to the last operation.

`simulate` makes whole stories out of one number: a small store, a plan, runs in which operations fail,
and a last run that finishes, whose output must be exact.  The same number tells the same story, operation
by operation.
"""

from __future__ import annotations

import math
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec

from actshuffle.arrays.output import coded_array
from actshuffle.engine import manifest
from actshuffle.engine.job import Job
from actshuffle.engine.prepare import prepare
from actshuffle.engine.request import Request
from actshuffle.engine.run import Result, execute
from actshuffle.engine.scratch import memory_beside, scratch_place
from actshuffle.errors import ActshuffleError, DestinationExistsError, FormatError, InfeasibleError, words_of
from actshuffle.executors import Serial
from actshuffle.progress import Silent
from actshuffle.storage import buffers
from actshuffle.storage.place import as_place
from actshuffle.testing.faults import HONEST, Faults, Killed, drawn
from actshuffle.testing.oracle import alarm, differences, leftovers

T = TypeVar("T")


class Choice(Protocol):
    """A source of decisions."""

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
        """Random bits, the same each time; shape ``(rows, *row_shape)``."""
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
        settings["compressors"] = [Crc32cCodec()]
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
    """Choose a store of a few rows, of any kind that the engine accepts."""
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
    """Choose feasible arguments of a run over a small store: fields of `actshuffle.engine.request.Request`."""
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
    return _strategy(choose_store)


def plans(store: StoreSpec) -> Any:
    """Hypothesis strategy of the arguments of a run over ``store``."""
    return _strategy(lambda choice: choose_plan(choice, store))


def _strategy(choose: Callable[[Choice], Any]) -> Any:
    """The strategy of ``choose`` under decisions by hypothesis, which can simplify them."""
    from hypothesis import strategies as st

    @st.composite
    def chosen(draw: Callable[[Any], Any]) -> Any:
        return choose(_Drawn(draw))

    return chosen()


class _Drawn:
    """Decisions by hypothesis."""

    def __init__(self, draw: Callable[[Any], Any]) -> None:
        from hypothesis import strategies

        self._draw, self._strategies = draw, strategies

    def among(self, options: Sequence[T]) -> T:
        found: T = self._draw(self._strategies.sampled_from(options))
        return found

    def between(self, low: int, high: int) -> int:
        return int(self._draw(self._strategies.integers(low, high)))


# --- The simulator --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Story:
    """The events under one seed."""

    seed: int
    store: StoreSpec
    plan: dict[str, Any]
    attempts: tuple[str, ...]  # how each run ended
    operations: tuple[tuple[int, str, str, str | None], ...]  # number, name, key, fault
    caught: bool  # a store lied, and verify found out

    def __str__(self) -> str:
        return f"seed {self.seed}: {self.store}, {self.plan}; " + "; ".join(self.attempts)


class SimulationError(AssertionError):
    """The simulator found a broken promise."""


def simulate(seed: int, folder: Path, *, kinds: Sequence[str] = HONEST, rate: float = 0.03, attempts: int = 8) -> Story:
    """Run a small shuffle in which operations fail until it is finished, and check the output.

    Every attempt must end in the exact output, in an `ActshuffleError`, or in death; the next attempt has
    fewer faults, the last one none.  ``silent`` among the ``kinds`` weakens the promise: `verify` must then
    reject every output that is not exact.  Raises `SimulationError`, which names the seed.
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
            end = "done" if "finished" in words_of(err) else f"DestinationExistsError: {words_of(err)}"
        except ActshuffleError as err:
            end = f"{type(err).__name__}: {words_of(err)}"
        except Exception as err:
            raise fail(f"attempt {attempt} ended in {type(err).__name__}: {err}") from err
        ends.append(end)
        told += [(o.number, o.name, o.key, kind) for o, kind in faults.log]
        if end == "done":
            break
        # A torn claim is no claim: the error asks the user to give --overwrite, and this user does.
        overwrite = end.startswith(FormatError.__name__) and "--overwrite" in end
        if attempt == attempts and not overwrite:
            break
    if ends[-1] != "done":
        raise fail("a run without faults did not finish")
    new_process()
    found, objection = differences(src, dst, seed), alarm(src, dst)
    if found and not ("silent" in kinds and objection):
        raise fail(f"not the exact output: {'; '.join(found)}")
    if objection and "silent" not in kinds:  # silent faults may also tear the records beside correct rows
        raise fail(f"a false alarm: {objection}")
    if (left := leftovers(dst)) and not found:
        raise fail(f"left behind: {left}")
    return Story(seed, store, plan, tuple(ends), tuple(told), bool(found))


def run(src: Path, dst: Path, seed: int, *, overwrite: bool = False, **plan: Any) -> Result:
    """Run a shuffle serially and without fsync; in one block by default."""
    return execute(prepared(src, dst, seed, overwrite=overwrite, **plan), Serial(), Silent())


def prepared(src: Path, dst: Path, seed: int, *, overwrite: bool = False, **plan: Any) -> Job:
    """Prepare the job of such a run."""
    request = Request.of(**({"seed": seed, "block_bytes": 1 << 30, "run_bytes": 1} | plan))
    return prepare(as_place(src), as_place(dst), request, Serial(), overwrite=overwrite, fsync=False)


def new_process() -> None:
    """Forget everything that a fresh process would not have in memory."""
    manifest.boundaries.cache_clear()
    coded_array.cache_clear()
    buffers.release()
