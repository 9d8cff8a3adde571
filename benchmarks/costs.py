"""`costs`: the time that checks, the cluster and the source's codecs add to a shuffle, each against one without.

A round is one shuffle of each kind, all of the same rows, in one process with the serial executor unless
noted otherwise, and a pass through zarr that only decodes::

    plain       chunk files are the bytes of their rows
    unchecked   plain, with a row hash that takes no time: shows the cost of the conservation digests
    dask        plain, on one worker of a Dask cluster: shows the cost of the cluster
    zstd        chunks compressed by zstd
    sharded     the same chunks, 32 to a shard

A source that must be decoded should cost as much as decoding alone plus a plain shuffle.
"""

from __future__ import annotations

import shutil
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr

import actshuffle
from actshuffle.arraytypes import U8, U64
from actshuffle.executors import Executor, Serial, local_cluster
from actshuffle.ordering.digest import RowHash
from actshuffle.units import format_bytes
from benchmarks import plots
from benchmarks.floor import durable, prepare
from benchmarks.phases import Timed, breakdown
from benchmarks.results import Bench, need_space, ranged, rate, spread, table
from benchmarks.sources import make_source

CODED = ("zstd", "sharded")
CHUNK, SHARD = 1 << 20, 32 << 20
HALF = np.uint64(0x0F0F0F0F0F0F0F0F)  # random bits do not compress; under this mask they do, by half


@dataclass(frozen=True)
class Ratio:
    """A time over another time of the same round, and the limit below which it should stay."""

    name: str
    of: str
    over: tuple[str, ...]
    limit: float


RATIOS = (
    Ratio("digests: plain over unchecked", "plain", ("unchecked",), 1.1),
    Ratio("one Dask worker over serial", "dask", ("plain",), 1.05),
    *(Ratio(f"{c} over decoding alone and plain", c, (f"decode {c}", "plain"), 1.3) for c in CODED),
)


def run(bench: Bench, *, size: int, row_bytes: int, levels: int, memory: int, mode: str, rounds: int) -> None:
    need_space(bench.work, 6 * size)
    plain = make_source(bench.work, size, row_bytes)
    coded = {name: _encode(plain, bench.work / f"{name}.zarr", name) for name in CODED}
    bench.plan(rounds * (3 + 2 * len(CODED)))
    found: list[dict[str, float]] = []
    with local_cluster(1) as cluster:
        serial = Serial()
        target = bench.work / "out"

        def shuffle(what: str, source: Path, crew: Executor = serial) -> dict[str, float]:
            prepare(mode, [source])
            start = time.monotonic()
            done = actshuffle.shuffle(
                source, target, seed=1, levels=levels, memory=memory, executor=crew, fsync=durable(mode)
            )
            seconds = time.monotonic() - start
            shutil.rmtree(target)
            bench.did(f"{what}: {rate(done.nbytes, seconds)}")
            return {what: seconds}

        def decode(what: str, source: Path) -> dict[str, float]:
            prepare(mode, [source])
            start = time.monotonic()
            nbytes = _decode(source)
            seconds = time.monotonic() - start
            bench.did(f"{what}: {rate(nbytes, seconds)}")
            return {what: seconds}

        for crew in (serial, cluster):  # touch buffers and load code
            actshuffle.shuffle(plain, target, seed=1, levels=levels, memory=memory, executor=crew)
            shutil.rmtree(target)
        receipts = _receipts(plain, target, levels, memory, durable(mode))
        for _ in range(rounds):
            one = shuffle("plain", plain)
            with unchecked():
                one |= shuffle("unchecked", plain)
            one |= shuffle("dask", plain, cluster)
            for name, source in coded.items():
                one |= decode(f"decode {name}", source) | shuffle(name, source)
            found.append(one)
    rows = summary(found)
    images = plots.draw(bench, lambda folder: [plots.costs(folder, rows)])
    figures = {"rounds": found, "receipts": receipts, "summary": rows}
    bench.publish(figures, page(rows, found, receipts, size, row_bytes, levels), images)


def summary(found: list[dict[str, float]]) -> list[dict[str, Any]]:
    """Median and range of each ratio over the rounds."""
    return [
        {
            "what": r.name,
            "limit": r.limit,
            "ratio": spread([one[r.of] / sum(one[over] for over in r.over) for one in found]),
        }
        for r in RATIOS
    ]


@contextmanager
def unchecked() -> Iterator[None]:
    """While this is open, every row of this process hashes to 0, in no time; all sums agree."""

    def of_parts(_self: RowHash, parts: Iterable[tuple[int, U8]], numbers: U64) -> U64:
        deque(parts, 0)
        return np.zeros((len(numbers), 2), np.uint64)

    before = RowHash.hashes, RowHash.hashes_of_parts
    RowHash.hashes = lambda _self, rows, _numbers: np.zeros((len(rows), 2), np.uint64)  # type: ignore[method-assign]
    RowHash.hashes_of_parts = of_parts  # type: ignore[method-assign]
    try:
        yield
    finally:
        RowHash.hashes, RowHash.hashes_of_parts = before  # type: ignore[method-assign]


def _receipts(source: Path, target: Path, levels: int, memory: int, fsync: bool) -> float:
    """The share of a serial run's time that it spends on writing and reading receipts."""
    timed, start = Timed(Serial()), time.monotonic()
    actshuffle.shuffle(
        source, target, seed=1, levels=levels, memory=memory, executor=timed, progress=timed, fsync=fsync
    )
    stop = time.monotonic()
    shutil.rmtree(target)
    return breakdown(timed, start, stop)["receipt"] / (stop - start)


def _encode(plain: Path, path: Path, name: str) -> Path:
    """The rows of a plain source, half of their bits cleared, in compressed chunks."""
    source = zarr.open_array(plain, mode="r")
    width = source.dtype.itemsize * source.shape[1]
    chunk = max(1, CHUNK // width)
    step = chunk * max(1, SHARD // CHUNK)
    array = zarr.create_array(
        path,
        shape=source.shape,
        dtype=source.dtype,
        chunks=(chunk, source.shape[1]),
        shards=(step, source.shape[1]) if name == "sharded" else None,
        config={"write_empty_chunks": True},
    )
    for start in range(0, source.shape[0], step):
        array[start : start + step] = np.asarray(source[start : start + step]) & HALF
    return path


def _decode(path: Path) -> int:
    """Decode every row once, a shard's worth at a time; returns the bytes of the rows."""
    array = zarr.open_array(path, mode="r")
    step = max(1, SHARD // (array.dtype.itemsize * array.shape[1]))
    return sum(np.asarray(array[start : start + step]).nbytes for start in range(0, array.shape[0], step))


def page(
    rows: list[dict[str, Any]], found: list[dict[str, float]], receipts: float, size: int, row_bytes: int, levels: int
) -> list[str]:
    return [
        f"{format_bytes(size)} in rows of {row_bytes} B, {levels} levels; median (range) of "
        f"{len(found)} interleaved rounds. Chunks of the coded sources hold {format_bytes(CHUNK)}, "
        f"shards {format_bytes(SHARD)}. Receipts took {100 * receipts:.1f}% of a plain run.",
        "",
        *table(
            ("", "ratio", "meant to be below"),
            ((r["what"], ranged(r["ratio"], "{:.3f}"), f"{r['limit']:.2f}") for r in rows),
        ),
        "",
        *table(("", "seconds"), ((name, ranged(spread([one[name] for one in found]))) for name in found[0])),
    ]
