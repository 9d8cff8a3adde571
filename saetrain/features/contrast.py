"""Hard quiet rows: where latents of similar decoder rows are active and the latent itself is not.

The nearest latent comes first.  Of each, the rows of its uniform sample of active rows are looked at in their order;
those on which the latent is quiet are kept, each row once.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actshuffle.jobs import FolderJob, FolderTask
from saetrain.describing.entries import key
from saetrain.describing.samples import placed
from saetrain.describing.slots import NO_ROW
from saetrain.features import layout
from saetrain.features.blueprint import Plan
from saetrain.features.gathering import keys_of, pieces, runs_of, totals
from saetrain.features.layout import Column, chunk_key

I64 = NDArray[np.int64]
KEPT = 10
BATCH = 1024  # latents whose candidates are looked at together
CLOSE = 4  # rows of a chunk that are read for one that is wanted, rather than each on its own
COLUMNS = {
    "hard/row": Column((KEPT,), "<i8", NO_ROW, "rows on which a near latent is active, and this one is not"),
    "hard/latent": Column((KEPT,), "<i8", -1, "that latent"),
}


def columns(plan: Plan) -> dict[str, Column]:
    return COLUMNS if plan.near else {}


def contrast(job: FolderJob, task: FolderTask, *, most: int) -> tuple[dict[str, Any], int]:
    """The hard quiet rows of a chunk of latents."""
    plan = Plan.of(job)
    lo, hi = plan.chunk_range(task.number)
    arrays, counts = layout.empty(COLUMNS, hi - lo), totals(job, plan, lo, hi)
    for start in range(lo, hi, BATCH):
        part = slice(start - lo, min(start + BATCH, hi) - lo)
        rows, owners = _candidates(job, plan, start, min(start + BATCH, hi))
        rows[_active(job, start, rows, counts[part], most)] = NO_ROW
        of, at = np.nonzero((rows != NO_ROW) & _first(rows))
        arrays["hard/row"][part] = placed(rows[of, at], of, len(rows), KEPT)
        arrays["hard/latent"][part] = placed(owners[of, at], of, len(rows), KEPT)
    return {}, layout.put_chunk(job, arrays, task.number, plan.chunk)


def _candidates(job: FolderJob, plan: Plan, lo: int, hi: int) -> tuple[I64, I64]:
    """Sampled rows of the near latents of latents [lo, hi), and whose they are: int64 [latents, near x samples]."""
    near = _rows(job, "near/id", np.arange(lo, hi), plan.near)
    first, end = plan.kinds.kinds()["random"]
    named = np.unique(near[near >= 0])
    sampled = np.full((len(named) + 1, end - first), NO_ROW, np.int64)  # the last is that of no latent
    sampled[:-1] = _rows(job, "example/row", named, plan.kinds.total)[:, first:end]
    place = np.where(near >= 0, np.searchsorted(named, near), len(named))
    return sampled[place].reshape(hi - lo, -1), np.repeat(near, end - first, axis=1)


def _active(job: FolderJob, lo: int, rows: I64, counts: I64, most: int) -> NDArray[np.bool_]:
    """True where a latent is active on a row that is a candidate for it."""
    plan, active = Plan.of(job), np.zeros(rows.shape, bool)
    for a, b in pieces(plan, counts, lo, most, plan.latents):
        part, held = slice(a - lo, b - lo), counts[a - lo : b - lo]
        wanted = key(np.arange(b - a)[:, None], rows[part])
        for runs in runs_of(job, a, b, held, most if b - a == 1 else int(held.sum()) + 1):
            keys = keys_of(plan, runs, b - a)
            at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
            active[part] |= (keys[at] == wanted) & (rows[part] != NO_ROW)
    return active


def is_there(job: FolderJob, task: FolderTask, receipt: dict[str, Any]) -> bool:
    return layout.has_chunk(job, COLUMNS, task.number)


def _first(rows: I64) -> NDArray[np.bool_]:
    """True where a row number is the first of its kind in its line."""
    order = np.argsort(rows, axis=1, kind="stable")
    ordered = np.take_along_axis(rows, order, axis=1)
    new = np.ones(rows.shape, bool)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    found = np.empty(rows.shape, bool)
    np.put_along_axis(found, order, new, axis=1)
    return found


def _rows(job: FolderJob, name: str, latents: I64, width: int) -> I64:
    """Rows of an int64 array that earlier tasks wrote, of ascending latents.

    Of each chunk, rows that lie close together are one read, with those between them; others are a small read each.
    """
    plan, objects = Plan.of(job), job.objects
    out = np.empty((len(latents), width), "<i8")
    for chunk in np.unique(latents // plan.chunk).tolist():
        inside = np.flatnonzero(latents // plan.chunk == chunk)
        places = latents[inside] - chunk * plan.chunk
        first, count = int(places[0]), int(places[-1] - places[0]) + 1
        key, flat = chunk_key(name, chunk, 2), out.reshape(-1).view(np.uint8).data
        if count <= CLOSE * len(places):
            held = np.empty((count, width), "<i8")
            objects.read_rows(key, held.nbytes, [first * width * 8], held.reshape(-1).view(np.uint8).data, [0])
            out[inside] = held[places - first]
        else:
            objects.read_rows(key, width * 8, (places * width * 8).tolist(), flat, (inside * width * 8).tolist())
    return out


def contrast_in(most: int) -> Any:
    return partial(contrast, most=most)
