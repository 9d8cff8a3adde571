"""What the store of `interactions` holds: the name, type and definition of every array."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from saetrain.products.energy import kept_energy
from saetrain.products.productplan import ProductPlan
from saetrain.products.tiles import Kept, Table
from saetrain.products.zarrays import Array

FORMAT = 1
HALVES = ("rows", "columns")


def arrays_of(plan: ProductPlan, half: int) -> list[Array]:
    """The arrays of the rows (half 0) or the columns (half 1)."""
    size, other, k = plan.shape[half], HALVES[1 - half][:-1], plan.k_of(half)
    mine = HALVES[half][:-1]

    def array(name: str, dtype: str, shape: tuple[int, ...], about: str) -> Array:
        return Array(f"{HALVES[half]}/{name}", dtype, (size, *shape), plan.chunk, about)

    found = [
        array("top/index", "uint32", (k,), f"{other}s of the k largest entries of each {mine}, largest first"),
        array("top/value", "float32", (k,), "these entries; equal ones in order of index"),
    ]
    if plan.smallest:
        found += [
            array("bottom/index", "uint32", (k,), f"{other}s of the k smallest entries of each {mine}, smallest first"),
            array("bottom/value", "float32", (k,), "these entries; equal ones in order of index"),
        ]
    if plan.thresholds:
        counted = (len(plan.thresholds),)
        found.append(array("over", "int64", counted, "entries whose absolute value exceeds each threshold, counted"))
    return [
        *found,
        array("energy", "float64", (), f"sum of the squares of all entries of the {mine}, by the Gram matrix"),
        array("sum", "float64", (), f"sum of all entries of the {mine}"),
        array("kept", "float64", (), "share of the energy that the entries in top and bottom hold; 1 of no energy"),
    ]


def described(kept: Kept, energy: Tensor, total: Tensor) -> dict[str, np.ndarray]:
    """The content of the arrays of one chunk, by the names of `arrays_of` without that of the half."""
    found = {f"top/{name}": array for name, array in _table(kept.top, 1).items()}
    if kept.bottom is not None:
        found |= {f"bottom/{name}": array for name, array in _table(kept.bottom, -1).items()}
    held = kept_energy(kept.top, kept.bottom)
    share = torch.where(energy > 0, (held / energy).clamp(max=1.0), torch.ones_like(energy))
    numbers = {"over": kept.over, "energy": energy, "sum": total, "kept": share}
    return found | {name: tensor.numpy() for name, tensor in numbers.items()}


def _table(table: Table, sign: int) -> dict[str, np.ndarray]:
    return {"index": table.index.numpy().astype("<u4"), "value": sign * table.value.numpy()}


def attributes(plan: ProductPlan, product: str) -> dict[str, Any]:
    """What the group says of itself."""
    sides = {
        name: {"path": side.path, "part": side.part, "unit": side.unit, "digest": side.digest}
        for name, side in (("a", plan.a), ("b", plan.b), ("through", plan.through))
        if side is not None
    }
    return {
        "saetrain_interactions": {
            "format": FORMAT,
            "product": product,
            **sides,
            "k": plan.k,
            "thresholds": list(plan.thresholds),
            "drop_same": plan.drop_same,
        }
    }
