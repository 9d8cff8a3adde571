"""The loader and the statistics beside a plain sequential read of the same files, in one run.

::

    python -m benchmarks.loader                  page cache, 384 and 4096 x float16
    python -m benchmarks.loader --cold           from disk

In every round everything is measured once, the order turned by one each time; figures are medians over
rounds, and of ratios the median of the ratios within a round.  "plain read" reads file after file, each
whole, into one buffer that stays; "small reads" does so 4 MiB at a time, which is what stays in cache
and so is the fastest way known.  Both on one thread.  "cpu" is processor time, which other load on the
machine changes less than the clock.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np

from actshuffle.arrays import group_metadata
from actshuffle.cli.options import COUNT, SIZE
from actshuffle.data.dataset import Dataset, open_dataset
from actshuffle.data.loader import Loader
from actshuffle.data.prefetch import _allocate  # the same kind of memory for all
from actshuffle.data.stats import stats
from actshuffle.manifest import MARKER_KEY
from actshuffle.objects import as_place, open_objects
from actshuffle.units import format_bytes
from benchmarks import cache, hardware

WIDTHS = (384, 4096)
CHUNK_BYTES = 32 << 20
SMALL = 4 << 20


def make_store(folder: Path, nbytes: int, width: int) -> Path:
    """A finished store of rows of ``width`` float16."""
    import zarr

    rows, chunk = max(1, nbytes // (2 * width)), max(1, CHUNK_BYTES // (2 * width))
    path = folder / f"{width}.zarr"
    zarr.create_group(path)
    array = zarr.create_array(
        path, name="data", shape=(rows, width), chunks=(min(chunk, rows), width), dtype="<f2",
        compressors=None, chunk_key_encoding={"name": "default", "separator": "."},
        config={"write_empty_chunks": True},
    )  # fmt: skip
    rng = np.random.default_rng(0)
    values = rng.standard_normal((min(chunk, rows), width), np.float32).astype("<f2")
    for start in range(0, rows, chunk):
        array[start : start + chunk] = values[: min(chunk, rows - start)]
    body = {"format": 1, "kind": "collection", "rows": rows, "fields": {"data": {}}}
    open_objects(as_place(path)).put(MARKER_KEY, group_metadata({"actshuffle": body}))
    return path


def plain_read(files: list[Path], buffer: memoryview) -> int:
    """Bytes read, file after file."""
    total = 0
    for file in files:
        fd = os.open(file, os.O_RDONLY)
        at = 0
        while got := os.preadv(fd, [buffer], at):
            at += got
        os.close(fd)
        total += at
    return total


def subjects(dataset: Dataset, files: list[Path], batch_size: int) -> dict[str, Callable[[], int]]:
    """What is measured: each call handles all bytes once.  Buffers and loaders live from round to round,
    as they do in training."""
    whole, small = (memoryview(_allocate(size).data) for size in (CHUNK_BYTES, SMALL))

    def loader(epoch: int = 0, **settings: Any) -> Callable[[], int]:
        made = Loader(dataset, batch_size, buffer_rows=0, **settings)

        def load() -> int:
            made.seek(epoch)
            return sum(batch["data"].nbytes for batch in made)

        return load

    return {
        "plain read": lambda: plain_read(files, whole),
        "small reads": lambda: plain_read(files, small),
        "loader": loader(),
        "loader, 1 thread": loader(threads=1),
        "loader, tensors": loader(as_torch=True),
        "loader, later epoch": loader(epoch=1),
        "stats": lambda: stats(dataset, write=False).nbytes,
    }


def measure(
    path: Path, batch_size: int, rounds: int, cold: bool
) -> Iterator[tuple[int, str, float, float]]:
    """(round, subject, bytes a second, bytes a processor second)."""
    dataset = open_dataset(path)
    files = sorted((path / "data").glob("c.*"), key=lambda p: int(p.name.split(".")[1]))
    measured = subjects(dataset, files, batch_size)
    (cache.settle if cold else cache.warm)([path])
    for number in range(-1, rounds):  # one to warm up
        names = list(measured)
        names = names[number % len(names) :] + names[: number % len(names)]
        for name in names:
            if cold:
                cache.evict([path])
            cpu, clock = time.process_time(), time.perf_counter()
            nbytes = measured[name]()
            clock, cpu = time.perf_counter() - clock, time.process_time() - cpu
            if number >= 0:
                yield number, name, nbytes / clock, nbytes / cpu


def summary(found: list[tuple[int, str, float, float]]) -> dict[str, dict[str, float]]:
    """Medians by subject, and of the ratios to the plain reads of the same round."""
    by = {(number, name): (rate, cpu) for number, name, rate, cpu in found}
    rounds = sorted({number for number, _ in by})
    result = {}
    for name in dict.fromkeys(name for _, name, _, _ in found):
        row = {
            "rate": statistics.median(by[r, name][0] for r in rounds),
            "cpu_rate": statistics.median(by[r, name][1] for r in rounds),
        }
        for other in ("plain read", "small reads"):
            ratios = [by[r, name][0] / by[r, other][0] for r in rounds]
            of_cpu = [by[r, name][1] / by[r, other][1] for r in rounds]
            row[f"of {other}"] = statistics.median(ratios)
            row[f"of {other}, cpu"] = statistics.median(of_cpu)
        result[name] = row
    return dict(
        sorted(result.items(), key=lambda item: (item[0] == "stats", "loader" in item[0], item[0]))
    )


def table(width: int, rows: dict[str, dict[str, float]]) -> Iterator[str]:
    yield (
        f"{width} x float16:         rate    of plain read    of small reads  |  "
        "per cpu second  of plain  of small"
    )
    for name, row in rows.items():
        yield (
            f"  {name:20}{format_bytes(row['rate']) + '/s':>10}{row['of plain read']:17.2f}"
            f"{row['of small reads']:18.2f}  |  {format_bytes(row['cpu_rate']):>14}"
            f"{row['of plain read, cpu']:10.2f}{row['of small reads, cpu']:10.2f}"
        )


@click.command(context_settings={"show_default": True})
@click.option("--size", type=SIZE, default="1GB", help="Bytes of each store.")
@click.option("--rounds", type=COUNT, default=9, help="Times that everything is measured.")
@click.option("--batch-size", type=COUNT, default=4096, help="Rows of a batch.")
@click.option("--widths", default="384,4096", help="Values of a row, with commas.")
@click.option("--cold", is_flag=True, help="Out of the page cache before each measurement.")
@click.option("--tiny", is_flag=True, help="In miniature, to see that it works.")
@click.option("--work", type=click.Path(path_type=Path), help="Where the stores go.  [temporary]")
def loader(
    size: int, rounds: int, batch_size: int, widths: str, cold: bool, tiny: bool, work: Path | None
) -> None:
    """The loader and stats, beside a plain sequential read: a table, then one JSON object."""
    if tiny:
        size, rounds, batch_size = 1 << 20, 1, 64
    if work is not None:
        work.mkdir(parents=True, exist_ok=True)
    document: dict[str, Any] = {
        "size": size, "rounds": rounds, "batch_size": batch_size, "cold": cold, "load": hardware.load(),
        "widths": {},
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="actshuffle-loader-", dir=work) as folder:
        document["machine"] = hardware.describe(Path(folder))
        for width in map(int, widths.split(",")):
            path = make_store(Path(folder), size, width)
            rows = summary(list(measure(path, batch_size, rounds, cold)))
            document["widths"][str(width)] = rows
            click.echo("\n".join(table(width, rows)) + "\n")
    document["load"] = [document["load"], hardware.load()]
    click.echo(json.dumps(document))


if __name__ == "__main__":
    loader()
