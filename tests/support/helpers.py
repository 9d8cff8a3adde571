"""Source stores of every kind the engine takes, an executor that repeats itself, and the check of outputs."""

from __future__ import annotations

import math
import os
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numcodecs import Blosc, Zstd
from zarr.codecs import ZstdCodec
from zarr.errors import UnstableSpecificationWarning

from actshuffle.bfloat16 import BFloat16
from actshuffle.engine import tasks
from actshuffle.engine.job import Job
from actshuffle.engine.prepare import prepare
from actshuffle.engine.request import Request
from actshuffle.engine.run import Result, execute
from actshuffle.executors import Serial
from actshuffle.ordering.keys import Keys
from actshuffle.planning.tree import Task
from actshuffle.progress import Silent
from actshuffle.storage.place import as_place

STRUCT = np.dtype([("id", "<u4"), ("score", "<f8"), ("flag", "i1")])
DTYPES = ["?", "i1", "<u2", "<i8", "<f2", "<f4", "<f8", "<c8", "<c16", "<M8[ns]", "<m8[s]", "S5", "<U3", "V3", STRUCT]


def values(n: int, shape: tuple[int, ...] = (), dtype: Any = "<f4", seed: int = 7) -> np.ndarray:
    """``n`` rows of random bits, NaNs of all sorts among them; booleans and letters where it must be."""
    rng, dtype = np.random.default_rng(seed), np.dtype(dtype)
    count = n * math.prod(shape)
    if dtype.kind == "b":
        bits = rng.integers(0, 2, count, np.uint8)
    elif dtype.kind == "S":
        bits = rng.integers(65, 91, count * dtype.itemsize, np.uint8)
    elif dtype.kind == "U":
        bits = rng.integers(65, 0x3000, count * dtype.itemsize // 4, np.uint32)
    else:
        bits = rng.integers(0, 256, count * dtype.itemsize, np.uint8)
    return bits.view(dtype).reshape(n, *shape)


# --- Source stores ------------------------------------------------------------------------------


def array(path: Path | str, data: np.ndarray, name: str | None = None, **settings: Any) -> None:
    """One Zarr array, uncompressed and in chunks of 7 rows unless told otherwise."""
    settings = {"chunks": (7, *(max(1, s) for s in data.shape[1:])), "compressors": None} | settings
    if "dtype" in settings:
        settings |= {"shape": data.shape}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnstableSpecificationWarning)
        made = zarr.create_array(
            str(path),
            name=name,
            **settings,
            config={"write_empty_chunks": True},
            **({} if "dtype" in settings else {"data": data}),
        )
        if "dtype" in settings:
            made[...] = data


def group(path: Path, arrays: dict[str, np.ndarray], **settings: Any) -> None:
    """A group whose arrays share their rows."""
    zarr.create_group(path, attributes={"model": "tiny", "layer": 3}).store.close()
    for name, data in arrays.items():
        array(path, data, name, **settings)


def _wide(path: Path, n: int, **settings: Any) -> None:
    array(path, values(n, (4, 3)), **settings)


def _mixed(path: Path, n: int) -> None:
    zarr.create_group(path, attributes={"model": "tiny", "nested": {"layers": [1, 2]}})
    for number, dtype in enumerate(DTYPES):
        data = values(n, (2,) if number % 2 else (), dtype, seed=number)
        array(path, data, f"f{number}", chunks=(5 + number, *data.shape[1:]))
    array(path, values(n, (3,), "<u2"), "bf16", dtype=BFloat16(), fill_value=0x3F80)


def _mixed_v2(path: Path, n: int) -> None:
    zarr.create_group(path, zarr_format=2, attributes={"model": "tiny"})
    for number, dtype in enumerate(DTYPES):
        data = values(n, (2,) if number % 2 else (), dtype, seed=number)
        array(path, data, f"f{number}", chunks=(5 + number, *data.shape[1:]), zarr_format=2)


def _named(path: Path, n: int) -> None:
    zarr.create_group(path, attributes={"title": "named dimensions"})
    array(
        path,
        values(n, (4,)),
        "x",
        dimension_names=["token", "feature"],
        fill_value=math.nan,
        attributes={"unit": "nats"},
    )
    array(path, values(n, (), "<i4"), "id", dimension_names=["token"], fill_value=-1)
    array(path, values(n, (2, 2), "<f8"), "y", dimension_names=["token", None, "k"])


def _named_v2(path: Path, n: int) -> None:
    zarr.create_group(path, zarr_format=2)
    array(
        path,
        values(n, (4,)),
        "x",
        zarr_format=2,
        fill_value=2.5,
        attributes={"_ARRAY_DIMENSIONS": ["token", "feature"], "unit": "nats"},
    )


