"""`s3`: shuffle and verify in an object store, beside a plain copy and a plain read of the same objects, in one run.

The plain copy gets each object of the source whole, and puts it elsewhere, through obstore, 16 at a time in each of the
same worker processes.  It runs right before and after each shuffle, so that other load weighs on both, and the
destinations of both are empty.  Processor time is that of the client's processes (workers and driver) by getrusage; a
server on the same machine takes its share of the cores, which the ratios show.
"""

from __future__ import annotations

import asyncio
import json
import resource
import time
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np

import actshuffle
from actshuffle.arrays.small import group_metadata
from actshuffle.executors import local_cluster
from actshuffle.storage.bucket import BucketObjects
from actshuffle.storage.objects import open_objects
from actshuffle.storage.place import Place, as_place
from actshuffle.storage.remote import wait
from actshuffle.units import format_bytes
from benchmarks import plots
from benchmarks.results import Bench, ranged, spread, table
from benchmarks.sources import WORD

SEED, AT_ONCE = 1, 16


def run(
    bench: Bench,
    *,
    url: str,
    storage_options: dict[str, Any],
    size: int,
    row_bytes: list[int],
    levels: list[int],
    workers: int,
    memory: int,
    chunk: int,
    rounds: int,
) -> None:
    top = as_place(url, storage_options)
    bench.plan(len(row_bytes) * (1 + rounds * len(levels)))
    found: list[dict[str, Any]] = []
    with local_cluster(workers) as crew:
        client = crew.client
        try:
            for width in row_bytes:
                source, target, other = (top.child(f"{name}-{width}") for name in ("source", "shuffled", "copied"))
                make(source, size, width, chunk)
                bench.did(f"source of {format_bytes(size)} in rows of {format_bytes(width)}")

                def copied() -> int:
                    return _spread(client, _copy, source, other)  # noqa: B023

                def read(*places: Place) -> int:
                    return sum(_spread(client, _read, place) for place in places)

                for number, level in product(range(rounds), levels):
                    asked = {"seed": SEED, "levels": level or None, "memory": memory, "overwrite": True}
                    options = {"storage_options": storage_options, "executor": crew}

                    def shuffled() -> Any:
                        return actshuffle.shuffle(source.url, target.url, **asked, **options)  # noqa: B023

                    def verified() -> Any:
                        report = actshuffle.verify(source.url, target.url, **options)  # noqa: B023
                        assert report.ok, str(report)

                    if not number:
                        copied()  # connections, buffers, code
                    one: dict[str, Any] = {"row_bytes": width, "levels": level, "round": number}
                    for name, call, goal in (
                        ("copy", copied, other),
                        ("shuffle", shuffled, target),
                        ("copy after", copied, other),
                        ("read", lambda: read(source, target), None),  # noqa: B023
                        ("verify", verified, None),
                    ):
                        if goal is not None:  # a copy, as a shuffle, finds nothing there
                            open_objects(goal).delete_prefix("")
                        one[name], result = measured(client, call)
                        if name == "shuffle":
                            one["requests"] = result.requests
                    found.append(one)
                    bench.did(f"rows of {format_bytes(width)}, {_name(level)}: {_of_copy(one):.2f} of a copy")
                open_objects(source).delete_prefix("")
        finally:
            open_objects(top).delete_prefix("")
    rows = summary(found, size)
    images = plots.draw(bench, lambda folder: [plots.s3(folder, rows)])
    bench.publish({"rounds": found, "summary": rows}, page(rows, size, workers), images)


