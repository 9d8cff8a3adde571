"""Jobs with the tasks of other packages, on the example job: any executor, any kill, the same bytes."""

from __future__ import annotations

import json
import os
import random
import resource
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actshuffle.errors import DestinationExistsError, RequestError, ResumeMismatchError
from actshuffle.executors import Serial, Threads, local_cluster
from actshuffle.jobs import FolderJob, FolderTask, Step, folder, read_done, run_in_folder
from actshuffle.jobs.folder import always, run_task
from actshuffle.jobs.records import sealed
from actshuffle.storage.place import as_place
from actshuffle.testing import Faults, Killed, Operation, matching
from examples.count_tokens import add_up, count, count_tokens, is_there
from support.finished import collection, fields
from support.processes import ended, start

N, PER_TASK = 150, 16
TASKS = -(-N // PER_TASK)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return collection(tmp_path_factory.mktemp("store") / "acts.zarr", N)


def run(store: Path, out: Path, **how: Any) -> Any:
    return count_tokens(store, out, rows_per_task=PER_TASK, fsync=False, **how)


def is_oracle(out: Path) -> bool:
    """True if the table holds exactly the tokens of the store, and nothing else is in the folder."""
    tokens, counts = np.unique(fields(N)["token"], return_counts=True)
    order = np.lexsort((tokens, -counts))
    found = np.load(out / "tokens.npy")
    left = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    return (
        np.array_equal(found, np.stack([tokens, counts], axis=1)[order])
        and left == ["done.json", "tokens.npy"]
        and read_done(out)["found"] == {"rows": N, "distinct": len(tokens)}
    )


# --- Executors ----------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_any_executor_makes_the_same(store, tmp_path, workers):
    done = run(store, tmp_path / "out", executor=Threads(workers) if workers else Serial())
    assert (done.tasks, done.resumed) == (TASKS, 0)
    assert is_oracle(tmp_path / "out")


def test_dask_makes_the_same(store, tmp_path, cluster):
    run(store, tmp_path / "out", executor=cluster(2))
    assert is_oracle(tmp_path / "out")


def _heap(job: FolderJob, task: FolderTask) -> tuple[dict[str, Any], int]:
    """Page faults of the second of two arrays, after the first was freed, for several sizes.

    One may lie alone in a part of the heap, which goes with it whatever the thresholds are.
    """
    faults = []
    for size in (1024, 896, 768, 640, 512):  # KiB, smaller than a huge page
        for _ in range(2):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            np.ones(size << 10, np.uint8)
            after = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        faults.append(after - before)
    return {"faults": faults, "fixed": "MALLOC_TRIM_THRESHOLD_" in os.environ}, 0


@pytest.mark.parametrize("settled", [True, False])
def test_freed_memory_is_used_again_by_the_tasks_of_a_nanny(tmp_path, settled):
    """Dask's nanny has freed memory returned to the system; a fresh page of it costs more than the work on it."""
    found: list[dict[str, Any]] = []
    with local_cluster(1) as executor:
        if not settled:  # the control: thresholds as the nanny sets them
            executor.client.run(_leave_heap)
        run_in_folder(
            "heap",
            tmp_path / "out",
            {},
            [Step("heap", _heap, 1)],
            publish=lambda job: found.extend(job.results("heap")) or {},
            executor=executor,
        )
    assert found[0]["fixed"]
    assert (min(found[0]["faults"]) < 64) == settled, found


def _leave_heap() -> None:
    folder.settled_heap = nullcontext  # in a worker that ends with the test


def test_the_check_sees_a_wrong_count(store, tmp_path):
    run(store, tmp_path / "out")
    table = np.load(tmp_path / "out/tokens.npy")
    table[3, 1] += 1
    np.save(tmp_path / "out/tokens.npy", table)
    assert not is_oracle(tmp_path / "out")


# --- Kills and faults ---------------------------------------------------------------------------


class On:
    """A schedule of faults by the number of the operation on one folder; the source store is left alone."""

    def __init__(self, folder: Path, faults: dict[int, str]) -> None:
        self.folder, self.faults, self.count = str(folder), faults, 0

    def __call__(self, operation: Operation) -> str | None:
        if operation.url != self.folder:
            return None
        self.count += 1
        return self.faults.get(self.count - 1)


def operations(store: Path, out: Path) -> int:
    """The number of operations that a whole run makes on the folder."""
    schedule = On(out, {})
    with Faults(schedule):
        run(store, out)
    return schedule.count


@pytest.mark.parametrize(
    ("kind", "step"), [("kill", 2), ("late", 7), ("torn", 7), pytest.param("kill", 1, marks=pytest.mark.soak)]
)
def test_killed_at_any_operation_then_resumed(store, tmp_path, kind, step):
    total = operations(store, tmp_path / "whole")
    assert total > 3 * TASKS
    for number in range(0, total, step):
        out = tmp_path / f"{kind}-{number}"
        with pytest.raises(Killed), Faults(On(out, {number: kind})):
            run(store, out)
        assert not (out / "done.json").exists() or kind != "kill" or is_complete(out)
        run(store, out)
        assert is_oracle(out), number


def is_complete(out: Path) -> bool:
    return read_done(out) is not None and (out / "tokens.npy").exists()


def killed(store: Path, out: Path, pattern: str) -> None:
    """Run in a process that SIGKILLs itself at an operation."""
    os.setpgrp()
    Faults(matching(pattern, "kill"), real=True).install()
    run(store, out)


@pytest.mark.parametrize(
    "pattern",
    [
        "put job.json",
        "put counts/4.npy",
        "put receipts/count/7.json",
        "put tokens.npy",
        "put done.json",
        "delete_prefix receipts",
    ],
)
def test_killed_process_then_resumed(store, tmp_path, pattern):
    out = tmp_path / "out"
    assert ended(start(killed, store, out, pattern)) == -9
    finished = pattern.startswith("delete_prefix")
    assert (read_done(out) is not None) is finished
    done = run(store, out)
    assert is_oracle(out)
    assert done.resumed == {"put counts/4.npy": 4, "put receipts/count/7.json": 7}.get(pattern, done.resumed)


def test_random_kills_until_it_is_done(store, tmp_path):
    dice, out, kills = random.Random(3), tmp_path / "out", 0
    while True:
        try:
            with Faults(On(out, {dice.randrange(12): dice.choice(["kill", "late", "torn"])})):
                run(store, out)
            break
        except Killed:
            kills += 1
            if kills > 3 * TASKS:  # each attempt gets no further than a dozen operations; give it room now
                run(store, out)
                break
    assert kills > 3
    assert is_oracle(out)


def test_errors_are_not_the_end(store, tmp_path):
    with pytest.raises(Exception, match="no space left"), Faults(matching("put counts/3.npy", "full")):
        run(store, tmp_path / "out")
    assert run(store, tmp_path / "out").resumed == 3
    assert is_oracle(tmp_path / "out")


# --- Receipts -----------------------------------------------------------------------------------


def half_done(store: Path, out: Path) -> Path:
    with pytest.raises(Killed), Faults(matching("put counts/6.npy", "kill")):
        run(store, out)
    return out


def test_torn_receipts_and_missing_data_do_not_count(store, tmp_path):
    out = half_done(store, tmp_path / "out")
    path = out / "receipts/count/1.json"
    path.write_bytes(path.read_bytes()[:-5])
    other = out / "receipts/count/2.json"
    other.write_bytes((out / "receipts/count/3.json").read_bytes())  # sealed, of another task
    (out / "counts/4.npy").unlink()
    assert run(store, out).resumed == 6 - 3
    assert is_oracle(out)


def test_receipts_of_another_job_do_not_count(store, tmp_path):
    out = half_done(store, tmp_path / "out")
    path = out / "receipts/count/1.json"
    body = json.loads(path.read_bytes())["body"]
    path.write_bytes(sealed(body | {"job": "0" * 32}))
    assert run(store, out).resumed == 5


def test_control_receipts_that_are_believed_lose_rows(store, tmp_path):
    """A step that does not look for its data trusts its receipt, and the check at the end misses the rows."""
    out = half_done(store, tmp_path / "out")
    (out / "counts/4.npy").unlink()
    job = json.loads((out / "job.json").read_bytes())["body"]
    steps = [Step("count", count, TASKS, always)]
    with pytest.raises((EOFError, ValueError)):
        run_in_folder("token counts", out, job["settings"], steps, publish=add_up, fsync=False)


def test_a_receipt_that_vanishes_before_the_end(store, tmp_path):
    job = FolderJob("x", {}, as_place(tmp_path), (Step("count", count, 3, is_there),))
    with pytest.raises(RequestError, match="count 0 vanished"):
        list(job.results("count"))


# --- Steps --------------------------------------------------------------------------------------


class Stages:
    """A progress that keeps the name and the number of tasks of each stage."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []

    def begin(self, stage: str, tasks: int, nbytes: int) -> None:
        self.seen.append((stage, tasks))

    def advance(self, nbytes: int, fresh: bool) -> None: ...

    def end(self) -> None: ...


def numbered(job: FolderJob, task: FolderTask) -> tuple[dict[str, Any], int]:
    return {"is": [task.step, task.number]}, 0


@pytest.mark.parametrize(
    ("beside", "stages"), [(True, [("a, b", 5), ("c", 1)]), (False, [("a", 2), ("b", 3), ("c", 1)])]
)
def test_steps_that_need_no_other_run_beside_it(tmp_path, beside, stages):
    steps = [Step("a", numbered, 2), Step("b", numbered, 3, beside=beside), Step("c", numbered, 1)]
    seen, found = Stages(), {}

    def publish(job: FolderJob) -> dict[str, Any]:
        found.update({step.name: [receipt["is"] for receipt in job.results(step.name)] for step in steps})
        return {}

    run_in_folder("x", tmp_path / "out", {}, steps, publish=publish, progress=seen, fsync=False)
    assert seen.seen == stages
    assert found == {step.name: [[step.name, number] for number in range(step.tasks)] for step in steps}


# --- Other requests -----------------------------------------------------------------------------


def test_the_same_again_is_already_finished(store, tmp_path):
    run(store, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert run(store, tmp_path / "out").tasks == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


def test_other_settings_are_refused_with_the_difference(store, tmp_path):
    out = half_done(store, tmp_path / "out")
    with pytest.raises(ResumeMismatchError, match="rows_per_task was 16, now 10"):
        count_tokens(store, out, rows_per_task=10)
    run(store, out)
    with pytest.raises(DestinationExistsError, match="rows_per_task was 16, now 10"):
        count_tokens(store, out, rows_per_task=10)
    assert is_oracle(out)
    count_tokens(store, out, rows_per_task=10, overwrite=True, fsync=False)
    assert is_oracle(out)


def test_something_else_in_the_folder_is_refused(store, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(DestinationExistsError, match=r"something else.*by hand"):
            run(store, tmp_path, overwrite=overwrite)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_late_twin_leaves_a_finished_folder_alone(store, tmp_path):
    run(store, tmp_path / "out")
    settings = read_done(tmp_path / "out")["settings"]
    job = FolderJob("token counts", settings, as_place(tmp_path / "out"), (Step("count", count, TASKS, is_there),))
    assert not run_task(job, FolderTask("count", 2)).fresh
    assert is_oracle(tmp_path / "out")
