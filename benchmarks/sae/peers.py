"""`sae-peers`: TopK training by saetrain and by other tools, on the same rows in the same order.

Quality: one width, k, batch size and number of steps; each tool trains as its own trainer does and is measured by its
own inference code on the same held-out rows.  Learning rates: each tool's default, and a grid that is the same for
all; a tool's best rate counts.  Planted: the same on rows whose true features are known.

Results are written after each rate.  A case that was measured on the same day with the same settings is skipped, so a
long comparison can be made in parts (--steps 0, --planted-steps 0, --rounds 0 and --only leave parts out).

Speed: one training step (forward, backward, update) of each tool on the same batch, in turn, round after round.
"""

from __future__ import annotations

import json
import statistics
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import actshuffle
from benchmarks import plots
from benchmarks.results import Bench, ranged, spread, table
from benchmarks.sae.planted import Planted
from benchmarks.sae.tools import TOOLS, Task, Tool, installed, measured
from saetrain.compute.mesh import Mesh

RATES = (2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)  # besides each tool's default
PLANTED = {"d": 64, "features": 192, "active": 4.0}


def run(
    bench: Bench,
    *,
    store: Path | None,
    d_sae: int,
    k: int,
    steps: int,
    batch: int,
    rounds: int,
    speed_batch: int,
    wide: list[int],
    planted_steps: int,
    only: list[str] | None = None,
) -> None:
    warnings.filterwarnings("ignore")  # those of the tools
    tools, versions = installed(only)
    figures: dict[str, Any] = {
        "versions": versions | {"torch": torch.__version__},
        "speed": [],
        "quality": [],
        "planted": [],
    }
    merge(bench, figures)
    shapes = [(384, d_sae, k), tuple(wide)] if rounds else []
    tries = len(tools) * (1 + len(RATES))
    bench.plan(len(shapes) + tries * (bool(steps) + bool(planted_steps)))
    mesh = Mesh.start("cpu")
    try:
        for d, n, active in shapes:
            figures["speed"] += _speed(bench, tools, mesh, d, n, active, speed_batch, rounds)
            publish(bench, figures)
        if steps:
            rows = _rows(store, (steps + 16) * batch)
            test, train = rows[-16 * batch :], rows[: -16 * batch]
            task = Task(train, d_sae, k, steps, batch)
            _quality(bench, tools, mesh, task, test, None, figures)
        if planted_steps:
            known = Planted.make(256 * (planted_steps + 16), **PLANTED)  # type: ignore[arg-type]
            test, train = known.rows[-4096:], known.rows[:-4096]
            task = Task(train, 2 * PLANTED["features"], 4, planted_steps, 256)
            _quality(bench, tools, mesh, task, test, known.dictionary, figures)
    finally:
        mesh.close()
    publish(bench, figures)


def publish(bench: Bench, figures: dict[str, Any]) -> None:
    merge(bench, figures)
    images = plots.draw(bench, lambda folder: [_draw(folder, figures)])
    bench.settings |= _at_once(figures) if not bench.settings.get("tiny") else {}
    bench.publish(figures, page(figures), images)


def _at_once(figures: dict[str, Any]) -> dict[str, Any]:
    """The settings of a single run that gives all results, which may have been measured in parts."""
    speed, quality, planted = (figures[part] for part in ("speed", "quality", "planted"))
    found: dict[str, Any] = {
        "only": None,
        "steps": quality[0]["steps"] if quality else 0,
        "planted_steps": planted[0]["steps"] if planted else 0,
        "rounds": speed[0]["tokens_per_s"]["rounds"] if speed else 0,
    }
    if speed:
        found["wide"] = [speed[-1][n] for n in ("d_in", "d_sae", "k")]
    return found


def merge(bench: Bench, figures: dict[str, Any]) -> None:
    """Add the results of earlier runs that this one does not have."""
    path = bench.results / "results.json"
    if not path.exists():
        return
    found = json.loads(path.read_text())["figures"]
    figures["versions"] = found["versions"] | figures["versions"]
    order = list(TOOLS)
    for part in ("speed", "quality", "planted"):
        lines = {_key(x): x for x in [*found[part], *figures[part]]}
        figures[part] = sorted(lines.values(), key=lambda x: order.index(x["tool"]))


