"""What follows from the weights alone: the nearest decoder rows of each latent, and the logits that it promotes.

::

    unembed    1 task                mean and spread of each latent's logits need the unembedding's Gram matrix
    product    chunk of latents      near/*, logit/*; and of each token the latents of the chunk that promote it most
    promote    range of tokens       logit_index/*: these, joined over all chunks
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actshuffle.jobs import FolderJob, FolderTask
from saetrain.compute.screen import fastest_type
from saetrain.describing.slots import Arrays
from saetrain.errors import DataError
from saetrain.features import layout
from saetrain.features.blueprint import Plan
from saetrain.features.dictionary import Dictionary
from saetrain.features.layout import Column
from saetrain.products import scratch
from saetrain.products.energy import Gram, gram
from saetrain.products.lens import BINS, Lens, project
from saetrain.products.nearest import Nearest, tile_bytes
from saetrain.products.tiles import COLUMNS, ROWS, Kept, Table

LOGITS = 10  # largest and smallest of a latent
PROMOTERS = 16  # latents of a token
TOKEN_CHUNK = 16_384  # tokens of a chunk of logit_index
NAN = float("nan")


def columns(plan: Plan) -> dict[str, Column]:
    """The arrays of one row a latent."""
    found = (
        {}
        if not plan.near
        else {
            "near/id": Column(
                (plan.near,), "<i8", -1, "latents of largest decoder cosine, without itself; -1 for none"
            ),
            "near/cosine": Column((plan.near,), "<f4", NAN, "these cosines, largest first"),
        }
    )
    if plan.lens is None:
        return found
    return found | {
        "logit/top_id": Column((LOGITS,), "<i8", -1, "tokens whose logit one unit of activation raises most"),
        "logit/top": Column((LOGITS,), "<f4", NAN, "these logits, less the mean over the vocabulary"),
        "logit/bottom_id": Column((LOGITS,), "<i8", -1, "tokens whose logit it lowers most"),
        "logit/bottom": Column((LOGITS,), "<f4", NAN, "these logits, smallest first"),
        "logit/std": Column((), "<f4", NAN, "standard deviation of its logits over the vocabulary"),
        "logit/histogram": Column((BINS,), "<u4", 0, "logits in equal bins from -5 to 5 standard deviations"),
    }


def token_columns() -> dict[str, Column]:
    """The arrays of one row a token."""
    return {
        "logit_index/id": Column((PROMOTERS,), "<i8", -1, "latents that raise the token's logit most; -1 for none"),
        "logit_index/value": Column((PROMOTERS,), "<f4", NAN, "logit of one unit of their activation"),
    }


def is_asked_for(plan: Plan) -> bool:
    return bool(plan.near) or plan.lens is not None


def ranges(plan: Plan) -> int:
    """Tasks of `promote`."""
    return 0 if plan.lens is None else -(-plan.lens.vocabulary // TOKEN_CHUNK)


def tasks(plan: Plan) -> int:
    return is_asked_for(plan) * plan.chunks + ranges(plan) + (plan.lens is not None)


def memory(plan: Plan) -> int:
    """Bytes of a product task: the chunk's decoder rows, what it keeps, and a tile."""
    size, d = min(plan.chunk, plan.latents), plan.d_in
    found = size * (12 * d + 24 * plan.near) + 48 * COLUMNS * d + max(64 * ROWS * COLUMNS, tile_bytes(d))
    if plan.lens is not None:
        # A table of all tokens exists while part of it is packed into an object.
        found += 16 * d * d + size * (12 * BINS + 48 * LOGITS) + 24 * PROMOTERS * plan.lens.vocabulary
    return found


def metadata(plan: Plan) -> Iterator[tuple[str, bytes]]:
    """The zarr.json of logit_index, whose rows are tokens."""
    if plan.lens is not None:
        found = layout.metadata(token_columns(), plan.lens.vocabulary, TOKEN_CHUNK, {})
        yield from ((key, data) for key, data in found if key != "zarr.json")


# --- Tasks --------------------------------------------------------------------------------------


def unembed(job: FolderJob, task: FolderTask) -> tuple[dict[str, Any], int]:
    lens = _lens(job)
    found = gram((lens.tile(at) for at in range(0, lens.vocabulary, COLUMNS)), lens.width)
    key, size = scratch.put(job, "unembed", {"matrix": found.matrix, "total": found.total})
    return {"keys": [key]}, size


