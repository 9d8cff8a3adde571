"""Several machines in miniature: the commands of Dask and of actshuffle, each process with separate folders.

Scheduler, workers and driver share only the store's path, as on a shared filesystem: their home, working,
temporary and Dask directories differ.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import actshuffle
from support.processes import address_in, assert_exact, source, until

ROWS, SEED = 900, 5

# Once a level has a receipt, its other tasks wait until its gate is open.
GATES = """
import time
from pathlib import Path
from actshuffle.engine import tasks

inner = vars(tasks).setdefault("ungated", tasks.run_task)  # Dask loads this twice

def gated(job, task):
    receipts, gate = Path(job.scratch.url, f"level{task.level}", "receipts"), Path(GATES, str(task.level))
    while task.level < 3 and any(receipts.glob("*")) and not gate.exists():
        time.sleep(0.01)
    return inner(job, task)

tasks.run_task = gated
"""


class Host:
    """A folder that stands for a machine: its home, its temporary and its working directory."""

    def __init__(self, root: Path, name: str) -> None:
        self.folder = root / name
        (self.folder / "tmp").mkdir(parents=True)
        self.env = os.environ | {
            "HOME": str(self.folder),
            "TMPDIR": str(self.folder / "tmp"),
            "DASK_TEMPORARY_DIRECTORY": str(self.folder / "dask"),
            "PYTHONPATH": str(Path(actshuffle.__file__).parents[1]),
            "DASK_DISTRIBUTED__ADMIN__SYSTEM_MONITOR__DISK": "false",
        }
        self.processes: list[subprocess.Popen[str]] = []

    def start(self, *words: str) -> subprocess.Popen[str]:
        with (self.folder / "log").open("a") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", *words],
                env=self.env,
                cwd=self.folder,
                text=True,
                stdout=subprocess.PIPE,
                stderr=log,
            )
        self.processes.append(process)
        return process

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
            process.stdout.close()


@contextmanager
def hosts(root: Path, *names: str):
    found = [Host(root, name) for name in names]
    try:
        yield found
    finally:
        for host in found:
            host.stop()


def start_scheduler(host: Host) -> str:
    note = host.folder / "scheduler.json"
    host.start(
        "distributed.cli.dask_scheduler",
        "--host",
        "127.0.0.1",
        "--port",
        "0",
        "--no-dashboard",
        "--scheduler-file",
        str(note),
    )
    return address_in(note)


def start_worker(host: Host, address: str, gates: Path | None = None) -> subprocess.Popen[str]:
    """A worker, whose tasks wait at ``gates`` if there are any."""
    preload = host.folder / "gates.py"
    preload.write_text("" if gates is None else GATES.replace("GATES", repr(str(gates))))
    return host.start(
        "distributed.cli.dask_worker",
        address,
        "--nthreads",
        "1",
        "--no-nanny",
        "--no-dashboard",
        "--host",
        "127.0.0.1",
        "--death-timeout",
        "120",
        "--local-directory",
        str(host.folder / "dask"),
        "--preload",
        str(preload),
    )


def drive(host: Host, address: str, *words: str) -> subprocess.Popen[str]:
    return host.start(
        "actshuffle",
        "run",
        *words,
        "--scheduler",
        address,
        "--seed",
        str(SEED),
        "--json",
        "--levels",
        "3",
        "--block-bytes",
        "560",
        "--run-bytes",
        "1",
        "--chunk-rows",
        "7",
    )


def told(process: subprocess.Popen[str]) -> dict[str, object]:
    out, _ = process.communicate(timeout=120)
    found: dict[str, object] = json.loads(out)
    assert process.returncode == 0, found
    return found


def test_workers_of_several_hosts_come_and_go(tmp_path):
    """Started with one worker; two hosts join; the first leaves politely, the second is killed."""
    shared = tmp_path / "shared"
    shared.mkdir()
    src, dst = source(shared / "src.zarr", ROWS), shared / "dst.zarr"
    (gates := tmp_path / "gates").mkdir()
    with hosts(tmp_path, "boss", "driver", "a", "b", "c") as (boss, user, a, b, c):
        address = start_scheduler(boss)
        first = start_worker(a, address, gates)
        driver = drive(user, address, str(src), str(dst))
        until(lambda: any(shared.glob("dst.zarr.scratch-*/level1/receipts/*")))
        second = start_worker(b, address, gates)
        start_worker(c, address, gates)
        until(lambda: all("Registered to" in (host.folder / "log").read_text() for host in (b, c)))
        (gates / "1").touch()
        first.send_signal(signal.SIGTERM)  # as a batch system ends a job
        until(lambda: any(shared.glob("dst.zarr.scratch-*/level2/receipts/*")))
        assert driver.poll() is None, "over before it began"
        second.kill()
        (gates / "2").touch()
        result = told(driver)
    assert result["resumed"] < 10, "done, but their worker died before it could say so"
    assert_exact(src, dst, SEED)
    for host in (a, b, c):
        assert not list(host.folder.rglob("*.zarr*")), "data beside the shared store"


def test_killed_driver_resumes_on_another_cluster(tmp_path):
    """The driver's host dies in mid-run; the run resumes from another host, on another cluster."""
    shared = tmp_path / "shared"
    shared.mkdir()
    src, dst = source(shared / "src.zarr", ROWS), shared / "dst.zarr"
    words = (str(src), str(dst), "--scratch", str(shared / "scratch"))
    with hosts(tmp_path, "boss", "driver", "a") as (boss, user, a):
        address = start_scheduler(boss)
        start_worker(a, address, tmp_path / "gates that stay closed")
        driver = drive(user, address, *words)
        until(lambda: any((shared / "scratch").glob("*/level1/receipts/*")))
        driver.kill()
    with hosts(tmp_path, "boss2", "driver2", "b", "c") as (boss, user, b, c):
        address = start_scheduler(boss)
        start_worker(b, address)
        start_worker(c, address)
        result = told(drive(user, address, *words))
    assert result["resumed"] > 0
    assert_exact(src, dst, SEED)