def make(place: Place, size: int, width: int, chunk: int) -> None:
    """A bare array of rows of random bytes, chunk by chunk, as `benchmarks.sources` makes it on disk."""
    rows, words = max(1, size // width), width // WORD
    step = max(1, min(chunk // width, rows))
    objects, rng = open_objects(place), np.random.Generator(np.random.SFC64(0))
    metadata = {
        "shape": [rows, words],
        "data_type": "uint64",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [step, words]}},
        "chunk_key_encoding": {"name": "default", "separator": "."},
        "fill_value": 0,
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
    }
    objects.put("zarr.json", group_metadata({}))
    for number in range(-(-rows // step)):
        objects.put(f"x/c.{number}.0", rng.bytes(step * width))
    objects.put("x/zarr.json", _array_metadata(metadata))


def _array_metadata(of: dict[str, Any]) -> bytes:
    return json.dumps({"zarr_format": 3, "node_type": "array", "attributes": {}, **of}).encode()


def _spread(client: Any, call: Callable[..., int], *places: Place) -> int:
    """Bytes that all workers move, each with its share of the objects of the first place."""
    keys = [key for key, nbytes in open_objects(places[0]).sizes("") if nbytes]
    count = len(client.scheduler_info(n_workers=-1)["workers"])
    shares = [keys[number::count] for number in range(count)]
    return sum(client.gather(client.map(call, shares, *([place] * count for place in places), pure=False)))


def _copy(keys: list[str], source: Place, target: Place) -> int:
    return _each(keys, source, target)


def _read(keys: list[str], source: Place) -> int:
    return _each(keys, source, None)


def _each(keys: list[str], source: Place, target: Place | None) -> int:
    import obstore

    def store(place: Place) -> Any:
        objects = open_objects(place)
        assert isinstance(objects, BucketObjects), "the plain copy is obstore's"
        return objects.store

    begin, goal = store(source), None if target is None else store(target)

    async def all_of_them() -> int:
        gate = asyncio.Semaphore(AT_ONCE)

        async def one(key: str) -> int:
            async with gate:
                data = await (await obstore.get_async(begin, key)).bytes_async()
                if goal is not None:
                    await obstore.put_async(goal, key, data, use_multipart=False)
                return len(data)

        return sum(await asyncio.gather(*map(one, keys)))

    return wait(all_of_them())


def measured(client: Any, call: Callable[[], Any]) -> tuple[dict[str, float], Any]:
    """Seconds, and processor seconds of workers and driver; and the result of the call."""
    before, clock = _cpu() + sum(client.run(_cpu).values()), time.perf_counter()
    result = call()
    seconds = time.perf_counter() - clock
    return {"seconds": seconds, "cpu": _cpu() + sum(client.run(_cpu).values()) - before}, result


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _of_copy(one: dict[str, Any]) -> float:
    return float((one["copy"]["seconds"] + one["copy after"]["seconds"]) / 2 / one["shuffle"]["seconds"])


def _name(level: int) -> str:
    return f"{level} levels" if level else "by default"


def summary(found: list[dict[str, Any]], size: int) -> list[dict[str, Any]]:
    """Ratios of neighbours, and processor seconds per GB, by case."""
    rows = []
    for case in dict.fromkeys((one["row_bytes"], one["levels"]) for one in found):
        ours = [one for one in found if (one["row_bytes"], one["levels"]) == case]
        rows.append(
            {
                "row_bytes": case[0],
                "levels": case[1],
                "rate": spread([size / one["shuffle"]["seconds"] / 1e9 for one in ours]),
                "of_copy": spread(list(map(_of_copy, ours))),
                "verify_of_read": spread([one["read"]["seconds"] / one["verify"]["seconds"] for one in ours]),
                **{
                    f"cpu_{name}": spread([one[name]["cpu"] / (size / 1e9) for one in ours])
                    for name in ("shuffle", "copy", "verify")
                },
                "requests": ours[-1]["requests"],
            }
        )
    return rows


def page(rows: list[dict[str, Any]], size: int, workers: int) -> list[str]:
    head = ("row", "", "GB/s", "of copy", "verify, of read", "CPU s/GB", "of a copy's", "of verify", "GET", "PUT")
    lines = [
        (
            format_bytes(r["row_bytes"]),
            _name(r["levels"]),
            *(ranged(r[k]) for k in ("rate", "of_copy", "verify_of_read", "cpu_shuffle", "cpu_copy", "cpu_verify")),
            *(f"{r['requests'].get(kind, 0):,}" for kind in ("get", "put")),
        )
        for r in rows
    ]
    return [
        f"{format_bytes(size)} in an object store, {workers} workers that run already; median (range) over rounds. "
        "*of copy*: the time of a plain copy by obstore in the same processes, before and after, over that of the "
        "shuffle. *verify, of read*: the time of a plain read of both stores over that of verify. *CPU*: processor "
        "seconds of the client's processes per GB of data; a server on this machine is not counted, and shares the "
        "cores.",
        "",
        *table(head, lines),
    ]
