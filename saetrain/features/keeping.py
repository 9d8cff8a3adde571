"""Keep all codes: by latent for later questions about latents, by row for questions about rows.

::

    OUT/codes/by_feature/CHUNK/row, value          entries of a chunk of latents, latent by latent, rows ascending
    OUT/codes/by_row/BLOCK/entries/feature, value  entries of a block of rows, row by row, latents ascending
    OUT/codes/by_row/BLOCK/rows/count              entries of each row

`stat/count` says where a latent begins.  Each is a Zarr array of plain bytes in one chunk.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actshuffle.jobs import FolderJob, FolderTask
from saetrain.describing.entries import Context
from saetrain.features import codes
from saetrain.features.blueprint import Plan
from saetrain.features.gathering import pieces, portions
from saetrain.features.layout import group_metadata

COLUMNS = {"row": "<i8", "value": "<f4"}


def by_feature(number: int) -> str:
    return f"codes/by_feature/{number}"


def by_row(block: int, part: str) -> str:
    return f"codes/by_row/{block}/{part}"


def keep_by_feature(job: FolderJob, context: Context, number: int, counts: NDArray[np.int64], most: int) -> None:
    """Write the entries of a chunk of latents, `most` at a time."""
    plan, n, folder = Plan.of(job), int(counts.sum()), by_feature(number)
    lo, _ = plan.chunk_range(number)
    with ExitStack() as stack:
        row, value = (
            stack.enter_context(job.objects.writer(f"{folder}/{name}/c/0", max(n, 1) * np.dtype(dtype).itemsize))
            for name, dtype in COLUMNS.items()
        )
        for a, b in pieces(plan, counts, lo, most, plan.latents):
            held = counts[a - lo : b - lo]
            for entries in portions(job, context, a, b, held, most if b - a == 1 else int(held.sum()) + 1):
                row.write(entries.row.astype("<i8").view(np.uint8).data)
                value.write(entries.value.view(np.uint8).data)
    for key, data in group_metadata({name: (n, dtype) for name, dtype in COLUMNS.items()}):
        job.objects.put(f"{folder}/{key}", data)


def keep_by_row(job: FolderJob, task: FolderTask) -> tuple[dict[str, Any], int]:
    """Write the entries of a block, row by row."""
    plan, block = Plan.of(job), task.number
    runs = [
        codes.read(job, key, hi - lo, plan.granule, 0, hi - lo, block=block, first=lo)
        for key, lo, hi in plan.code_objects(block)
    ]
    counts = np.concatenate([run.counts for run in runs])
    rows, values = (np.concatenate([getattr(run, name) for run in runs]) for name in ("rows", "values"))
    start, stop = plan.block(block)
    order = codes.by_latent(rows, stop - start)  # of rows here: entries of one row keep the order of latents
    latent = np.repeat(np.arange(plan.latents), counts)[order].astype("<u4")
    _put(job, by_row(block, "entries"), {"feature": latent, "value": values[order]})
    _put(job, by_row(block, "rows"), {"count": np.bincount(rows, minlength=stop - start).astype("<u4")})
    return {"entries": len(rows)}, 8 * len(rows)


def _put(job: FolderJob, folder: str, arrays: dict[str, NDArray[Any]]) -> None:
    for name, array in arrays.items():
        chunk = array if len(array) else np.zeros(1, array.dtype)
        job.objects.put(f"{folder}/{name}/c/0", chunk.view(np.uint8).data)
    for key, data in group_metadata({name: (len(array), array.dtype.str) for name, array in arrays.items()}):
        job.objects.put(f"{folder}/{key}", data)


def rows_are_there(job: FolderJob, task: FolderTask, receipt: dict[str, Any]) -> bool:
    folders = (by_row(task.number, part) for part in ("entries", "rows"))
    there = all(job.objects.size(f"{folder}/zarr.json") is not None for folder in folders)
    return there and codes.are_there(job, task.number)


def features_are_there(job: FolderJob, number: int) -> bool:
    return job.objects.size(f"{by_feature(number)}/zarr.json") is not None
