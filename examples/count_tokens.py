"""Count the tokens of a store with a job of our own: plain tasks, receipts, a resume after a kill.

    python examples/count_tokens.py demo/activations.zarr demo/token-counts --workers 2

Each task counts the tokens of one range of rows and writes its counts; `add_up` reads them all and writes the
table.  Kill the program and give the same command again: it resumes at the first task without a receipt.
The result does not depend on the number of workers or kills.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path
from typing import Any

import numpy as np

import actshuffle
from actshuffle.executors import executor_for
from actshuffle.jobs import FolderJob, FolderTask, Outcome, Step, run_in_folder


def count(job: FolderJob, task: FolderTask) -> tuple[dict[str, Any], int]:
    """Count the tokens of one range of rows; writes int64 ``(distinct, 2)``: token and count."""
    store = actshuffle.open_dataset(job.settings["store"])
    start = task.number * job.settings["rows_per_task"]
    tokens = store.read("token", start, min(start + job.settings["rows_per_task"], store.rows))
    found = np.stack(np.unique(tokens, return_counts=True), axis=1).astype("<i8")
    job.objects.put(f"counts/{task.number}.npy", as_npy(found))
    return {"rows": len(tokens), "distinct": len(found)}, tokens.nbytes


def is_there(job: FolderJob, task: FolderTask, receipt: dict[str, Any]) -> bool:
    """True if the counts that a receipt speaks of are there."""
    return job.objects.size(f"counts/{task.number}.npy") is not None


def add_up(job: FolderJob) -> dict[str, Any]:
    """Write ``tokens.npy``, int64 ``(distinct, 2)``, the most frequent token first; returns the totals."""
    totals: dict[int, int] = {}
    rows = 0
    for number, receipt in enumerate(job.results("count")):
        rows += receipt["rows"]
        for token, times in np.load(io.BytesIO(job.objects.get(f"counts/{number}.npy") or b"")):
            totals[int(token)] = totals.get(int(token), 0) + int(times)
    table = np.array(sorted(totals.items(), key=lambda x: (-x[1], x[0])), "<i8").reshape(-1, 2)
    job.objects.put("tokens.npy", as_npy(table))
    job.objects.delete_prefix("counts")
    return {"rows": rows, "distinct": len(table)}


def as_npy(array: np.ndarray) -> bytes:
    data = io.BytesIO()
    np.save(data, array)
    return data.getvalue()


def count_tokens(store: str | Path, out: str | Path, *, rows_per_task: int = 50_000, **how: Any) -> Outcome:
    """Count the tokens of ``store`` into the folder ``out``; ``how`` is passed to `run_in_folder`."""
    found = actshuffle.open_dataset(store)
    # The identity of the rows is part of the job: a store that changed is another job.
    settings = {"store": str(Path(store).absolute()), "identity": found.identity, "rows_per_task": rows_per_task}
    steps = [Step("count", count, tasks=-(-found.rows // rows_per_task), is_there=is_there)]
    return run_in_folder("token counts", out, settings, steps, publish=add_up, **how)


def main() -> None:
    parser = argparse.ArgumentParser(description="Count the tokens of a store.")
    parser.add_argument("store", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--workers", type=int, default=0, help="Worker processes; 0 works in this one.")
    given = parser.parse_args()
    with executor_for(given.workers) as executor:
        done = count_tokens(given.store, given.out, executor=executor)
    if done.already_finished:
        print(f"{given.out}: already finished")
        return
    table = np.load(given.out / "tokens.npy")
    print(f"{done.tasks} tasks, {done.resumed} of them done before, {done.seconds:.1f} s")
    print(f"{table[:, 1].sum():,} tokens, {len(table):,} distinct; the most frequent: {table[:5].tolist()}")


if __name__ == "__main__":
    main()
