"""`features-forecast`: the cost model of `saetrain features`, its unit costs measured here, against sizes held out.

Small runs in this process, on one thread, give the seconds of each step; least squares on relative errors gives the
unit costs of saetrain/features/forecast.py.  Other sizes are predicted before they are run.  The same costs then plan a
dictionary that is too large for this machine.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from actshuffle.executors import Serial
from actshuffle.units import format_bytes, format_seconds
from benchmarks import plots
from benchmarks.results import Bench, table
from benchmarks.sae.describe import make_dictionary, make_store
from saetrain.features.blueprint import Plan
from saetrain.features.forecast import QUANTITIES, forecast, quantities, seconds
from saetrain.features.pipeline import build_features, plan_features

T = TypeVar("T")
Size = tuple[int, int]  # rows and latents


class Timed(Serial):
    """Takes the time of each step's tasks."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def map(self, fn: Callable[..., T], calls: Iterable[tuple[Any, ...]]) -> Iterator[T]:
        for job, task in calls:
            began = time.perf_counter()
            found = fn(job, task)
            self.seconds[task.step] = self.seconds.get(task.step, 0.0) + time.perf_counter() - began
            yield found


def run(
    bench: Bench, *, width: int, k: int, calibrate: list[str], held: list[str], large: str, large_width: int
) -> None:
    torch.set_num_threads(1)
    known, unknown = ([_size(text) for text in sizes] for sizes in (calibrate, held))
    bench.plan(len(known) + len(unknown))
    measured = [_measure(bench, size, width, k) for size in known]
    units = fit(measured)
    found = []
    for size in unknown:
        plan, took = _measure(bench, size, width, k)
        told = seconds(plan, float(k * plan.rows), units)
        found.append({"rows": size[0], "latents": size[1], "predicted": told, "measured": took})
    plan = _large(measured[0][0], *_size(large), large_width)
    told = seconds(plan, float(k * plan.rows), units)
    cost = forecast(plan, 1 << 33)
    figures = {"units": units, "held_out": found, "large": told, "large_forecast": cost.as_dict()}
    images = plots.draw(bench, lambda folder: [_draw(folder, found)])
    bench.publish(figures, page(found, units, plan, told, str(cost), k), images)
    (bench.results / "costs.json").write_text(json.dumps({"units": units, "width": width, "k": k}) + "\n")


def _draw(folder: Path, found: list[dict[str, Any]]) -> str:
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(4, 3.2))
    predicted, measured = ([sum(line[name].values()) for line in found] for name in ("predicted", "measured"))
    most = 1.1 * max(*predicted, *measured)
    axis.plot([0, most], [0, most], color=plots.BLUE, linewidth=0.8)
    axis.plot(measured, predicted, "o", color=plots.BLUE)
    axis.set(xlabel="measured (s)", ylabel="predicted (s)", xlim=(0, most), ylim=(0, most))
    figure.savefig(folder / "features-forecast.png")
    plt.close(figure)
    return "features-forecast.png"


def _size(text: str) -> Size:
    rows, latents = text.split("x")
    return int(rows), int(latents)


def _measure(bench: Bench, size: Size, width: int, k: int) -> tuple[Plan, dict[str, float]]:
    """The plan of a run, and the seconds of its steps."""
    rows, latents = size
    store, dictionary, out = (bench.work / f"{name}-{rows}-{latents}" for name in ("rows", "sae", "out"))
    if not store.exists():
        make_store(store, rows, width)
    make_dictionary(latents, width, k).save(dictionary)
    timed = Timed()
    build_features(dictionary, store, out, incomplete=True, device="cpu", executor=timed)
    plan = plan_features(dictionary, store, incomplete=True)
    for folder in (store, dictionary, out):
        shutil.rmtree(folder)
    bench.did(f"{rows:,} rows, {latents:,} latents: {format_seconds(sum(timed.seconds.values()))}")
    return plan, timed.seconds


def fit(measured: Sequence[tuple[Plan, dict[str, float]]]) -> dict[str, list[float]]:
    """Unit costs of each step, none negative, of least squared relative error."""
    units = {}
    for step, names in QUANTITIES.items():
        seen = [(quantities(p, float(p.k * p.rows)), took[step]) for p, took in measured if step in took]
        if seen:
            matrix = np.array([[found[name] / took for name in names] for found, took in seen])
            units[step] = _solve(matrix)
    return units


def _solve(matrix: Any) -> list[float]:
    """Non-negative x of least |matrix x - 1|: the best of all subsets of columns."""
    best: tuple[float, list[float]] = (np.inf, [0.0] * matrix.shape[1])
    for size in range(1, matrix.shape[1] + 1):
        for chosen in combinations(range(matrix.shape[1]), size):
            part, *_ = np.linalg.lstsq(matrix[:, chosen], np.ones(len(matrix)), rcond=None)
            if (part >= 0).all():
                error = float(((matrix[:, chosen] @ part - 1) ** 2).sum())
                whole = np.zeros(matrix.shape[1])
                whole[list(chosen)] = part
                best = min(best, (error, whole.tolist()))
    return best[1]


def _large(plan: Plan, rows: int, latents: int, width: int) -> Plan:
    """The plan of a run that is only thought of: shards of 2^17 latents, chunks of 16,384."""
    return replace(
        plan, rows=rows, latents=latents, d_in=width, shards=-(-latents >> 17), chunk=16_384, pair_rows=1 << 14
    )


def page(
    found: list[dict[str, Any]], units: Any, plan: Plan, told: dict[str, float], cost: str, k: int
) -> Iterator[str]:
    yield f"TopK with k = {k}, one thread. Predicted with unit costs from smaller runs, then run."
    yield ""
    yield from table(
        ["rows", "latents", "predicted", "measured", "error"],
        (
            [
                f"{r['rows']:,}",
                f"{r['latents']:,}",
                format_seconds(sum(r["predicted"].values())),
                format_seconds(sum(r["measured"].values())),
                f"{error(r):+.0%}",
            ]
            for r in found
        ),
    )
    yield ""
    yield f"Planned alone: {plan.latents:,} latents, {plan.rows:,} rows of {plan.d_in:,}, one worker and thread:"
    yield ""
    yield from (f"    {line}" for line in cost.splitlines())
    yield f"    time                {format_seconds(sum(told.values()))}: " + ", ".join(
        f"{step} {format_seconds(s)}" for step, s in told.items()
    )
    yield ""
    yield f"Result and codes on disk as above; one encoder shard takes {format_bytes(4 * plan.d_in << 17)}."
    yield ""
    yield "Unit costs in seconds: " + "; ".join(
        f"{step} {', '.join(f'{u:.3g} a unit of {n}' for n, u in zip(QUANTITIES[step], of, strict=True))}"
        for step, of in units.items()
    )


def error(line: dict[str, Any]) -> float:
    """Of the predicted time, relative to the measured one."""
    return float(sum(line["predicted"].values()) / sum(line["measured"].values()) - 1)
