"""Whatever dies, and whenever: a second run completes, with the bytes of an undisturbed one."""

from __future__ import annotations

import itertools
import json
import operator
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import zarr

import actshuffle
from actshuffle.engine import preview, tasks
from actshuffle.engine import scratch as tier
from actshuffle.engine.scratch import scratch_place
from actshuffle.errors import (
    ActshuffleError,
    ClusterError,
    DestinationExistsError,
    FormatError,
    ResumeMismatchError,
    StorageError,
    StorageFullError,
)
from actshuffle.executors import Dask, Serial, local_cluster
from actshuffle.jobs.records import sealed
from actshuffle.planning.tree import Task
from actshuffle.progress import Silent
from actshuffle.storage.place import as_place
from actshuffle.testing import Faults, Killed, at, differences, leftovers, matching
from actshuffle.testing import run as serial_run
from actshuffle.testing.stories import new_process, prepared
from support.axes import halved
from support.executors import Stops
from support.processes import (
    KEPT,
    PATIENCE,
    PHASES,
    PLAN,
    SEED,
    TASKS,
    address_in,
    alive,
    assert_exact,
    dask_cluster,
    drive,
    ended,
    first_of_all,
    outcome,
    says_too_early_that_it_is_done,
    shuffled,
    source,
    start,
    takes_what_was_begun_for_done,
    until,
)
from support.runs import force
from support.stores import group, values


@pytest.fixture(scope="session")
def src(tmp_path_factory):
    return source(tmp_path_factory.mktemp("source") / "src.zarr")


@pytest.fixture
def dst(tmp_path):
    return tmp_path / "dst.zarr"


@pytest.fixture
def told(tmp_path):
    return tmp_path / "told.json"


def finish(src, dst, **settings):
    """Resume here, in this process, and check."""
    new_process()
    result = actshuffle.shuffle(src, dst, **({"seed": SEED, "fsync": False} | PLAN | settings))
    assert_exact(src, dst)
    return result


def stop_at(src, dst, what, kind="kill", **plan):
    """A run that dies at its first operation of some kind, as far as this process can tell."""
    new_process()
    with Faults(matching(what, kind)), pytest.raises(Killed):
        serial_run(src, dst, SEED, **(PLAN | plan))
    new_process()


# --- A process is killed, once per phase --------------------------------------------------------


@pytest.mark.parametrize(("phase", "kept"), halved(PHASES, [{}, KEPT]))
def test_killed_driver_during(phase, kept, src, dst, told):
    killed = start(drive, told, src, dst, kept, (PHASES[phase], "kill"))
    assert ended(killed) == -signal.SIGKILL
    assert not told.exists()
    if phase != "clearing":
        with pytest.raises(ActshuffleError):
            actshuffle.verify(src, dst)
    if kept and list(PHASES).index(phase) % 4 in (0, 1):  # the machine went down with it
        shutil.rmtree(_in_memory(dst), ignore_errors=True)
    finish(src, dst, **kept)


@pytest.mark.parametrize(("phase", "kept"), [*zip(TASKS, itertools.cycle([{}, KEPT]))])
def test_killed_worker_during(phase, kept, src, dst, told, tmp_path):
    with dask_cluster(tmp_path / "dask", 2, fault=(TASKS[phase], "kill")) as cluster:
        assert shuffled(told, src, dst, scheduler=cluster.address, **kept)["end"] == "done"
        assert sorted(w.exitcode or 0 for w in cluster.workers) == [-signal.SIGKILL, 0]
    assert_exact(src, dst)


@pytest.mark.parametrize(
    ("phase", "kept"), [("split", KEPT), ("leaf", {}), pytest.param("index", KEPT, marks=pytest.mark.soak)]
)
def test_killed_worker_of_own_cluster_during(phase, kept, src, dst, tmp_path):
    with local_cluster(2) as executor:
        executor.client.run(_die_once, TASKS[phase], tmp_path / "flag")
        before = set(_pids(executor.client).values())
        plan = PLAN | kept
        result = actshuffle.shuffle(src, dst, seed=SEED, fsync=False, executor=executor, **plan)
        assert result.resumed == 0
        until(lambda: len(_pids(executor.client)) == 2)
        assert set(_pids(executor.client).values()) - before, "nobody died"
    assert_exact(src, dst)


def _die_once(what, flag):
    decide = matching(what, "kill")
    Faults(lambda o: "kill" if decide(o) and first_of_all(flag) else None, real=True).install()


def _pids(client):
    return client.run(os.getpid)


