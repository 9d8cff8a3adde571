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


def start_worker(host: Host, address: str) -> subprocess.Popen[str]:
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
        "30",
        "--local-directory",
        str(host.folder / "dask"),
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
    src, dst = source(shared / "src.zarr", 2 * ROWS), shared / "dst.zarr"
    with hosts(tmp_path, "boss", "driver", "a", "b", "c") as (boss, user, a, b, c):
        address = start_scheduler(boss)
        first = start_worker(a, address)
        driver = drive(user, address, str(src), str(dst))
        until(lambda: any(shared.glob("dst.zarr.scratch-*/level1/receipts/*")))
        second = start_worker(b, address)
        start_worker(c, address)
        until(lambda: all("Registered to" in (host.folder / "log").read_text() for host in (b, c)))
        first.send_signal(signal.SIGTERM)  # as a batch system ends a job
        until(lambda: any(shared.glob("dst.zarr.scratch-*/level2/receipts/*")))
        assert driver.poll() is None, "over before it began"
        second.kill()
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
        start_worker(a, address)
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