SOURCES: dict[str, Callable[[Path, int], None]] = {
    "bare": _wide,
    "bare_v2": lambda p, n: _wide(p, n, zarr_format=2),
    "mixed_group": _mixed,
    "mixed_group_v2": _mixed_v2,
    "named": _named,
    "named_v2": _named_v2,
    "null_fill_v2": lambda p, n: _wide(p, n, fill_value=None, zarr_format=2),
    "bfloat16": lambda p, n: array(p, values(n, (6,), "<u2"), dtype=BFloat16()),
    "bfloat16_zstd": lambda p, n: array(p, values(n, (6,), "<u2"), dtype=BFloat16(), compressors=[ZstdCodec()]),
    "scalars": lambda p, n: array(p, values(n, (), "i1")),
    "scalars_v2": lambda p, n: array(p, values(n, (), "<f8"), zarr_format=2),
    "three_bytes": lambda p, n: array(p, values(n, (3,), "u1")),
    "odd_width": lambda p, n: array(p, values(n, (1001,), "u1")),
    "deep_rows": lambda p, n: array(p, values(n, (2, 1, 3, 2), "<f2")),
    "cut_rows": lambda p, n: _wide(p, n, chunks=(5, 3, 2)),
    "cut_rows_v2": lambda p, n: _wide(p, n, chunks=(5, 3, 2), zarr_format=2),
    "one_chunk": lambda p, n: _wide(p, n, chunks=(n + 13, 4, 3)),
    "row_chunks": lambda p, n: _wide(p, n, chunks=(1, 4, 3)),
    "zstd": lambda p, n: _wide(p, n, compressors=[ZstdCodec(level=1)]),
    "crc": lambda p, n: _wide(p, n, compressors=[zarr.codecs.Crc32cCodec()]),
    "blosc_v2": lambda p, n: _wide(p, n, compressors=[Blosc("zstd")], zarr_format=2),
    "zstd_v2": lambda p, n: _wide(p, n, compressors=[Zstd()], zarr_format=2),
    "fortran_v2": lambda p, n: _wide(p, n, order="F", zarr_format=2),
    "sharded": lambda p, n: _wide(p, n, chunks=(4, 4, 3), shards=(20, 4, 3)),
    "sharded_cut_zstd": lambda p, n: _wide(p, n, chunks=(4, 2, 3), shards=(12, 4, 3), compressors=[ZstdCodec()]),
    "big_endian_v2": lambda p, n: array(p, values(n, (4,), ">f4"), zarr_format=2),
    "big_endian_v3": lambda p, n: array(p, values(n, (4,), ">i8"), serializer=zarr.codecs.BytesCodec(endian="big")),
    "dots": lambda p, n: _wide(p, n, chunk_key_encoding={"name": "default", "separator": "."}),
    "v2_keys": lambda p, n: _wide(p, n, chunk_key_encoding={"name": "v2", "separator": "."}),
    "slashes_v2": lambda p, n: _wide(p, n, zarr_format=2, chunk_key_encoding={"name": "v2", "separator": "/"}),
}


# --- Running ------------------------------------------------------------------------------------


def job_of(src: Path, dst: Path, *, seed: int = 5, **request: Any) -> Job:
    """A job without fsync, one block unless told otherwise; ``key_bits`` in a request forces ties."""
    request = {"run_bytes": 1, "block_bytes": 1 << 30} | request
    return prepare(
        as_place(src), as_place(dst), Request(seed=seed, **request), most_memory=lambda: 1 << 30, fsync=False
    )


def run(src: Path, dst: Path, executor: Any = None, **request: Any) -> Result:
    """A whole run of such a job."""
    return execute(job_of(src, dst, **request), executor or Serial(), Silent())


def force(job: Job, task: Task) -> None:
    """The work of a task, whatever its receipt says: all its bytes are written again."""
    {"split": tasks.split, "index": tasks.index, "leaf": tasks.leaf}[task.kind](job, task)


def _once(rival: bool, job: Job, task: Task) -> tuple[bool, tasks.Done]:
    return rival, tasks.run_task(job, task)


def _forced(rival: bool, job: Job, task: Task) -> tuple[bool, tasks.Done | None]:
    return rival, force(job, task) if rival else tasks.run_task(job, task)


