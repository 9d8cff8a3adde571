"""`sae-order`: the worth of a shuffle.  The same SAE and budget, on rows in harvest order and on shuffled rows.

The last tenth of the documents is held out for evaluation.  Three runs train on the other rows, each row once:
shuffled by actshuffle; in the order of the harvest; and in that order through a shuffle buffer, as trainers without a
shuffled store do.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import zarr

import actshuffle
from benchmarks import plots
from benchmarks.results import Bench, table
from benchmarks.sae.planted import Planted
from saetrain.cli import main as saetrain
from saetrain.training.log import read_log

ROWS = 32_768  # rows copied at a time
SHOWN = ("eval_fvu", "eval_fvu_low", "eval_fvu_high", "eval_l0", "dead", "document_entropy")


def run(bench: Bench, *, store: Path | None, d_sae: int, k: int, batch: int, buffer: int, dead: int) -> None:
    store = store or _harvest(bench.work / "harvest.zarr")
    data = actshuffle.open_dataset(store, incomplete=True)
    ids = np.asarray(data.read("document", 0, data.rows))
    # Documents lie one after the other, so a cut between two of them holds out whole documents.
    cut = int(np.flatnonzero(ids == ids[int(data.rows * 0.9)])[0])
    train = _part(data, bench.work / "train.zarr", 0, cut)
    test = _part(data, bench.work / "test.zarr", cut, data.rows)
    actshuffle.shuffle(train, bench.work / "shuffled.zarr", seed=0)

    ways = {
        "shuffled": (bench.work / "shuffled.zarr", []),
        f"buffer of {buffer:,}": (train, ["--buffer-rows", str(buffer)]),
        "order of the harvest": (train, ["--buffer-rows", "0"]),
    }
    bench.plan(len(ways))
    steps = (cut - 1) // batch
    common = {
        "d-sae": d_sae,
        "k": k,
        "batch-size": batch,
        "steps": steps,
        "holdout": 1,
        "heldout": test,
        "incomplete": "true",
        "tile": 256,
        "dead-tokens": dead * batch,
        "field": "activations",
        "eval-every": max(steps // 6, 1),
    }
    words = [word for name, value in common.items() for word in (f"--{name}", str(value))]
    earlier = bench.results / "results.json"
    begun = json.loads(earlier.read_text())["figures"] if earlier.exists() else {}
    lines = begun.get("lines", {}) if begun.get("settings") == [d_sae, k, batch, buffer, dead, cut] else {}
    for name, (rows, more) in ways.items():
        if name in lines:  # the same day, with the same settings
            bench.did(f"{name}: measured before")
            continue
        out = bench.work / name
        with contextlib.redirect_stdout(io.StringIO()):
            if saetrain(["fit", str(rows), "--out", str(out), "--no-report", *words, *more]):
                raise RuntimeError(f"{name} failed")
        if read_log(out)[-1]["step"] < steps:
            raise click.ClickException(f"{name}: stopped; run again for the missing steps")
        kept = ("tokens", *SHOWN)
        lines[name] = [{n: x[n] for n in kept if n in x} for x in read_log(out)]
        bench.did(f"{name}: held-out FVU {lines[name][-1]['eval_fvu']:.4f}")
        figures = {
            "train_rows": cut,
            "test_rows": data.rows - cut,
            "documents": len(np.unique(ids)),
            "steps": steps,
            "dead_after_tokens": dead * batch,
            "settings": [d_sae, k, batch, buffer, dead, cut],
            "lines": lines,
            "summary": [
                {"rows": n, **{key: x[-1][key] for key in SHOWN}, "dead_most": max(y["dead"] for y in x)}
                for n, x in lines.items()
            ],
        }
        images = plots.draw(bench, lambda folder: [_draw(folder, lines)])
        bench.publish(figures, page(figures), images)


def _harvest(path: Path) -> Path:
    """Rows in the order of their documents, for a test of the program."""
    made = Planted.make(4096, 16, 24)
    order = made.documents.argsort(stable=True)
    group = zarr.create_group(path)
    group.create_array("activations", data=made.rows[order].numpy())
    group.create_array("document", data=made.documents[order].numpy())
    return path


def _part(data: actshuffle.Dataset, to: Path, start: int, stop: int) -> Path:
    """Copy rows [start, stop) to a separate store, in the same order."""
    group = zarr.create_group(to)
    for name in ("activations", "document"):
        info = data.fields[name]
        shape = (stop - start, *info.row_shape)
        chunks = (min(2048, stop - start), *info.row_shape)
        array = group.create_array(name, shape=shape, chunks=chunks, dtype=info.dtype)
        for at in range(start, stop, ROWS):
            end = min(at + ROWS, stop)
            array[at - start : end - start] = data.read(name, at, end)
    return to


def page(figures: dict[str, Any]) -> Iterator[str]:
    yield (
        f"Training on {figures['train_rows']:,} rows, once, in {figures['steps']:,} steps; FVU on "
        f"{figures['test_rows']:,} rows of documents never seen, with 95 % intervals over documents. "
        f"A latent is dead after {figures['dead_after_tokens']:,} tokens without firing.\n"
    )
    yield from table(
        ("rows", "held-out FVU", "L0", "dead at the end", "dead at worst", "document entropy of batches"),
        (
            (
                x["rows"],
                f"{x['eval_fvu']:.4f} ({x['eval_fvu_low']:.4f} to {x['eval_fvu_high']:.4f})",
                f"{x['eval_l0']:.1f}",
                f"{x['dead']:.1%}",
                f"{x['dead_most']:.1%}",
                f"{x['document_entropy']:.2f}",
            )
            for x in figures["summary"]
        ),
    )


def _draw(folder: Path, lines: dict[str, list[dict[str, Any]]]) -> str:
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.4))
    for (name, found), colour in zip(lines.items(), (plots.BLUE, plots.ORANGE, plots.RED), strict=False):
        held = [line for line in found if "eval_fvu" in line]
        tokens = [line["tokens"] / 1e3 for line in held]
        left.plot(tokens, [line["eval_fvu"] for line in held], color=colour, label=name, lw=1.8)
        low, high = ([line[f"eval_fvu_{end}"] for line in held] for end in ("low", "high"))
        left.fill_between(tokens, low, high, color=colour, alpha=0.15, lw=0)
        right.plot([x["tokens"] / 1e3 for x in found], [100 * x["dead"] for x in found], color=colour, lw=1.8)
    left.set(title="FVU on documents never seen, with 95 % intervals", xlabel="thousand tokens", yscale="log")
    left.yaxis.set_major_formatter("{x:.2g}")
    left.yaxis.set_minor_formatter("{x:.2g}")
    left.tick_params(which="minor", labelsize=7)
    right.set(title="dead latents, %", xlabel="thousand tokens", ylim=(0, None))
    for axis in (left, right):
        axis.grid(axis="y")
    left.legend()
    figure.tight_layout()
    figure.savefig(folder / "order.png")
    plt.close(figure)
    return "order.png"
