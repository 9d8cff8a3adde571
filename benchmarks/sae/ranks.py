"""`sae-ranks`: memory of each rank and bytes between ranks, as the number of ranks that share a dictionary grows.

Each case runs `saetrain fit --nproc N` as a user would type it, with a dictionary whose parameters outweigh everything
else, and once more with almost none: the difference is the cost of the parameters, in training and in saving.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from actshuffle.units import format_bytes
from benchmarks import measure, plots
from benchmarks.results import Bench, table
from saetrain.training.log import read_log

STEPS, BATCH, K = 6, 256, 32
KINDS = ("rows", "candidates", "reconstructions")


def run(bench: Bench, *, width: int, d_sae: int, small: int, ranks: list[int]) -> None:
    rng, store = np.random.default_rng(0), bench.work / "rows.zarr"
    zarr.create_array(store, data=rng.standard_normal((8 * BATCH, width), np.float32), chunks=(BATCH, width))
    bench.plan(2 * len(ranks))
    rows = []
    for count in ranks:
        found = {}
        for name, latents in (("base", small), ("whole", d_sae)):
            found[name] = _one(bench.work / f"{count}-{name}", store, count, latents)
            bench.did(f"{count} ranks, {latents:,} latents: {format_bytes(found[name]['memory'])} a rank")
        rows.append(
            {
                "ranks": count,
                "peak": found["whole"]["memory"],
                "base": found["base"]["memory"],
                "parameters": found["whole"]["memory"] - found["base"]["memory"],
                "sent": found["whole"]["sent"],
            }
        )
    for row in rows:
        row["of_first"] = row["parameters"] / rows[0]["parameters"]
        row["ideal"] = rows[0]["ranks"] / row["ranks"]
        row["stated"] = stated(row["ranks"], width)
    weights = 2 * 4 * width * d_sae
    images = plots.draw(bench, lambda folder: [_draw(folder, rows)])
    bench.publish({"weights": weights, "summary": rows}, page(rows, weights), images)


def _one(out: Path, store: Path, ranks: int, latents: int) -> dict[str, Any]:
    settings = {
        "d-sae": latents,
        "k": K,
        "batch-size": BATCH,
        "steps": STEPS,
        "holdout": BATCH,
        "tile": 32,
        "nproc": ranks,
        "incomplete": "true",
        "buffer-rows": 0,
        "log-every": 1,
        "eval-every": STEPS,
        "checkpoint-every": STEPS - 1,
        "aux-coef": 0,
    }
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    command = measure.python("-m", "saetrain", "fit", str(store), "--out", str(out), "--no-report", *words)
    measured = measure.run(command, environment={"OMP_NUM_THREADS": "1"}, seconds=500)
    if measured.outcome != "done":
        raise RuntimeError(f"{ranks} ranks: {measured.outcome}: {measured.message}")
    line = read_log(out)[2]  # a step without evaluation or checkpoint
    return {"memory": measured.largest, "sent": {k: line.get(f"sent.{k}", 0.0) for k in KINDS}}


def stated(ranks: int, width: int) -> dict[str, float]:
    """docs/training.md's table for topk with float32 rows: bytes that a rank sends for each token."""
    share = (ranks - 1) / ranks
    return {"rows": 4 * width * share, "candidates": 4.0 * K * (ranks - 1), "reconstructions": 8 * width * share}


def page(rows: list[dict[str, Any]], weights: int) -> Iterator[str]:
    yield (
        f"Weights of {format_bytes(weights)} (both matrices, float32), topk, k = {K}, {BATCH} tokens a step. "
        "Peak memory of the largest process over training, evaluating and saving; base: the same with "
        "almost no latents.\n"
    )
    yield from table(
        ("ranks", "peak of a rank", "base", "for parameters", "of 1 rank's", "1 / ranks"),
        (
            (
                x["ranks"],
                format_bytes(x["peak"]),
                format_bytes(x["base"]),
                format_bytes(x["parameters"]),
                f"{x['of_first']:.2f}",
                f"{x['ideal']:.2f}",
            )
            for x in rows
        ),
    )
    yield "\nBytes that a rank sent for each token of a step, measured (in brackets, as docs/training.md states):\n"
    yield from table(
        ("ranks", *KINDS),
        ((x["ranks"], *(f"{x['sent'][k]:,.0f} ({x['stated'][k]:,.0f})" for k in KINDS)) for x in rows),
    )


def _draw(folder: Path, rows: list[dict[str, Any]]) -> str:
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(4.6, 3.2))
    ranks = [x["ranks"] for x in rows]
    ideal = [x["ideal"] * rows[0]["parameters"] / 1e9 for x in rows]
    measured = [x["parameters"] / 1e9 for x in rows]
    axis.plot(ranks, ideal, "--", color=plots.GREY, label="1 / ranks")
    axis.plot(ranks, measured, "o-", color=plots.BLUE, label="measured")
    axis.set(title="Peak memory of a rank, above its base, GB", xlabel="ranks that share the dictionary")
    axis.set(xscale="log", yscale="log", xticks=ranks, xticklabels=ranks, yticks=ideal)
    axis.yaxis.set_major_formatter("{x:.2g}")
    axis.minorticks_off()
    axis.legend()
    axis.grid(axis="y")
    figure.savefig(folder / "ranks.png")
    plt.close(figure)
    return "ranks.png"
