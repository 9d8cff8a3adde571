"""One chunk of latents: gather their entries from all blocks, a piece of the chunk at a time, and describe them."""

from __future__ import annotations

from functools import partial
from typing import Any

from actshuffle.jobs import FolderJob, FolderTask
from saetrain.features import layout, samples, statistics, survey
from saetrain.features.blueprint import Plan
from saetrain.features.entries import BYTES, Context, Entries, gather, pieces, totals
from saetrain.features.layout import Arrays


def collate(job: FolderJob, task: FolderTask, *, memory: int) -> tuple[dict[str, Any], int]:
    plan = Plan.of(job)
    context = context_of(job)
    lo, hi = plan.chunk_range(task.number)
    counts = totals(job, plan, lo, hi)
    arrays = layout.empty(plan.columns, hi - lo)
    for a, b in pieces(plan, counts, lo, memory // BYTES, statistics.widest(context)):
        part = {name: array[a - lo : b - lo] for name, array in arrays.items()}
        describe(gather(job, context, a, b, counts[a - lo : b - lo]), context, part)
    nbytes = layout.put_chunk(job, arrays, task.number, plan.chunk)
    return {"entries": int(counts.sum()), "alive": int((counts > 0).sum())}, nbytes


def is_there(job: FolderJob, task: FolderTask, receipt: dict[str, Any]) -> bool:
    return layout.has_chunk(job, Plan.of(job).columns, task.number)


def context_of(job: FolderJob) -> Context:
    (found,) = job.results("survey")
    return Context(Plan.of(job), survey.documents(job), survey.pool(job), found["token_low"], found["token_high"])


def describe(entries: Entries, context: Context, out: Arrays) -> None:
    """Fill the rows of all arrays that are about these latents."""
    found = statistics.moments(entries)
    maximum = found["stat/max"]
    found |= statistics.documents(entries, context)
    found |= statistics.shape(entries, context, maximum)
    found |= statistics.tokens(entries, context)
    for name, values in found.items():
        out[name][...] = values
    samples.contexts(entries, context, samples.choose(entries, context, maximum), out)


def collate_in(memory: int) -> Any:
    """`collate` within a number of bytes, as a step's function: memory is no part of the job's identity."""
    return partial(collate, memory=memory)