@dataclass
class Twice:
    """An executor that runs a share of the tasks twice, as schedulers do that lose a worker.

    ``how`` is "receipt" (the second may meet the receipt of the first), "rewrite" (it writes all bytes
    again, on a cluster while the first is at it) or "late" (it does so when the level is done).
    """

    inner: Any
    how: str
    share: float = 0.2
    repeats: int = 0
    dice: random.Random = field(default_factory=lambda: random.Random(1))

    @property
    def workers(self) -> int:
        return int(self.inner.workers)

    def map(self, fn: Callable[..., Any], calls: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        if fn is not tasks.run_task:
            yield from self.inner.map(fn, calls)
            return
        late: list[tuple[Any, ...]] = []

        def doubled() -> Iterator[tuple[Any, ...]]:
            for call in calls:
                yield False, *call
                if self.dice.random() < self.share:
                    self.repeats += 1
                    if self.how == "late":
                        late.append(call)
                    else:
                        yield True, *call

        work = _once if self.how == "receipt" else _forced
        yield from (done for rival, done in self.inner.map(work, doubled()) if not rival)
        for _ in self.inner.map(force, late):
            pass


# --- Checking -----------------------------------------------------------------------------------


def rows_of(data: np.ndarray) -> np.ndarray:
    """The little-endian bytes of each row, uint8 ``(n, row bytes)``."""
    little = np.ascontiguousarray(data, data.dtype.newbyteorder("<"))
    width = little.dtype.itemsize * math.prod(little.shape[1:])
    return np.frombuffer(little.tobytes(), np.uint8).reshape(len(little), width)


def opened(path: Path | str) -> tuple[dict[str, Any], dict[str, zarr.Array]]:
    """A store's group attributes and arrays, as zarr alone sees them; a bare array is ``data``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnstableSpecificationWarning)
        node = zarr.open(str(path), mode="r")
        if isinstance(node, zarr.Array):
            return {}, {"data": node}
        return dict(node.attrs), dict(node.arrays())


def assert_is_oracle(
    src: Path,
    dst: Path,
    seed: int = 5,
    *,
    fields: Sequence[str] | None = None,
    source_row: bool = True,
    **key_bits: int,
) -> None:
    """Every array of ``dst`` is that of ``src`` in the order of the keys, with all that describes it."""
    (attributes, before), (found, after) = opened(src), opened(dst)
    before = {k: v for k, v in before.items() if fields is None or k in fields}
    n = next(iter(before.values())).shape[0]
    order = Keys(seed, **key_bits).order(n)
    assert found == attributes
    assert set(after) == {*before, *(["source_row"] * source_row)}
    if source_row:
        assert after["source_row"].dtype == np.dtype("<u8")
        np.testing.assert_array_equal(after["source_row"][:], order.astype(np.uint64))
    for name, was in before.items():
        now = after[name]
        assert now.shape == was.shape, name
        assert now.dtype == was.dtype.newbyteorder("<"), name
        assert _is_bfloat16(now) == _is_bfloat16(was), name
        assert now.nchunks_initialized >= now.nchunks, f"{name} has missing chunks"
        assert _scalar(now) == _scalar(was), f"fill value of {name}"
        assert _dimensions(name, now) == _dimensions(name, was), name
        assert dict(now.attrs) == {k: v for k, v in was.attrs.items() if k != "_ARRAY_DIMENSIONS"}, name
        np.testing.assert_array_equal(rows_of(now[:]), rows_of(was[:])[order], err_msg=name)


def _is_bfloat16(array: zarr.Array) -> bool:
    return array.metadata.to_dict().get("data_type") == "bfloat16"


def _scalar(array: zarr.Array) -> bytes:
    little = array.dtype.newbyteorder("<")
    fill = array.fill_value
    return (np.zeros((), little) if fill is None else np.array(fill, array.dtype).astype(little)).tobytes()


def _dimensions(name: str, array: zarr.Array) -> list[str]:
    names = array.attrs.get("_ARRAY_DIMENSIONS") if array.metadata.zarr_format == 2 else array.metadata.dimension_names
    if names is None or None in names:
        return ["row", *(f"{name}_{axis}" for axis in range(1, array.ndim))]
    return list(names)


def files(store: Path) -> dict[str, bytes]:
    """Every file of a store but the run's own records, by path."""
    found = {str(p.relative_to(store)): p for p in sorted(store.rglob("*")) if p.is_file()}
    return {k: p.read_bytes() for k, p in found.items() if not k.startswith("_actshuffle/")}


def evict(path: Path) -> None:
    """Put a file out of the page cache."""
    with path.open("rb") as held:
        os.fsync(held)
        os.posix_fadvise(held.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class Stops(Serial):
    """Dies after some tasks, as a machine does; ``seen`` tells which were found done."""

    def __init__(self, after: int = -1) -> None:
        self.left, self.seen = after, list[bool]()

    def map(self, fn: Any, calls: Any) -> Any:
        for call in calls:
            if self.left == 0:
                raise KeyboardInterrupt
            done = fn(*call)
            if fn is tasks.run_task:
                self.left -= 1
                self.seen.append(done.fresh)
            yield done
