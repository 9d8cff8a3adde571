"""A job whose results lie in one folder: the simple way to run the tasks of another package.

::

    OUT/job.json                 the job that owns the folder, until it is finished
    OUT/receipts/STAGE/7.json    task 7 of a stage is done
    OUT/...                      the objects that tasks write
    OUT/done.json                the completion marker, written last; it holds the value that ``publish`` returned

>>> def count(job, task):                                             # doctest: +SKIP
...     start, stop = job.settings["cuts"][task.number]
...     rows = open_dataset(job.settings["store"])["token"][start:stop]
...     job.objects.put(f"counts/{task.number}.bin", np.bincount(rows).astype("<i8").tobytes())
...     return {"rows": len(rows)}, rows.nbytes
>>> steps = [Step("count", count, tasks=100)]
>>> run_in_folder("token counts", "counts/", settings, steps, executor=executor)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

from actshuffle.errors import DestinationExistsError, RequestError, ResumeMismatchError
from actshuffle.executors import Executor, Serial
from actshuffle.jobs.locks import Locks
from actshuffle.jobs.receipts import Payload, read_receipt, read_receipts
from actshuffle.jobs.records import sealed, unsealed
from actshuffle.jobs.running import Course, Done, Outcome, Stage, once, run
from actshuffle.jobs.work import Work
from actshuffle.progress import Progress, observer
from actshuffle.progress.display import shown
from actshuffle.seals import seal
from actshuffle.storage.buffers import settled_heap
from actshuffle.storage.objects import Objects, open_objects
from actshuffle.storage.place import Place, as_place, local_path

JOB, DONE, RECEIPTS = "job.json", "done.json", "receipts"


class FolderTask(NamedTuple):
    """One task of a step; numbers count from 0."""

    step: str
    number: int


def always(job: FolderJob, task: FolderTask, payload: Payload) -> bool:
    """Trust a receipt without a look at the objects that it names."""
    return True


@dataclass(frozen=True)
class Step:
    """One stage of a folder's job.

    Attributes
    ----------
    name : names the stage and the folder of its receipts; part of the job's identity, as ``tasks`` is.
    do : a module-level function ``do(job, task)``.  It writes its data through ``job.objects`` and returns
        the content of its receipt (plain JSON values) and the number of bytes it moved.  It must be
        deterministic and idempotent.
    tasks : the number of tasks.
    is_there : returns True if the objects that a receipt names exist; called on resume.
    beside : its tasks run beside those of the step before it, on which they do not depend.  The steps after it wait
        for both.
    """

    name: str
    do: Callable[[FolderJob, FolderTask], tuple[Payload, int]]
    tasks: int
    is_there: Callable[[FolderJob, FolderTask, Payload], bool] = always
    beside: bool = False


@dataclass(frozen=True)
class FolderJob:
    """A frozen plan and its place.

    Attributes
    ----------
    name : names the results; part of the job's identity.
    settings : everything that decides the bytes of the results, as plain JSON values.
    place : the folder.
    steps : the stages, in order.
    fsync : make every object durable before its receipt.
    """

    name: str
    settings: Mapping[str, Any]
    place: Place
    steps: tuple[Step, ...] = field(compare=False)
    fsync: bool = True

    @cached_property
    def identity(self) -> str:
        return seal(self.document)

    @property
    def document(self) -> dict[str, Any]:
        """The values whose digest is the identity."""
        steps = [[step.name, step.tasks] for step in self.steps]
        return {"name": self.name, "settings": dict(self.settings), "steps": steps}

    @property
    def is_local(self) -> bool:
        return self.objects.is_local

    @property
    def objects(self) -> Objects:
        """The folder's objects, by key: ``get``, ``put`` (atomic), ``read`` and the like."""
        return open_objects(self.place, fsync=self.fsync)

    def receipt(self, task: FolderTask) -> tuple[Objects, str]:
        return self.objects, f"{RECEIPTS}/{task.step}/{task.number}.json"

    def accepts(self, task: FolderTask, payload: Payload) -> bool:
        return True

    def step(self, task: FolderTask) -> Step:
        return next(step for step in self.steps if step.name == task.step)

    def results(self, name: str) -> Iterator[Payload]:
        """The receipts of a step, in order; for later steps and for ``publish``."""
        step = next(step for step in self.steps if step.name == name)
        for number, found in enumerate(read_receipts(self, _tasks(step))):
            if found is None:
                raise RequestError(f"the receipt of {name} {number} vanished from {self.place}; run again to redo it")
            yield found


def _tasks(*steps: Step) -> Iterator[FolderTask]:
    return (FolderTask(step.name, number) for step in steps for number in range(step.tasks))


def _together(steps: Sequence[Step]) -> list[list[Step]]:
    """The steps whose tasks run beside one another, group by group."""
    found: list[list[Step]] = []
    for step in steps:
        if found and step.beside:
            found[-1].append(step)
        else:
            found.append([step])
    return found


def _stage(steps: list[Step]) -> Stage:
    name, count = ", ".join(step.name for step in steps), sum(step.tasks for step in steps)
    return Stage(name, partial(_tasks, *steps), count, 0, run_task, is_done)


