"""One chunk of latents: gather their entries from all blocks, a piece of the chunk at a time, and describe them."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from actshuffle.jobs import FolderJob, FolderTask
from saetrain.describing import samples, statistics
from saetrain.describing.entries import Context, Entries
from saetrain.describing.slots import QUANTILES, Arrays
from saetrain.describing.streamed import describe_streamed
from saetrain.features import layout, survey
from saetrain.features.blueprint import Plan
from saetrain.features.gathering import BYTES, gather, pieces, portions, totals
from saetrain.features.keeping import features_are_there, keep_by_feature

OWN = 1.7  # times the arrays of a latent that describing it takes, beside these and its entries; 1.62 were seen


def collate(job: FolderJob, task: FolderTask, *, most: int) -> tuple[dict[str, Any], int]:
    plan = Plan.of(job)
    context = context_of(job)
    lo, hi = plan.chunk_range(task.number)
    counts = totals(job, plan, lo, hi)
    arrays = layout.empty(plan.columns, hi - lo)
    each = math.ceil(OWN * sum(array.nbytes for array in arrays.values()) / (hi - lo) / BYTES)
    for a, b in pieces(plan, counts, lo, most, statistics.widest(context), each):
        part, held = {name: array[a - lo : b - lo] for name, array in arrays.items()}, counts[a - lo : b - lo]
        if held.sum() <= most:
            describe(gather(job, context, a, b, held), context, part)
        else:
            describe_streamed(partial(portions, job, context, a, b, held, most), context, held, part)
    if plan.keep_codes:
        keep_by_feature(job, context, task.number, counts, most)
    nbytes = layout.put_chunk(job, arrays, task.number, plan.chunk)
    return {"entries": int(counts.sum()), "alive": int((counts > 0).sum())}, nbytes


def is_there(job: FolderJob, task: FolderTask, receipt: dict[str, Any]) -> bool:
    plan = Plan.of(job)
    kept = not plan.keep_codes or features_are_there(job, task.number)
    return kept and layout.has_chunk(job, plan.columns, task.number)


def context_of(job: FolderJob) -> Context:
    (found,) = job.results("survey")
    plan = Plan.of(job)
    return Context(
        rows=plan.rows,
        documents=survey.documents(job),
        pool=survey.pool(job)[: plan.pool],
        token_low=found["token_low"],
        token_high=found["token_high"],
        has_tokens=plan.token is not None,
        slots=plan.kinds,
        window=plan.window,
        before=plan.before,
        after=plan.after,
    )


def describe(entries: Entries, context: Context, out: Arrays) -> None:
    """Fill the rows of all arrays that are about these latents."""
    found = statistics.moments(entries)
    maximum = found["stat/max"]
    found |= statistics.documents(entries, context)
    found |= statistics.effects(entries, context)
    found |= statistics.shape(entries, context, maximum)
    found |= statistics.tokens(entries, context, maximum)
    ordered = statistics.order_statistics(entries, context.slots.intervals)
    found["shape/quantile"] = ordered[:, : len(QUANTILES)]
    for name, values in found.items():
        out[name][...] = values
    chosen = samples.choose(entries, context, maximum, ordered[:, len(QUANTILES) :])
    samples.contexts(entries, context, chosen, out)


def collate_in(most: int) -> Any:
    """`collate` with at most so many entries in memory, as a step's function: that is no part of the job's identity."""
    return partial(collate, most=most)