def _key(line: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(line.get(n) for n in ("tool", "lr", "d_in", "d_sae", "k", "steps", "batch"))


def _rows(store: Path | None, count: int) -> Tensor:
    if store is None:  # a test of the program
        return Planted.make(count, 64, 192).rows
    data = actshuffle.open_dataset(store)
    if data.rows < count:
        raise ValueError(f"{store} has {data.rows:,} rows; {count:,} are needed, each seen once")
    return torch.from_numpy(data.read("activations", 0, count)).float()


def _speed(
    bench: Bench, tools: dict[str, Tool], mesh: Mesh, d: int, n: int, k: int, batch: int, rounds: int
) -> list[dict[str, Any]]:
    rows = torch.randn(4 * batch, d, generator=torch.Generator().manual_seed(0))
    task = Task(rows, n, k, 4, batch)
    runs = {name: tool.make(task, None, mesh) for name, tool in tools.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, one in runs.items():
            started = time.perf_counter()
            one.step(task.batches()[turn % 4])
            if turn:  # the first warms up
                times[name].append(time.perf_counter() - started)
    ours = times["saetrain"]  # with --only, it must be among them
    bench.did(f"speed, {d} -> {n}: {batch / statistics.median(ours):,.0f} tokens/s")
    return [
        {
            "tool": name,
            "d_in": d,
            "d_sae": n,
            "k": k,
            "batch": batch,
            "threads": torch.get_num_threads(),
            "tokens_per_s": spread([batch / t for t in found]),
            "best": batch / min(found),
            "of_saetrain": spread([a / b for a, b in zip(ours, found, strict=True)]),
        }
        for name, found in times.items()
    ]


def _quality(
    bench: Bench,
    tools: dict[str, Tool],
    mesh: Mesh,
    task: Task,
    test: Tensor,
    truth: Tensor | None,
    figures: dict[str, Any],
) -> None:
    part = "quality" if truth is None else "planted"
    same = {"d_sae": task.d_sae, "k": task.k, "steps": task.steps, "batch": task.batch}
    for name, tool in tools.items():
        for lr in (None, *RATES):
            line: dict[str, Any] = {"tool": name, "lr": lr or "default", **same}
            if _key(line) in map(_key, figures[part]):
                bench.did(f"{name}, lr {lr or 'default'}: measured before")
                continue
            one = tool.make(task, lr, mesh)
            for rows in task.batches():
                one.step(rows)
            found = measured(one.finish(), test, truth)
            figures[part].append(line | found)
            shown = "  ".join(f"{k} {v:.4f}" for k, v in found.items())
            bench.did(f"{name}, lr {lr or 'default'}: {shown}")
            publish(bench, figures)


def best(lines: list[dict[str, Any]], by: str, sign: int) -> dict[str, dict[str, Any]]:
    """Each tool's best line."""
    names = dict.fromkeys(line["tool"] for line in lines)
    return {n: min((x for x in lines if x["tool"] == n), key=lambda x: sign * x[by]) for n in names}


def page(figures: dict[str, Any]) -> Iterator[str]:
    listed = ", ".join(f"{name} {what}" for name, what in figures["versions"].items())
    yield f"{listed}.\n"
    if figures["quality"]:
        yield "## Quality: held-out FVU at equal L0, steps, width and rows\n"
        yield "{steps} steps of {batch:,} rows, {d_sae:,} latents, k = {k}.\n".format(**figures["quality"][0])
        yield from table(*_by_rate(figures["quality"], "fvu", 1, ("l0", "never_fired")))
        yield ""
    if figures["planted"]:
        yield "## Planted dictionary: cosine of each true feature with the closest decoder row, mean\n"
        yield "{steps} steps of {batch:,} rows, {d_sae:,} latents, k = {k}; {features} true features.\n".format(
            **figures["planted"][0], **PLANTED
        )
        yield from table(*_by_rate(figures["planted"], "mean_max_cosine", -1, ("fvu", "l0")))
        yield ""
    if figures["speed"]:
        yield "## Speed of a training step: median (range) over rounds\n"
        yield from table(
            ("width", "latents", "k", "tokens a step", "threads", "tool", "tokens/s", "of saetrain's speed"),
            (
                (
                    x["d_in"],
                    x["d_sae"],
                    x["k"],
                    x["batch"],
                    x["threads"],
                    x["tool"],
                    ranged(x["tokens_per_s"], "{:,.0f}"),
                    ranged(x["of_saetrain"]),
                )
                for x in figures["speed"]
            ),
        )


def _by_rate(
    lines: list[dict[str, Any]], what: str, sign: int, more: tuple[str, ...]
) -> tuple[list[str], list[list[str]]]:
    """A row for each tool: one figure at its best rate, the default and each rate; others at the best rate."""
    rates = ["default", *RATES]
    head = ["tool", "best", *(f"lr {r}" for r in rates), *(f"{n} at the best" for n in more)]
    rows = []
    for name, top in best(lines, what, sign).items():
        at = {x["lr"]: f"{x[what]:.4f}" for x in lines if x["tool"] == name}
        others = [f"{top[n]:.4g}" for n in more]
        rows.append([name, f"{top[what]:.4f}", *(at.get(r, "") for r in rates), *others])
    return head, rows


def _draw(folder: Path, figures: dict[str, Any]) -> str:
    import matplotlib.pyplot as plt

    parts: list[tuple[str, dict[str, float]]] = []
    if figures["quality"]:
        chosen = best(figures["quality"], "fvu", 1)
        parts.append(("held-out FVU, best rate of each\n(lower is better)", {n: x["fvu"] for n, x in chosen.items()}))
    if figures["planted"]:
        chosen = best(figures["planted"], "mean_max_cosine", -1)
        parts.append(
            (
                "planted features: mean max cosine\n(higher is better)",
                {n: x["mean_max_cosine"] for n, x in chosen.items()},
            )
        )
    for shape in dict.fromkeys((x["d_in"], x["d_sae"]) for x in figures["speed"]):
        lines = [x for x in figures["speed"] if (x["d_in"], x["d_sae"]) == shape]
        title = f"tokens/s of a training step\n{shape[0]} wide, {shape[1]:,} latents"
        parts.append((title, {x["tool"]: x["tokens_per_s"]["median"] for x in lines}))
    if not parts:
        return ""
    names = [name for name in TOOLS if any(name in values for _, values in parts)]
    figure, axes = plt.subplots(1, len(parts), figsize=(1.8 + 2.7 * len(parts), 2.6), sharey=True, squeeze=False)
    for axis, (title, values) in zip(axes[0], parts, strict=True):
        colours = [plots.BLUE if name == "saetrain" else plots.GREY for name in names]
        bars = axis.barh(names, [values.get(n, 0.0) for n in names], 0.65, color=colours)
        form = "{:.3f}" if max(values.values()) < 10 else "{:,.0f}"
        shown = [form.format(values[n]) if n in values else "not measured" for n in names]
        axis.bar_label(bars, shown, padding=3, fontsize=8)
        axis.set_title(title, fontsize=9)
        axis.margins(x=0.25)
        axis.locator_params(axis="x", nbins=4)
        axis.grid(axis="x")
    axes[0][0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(folder / "peers.png")
    plt.close(figure)
    return "peers.png"