def run_task(job: FolderJob, task: FolderTask) -> Done:
    """Do one task, unless its receipt shows that it is done, or it comes late and the folder is finished."""
    finished = read_done(job.place)
    if finished is not None and finished["job"] == job.identity:
        return Done(task, 0, 0.0, False)
    with settled_heap():
        return once(job, task, job.step(task).do, is_done)


def is_done(job: FolderJob, task: FolderTask) -> bool:
    """True if there is a valid receipt and the objects it names exist."""
    payload = read_receipt(job, task)
    return payload is not None and job.step(task).is_there(job, task, payload)


class FolderCourse(Course[FolderJob]):
    """The driver's side: ``publish`` adds up the results of the steps and returns the content of the marker."""

    def __init__(self, job: FolderJob, locks: Locks, publish: Callable[[FolderJob], Payload]) -> None:
        super().__init__(job, locks)
        self._publish = publish

    def stages(self) -> list[Stage]:
        return [_stage(together) for together in _together(self.job.steps)]

    def is_finished(self) -> bool:
        return read_done(self.job.place) is not None

    def claim(self) -> None:
        claimed = unsealed(self.job.objects.get(JOB))
        if claimed is None or claimed["job"] != self.job.identity:  # a resume leaves the claim as it is
            self.job.objects.put(JOB, sealed({"job": self.job.identity, **self.job.document}))

    def publish(self, progress: Progress) -> None:
        found = self._publish(self.job)
        objects = self.job.objects
        objects.settle([""])
        objects.put(DONE, sealed({"job": self.job.identity, **self.job.document, "found": found}))

    def clear(self, progress: Progress) -> None:
        """Receipts go first: a late twin of a task must find the folder still claimed."""
        objects = self.job.objects
        objects.delete_prefix(RECEIPTS)
        objects.delete(JOB)


def read_done(folder: str | Path | Place) -> Payload | None:
    """The completion marker of a folder, or None if there is no valid one: the results are incomplete.

    ``found`` holds the value that ``publish`` returned; ``name`` and ``settings`` describe the job.
    """
    place = folder if isinstance(folder, Place) else as_place(folder)
    return unsealed(open_objects(place).get(DONE))


@shown
def run_in_folder(
    name: str,
    folder: str | Path,
    settings: Mapping[str, Any],
    steps: Sequence[Step],
    *,
    publish: Callable[[FolderJob], Payload] = lambda job: {},
    executor: Executor | None = None,
    progress: Progress | bool = True,
    overwrite: bool = False,
    fsync: bool = True,
    storage_options: dict[str, Any] | None = None,
) -> Outcome:
    """Run a job of ``steps`` whose results lie in ``folder``, or resume it, or find it finished.

    Parameters
    ----------
    name, settings : the name of the results, and everything that decides their bytes, as plain JSON values.
    folder : a path or URL that holds nothing else.
    publish : called when every task is done; adds up their results and returns the content of the marker.
    executor : by default this process.
    progress : True for a display on stderr, False for none, or an observer.
    overwrite : delete the objects that another job left in the folder.
    fsync : make every object durable before its receipt.
    storage_options : options of the object store, for a URL.

    Raises
    ------
    ResumeMismatchError : the folder holds a half-done job with other settings.
    DestinationExistsError : the folder holds a finished job with other settings, or other objects.
    DestinationInUseError : another process runs a job in the folder.
    """
    place = as_place(folder, storage_options)
    job = FolderJob(name, json.loads(json.dumps(dict(settings))), place, tuple(steps), fsync)
    work = Work(executor or Serial(), observer(progress), overwrite)
    with work.locks:
        return run_held(job, publish, work)


def run_held(job: FolderJob, publish: Callable[[FolderJob], Payload], work: Work) -> Outcome:
    """`run_in_folder` for a caller that holds the folder, or a place that it lies beside."""
    if (path := local_path(job.place)) is not None and path.is_file():
        raise DestinationExistsError(f"{path} is a file; name a folder")
    work.locks.take(job.place)
    _make_way(job, overwrite=work.overwrite)
    return run(FolderCourse(job, work.locks, publish), work.crew, work.progress)


def _make_way(job: FolderJob, *, overwrite: bool) -> None:
    """Leave the folder free, or as an earlier run of the same job left it.  Refuses anything else that is there."""
    objects, place = job.objects, job.place
    objects.settle([""])  # removes the leftovers of a killed writer
    finished, claimed = read_done(place), unsealed(objects.get(JOB))
    before = finished or claimed
    if before is None or before["job"] != job.identity:
        # A torn claim on its own counts as absent; whatever else is there is not ours to delete.
        if before is None and any(key != JOB for key in objects.list("")):
            raise DestinationExistsError(f"{place} holds something else; choose another folder, or empty it by hand")
        if before is not None and not overwrite:
            _refuse_other(place, before, job, finished=finished is not None)
        objects.delete(DONE)
        objects.delete_prefix("")


def _refuse_other(place: Place, before: Payload, job: FolderJob, *, finished: bool) -> None:
    was, now = ({"name": d["name"], "steps": d["steps"], **d["settings"]} for d in (before, job.document))
    changed = [f"{k} was {was.get(k)!r}, now {now.get(k)!r}" for k in sorted(was | now) if was.get(k) != now.get(k)]
    state, error = ("finished", DestinationExistsError) if finished else ("half done", ResumeMismatchError)
    raise error(f"{place} is {state} with other settings: {'; '.join(changed)}. Give the same again, or overwrite it")