def product(job: FolderJob, task: FolderTask) -> tuple[dict[str, Any], int]:
    plan = Plan.of(job)
    lo, hi = plan.chunk_range(task.number)
    dictionary, arrays = Dictionary(plan.dictionary), layout.empty(columns(plan), hi - lo)
    if plan.near:
        _near(dictionary, lo, hi, arrays)
    keys, nbytes = [], 0
    if plan.lens is not None:
        tokens = _logits(dictionary, plan.lens, lo, hi, scratch.get_gram(job, "unembed"), arrays)
        for number, at in enumerate(range(0, plan.lens.vocabulary, TOKEN_CHUNK)):
            part = {name: tensor[at : at + TOKEN_CHUNK] for name, tensor in scratch.tensors_of(tokens).items()}
            key, size = scratch.put(job, f"promote/{number}/{task.number}", part)
            keys.append(key)
            nbytes += size
    return {"keys": keys}, nbytes + layout.put_chunk(job, arrays, task.number, plan.chunk)


def is_there(job: FolderJob, task: FolderTask, receipt: dict[str, Any]) -> bool:
    return scratch.is_there(job, task, receipt) and layout.has_chunk(job, columns(Plan.of(job)), task.number)


def promote(job: FolderJob, task: FolderTask) -> tuple[dict[str, Any], int]:
    plan, start = Plan.of(job), task.number * TOKEN_CHUNK
    size = min(TOKEN_CHUNK, _lens(job).vocabulary - start)
    kept = Kept.empty(size, PROMOTERS, False, 0)
    for chunk in range(plan.chunks):
        scratch.join(kept, 0, scratch.get(job, f"promote/{task.number}/{chunk}"))
    arrays = layout.empty(token_columns(), size)
    _fill(arrays, "logit_index/id", "logit_index/value", kept.top)
    return {}, layout.put_chunk(job, arrays, task.number, TOKEN_CHUNK)


def is_promoted(job: FolderJob, task: FolderTask, receipt: dict[str, Any]) -> bool:
    return layout.has_chunk(job, token_columns(), task.number)


def _lens(job: FolderJob) -> Lens:
    found = Plan.of(job).lens
    assert found is not None
    return found


# --- The products -------------------------------------------------------------------------------


def _near(dictionary: Dictionary, lo: int, hi: int, arrays: Arrays) -> None:
    rows = torch.cat([_unit(dictionary, at, min(at + COLUMNS, hi)) for at in range(lo, hi, COLUMNS)])
    k = min(arrays["near/id"].shape[1], dictionary.latents)
    nearest = Nearest(rows, lo, k, fastest_type(dictionary.d_out))
    for at in range(0, dictionary.latents, COLUMNS):
        nearest.offer(_unit(dictionary, at, min(at + COLUMNS, dictionary.latents)), at)
    _fill(arrays, "near/id", "near/cosine", nearest.table)


def _unit(dictionary: Dictionary, lo: int, hi: int) -> Tensor:
    """Decoder rows of norm 1; a row of zeros stays one."""
    rows = dictionary.rows(lo, hi)["W_dec"].float().double()
    norm = rows.square().sum(1, keepdim=True).sqrt()
    if not bool(torch.isfinite(norm).all()):
        number = lo + int((~torch.isfinite(norm)).nonzero()[0, 0])
        raise DataError(f"the decoder row of latent {number:,} of {dictionary.path} holds a number that is not finite")
    return rows.div_(norm.clamp_min(1e-300)).float()


def _logits(dictionary: Dictionary, lens: Lens, lo: int, hi: int, whole: Gram, arrays: Arrays) -> Kept:
    """Fill logit/*; returns for each token the latents of the chunk that promote it most."""
    rows = lens.directions(
        torch.cat([dictionary.rows(at, min(at + COLUMNS, hi))["W_dec"] for at in range(lo, hi, COLUMNS)])
    )
    parts = [whole.whole(rows[at : at + COLUMNS]) for at in range(0, len(rows), COLUMNS)]
    energy, total = (torch.cat(found) for found in zip(*parts, strict=True))
    mean = total / lens.vocabulary
    std = (energy / lens.vocabulary - mean.square()).clamp_min(0).sqrt()
    found = project(lens, rows, lo, mean, std, LOGITS, PROMOTERS)
    _fill(arrays, "logit/top_id", "logit/top", found.rows.top)
    assert found.rows.bottom is not None
    _fill(arrays, "logit/bottom_id", "logit/bottom", Table(-found.rows.bottom.value, found.rows.bottom.index))
    arrays["logit/std"][:] = std.numpy()
    arrays["logit/histogram"][:] = found.histogram.numpy()
    return found.tokens


def _fill(arrays: Arrays, index: str, value: str, table: Table) -> None:
    """Put a table into arrays that may be wider; where it has no entry, their rows stay empty."""
    k, held = table.index.shape[1], (table.index >= 0).numpy()
    arrays[index][:, :k] = np.where(held, table.index.numpy(), -1)
    arrays[value][:, :k] = np.where(held, table.value.numpy(), np.nan)
