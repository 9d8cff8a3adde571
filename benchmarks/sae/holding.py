"""`sae-memory`: the peak memory of `saetrain fit`, beside the plan's figure.

Each run is a process of the command line, on planted rows in a store.  Its peak is the kernel's own, which misses no
moment, with the pages of mapped files.  Less that of a run of very few latents and rows, it is the memory that the
settings ask for.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from actshuffle.units import format_bytes, format_seconds
from benchmarks import measure
from benchmarks.results import Bench, table
from saetrain.config import Config, resolve
from saetrain.memory import predict

EACH = 4096  # rows that are made at a time
HELD_OUT = 64
FEW = {"d_sae": 64, "batch_size": 64}  # of the run that is taken off
DAY = 86_400


def run(
    bench: Bench, *, archs: list[str], width: int, d_sae: int, batch: int, k: int, tile: int, moments: str, steps: int
) -> None:
    store = bench.work / "rows.zarr"
    rows = make_store(store, batch + HELD_OUT, width)
    bench.plan(2 * len(archs))
    found = []
    for arch in archs:
        settings: dict[str, Any] = {
            **{"arch": arch, "k": k, "moments": moments, "holdout": HELD_OUT, "device": "cpu"},
            **{"d_sae": d_sae, "batch_size": batch, "tile": tile, "steps": steps},
        }
        small = settings | FEW | {"k": min(k, FEW["d_sae"]), "tile": FEW["batch_size"]}
        base = fit(bench, store, small)
        bench.did(f"{arch}, few latents: {format_bytes(base.resident)}")
        done = fit(bench, store, settings)
        plan = predict(resolve(Config(**settings), width, rows), width)
        few = predict(resolve(Config(**small), width, rows), width)
        mine = done.resident - base.resident + few.peak
        bench.did(f"{arch}: {format_bytes(mine)} of {format_bytes(plan.peak)} planned")
        found.append(
            {
                "arch": arch,
                "seconds": done.seconds,
                "resident": done.resident,
                "base": base.resident,
                "measured": mine,
                "planned": plan.to_json(),
            }
        )
    bench.publish({"summary": found}, page(found, width, d_sae, batch, moments, steps), [])


def make_store(path: Path, rows: int, width: int) -> int:
    dice, group = np.random.default_rng(0), zarr.create_group(path)
    x = group.create_array("x", shape=(rows, width), dtype="<f4", chunks=(min(1024, rows), width), compressors=None)
    for at in range(0, rows, EACH):
        x[at : at + EACH] = dice.standard_normal((min(EACH, rows - at), width), np.float32)
    return rows


def fit(bench: Bench, store: Path, settings: dict[str, Any]) -> measure.Measured:
    """One run of the command line, whose folder is removed again."""
    words = ["--incomplete", "true", "--buffer-rows", "0", "--no-report"]
    for name, value in settings.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    out = bench.work / "run"
    done = measure.run(measure.python("-m", "saetrain", "fit", str(store), "--out", str(out), *words), seconds=DAY)
    if (
        done.outcome != "done" and "diverged: the FVU" not in done.message
    ):  # noise cannot be learnt, in so few steps at that
        raise RuntimeError(f"{done.outcome}: {done.message}")
    shutil.rmtree(out)
    return done


def page(found: list[dict[str, Any]], width: int, d_sae: int, batch: int, moments: str, steps: int) -> Iterator[str]:
    yield (
        f"{d_sae:,} latents, width {width:,}, {batch:,} rows a step, moments {moments}, {steps:,} steps, one rank on "
        "the CPU. *Measured* is the kernel's peak of the process, less that of a run of few latents, and with what the "
        "plan says of those."
    )
    yield ""
    yield from table(
        ["variant", "planned", "measured", "measured of planned", "process", "few latents", "time of the command"],
        (
            [
                one["arch"],
                format_bytes(one["planned"]["peak"]),
                format_bytes(one["measured"]),
                f"{one['measured'] / one['planned']['peak']:.2f}",
                format_bytes(one["resident"]),
                format_bytes(one["base"]),
                format_seconds(one["seconds"]),
            ]
            for one in found
        ),
    )
