"""Latents that are active together: the codes of a uniform sample of rows, then each chunk of latents."""

from __future__ import annotations

from typing import Any

import numpy as np

from actshuffle.jobs import FolderJob, FolderTask
from saetrain.describing.together import TOGETHER, Sample, together
from saetrain.features import codes, layout, survey
from saetrain.features.blueprint import Plan
from saetrain.features.layout import Column

PAIR_ROWS = 1 << 16  # rows of the sample, or fewer where they hold more than
PAIR_ENTRIES = 1 << 22  # active entries
PAIRS = 1 << 24  # of active entries of one row
_NAN, _ROW = float("nan"), (TOGETHER,)
COLUMNS = {
    "together/id": Column(_ROW, "<i8", -1, "latents that are active with it on more rows than chance gives"),
    "together/count": Column(_ROW, "<i8", 0, "rows of the sample on which both are active"),
    "together/expected": Column(_ROW, "<f4", _NAN, "what chance would give: n_f n_g / n"),
    "together/pmi": Column(_ROW, "<f4", _NAN, "log2(count / expected)"),
    "together/share": Column(_ROW, "<f4", _NAN, "count / n_f"),
    "together/low": Column(_ROW, "<f4", _NAN, "lower end of the share's 95% interval, documents as clusters"),
    "together/high": Column(_ROW, "<f4", _NAN, "upper end of that interval"),
}


def draw(job: FolderJob, task: FolderTask) -> tuple[dict[str, Any], int]:
    """The active latents of those rows of a block that are in the sample, row by row."""
    plan, block = Plan.of(job), task.number
    start, stop = plan.block(block)
    sample = np.sort(survey.pool(job)[: plan.pair_rows])
    wanted = sample[(sample >= start) & (sample < stop)] - start
    chosen = np.zeros(stop - start, bool)
    chosen[wanted] = True
    rows, latents = [], []
    for key, lo, hi in plan.code_objects(block):
        run = codes.read(job, key, hi - lo, plan.granule, 0, hi - lo, block=block, first=lo)
        inside = chosen[run.rows]
        rows.append(run.rows[inside])
        latents.append(np.repeat(np.arange(lo, hi, dtype="<u4"), run.counts)[inside])
    row, latent = np.concatenate(rows), np.concatenate(latents)
    order = codes.by_latent(row, stop - start)
    counts = np.bincount(row, minlength=stop - start)[wanted].astype("<u4")
    data = counts.tobytes() + latent[order].astype("<u4").tobytes()
    job.objects.put(_key(block), data)
    return {"rows": len(wanted), "entries": len(latent)}, len(data)


def is_drawn(job: FolderJob, task: FolderTask, receipt: dict[str, Any]) -> bool:
    return job.objects.size(_key(task.number)) is not None and codes.are_there(job, task.number)


def pairs(job: FolderJob, task: FolderTask) -> tuple[dict[str, Any], int]:
    """What each latent of a chunk is active with."""
    plan = Plan.of(job)
    lo, hi = plan.chunk_range(task.number)
    found = together(sample_of(job, plan), lo, hi)
    arrays = {name: found[name].astype(column.dtype) for name, column in COLUMNS.items()}
    return {}, layout.put_chunk(job, arrays, task.number, plan.chunk)


def are_there(job: FolderJob, task: FolderTask, receipt: dict[str, Any]) -> bool:
    return layout.has_chunk(job, COLUMNS, task.number)


def sample_of(job: FolderJob, plan: Plan) -> Sample:
    """The whole sample, in memory."""
    counts, latents = [], []
    for block, drawn in enumerate(job.results("draw")):
        data = np.frombuffer(job.objects.get(_key(block)) or b"", "<u4")
        counts.append(data[: drawn["rows"]])
        latents.append(data[drawn["rows"] :])
    rows = np.sort(survey.pool(job)[: plan.pair_rows])
    document = np.searchsorted(survey.documents(job), rows, side="right") - 1
    count, latent = np.concatenate(counts).astype(np.int64), np.concatenate(latents).astype(np.int32)
    return Sample(plan.latents, count, latent, document)


def _key(block: int) -> str:
    return f"work/sample/{block}.bin"
