"""`floor`: the speed of memory and disk on this machine, by our own copier, in interleaved rounds."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from actshuffle.units import format_bytes
from benchmarks import cache, plots
from benchmarks.copier import MEMCPY_REPEATS, Copier, Work
from benchmarks.results import Bench, need_space, ranged, rate, spread, table
from benchmarks.sources import chunk_keys, make_source

KINDS = (("memcpy", 1), ("read", 1), ("write", 1), ("copy", 1), ("copy", 2), ("plain copy", 2))
ROW_BYTES = 8192  # any width will do: a copier does not look at rows
LEAST_FILLED = 256 << 20  # from this source size on, filling memory is worth its seconds


class Floor:
    """The copier at work on one source; every measurement starts from a known state of the cache."""

    def __init__(self, copier: Copier, source: Path, scratch: Path) -> None:
        self.copier, self.source = copier, source
        self._target = scratch / f"copy-{copier.processes}"
        self._keys = tuple(chunk_keys(source))
        self._size = (source / self._keys[0]).stat().st_size
        self.nbytes = len(self._keys) * self._size

    def measure(self, what: str, buffers: int, mode: str) -> dict[str, Any]:
        """Measure seconds, bytes moved, and the share of the source that was cached at the start."""
        prepare(mode, [self.source])
        share = cache.cached_share([self.source])
        work = Work(what, self.source, self._target, self._keys, self._size, durable(mode), buffers)
        seconds = self.copier.seconds(work)
        shutil.rmtree(self._target, ignore_errors=True)
        moved = self.nbytes
        if what == "memcpy":
            moved = MEMCPY_REPEATS * self._size * self.copier.processes
        return {
            "what": label(what, buffers),
            "mode": mode,
            "processes": self.copier.processes,
            "seconds": seconds,
            "bytes": moved,
            "cached": share,
        }

    def warm_up(self) -> None:
        """Start the processes and touch their buffers."""
        self.copier.seconds(Work("memcpy", self.source, self._target, (), self._size, False))


def label(what: str, buffers: int) -> str:
    return f"{what}, one buffer" if (what, buffers) == ("copy", 1) else what


def prepare(mode: str, folders: list[Path]) -> None:
    """Bring sources into the mode's state, "cached" in memory or "disk" on disk only, and the rest of memory in use."""
    if mode == "disk":
        cache.evict(folders)
    size = sum(path.stat().st_size for folder in folders for path in folder.rglob("*"))
    if size >= LEAST_FILLED:
        cache.fill_memory(folders[0].parent)
    if mode == "cached":
        cache.warm(folders)  # comes last, or their pages would be the first to be dropped


def durable(mode: str) -> bool:
    """True if writes must reach the disk before they count."""
    return mode == "disk"


def run(bench: Bench, *, size: int, processes: list[int], modes: list[str], rounds: int, chunk: int) -> None:
    need_space(bench.work, int(2.5 * size))
    source = make_source(bench.work, size, ROW_BYTES, chunk)
    bench.plan(rounds * len(processes) * len(modes) * len(KINDS))
    found: list[dict[str, Any]] = []
    copiers = [Copier(count) for count in processes]
    try:
        floors = [Floor(copier, source, bench.work) for copier in copiers]
        for floor in floors:
            floor.warm_up()
        for number in range(rounds):
            for mode in modes:
                for floor in floors:
                    for what, buffers in KINDS:
                        one = floor.measure(what, buffers, mode)
                        found.append(one | {"round": number})
                        bench.did(
                            f"{mode}, {floor.copier.processes} processes, {one['what']}: "
                            f"{rate(one['bytes'], one['seconds'])}"
                        )
    finally:
        for copier in copiers:
            copier.__exit__()
    rows = [line for line in summary(found, processes, modes) if line]
    images = plots.draw(bench, lambda folder: [plots.floor(folder, rows)])
    bench.publish({"rounds": found, "summary": rows}, page(rows, size, chunk), images)


def summary(found: list[dict[str, Any]], processes: list[int], modes: list[str]) -> list[dict[str, Any]]:
    rows = []
    for mode in modes:
        for count in processes:
            for what, buffers in KINDS:
                name = label(what, buffers)
                ours = [f for f in found if (f["mode"], f["processes"], f["what"]) == (mode, count, name)]
                rates = spread([f["bytes"] / f["seconds"] / 1e9 for f in ours])
                cached = spread([f["cached"] for f in ours])["median"]
                rows.append({"mode": mode, "processes": count, "what": name, "rate": rates, "cached": cached})
    return rows


def page(rows: list[dict[str, Any]], size: int, chunk: int) -> list[str]:
    return [
        f"{format_bytes(size)} in chunk files of {format_bytes(chunk)}; GB/s, median (range) of "
        "interleaved rounds. *cached*: the source is in the page cache and writes need not reach the "
        "disk. *disk*: the source is out of the cache (the last column is the share of its pages that "
        "were still there) and writes bypass it and are fsynced. A copy of N bytes counts as N, not 2N.",
        "",
        *table(
            ("mode", "processes", "", "GB/s", "cached before"),
            ((r["mode"], r["processes"], r["what"], ranged(r["rate"]), f"{r['cached']:.2f}") for r in rows),
        ),
    ]
