"""The part of the scratch that stays in the machine's memory: a folder in its tmpfs, with spill or rows to gather.

All workers of the machine share it, so it outlives any of them.  It does not outlive the machine: the
blocks in it are then missing, their tasks count as not done, and a run that resumes repeats them.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from pathlib import Path
from typing import Any

from actshuffle.engine import manifest
from actshuffle.engine.job import Job
from actshuffle.engine.request import Request
from actshuffle.errors import FormatError, InfeasibleError, ResumeMismatchError, StorageError
from actshuffle.seals import checksum
from actshuffle.storage.objects import Objects, open_objects
from actshuffle.storage.place import Place
from actshuffle.units import format_bytes


def scratch_place(dst: Place, folder: str | None) -> Place:
    """A place for the spill that belongs to this destination alone: beside it, or in a given folder."""
    name = dst.url.rstrip("/").rsplit("/", 1)[-1]
    tag = checksum(dst.url.rstrip("/"), 8)
    if folder is None:
        return Place(f"{dst.url.rstrip('/')}.scratch-{tag}", dst.options)
    return Place(folder, dst.options if "://" in folder else "{}").child(f"{name}.scratch-{tag}")


def recorded_scratch(dst: Place, recorded: dict[str, Any]) -> Place:
    """The scratch of a half-done run, by its record.

    Others may have written that record, so a path in it is used only if the ``run.json`` there names the same job.
    """
    folder = Request.recorded(recorded.get("request")).scratch
    if folder is None:
        return scratch_place(dst, None)
    body, found = None, scratch_place(dst, folder)
    if "://" not in folder:
        with contextlib.suppress(FormatError):
            body = manifest.read_run(open_objects(found), "run.json")
    if body is None or body["job"] != recorded["job"]:
        raise ResumeMismatchError(
            f"{dst} is half done, and its scratch {folder} holds nothing of this run: give --scratch to resume"
        )
    return found


MEMORY_FOLDER = Path("/dev/shm")  # a file system in memory on every Linux


def memory_place(job: Job) -> Place:
    """The folder in memory of a job's spill."""
    return memory_beside(job.scratch)


def memory_beside(scratch: Place) -> Place:
    """The folder in memory that belongs to a scratch, and to this user."""
    tag = checksum(scratch.url, 16)
    return Place(str(MEMORY_FOLDER / f"actshuffle-{os.geteuid()}-{tag}"))


def memory_objects(job: Job) -> Objects | None:
    """The objects in the machine's memory, all workers together: spill, or rows to gather; None if nothing does."""
    return open_objects(memory_place(job), fsync=False) if job.plan.uses_memory else None


def free_shared() -> int:
    """Bytes free in the file system in memory; 0 where there is none."""
    return shutil.disk_usage(MEMORY_FOLDER).free if MEMORY_FOLDER.is_dir() else 0


def check_memory(job: Job) -> None:
    """Refuse to keep more in memory than there is room for."""
    need, staged = job.plan.kept_bytes, job.plan.staged
    what, advice = ("rows", "leave --gather out") if staged else ("spill", "give less --spill-memory")
    if not MEMORY_FOLDER.is_dir():
        hint = advice if staged else "leave --spill-memory out"
        raise InfeasibleError(f"no {MEMORY_FOLDER} to keep {what} in; {hint}")
    held = sum(size for _, size in open_objects(memory_place(job)).sizes(""))
    free = shutil.disk_usage(MEMORY_FOLDER).free + held
    if need > free:
        raise InfeasibleError(
            f"{format_bytes(need)} of {what} are to stay in memory, but {MEMORY_FOLDER} has "
            f"{format_bytes(free)} free: {advice}"
        )


def claim_memory(job: Job) -> None:
    """Make the folder in memory, closed to other users."""
    if job.plan.uses_memory:
        with contextlib.suppress(FileExistsError):
            Path(memory_place(job).url).mkdir(mode=0o700)
        _refuse_foreign(job)
        open_objects(memory_place(job)).settle([""])


def clear_scratch(job: Job) -> None:
    """Delete all of a job's scratch, on disk and in memory."""
    job.at_scratch.delete_prefix("")
    if job.plan.uses_memory:
        _refuse_foreign(job)
    elif not _is_ours(job):  # an earlier run to this destination may have kept spill in memory
        return
    open_objects(memory_place(job), fsync=False).delete_prefix("")


def _is_ours(job: Job) -> bool:
    """True if the folder in memory is this user's and closed to others; any user may create names there."""
    with contextlib.suppress(FileNotFoundError):
        found = Path(memory_place(job).url).lstat()
        is_folder, closed = stat.S_ISDIR(found.st_mode), not found.st_mode & 0o077
        return is_folder and closed and found.st_uid == os.geteuid()
    return False


def _refuse_foreign(job: Job) -> None:
    path = Path(memory_place(job).url)
    if os.path.lexists(path) and not _is_ours(job):
        raise StorageError(f"{path} is not a folder of this user alone; remove it and run again")
