"""Measure a command in separate processes: time, peak memory of all of them, and limits on both.

Memory counts the pages that the system could not reclaim: anonymous and shared pages, each shared page
divided among the processes that map it (proportional set size), and files in the machine's memory (/dev/shm),
mapped or not.  Mapped pages of other files are counted separately.
A mark in their environment identifies all descendants, daemons that left the process tree included.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from actshuffle.engine.scratch import MEMORY_FOLDER

ROOT = Path(__file__).parents[1]
_MARK = "ACTSHUFFLE_BENCHMARK"
_INTERVAL, _LONGEST = 0.1, 1.0  # least and most seconds between looks at memory
_LOOKS = 0.03  # most of the time that looks may take: each occupies a processor and holds up the processes it reads


@dataclass(frozen=True)
class Measured:
    """The measurements of one command; ``outcome`` is "done", "failed", "out of time" or "out of memory"."""

    outcome: str
    seconds: float
    memory: int  # peak over time of the sum over processes, bytes
    largest: int  # peak of any one process
    mapped: int  # peak of mapped file pages, not in memory
    resident: int  # peak of any one process by the kernel's own count, which misses no moment; mapped files included
    stdout: str
    message: str = ""

    def as_dict(self) -> dict[str, Any]:
        return {k: v for k, v in asdict(self).items() if k != "stdout"}


def run(
    command: Sequence[str],
    *,
    seconds: float = 3600.0,
    memory: int | None = None,
    environment: dict[str, str] | None = None,
) -> Measured:
    """Run a command from the root of the repository; at a limit, kill it and all its descendants."""
    mark = secrets.token_hex(8)
    env = {**os.environ, **(environment or {}), _MARK: mark, "PYTHONPATH": str(ROOT)}
    peak, largest, mapped, resident, outcome = 0, 0, 0, 0, "done"
    before = _in_memory_files()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        started = time.monotonic()
        child = subprocess.Popen(command, stdout=out, stderr=err, env=env, cwd=ROOT)
        try:
            while child.poll() is None:
                looked = time.monotonic()
                there = marked(mark)
                sizes = [_sizes(pid) for pid in there]
                resident = max([resident, *map(peak_of, there)])
                shared = max(sum(size.shared for size in sizes), _in_memory_files() - before)
                now = sum(size.own for size in sizes) + shared
                peak = max(peak, now)
                largest = max([largest, *(size.own + size.shared for size in sizes)])
                mapped = max(mapped, sum(size.files for size in sizes))
                if time.monotonic() - started > seconds:
                    outcome = "out of time"
                elif memory is not None and now > memory:
                    outcome = "out of memory"
                if outcome != "done":
                    break
                pause = (time.monotonic() - looked) / _LOOKS
                with suppress(subprocess.TimeoutExpired):
                    child.wait(min(max(_INTERVAL, pause), _LONGEST))
            elapsed = time.monotonic() - started
        finally:
            _end(child, mark)
        if outcome == "done" and child.returncode:
            outcome = "out of memory" if child.returncode == -signal.SIGKILL else "failed"
        out.seek(0)
        err.seek(0)
        text, complaint = out.read(), err.read()
    why = _complaint(complaint) if outcome == "failed" else ""
    return Measured(outcome, elapsed, peak, largest, mapped, resident, text, why)


def python(*words: str, interpreter: str | None = None) -> list[str]:
    """A command that runs Python with some arguments."""
    return [interpreter or sys.executable, *words]


def marked(mark: str) -> list[int]:
    """Processes whose environment carries the mark."""
    needle, found = f"{_MARK}={mark}".encode(), []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                if needle in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                pass  # it has ended, or belongs to another user
    return found


def memory_of(pid: int) -> int:
    """Bytes that one process holds; 0 if it has ended."""
    size = _sizes(pid)
    return size.own + size.shared


class _Sizes(NamedTuple):
    own: int
    shared: int
    files: int


def _in_memory_files() -> int:
    return shutil.disk_usage(MEMORY_FOLDER).used if MEMORY_FOLDER.is_dir() else 0


def _sizes(pid: int) -> _Sizes:
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return _Sizes(0, 0, 0)
    kilobytes = {
        parts[0]: int(parts[1]) for parts in (line.split() for line in text.splitlines()) if parts[0].startswith("Pss_")
    }
    kinds = (1024 * kilobytes.get(f"Pss_{kind}:", 0) for kind in ("Anon", "Shmem", "File"))
    return _Sizes(*kinds)


def peak_of(pid: int) -> int:
    """The most bytes that one process has held so far by the kernel's count, mapped files included; 0 if it ended."""
    try:
        found = re.search(r"VmHWM:\s*(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0
    return 1024 * int(found[1]) if found else 0


def _end(child: subprocess.Popen[Any], mark: str) -> None:
    """End every process that carries the mark, and no other."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        left = marked(mark)
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        deadline = time.monotonic() + 5
        while left and time.monotonic() < deadline and marked(mark):
            child.poll()  # so that it does not stay as a zombie
            time.sleep(0.05)
    child.wait()


def _complaint(text: str) -> str:
    """The last line that names an error, else the last line; files without their folders."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"(error: |[\w.$]*(Error|Exception)\b)", line)]
    return re.sub(r"(?<!\w)(/[\w.@+-]+)+/", "", (named or lines or ["no message"])[-1])[:300]
