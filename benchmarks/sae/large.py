"""`features-large`: `saetrain features` on a dictionary of very many latents, planned, run and looked into.

The decoder is random; the rows are the first of a store in document order, with their tokens and documents, or random
ones.  A random sample of the latents is computed again by plain products: how often each is active, its largest
activation, and its neighbours.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import zarr
from torch import Tensor

from actshuffle import Dataset, open_dataset
from actshuffle.units import format_bytes, format_seconds
from benchmarks import measure
from benchmarks.results import Bench, table
from benchmarks.sae.describe import idle, make_dictionary, make_store
from saetrain import open_features
from saetrain.features.forecast import forecast, read_units
from saetrain.features.forecast import seconds as forecast_seconds
from saetrain.features.pipeline import plan_features
from saetrain.reading.latents import Features

BLOCK = 8192  # latents of a plain product
DAY = 86_400


def run(
    bench: Bench,
    *,
    store: Path | None,
    latents: int,
    rows: int,
    width: int,
    k: int,
    near: int,
    memory: int,
    workers: int,
    checked: int,
    costs: Path | None,
) -> None:
    source, dictionary, out = (bench.work / name for name in ("rows.zarr", "sae", "out"))
    if store is None:
        make_store(source, rows, width)
    else:
        rows, width = _first_rows(open_dataset(store, incomplete=True), rows, source)
    near = min(near, latents - 1)
    make_dictionary(latents, width, k).save(dictionary)
    plan = plan_features(dictionary, source, incomplete=True, near=near, memory=memory)
    cost, predicted = forecast(plan, memory), None
    if costs is not None:
        predicted = sum(forecast_seconds(plan, cost.entries, read_units(costs), max(workers, 1)).values())
    bench.plan(2)
    words = ["features", str(dictionary), str(source), str(out), "--json", "--incomplete", "--near", str(near)]
    command = measure.python("-m", "saetrain", *words, "--memory", str(memory), "--workers", str(workers))
    done = measure.run(command, environment={"OMP_NUM_THREADS": "1"}, seconds=DAY)
    if done.outcome != "done":
        raise RuntimeError(f"{done.outcome}: {done.message}")
    seconds = json.loads(done.stdout)["seconds"]
    bench.did(f"{latents:,} latents: {format_seconds(seconds)}")
    x = torch.from_numpy(np.ascontiguousarray(open_dataset(source, incomplete=True).read(plan.field, 0, rows)))
    found = open_features(out)
    alive = int((found.array("stat/count") > 0).sum())
    again = compare(found, x, make_dictionary(latents, width, k).W_dec.detach(), k, near, checked)
    bench.did(f"{checked:,} latents again")
    figures = {
        "rows": rows,
        "width": width,
        "latents": latents,
        "alive": alive,
        "seconds": seconds,
        "predicted": predicted,
        "tasks": cost.tasks,
        "memory": memory,
        "planned": {name: getattr(cost, f"{name}_memory") for name in ("encode", "collate", "product")},
        "own": done.largest,
        "resident": done.resident,
        "idle": idle(),
        "again": again,
    }
    bench.publish({"summary": figures}, page(figures, k, near, store is not None), [])


def _first_rows(whole: Dataset, rows: int, to: Path) -> tuple[int, int]:
    """Copy the first rows of all arrays; how many there are, and their width."""
    rows, width, group = min(rows, whole.rows), 0, zarr.create_group(to)
    for name, info in whole.fields.items():
        if info.row_shape and info.dtype != np.float32:
            raise click.ClickException(f"{name!r} is of type {info.dtype_name}: give a store of float32")
        part = whole.read(name, 0, rows)
        group.create_array(name, data=part, chunks=(min(1024, rows), *part.shape[1:]), compressors=None)
        width = max([width, *info.row_shape])
    return rows, width


def compare(found: Features, x: Tensor, unit: Tensor, k: int, near: int, checked: int) -> dict[str, Any]:
    """Shares of sampled latents that plain products describe alike, and the largest difference.

    Half of the sample are latents that are active on some row.  A product of another shape rounds otherwise, so an
    activation at the edge of a row's k largest may change sides.
    """
    dice, alive = np.random.default_rng(0), np.flatnonzero(found.array("stat/count"))
    some = [dice.choice(of, min(checked // 2, len(of)), replace=False) for of in (alive, np.arange(len(unit)))]
    sample = torch.from_numpy(np.unique(np.concatenate(some)))
    edge, pre = torch.full((len(x), k), -torch.inf), torch.empty(len(x), len(sample))
    cosines, names = torch.empty(len(sample), 0), torch.empty(len(sample), 0, dtype=torch.int64)
    for lo in range(0, len(unit), BLOCK):
        part = unit[lo : lo + BLOCK]
        product, here = x @ part.T, (sample >= lo) & (sample < lo + len(part))
        edge = torch.cat([edge, product], 1).topk(k, dim=1).values
        pre[:, here] = product[:, sample[here] - lo]
        if near:
            cosine = unit[sample] @ part.T
            cosine[here, sample[here] - lo] = -torch.inf
            both = torch.cat([cosines, cosine], 1)
            ids = torch.cat([names, torch.arange(lo, lo + len(part)).expand(len(sample), -1)], 1)
            cosines, at = both.topk(min(near, both.shape[1]), dim=1)
            names = ids.gather(1, at)
    active = (pre >= edge[:, -1:]) & (pre > 0)
    count, largest = active.sum(0), pre.masked_fill(~active, 0).amax(0)
    theirs = [found[int(i)] for i in sample]
    counts = torch.tensor([one.count for one in theirs])
    most = torch.tensor([0.0 if one.is_dead else one.max for one in theirs])
    either, both_alive = (counts > 0) | (count > 0), (counts > 0) & (count > 0)
    same = {
        "latents": len(sample),
        "active": int(either.sum()),
        "count": float((counts == count)[either].float().mean()),
    }
    same["largest_apart"] = float((most - largest)[both_alive].abs().max()) if both_alive.any() else 0.0
    if near:
        listed = torch.tensor([[n.latent for n in one.neighbours or ()] for one in theirs])
        same["near"] = float((listed == names).float().mean())
    return same


def page(found: dict[str, Any], k: int, near: int, real: bool) -> Iterator[str]:
    yield (
        f"{found['latents']:,} latents of a random decoder, TopK with k = {k}, {near} neighbours of each; "
        f"{found['rows']:,} {'rows of a store, its first,' if real else 'random rows'} of {found['width']:,} numbers; "
        f"--memory {format_bytes(found['memory'])}. {found['alive']:,} latents are active on some row."
    )
    yield ""
    yield from table(
        ["", "predicted", "measured"],
        [
            [
                "time",
                format_seconds(found["predicted"]) if found["predicted"] else "",
                format_seconds(found["seconds"]),
            ],
            ["memory of a task, at most", format_bytes(max(found["planned"].values())), ""],
            ["own memory of the largest process, by looks", "", format_bytes(found["own"])],
            ["the same with pages of mapped files, by the kernel", "", format_bytes(found["resident"])],
            ["a worker before its first task, by the kernel", "", format_bytes(found["idle"])],
        ],
    )
    yield ""
    again = found["again"]
    yield (
        f"Of {again['latents']:,} random latents, of which {again['active']:,} are active, plain products found the "
        f"same number of active rows for {again['count']:.1%} of these, and largest activations at most "
        f"{again['largest_apart']:.1g} apart"
        + (f"; {again['near']:.2%} of their neighbours are the same, place by place." if near else ".")
    )
