"""How long a run takes: quantities that follow from its plan, times unit costs that a benchmark measures.

::

    encode      products  rows latents width       offered  active entries, of each shard where latents compete
    select      offered
    survey      rows
    keep, draw  entries
    collate     entries   latents
    pairs       pairs     latents
    product     near      latents^2 width
    contrast    entries   latents

Unit costs are seconds of one worker, for one machine, width and kind of dictionary;
`python -m benchmarks features-forecast` measures them.  Logits are not forecast.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from saetrain.errors import DataError
from saetrain.features.blueprint import Plan

QUANTITIES: dict[str, tuple[str, ...]] = {
    "encode": ("products", "offered"),
    "select": ("offered",),
    "keep": ("entries",),
    "survey": ("rows",),
    "draw": ("entries",),
    "collate": ("entries", "latents"),
    "pairs": ("pairs", "latents"),
    "product": ("near",),
    "contrast": ("entries", "latents"),
}
Units = Mapping[str, Sequence[float]]  # by step, one for each of its quantities


def quantities(plan: Plan, entries: float) -> dict[str, float]:
    """What the work of a run's steps is proportional to; `entries` are the active ones of the whole run."""
    active = entries / plan.rows
    return {
        "products": float(plan.rows) * plan.latents * plan.d_in,
        "offered": entries * (plan.shards if plan.selects else 1),
        "rows": float(plan.rows),
        "entries": entries,
        "latents": float(plan.latents),
        "pairs": plan.pair_rows * active * active,
        "near": float(plan.latents) ** 2 * plan.d_in if plan.near else 0.0,
    }


def seconds(plan: Plan, entries: float, units: Units, workers: int = 1) -> dict[str, float]:
    """Seconds of each step, by its name."""
    found = quantities(plan, entries)
    steps = [step for step in QUANTITIES if step in units and _has(plan, step)]
    return {
        step: sum(found[name] * unit for name, unit in zip(QUANTITIES[step], units[step], strict=True)) / workers
        for step in steps
    }


def read_units(path: Path) -> dict[str, list[float]]:
    """Unit costs from the file that the benchmark writes."""
    try:
        found = json.loads(path.read_text())["units"]
        units = {step: [float(unit) for unit in found[step]] for step in QUANTITIES if step in found}
        if not units or any(len(units[step]) != len(QUANTITIES[step]) for step in units):
            raise ValueError("it names other quantities")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} holds no unit costs ({error}): `python -m benchmarks features-forecast` writes them as costs.json"
        ) from error
    return units


def _has(plan: Plan, step: str) -> bool:
    if step == "select":
        return plan.selects
    if step == "keep":
        return plan.keep_codes
    return bool(plan.near) or step not in ("product", "contrast")
