"""`loader`: the loader and the statistics beside a plain sequential read of the same files, in one run.

The plain read reads the same files, each whole, into a buffer that is reused, on the same number of threads
(which take the files in turn).  It runs right before each measurement, so that other load on the machine
weighs on both, and a ratio is that of a neighbouring pair.  "read, small buffer" reads 4 MiB at a time, which
stay in the processor's cache: the fastest way known, but no batch of any size is ever in memory as a whole.
"read, three buffers" fills three in turn, as any reader must that hands out a file's rows whole while it reads
the next.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from itertools import cycle, groupby, product
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from actshuffle.arrays.names import MARKER_KEY
from actshuffle.arrays.small import group_metadata
from actshuffle.checking.statspass import stats
from actshuffle.executors import Threads
from actshuffle.loading.dataset import Dataset, open_dataset
from actshuffle.loading.loader import Loader
from actshuffle.storage.buffers import pages
from actshuffle.storage.objects import open_objects
from actshuffle.storage.place import as_place
from actshuffle.units import format_bytes
from benchmarks import cache, plots
from benchmarks.results import Bench, need_space, ranged, spread, table

SMALL = 4 << 20
Subject = Callable[[], int]  # handles all bytes once and returns their number


def make_store(folder: Path, nbytes: int, width: int, chunk_bytes: int) -> Path:
    """Make a finished store of rows of ``width`` float16."""
    rows, chunk = max(1, nbytes // (2 * width)), max(1, chunk_bytes // (2 * width))
    path = folder / f"{width}.zarr"
    zarr.create_group(path)
    array = zarr.create_array(
        path,
        name="data",
        shape=(rows, width),
        chunks=(min(chunk, rows), width),
        dtype="<f2",
        compressors=None,
        chunk_key_encoding={"name": "default", "separator": "."},
        config={"write_empty_chunks": True},
    )
    rng = np.random.default_rng(0)
    values = rng.standard_normal((min(chunk, rows), width), np.float32).astype("<f2")
    for start in range(0, rows, chunk):
        array[start : start + chunk] = values[: min(chunk, rows - start)]
    body = {"format": 1, "kind": "collection", "rows": rows, "fields": {"data": {}}}
    open_objects(as_place(path)).put(MARKER_KEY, group_metadata({"actshuffle": body}))
    return path


class Plain:
    """Reads all files, on some threads, each into its own buffer."""

    def __init__(self, files: list[Path], threads: int, buffer_bytes: int, buffers: int = 1) -> None:
        self._shares = [files[i::threads] for i in range(threads)]
        self._buffers = [[memoryview(pages(buffer_bytes).data) for _ in range(buffers)] for _ in range(threads)]
        self._pool = ThreadPoolExecutor(threads)

    def __call__(self) -> int:
        return sum(self._pool.map(_read, self._shares, self._buffers))


def _read(files: list[Path], buffers: list[memoryview]) -> int:
    total = 0
    for file, buffer in zip(files, cycle(buffers), strict=False):
        fd = os.open(file, os.O_RDONLY)
        at = 0
        while got := os.preadv(fd, [buffer], at):
            at += got
        os.close(fd)
        total += at
    return total


def subjects(dataset: Dataset, files: list[Path], batch_size: int, threads: int) -> dict[str, Subject]:
    """The callables to measure.  Buffers and loaders live from round to round, as they do in training."""

    def loader(epoch: int = 0, **settings: Any) -> Subject:
        made = Loader(dataset, batch_size, buffer_rows=0, threads=threads, **settings)

        def load() -> int:
            made.seek(epoch)
            return sum(batch["data"].nbytes for batch in made)

        return load

    found: dict[str, Subject] = {
        "read, small buffer": Plain(files, threads, SMALL),
        "read, three buffers": Plain(files, threads, _largest(files), buffers=3),
        "loader": loader(),
        "loader, later epoch": loader(epoch=1),
    }
    if find_spec("torch"):
        found["loader, tensors"] = loader(as_torch=True)
    executor = Threads(threads)
    found["stats"] = lambda: stats(dataset, write=False, executor=executor).nbytes
    return found


def run(
    bench: Bench,
    *,
    size: int,
    widths: list[int],
    threads: list[int],
    modes: list[str],
    batch_sizes: list[int],
    chunk: int,
    rounds: int,
    disk_rounds: int,
) -> None:
    need_space(bench.work, int(1.1 * size * len(widths)))
    times = {mode: disk_rounds if mode == "disk" else rounds for mode in modes}
    bench.plan(len(widths) * len(threads) * len(batch_sizes) * sum(times.values()))
    found: list[dict[str, Any]] = []
    for width in widths:
        path = make_store(bench.work, size, width, chunk)
        cache.settle([path])
        for mode, count, batch in product(modes, threads, batch_sizes):
            case = {"width": width, "mode": mode, "threads": count, "batch": batch}
            measured = _measured(path, batch, count, mode, times[mode])
            for _, ones in groupby(measured, lambda one: one["round"]):
                here = [case | one for one in ones]
                found += here
                told = ", ".join(f"{one['what']} {_of_plain(one):.2f}" for one in here)
                bench.did(
                    f"{mode}, {width} x float16, {count} threads, batches of {batch:,}, of the plain read: {told}"
                )
    rows = summary(found)
    images = plots.draw(bench, lambda folder: [plots.loader(folder, rows)])
    bench.publish({"rounds": found, "summary": rows}, page(rows, size, chunk), images)


def _measured(path: Path, batch_size: int, threads: int, mode: str, rounds: int) -> Iterator[dict[str, Any]]:
    dataset = open_dataset(path)
    files = sorted((path / "data").glob("c.*"), key=lambda p: int(p.name.split(".")[1]))
    plain, all_ = (Plain(files, threads, _largest(files)), subjects(dataset, files, batch_size, threads))
    for number in range(-1, rounds):  # round -1 warms up
        names = list(all_)
        turn = number % len(names)
        cache.warm([path] if mode == "cached" else [])
        for name in names[turn:] + names[:turn]:
            beside, one = (_timed(subject, path, mode) for subject in (plain, all_[name]))
            if number >= 0:
                yield {"round": number, "what": name, "plain": beside} | one


def _timed(subject: Subject, path: Path, mode: str) -> dict[str, float]:
    """Bytes, seconds, and processor seconds of all threads."""
    if mode == "disk":
        cache.evict([path])
    else:
        subject()  # on a virtual machine, memory that was idle for seconds is slow at first
    cpu, clock = time.process_time(), time.perf_counter()
    nbytes = subject()
    return {"bytes": nbytes, "seconds": time.perf_counter() - clock, "cpu": time.process_time() - cpu}


def _largest(files: list[Path]) -> int:
    return max(file.stat().st_size for file in files)


def _of_plain(one: dict[str, Any]) -> float:
    return float(one["plain"]["seconds"] / one["seconds"])


def summary(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rates, and ratios of neighbouring pairs, by case."""
    cases: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for one in found:
        case = one["width"], one["mode"], one["threads"], one["batch"], one["what"]
        cases.setdefault(case, []).append(one)
    loaders = {
        (*case[:-1], one["round"]): one["seconds"]
        for case, ours in cases.items()
        if case[-1] == "loader"
        for one in ours
    }
    return [
        {
            "width": width,
            "mode": mode,
            "threads": threads,
            "batch": batch,
            "what": what,
            "rate": spread([one["bytes"] / one["seconds"] / 1e9 for one in ours]),
            "plain": spread([one["bytes"] / one["plain"]["seconds"] / 1e9 for one in ours]),
            "of_plain": spread(list(map(_of_plain, ours))),
            "of_loader": spread([loaders[width, mode, threads, batch, one["round"]] / one["seconds"] for one in ours]),
            "of_plain_cpu": spread([one["plain"]["cpu"] / one["cpu"] for one in ours]),
        }
        for (width, mode, threads, batch, what), ours in cases.items()
    ]


