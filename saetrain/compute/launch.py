"""`--nproc N`: run this command as N ranks on this machine, without torchrun.

Ranks find each other through a file in a private folder and communicate over the loopback interface only.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from saetrain.compute.mesh import RENDEZVOUS

LAUNCHER = "SAETRAIN_LAUNCHER"  # its process id, for the ranks
GRACE = 30.0  # seconds that the other ranks get to leave once one has failed


def launch(arguments: Sequence[str], nproc: int) -> int:
    """Run `python -m saetrain arguments` on N ranks; returns the exit status of the first that failed, or 0.

    SIGTERM and SIGINT are passed on, so that all ranks write a checkpoint and leave together.
    """
    threads = os.environ.get("OMP_NUM_THREADS") or str(max((os.cpu_count() or 1) // nproc, 1))
    with tempfile.TemporaryDirectory(prefix="saetrain-") as folder:
        common = {
            **os.environ,
            RENDEZVOUS: str(Path(folder, "meet")),
            LAUNCHER: str(os.getpid()),
            "WORLD_SIZE": str(nproc),
            "OMP_NUM_THREADS": threads,
            "GLOO_SOCKET_IFNAME": "lo",
            "NCCL_SOCKET_IFNAME": "lo",
        }
        ranks = [
            subprocess.Popen(
                [sys.executable, "-m", "saetrain", *arguments],
                env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                start_new_session=True,  # so that Ctrl-C reaches them once, through `pass_on`
            )
            for rank in range(nproc)
        ]

        def pass_on(number: int, frame: Any) -> None:
            for rank in ranks:
                if rank.poll() is None:
                    rank.send_signal(number)

        before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            return _wait(ranks)
        finally:
            for caught, handler in before.items():
                signal.signal(caught, handler)
            for rank in ranks:
                if rank.poll() is None:
                    rank.kill()
                    rank.wait()


def end_with_launcher() -> None:
    """Have the kernel send this rank SIGTERM when its launcher dies, however it dies.  Linux only."""
    launcher = os.environ.get(LAUNCHER)
    if launcher is None or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    if os.getppid() != int(launcher):  # it died before the call
        os.kill(os.getpid(), signal.SIGTERM)


def _wait(ranks: Sequence[subprocess.Popen[bytes]]) -> int:
    failed, deadline = 0, float("inf")
    while any(rank.poll() is None for rank in ranks) and time.monotonic() < deadline:
        bad = [rank.returncode for rank in ranks if rank.poll() is not None and rank.returncode]
        if bad and not failed:
            failed, deadline = bad[0], time.monotonic() + GRACE
        time.sleep(0.05)
    failed = failed or next((r.returncode for r in ranks if r.returncode), 0)
    return 128 - failed if failed < 0 else failed  # as a shell has it for a rank that a signal ended