@pytest.mark.parametrize(("phase", "kept"), [("split", KEPT), ("index", {}), ("leaf", KEPT)])
def test_killed_scheduler_during(phase, kept, src, dst, told, tmp_path):
    with dask_cluster(tmp_path / "dask", 0) as cluster:
        for _ in range(2):
            cluster.add_worker((TASKS[phase], "kill"), victim=cluster.scheduler.pid)
        end = shuffled(told, src, dst, scheduler=cluster.address, **kept)
        assert ended(cluster.scheduler) == -signal.SIGKILL
        assert (end["end"], "run again to resume" in end["message"]) == ("ClusterError", True)
    with dask_cluster(tmp_path / "dask2", 2) as cluster:
        assert shuffled(told, src, dst, scheduler=cluster.address, **kept)["end"] == "done"
    assert_exact(src, dst)


@pytest.mark.parametrize("wait", [2.0, pytest.param(None, marks=pytest.mark.soak)])  # None: Dask's own, half a minute
def test_killed_scheduler_of_the_dask_commands(wait, src, dst, told, tmp_path):
    from distributed import Client

    env = os.environ | {"DASK_DISTRIBUTED__ADMIN__SYSTEM_MONITOR__DISK": "false"}
    address = tmp_path / "scheduler.json"
    base = [sys.executable, "-m", "distributed.cli.dask_scheduler"]
    worker = [sys.executable, "-m", "distributed.cli.dask_worker"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": env, "cwd": tmp_path}
    scheduler = subprocess.Popen(
        [*base, "--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(address)], **quiet
    )
    workers = subprocess.Popen(
        [
            *worker,
            "--scheduler-file",
            str(address),
            "--nworkers",
            "2",
            "--nthreads",
            "1",
            "--no-dashboard",
            "--host",
            "127.0.0.1",
            "--death-timeout",
            "120",
        ],
        **quiet,
    )
    try:
        with Client(address_in(address), timeout=PATIENCE) as client:
            client.wait_for_workers(1, timeout=PATIENCE)
        settings = {"scheduler": address_in(address), "wait": wait, "progress": _Slow()}
        driver = start(drive, told, src, dst, settings)
        scratch = Path(scratch_place(as_place(dst), None).url)
        until((scratch / "level1" / "receipts" / "0.json").exists)
        scheduler.kill()
        ended(driver)
        assert outcome(told)["end"] == "ClusterError"
    finally:
        for process in (scheduler, workers):
            process.kill()
            process.wait()
    finish(src, dst)


@pytest.mark.parametrize("phase", ["split", "leaf"])
def test_killed_driver_whose_workers_go_on(phase, src, dst, told, tmp_path):
    with dask_cluster(tmp_path / "dask", 2) as cluster:
        driver = start(drive, told, src, dst, {"scheduler": cluster.address, "progress": _Slow()})
        folder = Path(scratch_place(as_place(dst), None).url) / "level1/blocks"
        folder = folder if phase == "split" else dst / "x"
        until(lambda: folder.exists() and any(folder.iterdir()))
        driver.kill()
        ended(driver)
        told.unlink(missing_ok=True)
        # At once: tasks of the dead driver may still be running.
        assert shuffled(told, src, dst, scheduler=cluster.address)["end"] in ("done", "DestinationExistsError")
    assert_exact(src, dst)


def test_workers_join_and_leave_during_a_run(src, dst, told, tmp_path):
    with dask_cluster(tmp_path / "dask", 1, fault=(TASKS["split"], "late")) as cluster:
        driver = start(drive, told, src, dst, {"scheduler": cluster.address})
        cluster.workers[0].join(PATIENCE)
        assert cluster.workers[0].exitcode == -signal.SIGKILL  # the last worker; the run waits
        (tmp_path / "dask/fault").unlink()
        cluster.add_worker(fault=(TASKS["leaf"], "late"))
        cluster.workers[1].join(PATIENCE)
        assert cluster.workers[1].exitcode == -signal.SIGKILL
        cluster.add_worker()
        cluster.add_worker()
        ended(driver)
        assert outcome(told)["end"] == "done"
    assert_exact(src, dst)


def test_killed_driver_takes_its_own_cluster_along(src, dst, told):
    driver = start(drive, told, src, dst, {"workers": 2})
    children = until(lambda: _children(driver.pid, "distributed.nanny|spawn_main|forkserver"))
    until(lambda: (dst / "_actshuffle/run.json").exists())
    driver.kill()
    ended(driver)
    until(lambda: not any(map(alive, children)))
    told.unlink(missing_ok=True)
    if not (dst / "_actshuffle/zarr.json").exists() or leftovers(dst):
        finish(src, dst)
    assert_exact(src, dst)


def _children(pid, _pattern):
    found = subprocess.run(["ps", "--ppid", str(pid), "-o", "pid="], capture_output=True, text=True)
    return [int(x) for x in found.stdout.split()]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("send", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_driver_stops_and_resumes(workers, send, src, dst, told):
    driver = start(drive, told, src, dst, {"workers": workers, "progress": _Slow()})
    until(lambda: (dst / "_actshuffle/run.json").exists())
    time.sleep(0.2)
    os.kill(driver.pid, send)
    ended(driver)
    if send == signal.SIGINT:
        assert outcome(told)["end"] == "KeyboardInterrupt"
    else:
        assert not told.exists()
    finish(src, dst)


class _Slow(Silent):
    """A run that takes a while."""

    def advance(self, nbytes, fresh):
        time.sleep(0.3)


# --- Every operation of a small run -------------------------------------------------------------


def _operations(src, dst, **plan):
    faults = Faults()
    new_process()
    with faults:
        serial_run(src, dst, SEED, **plan)
    shutil.rmtree(dst)
    return [operation for operation, _ in faults.log]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    return source(tmp_path_factory.mktemp("tiny") / "src.zarr", 16)


@pytest.fixture(scope="session")
def less_tiny(tmp_path_factory):
    """For the soak."""
    return source(tmp_path_factory.mktemp("tiny") / "src.zarr", 30)


TINY = {"levels": 3, "block_bytes": 320, "run_bytes": 1, "chunk_rows": 8}


@pytest.mark.parametrize("kind", ["kill", "torn"])
def test_killed_at_every_operation(kind, tiny, dst):
    operations = _operations(tiny, dst, **TINY)
    assert len(operations) > 100
    for operation in operations:
        if kind == "torn" and operation.name != "put":
            continue
        new_process()
        with Faults(at({operation.number: kind}), seed=operation.number), pytest.raises(Killed):
            serial_run(tiny, dst, SEED, **TINY)
        _resume(tiny, dst, operation, TINY)
        shutil.rmtree(dst, ignore_errors=True)


def _resume(src, dst, operation, plan):
    """Finish what an operation cut short; begin again only where `run.json` itself was torn."""
    new_process()
    try:
        serial_run(src, dst, SEED, **plan)
    except DestinationExistsError as err:
        assert "finished" in str(err), operation
    except FormatError as err:
        assert "overwrite=True" in str(err), operation
        serial_run(src, dst, SEED, overwrite=True, **plan)
    assert differences(src, dst, SEED) == [], operation
    assert leftovers(dst) == [], operation


@pytest.mark.soak
@pytest.mark.parametrize("kind", ["kill", "late", "torn", "power", "error", "full", "lost", "stale"])
@pytest.mark.parametrize(
    "plan",
    [
        {"levels": 1},
        TINY | {"levels": 2, "block_bytes": 500},
        TINY,
        TINY | KEPT,
        TINY | {"levels": 4, "codec": "crc32c"},
        TINY | {"levels": 2, "block_bytes": 500, "codec": "zstd", "chunks_per_shard": 2},
    ],
    ids=["1", "2", "3", "3-memory", "4-crc32c", "2-zstd-sharded"],
)
def test_failing_at_every_operation(kind, plan, less_tiny, dst):
    for operation in _operations(less_tiny, dst, **plan):
        new_process()
        with Faults(at({operation.number: kind}), seed=operation.number), suppress(Killed, ActshuffleError):
            serial_run(less_tiny, dst, SEED, **plan)
        _resume(less_tiny, dst, operation, plan)
        shutil.rmtree(dst)


def test_control_an_engine_that_says_too_early_that_it_is_done(tiny, dst, monkeypatch):
    """Its half-done stores pass for complete ones, and the walk through all operations detects that."""
    from actshuffle.engine import manifest
    from actshuffle.engine import run as runs

    inner = runs._claim

    def hasty(job):
        inner(job)
        manifest.write_marker(job, {f.name: "0" * 32 for f in job.fields}, {})

    monkeypatch.setattr(runs, "_claim", hasty)
    operations = [o for o in _operations(tiny, dst, **TINY) if o.key.startswith("level2")]
    with Faults(at({operations[0].number: "kill"})), pytest.raises(Killed):
        serial_run(tiny, dst, SEED, **TINY)
    with pytest.raises(AssertionError):
        _resume(tiny, dst, operations[0], TINY)


def test_killed_process_at_every_tenth_operation(tiny, dst, told):
    """The same with real kills: no handler cleans up."""
    operations = _operations(tiny, dst, **TINY)
    for operation in operations[::10]:
        fault = (f"{operation.name} {operation.key}", "kill")
        killed = start(drive, told, tiny, dst, TINY, fault)
        assert ended(killed) == -signal.SIGKILL, operation
        _resume(tiny, dst, operation, TINY)
        shutil.rmtree(dst)


@pytest.mark.soak
def test_killed_process_at_every_operation(less_tiny, dst, told):
    for operation in _operations(less_tiny, dst, **TINY):
        fault = (f"{operation.name} {operation.key}", "kill")
        killed = start(drive, told, less_tiny, dst, TINY, fault)
        assert ended(killed) == -signal.SIGKILL, operation
        _resume(less_tiny, dst, operation, TINY)
        shutil.rmtree(dst)


@pytest.mark.parametrize(("kind", "error"), [("error", StorageError), ("full", StorageFullError)])
def test_write_fails_at_every_write(kind, error, tiny, dst):
    writes = [o for o in _operations(tiny, dst, **TINY) if o.name == "put"]
    assert len(writes) > 30
    for operation in writes[:: 1 if kind == "full" else 4]:
        new_process()
        with Faults(at({operation.number: kind})), pytest.raises(error) as raised:
            serial_run(tiny, dst, SEED, **TINY)
        assert operation.key in str(raised.value)
        _resume(tiny, dst, operation, TINY)
        shutil.rmtree(dst)


# --- Kills at random times ----------------------------------------------------------------------


def _kill_at_random(who, count, src, tmp_path, seed, broken=None):
    """Kill one process of a cluster while a run is under way, at a random time, resume, check; and again.

    Every second run keeps some of its spill in memory.  Kills before the start or after the end of a run are
    checked as well, but not counted.
    """
    dice = random.Random(seed)
    told = tmp_path / "told.json"
    seconds = 0.4  # about as long as a run takes; found out by how many kills come too late
    number = struck = 0
    while struck < count:
        assert number < 50 + 5 * count, "kills hardly ever come in time"
        folder = tmp_path / f"dask{number}"
        with dask_cluster(folder, 2, broken=broken) as cluster:
            for _ in range(10):
                dst = tmp_path / f"dst{number}.zarr"
                settings = {"scheduler": cluster.address} | (KEPT if number % 2 else {})
                number += 1
                told.unlink(missing_ok=True)
                driver = start(drive, told, src, dst, settings, None, broken)
                claim = dst / "_actshuffle/run.json"
                if dice.random() < 0.9:
                    until(lambda: claim.exists() or told.exists())  # noqa: B023
                time.sleep(dice.uniform(0, seconds))
                victim = {"driver": driver, "scheduler": cluster.scheduler, "worker": dice.choice(cluster.workers)}[who]
                in_time = claim.exists() and not told.exists()
                victim.kill()
                victim.join()
                struck += in_time
                seconds *= 0.8 if told.exists() else 1.1
                if who == "worker":
                    cluster.workers.remove(victim)
                    cluster.add_worker()
                ended(driver)
                said = outcome(told) if told.exists() else {"end": "killed"}
                end = said["end"]
                assert (
                    end
                    in {"worker": ("done",), "driver": ("done", "killed"), "scheduler": ("done", "ClusterError")}[who]
                ), (seed, number, said)
                if who == "scheduler":
                    break
                if end != "done":
                    again = shuffled(told, src, dst, **settings)["end"]
                    assert again in ("done", "DestinationExistsError"), (seed, number, again)
                assert_exact(src, dst)
                shutil.rmtree(dst)
                if struck >= count:
                    break
        if who == "scheduler":
            if end != "done":
                shuffled(told, src, dst)
            assert_exact(src, dst)
            shutil.rmtree(dst)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize(("who", "count"), [("worker", 5), ("scheduler", 2), ("driver", 3)])
def test_kills_at_random(who, count, src, tmp_path):
    _kill_at_random(who, count, src, tmp_path, seed=1)


@pytest.mark.soak
@pytest.mark.parametrize("block", range(20))
@pytest.mark.parametrize(("who", "count"), [("worker", 15), ("scheduler", 5), ("driver", 5)])
def test_kills_at_random_by_the_hundred(who, count, block, src, tmp_path):
    _kill_at_random(who, count, src, tmp_path, seed=1000 + block)


@pytest.mark.parametrize(
    ("who", "broken"),
    [
        ("driver", says_too_early_that_it_is_done),
        ("scheduler", says_too_early_that_it_is_done),
        ("worker", takes_what_was_begun_for_done),
    ],
)
def test_control_kills_at_random_of_an_engine(who, broken, src, tmp_path):
    """An engine that does not survive kills fails the campaign."""
    with pytest.raises(AssertionError, match=r"absent|cannot be opened|FormatError"):
        _kill_at_random(who, 20, src, tmp_path, seed=2, broken=broken)
    for dst in tmp_path.glob("dst*.zarr"):
        shutil.rmtree(_in_memory(dst), ignore_errors=True)


def _in_memory(dst):
    return Path(tier.memory_beside(scratch_place(as_place(dst), None)).url)


# --- Tasks that run twice, and late -------------------------------------------------------------


class _Haunted(Serial):
    """An executor that runs a third of the tasks again, some calls later."""

    def __init__(self, delay):
        self.dice, self.delay, self.owed, self.came = random.Random(3), delay, [], 0

    def map(self, fn, calls):
        for call in calls:
            yield fn(*call)
            if fn is tasks.run_task and self.dice.random() < 0.3:
                self.owed.append(call)
            if len(self.owed) > self.delay:
                job, task = self.owed.pop(0)
                if (Path(job.scratch.url) / f"level{task.level - 1}").exists() or task.level == 1:
                    force(job, task)
                    self.came += 1


@pytest.mark.parametrize("delay", [0, 1, 2])
def test_zombie_tasks_during_the_run(delay, src, dst):
    executor = _Haunted(delay)
    actshuffle.shuffle(src, dst, seed=SEED, fsync=False, executor=executor, **PLAN)
    assert executor.came > 0
    assert_exact(src, dst)


@pytest.mark.parametrize("task", [Task("split", 1, 2), Task("split", 2, 3), Task("leaf", 3, 1)])
def test_zombie_finishes_after_the_run(task, src, dst):
    """The late task writes the bytes that are there already, or none that a reader looks at."""
    job = prepared(src, dst, SEED, **PLAN)
    serial_run(src, dst, SEED, **PLAN)
    with pytest.raises(ActshuffleError):  # scratch is gone, and with it what it reads
        new_process()
        force(job, task)
        raise FormatError("it had all it needed")
    shutil.rmtree(job.scratch.url, ignore_errors=True)
    shutil.rmtree(dst / "_actshuffle/receipts", ignore_errors=True)
    assert_exact(src, dst)
    assert actshuffle.verify(src, dst).ok


def test_zombie_leaf_begins_while_a_run_is_cleared_away(src, dst):
    """The task was done before; at any moment it finds its receipt, or no input."""
    job = prepared(src, dst, SEED, **PLAN)
    zombie = Task("leaf", 3, 1)

    came = []

    def haunted(operation):
        if operation.name in ("delete_prefix", "delete") and len(came) % 2 == 0:
            came.append("in")
            with suppress(ActshuffleError):
                tasks.run_task(job, zombie)
            came.append("out")

    with Faults(haunted):
        serial_run(src, dst, SEED, **PLAN)
    assert len(came) >= 8
    assert_exact(src, dst)


@pytest.mark.parametrize("phase", ["split", "second split", "leaf"])
def test_zombie_writes_into_scratch_while_it_is_cleared_away(phase, src, dst, monkeypatch):
    from actshuffle.storage import files

    inner = shutil.rmtree
    written = []

    def haunted(path, *args, **kwargs):
        if not written and "scratch" in str(path):
            extra = Path(path) / "level2" / "blocks"
            extra.mkdir(parents=True, exist_ok=True)
            written.append((extra / "c.0.0").write_bytes(b"late"))
            inner(Path(path) / "level2" / "runs", ignore_errors=True)
            raise OSError(39, "Directory not empty")
        inner(path, *args, **kwargs)

    monkeypatch.setattr(files.shutil, "rmtree", haunted)
    stop_at(src, dst, PHASES[phase])
    finish(src, dst)
    assert written


# --- What is not the same any more --------------------------------------------------------------


def changed_shape(src):
    zarr.open_array(src / "x", mode="r+").resize((121, 4))


def changed_size(src):
    with (src / "x/c/3/0").open("ab") as file:
        file.write(b"more")


def changed_attributes_of_array(src):
    zarr.open_array(src / "x", mode="r+").attrs["unit"] = "bananas"


def added_array(src):
    zarr.create_array(src, name="y", data=values(120, (2,)))


@pytest.mark.parametrize("change", [changed_shape, changed_size, changed_attributes_of_array, added_array])
@pytest.mark.parametrize("phase", ["split", "leaf"])
def test_source_changed_between_runs_is_refused(change, phase, src, dst, tmp_path):
    copy = tmp_path / "src.zarr"
    shutil.copytree(src, copy)
    stop_at(copy, dst, PHASES[phase])
    before = _files(tmp_path)
    change(copy)
    with pytest.raises(ActshuffleError):
        actshuffle.shuffle(copy, dst, seed=SEED, fsync=False, **PLAN)
    shutil.rmtree(copy)
    shutil.copytree(src, copy)
    assert _files(tmp_path) == before
    finish(copy, dst)


def _files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize(
    ("other", "told_of"),
    [
        ({"seed": 6}, "seed was 5, now 6"),
        ({"levels": 2}, "levels was 3, now 2"),
        ({"block_bytes": 640}, "block_bytes was 560, now 640"),
        ({"chunk_rows": 8}, "chunk_rows was 7, now 8"),
        ({"fields": ["x"]}, "fields was None, now ['x']"),
        ({"codec": "zstd"}, "codec was None, now 'zstd'"),
        ({"source_row": False}, "source_row was None, now False"),
        ({"memory": "1GB"}, "memory was None, now 1000000000"),
    ],
)
def test_other_arguments_are_refused_with_the_difference(other, told_of, src, dst, tmp_path):
    stop_at(src, dst, PHASES["split"])
    before = _files(tmp_path)
    with pytest.raises(ResumeMismatchError) as raised:
        actshuffle.shuffle(src, dst, **({"seed": SEED, "fsync": False} | PLAN | other))
    assert told_of in str(raised.value)
    assert "overwrite=True" in str(raised.value)
    assert _files(tmp_path) == before
    finish(src, dst)


@pytest.mark.parametrize(("then", "now"), [(2, 0), (0, 2)])
def test_a_run_keeps_its_plan_unless_the_client_holds_more_now(src, dst, monkeypatch, then, now):
    asked = {"seed": SEED, "levels": 2, "block_bytes": 560, "run_bytes": 1, "chunk_rows": 5}
    monkeypatch.setattr(preview, "copies_at", lambda place: then)
    with pytest.raises(KeyboardInterrupt):
        actshuffle.shuffle(src, dst, executor=Stops(4), **asked)
    monkeypatch.setattr(preview, "copies_at", lambda place: now)
    if now > then:
        with pytest.raises(ResumeMismatchError, match="client of the object store was another"):
            actshuffle.shuffle(src, dst, **asked)
    else:
        assert actshuffle.shuffle(src, dst, **asked).resumed
        assert differences(src, dst, SEED) == []


def test_another_source_is_refused(src, dst, tmp_path):
    other = source(tmp_path / "other.zarr", 120)
    stop_at(src, dst, PHASES["split"])
    with pytest.raises(ResumeMismatchError, match="source"):
        actshuffle.shuffle(other, dst, seed=SEED, fsync=False, **PLAN)
    finish(src, dst)


def test_settled_arguments_need_not_be_given_again(src, dst):
    stop_at(src, dst, PHASES["leaf"])
    actshuffle.shuffle(src, dst, fsync=False)
    assert_exact(src, dst)


def test_finished_store_is_not_overwritten_unless_asked(src, dst):
    serial_run(src, dst, SEED, **PLAN)
    before = _files(dst)
    for other, words in [
        ({"seed": 6}, "seed was 5, now 6"),
        ({"levels": 2, "block_bytes": 2000}, "levels were 3, now 2"),
        ({"codec": "crc32c"}, "the codec was another"),
        ({"chunk_rows": 5}, "chunks had another size"),
        ({"source_row": False}, "arrays were .*source_row"),
        ({"missing_chunks": "fill"}, "missing_chunks was refuse"),
    ]:
        with pytest.raises(DestinationExistsError, match=f"{words}.*overwrite=True"):
            actshuffle.shuffle(src, dst, **({"seed": SEED, "fsync": False} | PLAN | other))
        assert _files(dst) == before
    group(src.with_name("grown"), {"extra": values(120, (2,))})
    with pytest.raises(DestinationExistsError, match="source is not the one"):
        actshuffle.shuffle(src.with_name("grown"), dst, seed=SEED, fsync=False)
    assert _files(dst) == before


def test_the_same_request_on_a_finished_store_writes_nothing(src, dst):
    """A scheduler may requeue a run that was killed between its marker and its exit."""
    first = serial_run(src, dst, SEED, **PLAN)
    before, log = _files(dst), Faults()
    for settings in ({"seed": SEED, **PLAN}, {**PLAN}, {"seed": SEED}, {}):
        with log:
            again = actshuffle.shuffle(src, dst, fsync=False, **settings)
        assert (again.already_finished, again.tasks, again.seed) == (True, 0, SEED)
        assert "already finished" in str(again)
    assert not first.already_finished
    assert _files(dst) == before
    assert not [o for o, _ in log.log if o.name in ("put", "delete", "delete_prefix", "settle")]


def test_finished_store_is_overwritten_if_asked(src, dst):
    serial_run(src, dst, SEED, **PLAN)
    actshuffle.shuffle(src, dst, seed=6, fsync=False, overwrite=True, **PLAN)
    assert_exact(src, dst, 6)


@pytest.mark.parametrize("number", range(14))
def test_killed_while_overwriting(number, src, dst):
    """The remains of the old store never pass for a complete one."""
    serial_run(src, dst, 6, **PLAN)
    new_process()
    log = Faults()
    with log:
        prepared(src, dst, SEED, overwrite=True, **PLAN)
    serial_run(src, dst, 6, **PLAN)
    changes = [o for o, _ in log.log if o.name in ("delete", "delete_prefix", "put", "settle")]
    if number >= len(changes):
        return
    new_process()
    with Faults(at({changes[number].number: "late"})), pytest.raises(Killed):
        serial_run(src, dst, SEED, overwrite=True, **PLAN)
    if (dst / "_actshuffle/zarr.json").exists():
        assert number == 0 or differences(src, dst, 6) == []
    new_process()
    serial_run(src, dst, SEED, overwrite=True, **PLAN)
    assert_exact(src, dst)


# --- Scratch of an earlier run ------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["split", "second split", "leaf"])
def test_stale_scratch_of_another_seed_is_not_used(phase, src, dst):
    new_process()
    with Faults(matching(PHASES[phase], "kill")), pytest.raises(Killed):
        serial_run(src, dst, 6, **PLAN)
    shutil.rmtree(dst)
    finish(src, dst)


def test_stale_scratch_of_the_same_run_is_used(src, dst):
    stop_at(src, dst, PHASES["leaf"])
    shutil.rmtree(dst)
    assert finish(src, dst).tasks < 15


def test_stale_scratch_whose_source_has_changed_is_not_used(src, dst, tmp_path):
    copy = tmp_path / "src.zarr"
    shutil.copytree(src, copy)
    stop_at(copy, dst, PHASES["leaf"])
    shutil.rmtree(dst)
    zarr.open_array(copy / "x", mode="r+").attrs["unit"] = "bananas"
    finish(copy, dst)


def test_scratch_that_vanished_is_made_again(src, dst):
    stop_at(src, dst, PHASES["leaf"])
    shutil.rmtree(scratch_place(as_place(dst), None).url)
    finish(src, dst)


def test_half_written_files_are_swept(src, dst):
    stop_at(src, dst, PHASES["leaf"])
    scratch = Path(scratch_place(as_place(dst), None).url)
    for folder in (dst / "x", scratch / "level2/blocks"):
        (folder / "c.0.0.deadbeef.actshuffle-partial").write_bytes(b"half")
    finish(src, dst)


# --- Records that are damaged -------------------------------------------------------------------


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


def noise(path):
    path.write_bytes(np.random.default_rng(0).bytes(path.stat().st_size))


DAMAGE = [flip, cut, empty, noise, Path.unlink]


@pytest.mark.parametrize(
    ("damage", "what"),
    halved(
        DAMAGE,
        [
            "level1/receipts/1.json",
            "level1/runs/c.1.0.0",
            "level1/sums/c.1.0.0",
            "level1/blocks/c.1.0",
            "level2/receipts/2.json",
            "level1/index/0.json",
            "level2/index/1.json",
            "bounds/c.0.0",
            "bounds/zarr.json",
            "bounds.json",
            "run.json",
            "level2/runs/c.1.0.0",
            "level2/sums/c.1.0.0",
            "level2/blocks/c.1.0",
        ],
    ),
)
def test_damaged_scratch_between_runs(what, damage, src, dst):
    stop_at(src, dst, PHASES["second split" if "level1" in what else "leaf receipt"])
    damage(Path(scratch_place(as_place(dst), None).url) / what)
    for attempt in range(4):
        new_process()
        try:
            serial_run(src, dst, SEED, **PLAN)
            break
        except ActshuffleError as err:
            assert "run again" in str(err), err
            assert attempt < 3, "stuck"
    assert_exact(src, dst)


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("what", ["_actshuffle/receipts/0.json", "x/c.0.0", "doc/c.0", "source_row/c.0"])
def test_damaged_destination_between_runs(what, damage, src, dst):
    stop_at(src, dst, "put _actshuffle/receipts/1.json")
    damage(dst / what)
    resizing = damage in (cut, empty, Path.unlink)
    serial_run(src, dst, SEED, **PLAN)
    if "receipts" in what or resizing:  # seen, and done again
        assert_exact(src, dst)
    else:  # the same size: a finished object is not read again, and verify is there to tell
        assert not actshuffle.verify(src, dst).ok


@pytest.mark.parametrize("damage", [flip, cut, empty, noise])
def test_damaged_run_json_is_refused(damage, src, dst, tmp_path):
    stop_at(src, dst, PHASES["leaf"])
    damage(dst / "_actshuffle/run.json")
    before = _files(tmp_path)
    with pytest.raises(FormatError, match="overwrite=True"):
        serial_run(src, dst, SEED, **PLAN)
    assert _files(tmp_path) == before
    new_process()
    serial_run(src, dst, SEED, overwrite=True, **PLAN)
    assert_exact(src, dst)


@pytest.mark.parametrize("damage", [flip, cut, empty, noise])
def test_damaged_marker_is_refused(damage, src, dst):
    serial_run(src, dst, SEED, **PLAN)
    damage(dst / "_actshuffle/zarr.json")
    with suppress(ActshuffleError):
        actshuffle.verify(src, dst)  # or a verdict: a flipped bit of the version's text does no harm
    with pytest.raises(ActshuffleError):
        serial_run(src, dst, SEED, **PLAN)


@pytest.mark.parametrize("name", ["run.json", "marker", "receipt"])
def test_unknown_version_is_refused(name, src, dst):

    stop_at(src, dst, PHASES["leaf"])
    if name == "marker":
        serial_run(src, dst, SEED, **PLAN)
        marker = dst / "_actshuffle/zarr.json"
        body = json.loads(marker.read_text())
        body["attributes"]["actshuffle"]["format"] = 99
        marker.write_text(json.dumps(body))
        with pytest.raises(FormatError, match="format 99"):
            actshuffle.verify(src, dst)
        with pytest.raises(FormatError, match="format 99"):
            serial_run(src, dst, SEED, **PLAN)
        return
    scratch = Path(scratch_place(as_place(dst), None).url)
    path = dst / "_actshuffle/run.json" if name == "run.json" else scratch / "level2/receipts/1.json"
    body = json.loads(path.read_text())["body"]
    path.write_bytes(sealed(body | {"format": 99}))
    if name == "run.json":
        with pytest.raises(FormatError, match="format 99"):
            serial_run(src, dst, SEED, **PLAN)
    else:  # of no use, so the work is done again
        finish(src, dst)


# --- Executors ----------------------------------------------------------------------------------


class Unanswered:
    """A client whose scheduler has just died, and which has not noticed."""

    status, asynchronous = "running", False

    def _ask(self, *_, **__):
        from distributed.comm import CommClosedError

        raise CommClosedError("ConnectionPool closing.")

    nthreads = scheduler_info = run = _ask
    dashboard_link = property(_ask)


@pytest.mark.parametrize("name", ["dashboard", "tasks_per_worker", "task_memory", "workers", "close"])
def test_a_scheduler_that_dies_is_told_wherever_it_is_asked(name):
    calls = {
        "dashboard": lambda: Dask(Unanswered()),
        "tasks_per_worker": lambda: crew.tasks_per_worker,
        "task_memory": lambda: crew.task_memory(),
        "workers": lambda: crew.workers,
        "close": lambda: crew.close(),
    }
    with mock.patch.object(Unanswered, "dashboard_link", ""):
        crew = Dask(Unanswered())
    if name in ("workers", "close"):  # which can do without an answer
        calls[name]()
        return
    with pytest.raises(ClusterError, match=r"the Dask cluster went away \(CommClosedError: ConnectionPool closing"):
        calls[name]()


def test_a_client_that_has_closed_itself_is_told():
    """As Dask's does when its scheduler is gone for good."""
    with mock.patch.object(Unanswered, "dashboard_link", ""):
        crew = Dask(Unanswered())
    crew.client.status = "closed"
    with pytest.raises(ClusterError, match="the Dask cluster went away"):
        list(crew.map(abs, [(1,)]))


def test_own_errors_are_not_tried_again():
    calls = []

    class Client:
        """The part of a client that the executor needs."""

        dashboard_link, status, asynchronous = "", "running", False

    assert Dask(Client()).retries == 2
    executor = Serial()

    def fails(x):
        calls.append(x)
        raise StorageError("no")

    with pytest.raises(StorageError):
        list(executor.map(fails, [(1,), (2,)]))
    assert calls == [1]


def test_results_that_die_with_their_worker_are_made_again(tmp_path, monkeypatch):
    """Dask reports a future as finished, and its result is lost before the driver fetches it."""
    import distributed

    class Late(distributed.as_completed):
        def next_batch(self, block=True):
            batch = super().next_batch(block)
            if len(cluster.workers) == 1:
                cluster.workers[0].kill()
                until(lambda: batch[0].status != "finished")
                cluster.add_worker()
            return batch

    monkeypatch.setattr(distributed, "as_completed", Late)
    with dask_cluster(tmp_path / "dask", 1) as cluster:
        with distributed.Client(cluster.address) as client:
            found = sorted(Dask(client).map(operator.neg, [(x,) for x in range(100)]))
        assert len(cluster.workers) == 2
    assert found == sorted(-x for x in range(100))


def test_cluster_without_workers_is_a_clear_error(tmp_path, src, dst, monkeypatch):
    from distributed import Client

    from actshuffle.executors import cluster as dask_module

    clock = time.monotonic
    monkeypatch.setattr(dask_module.time, "monotonic", lambda: clock() * 60)
    no_workers = pytest.raises(ClusterError, match="no workers")
    with dask_cluster(tmp_path / "dask", 0) as cluster, Client(cluster.address) as client, no_workers:
        actshuffle.shuffle(src, dst, seed=SEED, client=client, **PLAN)
