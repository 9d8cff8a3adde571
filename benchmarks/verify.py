"""`verify`: `actshuffle verify` beside a plain read of both stores, in one run.

The plain read is that of `loader`: all files of both stores, each whole into a buffer that is reused, on as many
threads as verify has.  It runs right before each measurement, so that other load on the machine weighs on both.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import groupby, product
from pathlib import Path
from typing import Any

import actshuffle
from actshuffle.executors import Threads
from actshuffle.units import format_bytes
from benchmarks import cache, plots
from benchmarks.loader import Plain
from benchmarks.results import Bench, need_space, ranged, spread, table
from benchmarks.sources import make_source

KINDS = {"full": False, "with mixing": True}
LEAST_FILE = 4096  # bytes; smaller files are metadata


def run(
    bench: Bench, *, size: int, row_bytes: list[int], threads: list[int], modes: list[str], chunk: int, rounds: int
) -> None:
    need_space(bench.work, int(3.3 * size * len(row_bytes)))  # two stores, and the spill of making one
    bench.plan(len(row_bytes) * len(modes) * len(threads) * rounds)
    found: list[dict[str, Any]] = []
    for width in row_bytes:
        source = make_source(bench.work, size, width, chunk)
        stores = source, bench.work / f"shuffled-{width}.zarr"
        actshuffle.shuffle(*stores, seed=0)
        cache.settle(list(stores))
        for mode, count, number in product(modes, threads, range(rounds)):
            case = {"row_bytes": width, "mode": mode, "threads": count, "round": number}
            here = [case | {"what": what} | _pair(stores, count, mode, mixing) for what, mixing in KINDS.items()]
            found += here
            told = ", ".join(f"{one['what']} {_of_read(one):.2f}" for one in here)
            bench.did(f"{mode}, rows of {format_bytes(width)}, {count} threads, of a plain read: {told}")
    rows = summary(found)
    images = plots.draw(bench, lambda folder: [plots.verify(folder, rows)])
    bench.publish({"rounds": found, "summary": rows}, page(rows, size), images)


def _pair(stores: tuple[Path, Path], threads: int, mode: str, mixing: bool) -> dict[str, Any]:
    """One measurement of verify, and one of the plain read before it."""
    files = [path for store in stores for path in store.rglob("*") if path.is_file()]
    files = [path for path in files if path.stat().st_size > LEAST_FILE]
    plain = Plain(files, threads, max(path.stat().st_size for path in files))

    def verify() -> int:
        report = actshuffle.verify(*stores, mixing=mixing, executor=Threads(threads))
        assert not report.problems, str(report)
        return report.nbytes

    return {"read": _timed(plain, stores, mode)} | _timed(verify, stores, mode)


def _timed(subject: Callable[[], int], stores: tuple[Path, Path], mode: str) -> dict[str, float]:
    """Bytes, seconds, and processor seconds of all threads."""
    if mode == "disk":
        cache.evict(stores)
    else:
        subject()  # the first time memory is touched is slow on a virtual machine
    cpu, clock = time.process_time(), time.perf_counter()
    nbytes = subject()
    return {"bytes": nbytes, "seconds": time.perf_counter() - clock, "cpu": time.process_time() - cpu}


def _of_read(one: dict[str, Any]) -> float:
    return float(one["read"]["seconds"] / one["seconds"])


def summary(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rates, and ratios of neighbouring pairs, by case."""
    case = ("row_bytes", "mode", "threads", "what")
    ordered = sorted(found, key=lambda one: [str(one[k]) for k in case])
    return [
        dict(zip(case, values, strict=True))
        | {
            "rate": spread([one["bytes"] / one["seconds"] / 1e9 for one in ours]),
            "read": spread([one["read"]["bytes"] / one["read"]["seconds"] / 1e9 for one in ours]),
            "of_read": spread(list(map(_of_read, ours))),
            "of_read_cpu": spread([one["read"]["cpu"] / one["cpu"] for one in ours]),
        }
        for values, group in groupby(ordered, key=lambda one: tuple(one[k] for k in case))
        for ours in [list(group)]
    ]


def page(rows: list[dict[str, Any]], size: int) -> list[str]:
    columns = "rate", "read", "of_read", "of_read_cpu"
    head = ("row", "mode", "threads", "", "GB/s", "plain read GB/s", "of plain read", "by processor time")
    lines = [
        (format_bytes(r["row_bytes"]), r["mode"], r["threads"], r["what"], *(ranged(r[k]) for k in columns))
        for r in rows
    ]
    return [
        f"{format_bytes(size)} and its shuffle, both read whole. GB/s of both together, and ratios: median (range) "
        "over rounds. *of plain read*: rate over that of a plain read of all files of both, on as many threads, right "
        "before it. *by processor time*: the same ratio of processor seconds, which other load changes less. "
        "*cached*: files in the page cache; of two passes, the second. *disk*: files out of the page cache.",
        "",
        *table(head, lines),
    ]
