"""`features-growth`: peak memory of `saetrain features` at a fixed --memory, as tokens and as latents grow.

Each run is a process of the command line.  A process's peak is the kernel's own, with the pages of mapped files: looks
at its memory would miss moments.  Sizes are such that entries, or the arrays of latents, fill the memory from the
first on: below that a run takes less.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from actshuffle.units import format_bytes, format_seconds
from benchmarks import measure, plots
from benchmarks.results import Bench, table
from benchmarks.sae.describe import make_dictionary, make_store
from saetrain.features.forecast import forecast
from saetrain.features.pipeline import plan_features


def run(
    bench: Bench,
    *,
    rows: list[int],
    latents: list[int],
    latent_rows: list[int],
    width: int,
    k: int,
    memory: int,
    workers: int,
) -> None:
    sizes = [("tokens", n, latents[0]) for n in rows] + [
        ("latents", of, n) for of, n in zip(latent_rows, latents, strict=True)
    ]
    bench.plan(len(sizes))
    found = [{"grows": grows} | _one(bench, n, count, width, k, memory, workers) for grows, n, count in sizes]
    idle = _run(["--version"]).resident
    images = plots.draw(bench, lambda folder: [_draw(folder, found)])
    bench.publish({"summary": found, "memory": memory, "idle": idle}, page(found, width, k, memory, idle), images)


def _one(bench: Bench, rows: int, latents: int, width: int, k: int, memory: int, workers: int) -> dict[str, Any]:
    store, dictionary, out = (bench.work / name for name in ("rows.zarr", "sae", "out"))
    make_store(store, rows, width)
    make_dictionary(latents, width, k).save(dictionary)
    plan = plan_features(dictionary, store, incomplete=True, memory=memory)
    cost = forecast(plan, memory)
    words = ["features", str(dictionary), str(store), str(out), "--json", "--incomplete"]
    measured = _run([*words, "--memory", str(memory), "--workers", str(workers)])
    for folder in (store, dictionary, out):
        shutil.rmtree(folder)
    bench.did(f"{rows:,} rows, {latents:,} latents: largest process {format_bytes(measured.resident)}")
    return {
        "rows": rows,
        "latents": latents,
        "seconds": json.loads(measured.stdout)["seconds"],
        "largest": measured.resident,
        "shards": plan.shards,
        "tasks": cost.tasks,
        "planned": {name: getattr(cost, f"{name}_memory") for name in ("encode", "collate", "product")},
    }


def _draw(folder: Path, found: list[dict[str, Any]]) -> str:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(7, 3), sharey=True)
    for axis, grows, over in zip(axes, ("tokens", "latents"), ("rows", "latents"), strict=True):
        ours = sorted((one for one in found if one["grows"] == grows), key=lambda one: one[over])
        axis.plot([one[over] for one in ours], [one["largest"] / 1e6 for one in ours], "o-", color=plots.BLUE)
        axis.set(xlabel=over, xscale="log", ylim=(0, None))
        axis.grid(axis="y")
    axes[0].set(ylabel="largest process (MB)")
    figure.savefig(folder / "features-growth.png")
    plt.close(figure)
    return "features-growth.png"


def _run(words: list[str]) -> measure.Measured:
    found = measure.run(measure.python("-m", "saetrain", *words), environment={"OMP_NUM_THREADS": "1"}, seconds=7200)
    if found.outcome != "done":
        raise RuntimeError(f"{found.outcome}: {found.message}")
    return found


def spread(found: list[dict[str, Any]], grows: str) -> float:
    """The largest peak of a series over the smallest, less 1."""
    peaks = [one["largest"] for one in found if one["grows"] == grows]
    return max(peaks) / min(peaks) - 1


def page(found: list[dict[str, Any]], width: int, k: int, memory: int, idle: int) -> Iterator[str]:
    yield (
        f"TopK with k = {k}, rows of {width} numbers, --memory {format_bytes(memory)}. Largest process, with "
        "libraries and mapped files: "
        f"{spread(found, 'tokens'):.1%} apart as tokens grow, {spread(found, 'latents'):.1%} as latents grow. "
        f"`saetrain --version` takes {format_bytes(idle)}."
    )
    yield ""
    yield from table(
        ["grows", "rows", "latents", "shards", "tasks", "time", "largest process", "planned for a task, at most"],
        (
            [
                one["grows"],
                f"{one['rows']:,}",
                f"{one['latents']:,}",
                f"{one['shards']:,}",
                f"{one['tasks']:,}",
                format_seconds(one["seconds"]),
                format_bytes(one["largest"]),
                format_bytes(max(one["planned"].values())),
            ]
            for one in found
        ),
    )
