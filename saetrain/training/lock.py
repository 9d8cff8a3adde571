"""One writer for each run: a lock on its folder that the kernel holds for as long as the process lives."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from saetrain.compute.mesh import Mesh
from saetrain.errors import ConfigError

LOCK = ".lock"


@contextmanager
def locked(runs: Iterable[Path], mesh: Mesh) -> Iterator[None]:
    """Hold the folders; the first rank does so for all.  Refuses a folder that another living process holds."""
    with ExitStack() as held:
        trouble = ""
        if mesh.rank == 0:
            try:
                for run in runs:
                    held.enter_context(_lock(run))
            except ConfigError as error:
                trouble = str(error)
        if mesh.any(bool(trouble)):
            raise ConfigError(trouble or "another rank found a run in use")
        yield


@contextmanager
def _lock(run: Path) -> Iterator[None]:
    """Hold one folder, and leave no trace of it if nothing was written."""
    fresh = not run.exists()
    run.mkdir(parents=True, exist_ok=True)
    with (run / LOCK).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise ConfigError(f"{run} is in use by {holder}: wait for it, or give another --out") from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}")
        file.flush()
        try:
            yield
        finally:
            if fresh and [path.name for path in run.iterdir()] == [LOCK]:
                (run / LOCK).unlink()
                run.rmdir()
