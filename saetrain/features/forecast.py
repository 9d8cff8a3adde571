"""What a run will take, before it writes a byte: tasks, operations, memory, bytes on disk.

Active entries are known beforehand only roughly: k a token, or the firing rates that training recorded, or a pilot on a
few tiles of rows.  Times are quantities that follow from the plan, times unit costs that a benchmark measures:

::

    encode      products  rows latents width       offered  active entries, of each shard where latents compete
    select      offered
    survey      rows
    keep, draw  entries
    collate     entries   latents
    pairs       pairs     latents
    product     near      latents^2 width                   again    decoder rows, read once for each chunk, times width
    contrast    entries   latents

Unit costs are seconds of one worker, for one machine, width and kind of dictionary;
`python -m benchmarks features-forecast` measures them.  Logits are not forecast.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from actshuffle import format_bytes, open_dataset
from actshuffle.errors import InfeasibleError
from actshuffle.units import counted
from saetrain.errors import DataError
from saetrain.features import contrast, pairs, product
from saetrain.features.blueprint import Plan
from saetrain.features.dictionary import Dictionary, shard_of
from saetrain.features.encode import active, rows_of
from saetrain.features.gathering import BYTES

PILOT_TILES = 8
CODE_BYTES = 6  # an active entry on disk, and 4 of its effect on the loss
BLOCK_ENTRY = 56  # bytes of memory an entry of a block takes while it is grouped
EFFECT = 12  # and its effect on the loss
TILE_ELEMENT = 8  # and a pre-activation


@dataclass(frozen=True)
class Forecast:
    """Figures of a run; bytes and operations."""

    tasks: int
    operations: float  # of the encoder product
    entries: float  # active, expected
    entries_from: str
    read_bytes: int  # of the store
    codes_bytes: float  # on disk until the run ends, or kept
    result_bytes: int
    encode_memory: int  # of a task
    collate_memory: int
    product_memory: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        rows = {
            "tasks": f"{self.tasks:,}",
            "encoder product": f"{self.operations:.3g} operations",
            "active entries": f"about {self.entries:.3g} ({self.entries_from})",
            "reads of the store": format_bytes(self.read_bytes),
            "memory of a task": f"encode {format_bytes(self.encode_memory)}, "
            f"collate {format_bytes(self.collate_memory)}, "
            f"product {format_bytes(self.product_memory)}",
            "disk": f"codes about {format_bytes(self.codes_bytes)}, result {format_bytes(self.result_bytes)}",
        }
        return "\n".join(f"{name:18}  {text}" for name, text in rows.items())


def encode_memory(plan: Plan, shards: int, active_share: float) -> int:
    """Bytes of one encode task: the shard's encoder in two types, a tile of pre-activations, the entries of a block."""
    widest = -(-plan.latents // shards)
    tile = plan.tile_rows * widest * TILE_ELEMENT + plan.tile_rows * 6 * plan.row_bytes
    entry = BLOCK_ENTRY if plan.gradient is None else BLOCK_ENTRY + EFFECT
    weights = widest * (plan.row_bytes + 2 * plan.d_in)  # and as they are in bfloat16
    return int(weights + tile + entry * plan.block_rows * active_share * widest)


def most_entries(plan: Plan, memory: int) -> int:
    """Entries that a collate task may hold; refuses a memory in which not even one block of a latent fits."""
    fixed = result_bytes(plan, plan.chunk)
    most = (memory - fixed) // BYTES
    if most < plan.block_rows:
        need = fixed + BYTES * plan.block_rows
        raise InfeasibleError(
            f"--memory {format_bytes(memory)} is less than {format_bytes(need)}: a chunk of "
            f"{counted(plan.chunk, 'latent')} "
            f"takes {format_bytes(fixed)}, and the {counted(plan.block_rows, 'row')} of a block up to "
            f"{BYTES} bytes each; "
            "give more, or smaller blocks with --block-rows"
        )
    return int(most)


def result_bytes(plan: Plan, latents: int) -> int:
    row = sum(
        int(np.prod(c.shape, dtype=int)) * np.dtype(c.dtype).itemsize
        for c in (plan.columns | pairs.COLUMNS | contrast.columns(plan) | product.columns(plan)).values()
    )
    return row * latents


def active_entries(plan: Plan) -> tuple[float, str]:
    """Expected active entries of the whole run, and where the number comes from."""
    if plan.k:
        return float(plan.k * plan.rows), f"{plan.k} a row"
    rates = Dictionary(plan.dictionary).firing_rates()
    if rates is not None and float(rates.sum()) > 0:
        return float(rates.sum()) * plan.rows, "firing rates of training"
    data, tiles = open_dataset(plan.store, incomplete=True), -(-plan.rows // plan.tile_rows)
    chosen = np.unique(np.linspace(0, tiles - 1, PILOT_TILES).astype(int)).tolist()
    shard = shard_of(plan.dictionary, plan.sae, 0, min(plan.latents, 16 * plan.tile_latents), "cpu", False)
    found = seen = 0
    for tile in chosen:
        start = tile * plan.tile_rows
        rows = rows_of(data, plan, plan.field, start, min(start + plan.tile_rows, plan.rows))
        found, seen = found + len(active(shard, rows, plan).row), seen + len(rows)
    return found / seen * plan.rows * plan.latents / (shard.hi - shard.lo), f"a pilot of {counted(seen, 'row')}"


def forecast(plan: Plan, memory: int) -> Forecast:
    entries, how = active_entries(plan)
    share = entries / plan.rows / plan.latents
    codes = entries * (CODE_BYTES if plan.gradient is None else CODE_BYTES + 4) + plan.blocks * plan.latents * 4
    kept = entries * 16 if plan.keep_codes else 0
    return Forecast(
        tasks=1
        + product.tasks(plan)
        + plan.blocks * (plan.shards + plan.selects + plan.keep_codes + 1)
        + (3 if plan.near else 2) * plan.chunks,
        operations=2.0 * plan.rows * plan.latents * plan.d_in,
        entries=entries,
        entries_from=how,
        read_bytes=plan.rows * plan.row_bytes * plan.shards,
        codes_bytes=codes * (2 if plan.selects else 1) + kept,
        result_bytes=result_bytes(plan, plan.chunk * plan.chunks),
        encode_memory=encode_memory(plan, plan.shards, share),
        collate_memory=most_entries(plan, memory) * BYTES + result_bytes(plan, plan.chunk),
        product_memory=product.memory(plan),
    )


def check(found: Forecast, plan: Plan, out: str | Path, memory: int) -> None:
    """Refuse a run that cannot fit, with the arithmetic."""
    if found.encode_memory > memory:
        raise InfeasibleError(
            f"--memory {format_bytes(memory)} is less than the {format_bytes(found.encode_memory)} of an encode task: "
            f"{counted(plan.latents, 'latent')} of {counted(plan.d_in, 'number')} in "
            f"{counted(plan.shards, 'part')}; give more, or more --shards"
        )
    if found.product_memory > memory:
        raise InfeasibleError(
            f"--memory {format_bytes(memory)} is less than the {format_bytes(found.product_memory)} of a product task: "
            f"{counted(plan.chunk, 'latent')} of {counted(plan.d_in, 'number')}, and their tables; give more"
        )
    if "://" not in str(out):
        folder = next(p for p in (Path(out).absolute(), *Path(out).absolute().parents) if p.exists())
        free, need = shutil.disk_usage(folder).free, found.codes_bytes + found.result_bytes
        if need > free:
            raise InfeasibleError(
                f"{out} has room for {format_bytes(free)}, and the run needs about {format_bytes(need)}: "
                f"{format_bytes(found.codes_bytes)} for codes, {format_bytes(found.result_bytes)} for the result"
            )


# --- Time ---------------------------------------------------------------------------------------

QUANTITIES: dict[str, tuple[str, ...]] = {
    "encode": ("products", "offered"),
    "select": ("offered",),
    "keep": ("entries",),
    "survey": ("rows",),
    "draw": ("entries",),
    "collate": ("entries", "latents"),
    "pairs": ("pairs", "latents"),
    "product": ("near", "again"),
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
        "again": float(plan.chunks) * plan.latents * plan.d_in if plan.near else 0.0,
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
