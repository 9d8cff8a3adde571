"""One look at the small columns of the store, which later tasks share.

It writes ``work/documents.bin``, the first row of each document and the number of rows, int64; and
``work/pool.bin``, the rows of smallest priority, smallest first, int64: an exactly uniform sample without
replacement, in random order.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from actshuffle import open_dataset, priorities
from actshuffle.jobs import FolderJob, FolderTask
from saetrain.errors import DataError
from saetrain.features import codes
from saetrain.features.blueprint import Plan

PIECE = 1 << 18  # rows looked at together, in some 20 MB
DOCUMENTS, POOL = "work/documents.bin", "work/pool.bin"
I64 = np.ndarray[Any, np.dtype[np.int64]]


def survey(job: FolderJob, task: FolderTask) -> tuple[dict[str, Any], int]:
    plan = Plan.of(job)
    data = open_dataset(plan.store, incomplete=True)
    if data.identity != plan.identity:
        raise DataError(f"{plan.store} is not the store it was when this run began: start again with another OUT")
    starts, last, low, high = [np.zeros(min(plan.rows, 1), np.int64)], None, 0, 0
    pool, wanted = np.empty((0, 2), np.uint64), max(plan.pool, plan.pair_rows)  # priority and row
    for at in range(0, plan.rows, PIECE):
        stop = min(at + PIECE, plan.rows)
        if plan.document is not None:
            found = data.read(plan.document, at, stop)
            starts.append(np.flatnonzero(found[1:] != found[:-1]) + at + 1)
            if last is not None and found[0] != last:
                starts.append(np.array([at], np.int64))
            last = found[-1]
        if plan.token is not None:
            tokens = data.read(plan.token, at, stop)
            low, high = min(low, int(tokens.min())), max(high, int(tokens.max()))
        both = np.stack([priorities(plan.seed, at, stop), np.arange(at, stop, dtype=np.uint64)], axis=1)
        pool = np.concatenate([pool, both])
        pool = pool[np.lexsort((pool[:, 1], pool[:, 0]))[:wanted]]
    edges = np.append(np.sort(np.concatenate(starts)), plan.rows).astype("<i8")
    job.objects.put(DOCUMENTS, edges.tobytes())
    job.objects.put(POOL, pool[:, 1].astype("<i8").tobytes())
    return {"documents": len(edges) - 1, "token_low": low, "token_high": high}, edges.nbytes


def is_there(job: FolderJob, task: FolderTask, receipt: dict[str, Any]) -> bool:
    found = all(job.objects.size(key) is not None for key in (DOCUMENTS, POOL))
    return found and all(codes.are_there(job, block) for block in range(Plan.of(job).blocks))


def documents(job: FolderJob) -> I64:
    """First rows of the documents, and the number of rows, int64 [documents + 1]."""
    return np.frombuffer(job.objects.get(DOCUMENTS) or b"", "<i8")


def pool(job: FolderJob) -> I64:
    """Rows in random order, as many as any step asks for."""
    return np.frombuffer(job.objects.get(POOL) or b"", "<i8")