def page(rows: list[dict[str, Any]], size: int, chunk: int) -> list[str]:
    return [
        f"{format_bytes(size)} of float16 in files of {format_bytes(chunk)}, in batches of *batch* rows; "
        "the consumer does nothing with them. GB/s and ratios: median (range) over "
        "rounds. *of plain read*: rate over that of the plain read of the same files, on the same number "
        "of threads, right before it. *by processor time*: the same ratio of processor seconds, which other "
        "load on the machine changes less. *of loader*: rate over that of the loader in the same round. "
        "*cached*: files in the page cache; of two passes, the second. *disk*: files out of the page cache.",
        "",
        *table(
            (
                "row",
                "mode",
                "threads",
                "batch",
                "",
                "GB/s",
                "plain read GB/s",
                "of plain read",
                "by processor time",
                "of loader",
            ),
            (
                (
                    f"{r['width']} x float16",
                    r["mode"],
                    r["threads"],
                    f"{r['batch']:,}",
                    r["what"],
                    ranged(r["rate"]),
                    ranged(r["plain"]),
                    ranged(r["of_plain"]),
                    ranged(r["of_plain_cpu"]),
                    ranged(r["of_loader"]),
                )
                for r in rows
            ),
        ),
        "",
        "The loader hands out batches in the buffers they were read into, and reads ahead, into three or four "
        "blocks in turn: of 8 MiB where all files are in the page cache at the start, else of 64 MiB, or of one "
        "batch if that is larger. The plain read fills one buffer over and over, as large as a file. The share "
        "of either that stays in the processor's cache makes most of the difference between them.",
        "",
        "stats of cached files is bound by the processor, not by reading: it converts every value to float32, "
        "squares it and adds up both, about eight numpy passes over a tile in cache. Beside each of its threads, "
        "another reads ahead, and bypasses the page cache for data that is not in it.",
    ]
