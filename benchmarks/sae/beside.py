"""`features-peers`: `saetrain features` beside a plain loop over columns, SAEDashboard and delphi, on the same rows.

The bare encoder product is timed in the same run.  A peer describes the first `--some` features, in a process of its
own (columns.py), fed from the same rows; its time for the whole dictionary is extrapolated, as it works 128 features at
a time.  The loop's first pass and delphi's cache, which are not repeated, count once.  SAEDashboard and delphi run
under the Pythons of environments of their own.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import zarr

import saetrain
from actshuffle.units import format_bytes
from benchmarks import measure, plots
from benchmarks.results import Bench, table
from benchmarks.sae.describe import bare, describe, idle, make_dictionary, make_store

NAMES = {"loop": "plain loop over columns", "dashboard": "SAEDashboard", "delphi": "delphi"}


def run(
    bench: Bench,
    *,
    rows: int,
    width: int,
    latents: int,
    k: int,
    workers: int,
    some: int,
    dashboard: str | None,
    delphi: str | None,
) -> None:
    store, dictionary = make_store(bench.work / "rows.zarr", rows, width), bench.work / "sae"
    make_dictionary(latents, width, k).save(dictionary)
    group, arrays = zarr.open_group(store, mode="r"), []
    for name in ("x", "token", "document"):
        arrays.append(str(bench.work / f"{name}.npy"))
        np.save(arrays[-1], np.asarray(group[name]))
    pythons = {"loop": measure.python()[0], "dashboard": dashboard, "delphi": delphi}
    bench.plan(1 + len(pythons))
    product = [bare(rows, width, latents, max(workers, 1), bench.work)]
    ours = describe(dictionary, store, bench.work / "out", workers)
    bench.did(f"saetrain: {ours['seconds']:.1f} s")
    found = [{"tool": "saetrain features", "seconds": ours["seconds"], "memory": ours["memory"], "described": latents}]
    start = idle()
    due = saetrain.open_features(bench.work / "out")
    for name, python in pythons.items():
        if python is None:
            found.append({"tool": NAMES[name], "why": f"not installed: give --{name} PYTHON"})
        else:
            found.append(_peer(bench, name, python, [*arrays, str(dictionary)], min(some, latents), latents, due))
        bench.did(NAMES[name])
    product.append(bare(rows, width, latents, max(workers, 1), bench.work))
    for one in found:
        if "seconds" in one:
            one["of_product"] = one["seconds"] / (sum(product) / 2)
    for path in bench.work.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    images = plots.draw(bench, lambda folder: [_draw(folder, found)])
    text = page(found, product, rows, width, latents, k, start)
    bench.publish({"summary": found, "product": product, "start": start}, text, images)


def _peer(bench: Bench, name: str, python: str, paths: list[str], some: int, latents: int, due: Any) -> dict[str, Any]:
    script, out = Path(__file__).with_name("columns.py"), bench.work / f"{name}.npz"
    command = [python, str(script), name, *paths, str(some), str(out)]
    done = measure.run(command, seconds=7200, environment={"PYTHONPATH": "", "OMP_NUM_THREADS": str(os.cpu_count())})
    if done.outcome != "done":
        return {"tool": NAMES[name], "why": f"{done.outcome}: {done.message[-300:]}"}
    held = np.load(out)
    once, each = float(held["once"]), float(held["seconds"])
    told = {"tool": NAMES[name], "memory": done.resident, "described": some}
    told["seconds"] = once + each * latents / some
    if name == "loop":
        first, end = due.kinds["top"]
        rows, values = (due.array(f"example/{part}", 0, some)[:, first:end] for part in ("row", "value"))
        told["same"] = float((held["rows"] == rows).mean())
        told["apart"] = float(np.abs(held["values"] - values).max())
    else:
        here = np.isfinite(held["largest"])
        alike = np.isclose(held["largest"], np.nan_to_num(due.array("stat/max", 0, some)), rtol=1e-3, atol=1e-3)
        told["made"], told["same"] = int(here.sum()), float(alike[here].mean()) if here.any() else 0.0
    return told


def _draw(folder: Path, found: list[dict[str, Any]]) -> str:
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 2.2))
    here = [one for one in found if "of_product" in one][::-1]
    axis.barh([one["tool"] for one in here], [one["of_product"] for one in here], color=plots.BLUE)
    axis.set(xlabel="time for the whole dictionary, in bare encoder products", xscale="log")
    figure.savefig(folder / "features-peers.png")
    plt.close(figure)
    return "features-peers.png"


def page(
    found: list[dict[str, Any]], product: list[float], rows: int, width: int, latents: int, k: int, start: int
) -> Iterator[str]:
    yield (
        f"{rows:,} rows of {width} numbers, {latents:,} latents, TopK with k = {k}. The bare encoder product took "
        f"{product[0]:.1f} s before and {product[1]:.1f} s after. A worker of `saetrain features` "
        f"starts with {format_bytes(start)}, by the kernel's count of the peak, as is the memory of all."
    )
    yield ""
    yield from table(
        ["", "features run", "whole dictionary", "of the product", "latents/s", "largest process", "same as saetrain"],
        (
            [
                one["tool"],
                f"{one['described']:,}",
                f"{one['seconds']:.1f} s",
                f"{one['of_product']:.2f}",
                f"{latents / one['seconds']:,.1f}",
                format_bytes(one["memory"]),
                f"{one['same']:.2%}" if "same" in one else "",
            ]
            if "seconds" in one
            else [one["tool"], one["why"], *[""] * 5]
            for one in found
        ),
    )
    yield ""
    yield (
        "*Same*: for the loop, slots of the 20 largest activations that name the same row (a product in tiles of "
        "another shape rounds differently, and ties move); for the others, features whose largest activation is the "
        "same within 0.001 (SAEDashboard skips rows at the ends of prompts, both the last rows, which fill none, and "
        "delphi stores half precision)."
    )
    for one in found:
        if one.get("made", one.get("described")) != one.get("described"):
            yield ""
            yield f"{one['tool']} made {one['made']:,} of {one['described']:,} records; it leaves out rarer features."
