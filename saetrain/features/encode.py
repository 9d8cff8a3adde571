"""The encoder product, and which of its results are active.

::

    encode   block x shard    pre = (x - offset) W_enc^T + b_enc, a tile at a time; active entries go to work/codes/
                              with k latents a token and several shards, each shard's k best go to work/candidates/
    select   block            the k best of all shards' candidates; ties go to the lower latent

Pre-activations exist for one tile of rows at a time.  On a CPU a rough product of all says which of them to compute
(saetrain/compute/screen.py), each as an inner product of its own; on a GPU they are those of one product in float32.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from actshuffle import Dataset, open_dataset
from actshuffle.jobs import FolderJob, FolderTask
from saetrain.compute.kernels import Codes, candidates, true_places
from saetrain.compute.screen import Screen, best_of
from saetrain.data import check_finite, read_columns
from saetrain.describing.sorting import ordered, ranks
from saetrain.features import codes
from saetrain.features.blueprint import Plan
from saetrain.features.dictionary import Shard, shard_of

I64 = np.ndarray[Any, np.dtype[np.int64]]


def encode(job: FolderJob, task: FolderTask, *, device: str) -> tuple[dict[str, Any], int]:
    """One block of rows through one shard of the dictionary."""
    plan = Plan.of(job)
    number, block = plan.encode_task(task)
    key, lo, hi = (plan.candidate_objects if plan.selects else plan.code_objects)(block)[number]
    shard = shard_of(plan.dictionary, plan.sae, lo, hi, device, plan.gradient is not None)
    data = open_dataset(plan.store, incomplete=True)
    start, stop = plan.block(block)
    parts, room = [], torch.empty(plan.tile_rows, hi - lo, device=device)  # touched once, not anew for each tile
    for at in range(start, stop, plan.tile_rows):
        end = min(at + plan.tile_rows, stop)
        x, gradient = rows_of(data, plan, plan.field, at, end).to(device), None
        if plan.gradient is not None:
            gradient = rows_of(data, plan, plan.gradient, at, end).to(device)
        found = active(shard, x, plan, room, gradient)
        parts.append(found._replace(row=found.row + (at - start)))
    latent, row, value = (np.concatenate(p) for p in list(zip(*parts, strict=True))[:3])
    effect = None if plan.gradient is None else np.concatenate([part.effect for part in parts])
    run = codes.grouped(latent, row, value, effect, hi - lo)
    nbytes = codes.put(job, key, run, plan.granule)
    return {"entries": len(value), "key": key}, nbytes + (stop - start) * plan.row_bytes


def is_there(job: FolderJob, task: FolderTask, receipt: dict[str, Any]) -> bool:
    return job.objects.size(receipt["key"]) is not None


def rows_of(data: Dataset, plan: Plan, field: str, start: int, stop: int) -> Tensor:
    """Rows [start, stop) of the arrays in `field` as float32 [rows, d_in]; refuses NaNs and infinities."""
    rows = read_columns(data, field, start, stop, flat=True)
    check_finite(rows, plan.store, field, start)
    return rows.float()


class Active(NamedTuple):
    """Active entries of a tile, token by token."""

    latent: np.ndarray[Any, Any]  # of the shard
    row: np.ndarray[Any, Any]  # of the tile
    value: np.ndarray[Any, Any]
    effect: np.ndarray[Any, Any] | None  # value times <decoder row, gradient>


def active(shard: Shard, x: Tensor, plan: Plan, room: Tensor | None = None, gradient: Tensor | None = None) -> Active:
    """The entries of a tile of rows [rows, d_in] that are active, or candidates.

    `room` is as `product` takes it; `gradient` [rows, d_in] is that of the loss with respect to the rows.
    """
    if shard.screen is not None:
        row, latent, value = _screened(shard.screen, x - shard.offset, plan.k, room)
    else:
        pre = product(shard, x, plan, room)
        if plan.k:
            row, latent, value = largest(pre, plan.k)
        else:
            place = true_places(pre > shard.threshold)
            value = pre.flatten()[place].cpu().numpy()
            row, latent = np.divmod(place.cpu().numpy(), pre.shape[1])
    effect = None
    if gradient is not None:
        assert shard.decoder is not None
        latents, values, rows = (torch.from_numpy(array).to(x.device) for array in (latent, value, row))
        dots = Codes(latents, values, rows, len(x), shard.hi - shard.lo).dots(gradient, shard.decoder)
        effect = value * dots.cpu().numpy()
    return Active(latent, row, value, effect)


def _screened(screen: Screen, x: Tensor, k: int, room: Tensor | None) -> tuple[I64, I64, np.ndarray[Any, Any]]:
    room = x.new_empty(len(x), len(screen.weight)) if room is None else room
    return screen.largest(x, k, room) if k else screen.above(x, room)


def largest(pre: Tensor, k: int) -> tuple[I64, I64, np.ndarray[Any, Any]]:
    """Rows, columns and values of the k largest of each row, as of `best_of`."""
    row, column, value = (tensor.cpu().numpy() for tensor in candidates(pre, min(k, pre.shape[1])))
    return best_of(row, column, value, len(pre), k)


def product(shard: Shard, x: Tensor, plan: Plan, room: Tensor | None = None) -> Tensor:
    """Pre-activations [rows, latents of the shard], in `room` [tile rows, latents of the shard] if it is given.

    For a GPU.  Each tile is one matrix product of its own.  Tiles lie at multiples of `tile_rows` and `tile_latents`
    of the whole store and the whole dictionary, so a pre-activation has the same bits whatever the blocks and shards.
    """
    centred = x - shard.offset
    pre = x.new_empty(len(x), shard.hi - shard.lo) if room is None else room[: len(x)]
    for lo in range(0, shard.hi - shard.lo, plan.tile_latents):
        part = slice(lo, lo + plan.tile_latents)
        torch.addmm(shard.bias[part], centred, shard.weight[part].T, out=pre[:, part])
    return pre


def select(job: FolderJob, task: FolderTask) -> tuple[dict[str, Any], int]:
    """Of all shards' candidates of a block, the k largest of each row; shards join one after the other."""
    plan, block = Plan.of(job), task.number
    held: list[np.ndarray[Any, Any]] = []  # latents, which ascend, and the arrays of a run
    for key, lo, hi in plan.candidate_objects(block):
        run = codes.read(job, key, hi - lo, plan.granule, 0, hi - lo, block=block, first=lo)
        more = [np.repeat(np.arange(lo, hi, dtype=np.int32), run.counts), *run.arrays]
        held = [np.concatenate(both) for both in zip(held, more, strict=True)] if held else more
        kept = best(held[2], held[1], plan.k)
        held = [array[kept] for array in held]
    latent, values, rows, *effects = held
    counts = np.bincount(latent, minlength=plan.latents).astype("<u4")
    run = codes.Run(counts, rows, values, effects[0] if effects else None)
    ((key, _, _),) = plan.code_objects(block)
    return {"entries": len(latent), "key": key}, codes.put(job, key, run, plan.granule)


def best(rows: np.ndarray[Any, Any], values: np.ndarray[Any, Any], k: int) -> np.ndarray[Any, Any]:
    """Mask of the k largest positive values of each row; of equal ones the first come first."""
    order = ordered(rows, np.uint32(0x7FFFFFFF) - values.view(np.uint32))
    kept = np.zeros(len(rows), bool)
    kept[order[ranks(rows[order]) < k]] = True
    return kept


def encode_on(device: str) -> Any:
    """`encode` on a device, as a step's function: the device is no part of the job's identity."""
    return partial(encode, device=device)
