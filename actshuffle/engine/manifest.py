"""What is known to be done: receipts while a run goes on, one marker when it is over.

::

    dst/_actshuffle/run.json            the job, while it is not finished
    dst/_actshuffle/receipts/7.json     leaf 7 is written: digests of its objects
    dst/_actshuffle/digests/NAME        uint64 (objects, 2), at the end: digest of every output object
    dst/_actshuffle/zarr.json           the completion marker, last of all
    scratch/run.json                    whose scratch this is
    scratch/bounds, bounds.json         keys at the boundaries between leaves, and their checksum
    scratch/level1/receipts/7.json      block 7 is split: rows and digests of its runs
    scratch/level1/index/0.json         the blocks of bucket 0 are all there and add up

A receipt is written after its data.  It names the job and carries its own checksum, so one that is
torn, stale or of another run counts as absent and the task runs again; and the objects it speaks of
must be there with their sizes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import Any, TypeVar

from actshuffle._version import __version__
from actshuffle.arrays.field import Field
from actshuffle.arrays.marker import _digest, _is_list
from actshuffle.arrays.names import FORMAT, MARKER_KEY, RECEIPTS, RUN_KEY
from actshuffle.arrays.small import get_array, group_metadata, put_array
from actshuffle.arraytypes import U64
from actshuffle.engine.job import Job
from actshuffle.errors import FormatError
from actshuffle.limits import RECEIPTS_AT_ONCE
from actshuffle.ordering.keys import Keys
from actshuffle.planning.memory import MemoryModel
from actshuffle.planning.tree import Plan, Task
from actshuffle.storage.objects import Objects, open_objects
from actshuffle.storage.place import Place, public_url

T = TypeVar("T")
ORDER_NAME = "lexsort(lo, hi) of Philox4x64-10 words, SeedSequence(seed, spawn_key=(0,) and (1,))"


def receipt_place(job: Job, task: Task) -> tuple[Objects, str]:
    """Where a task's receipt lives: beside what it speaks of."""
    if task.kind == "leaf":
        return open_objects(job.destination, fsync=job.fsync), f"{RECEIPTS}/{task.number}.json"
    folder = "receipts" if task.kind == "split" else "index"
    key = f"level{task.level}/{folder}/{task.number}.json"
    return open_objects(job.scratch, fsync=job.fsync), key


def write_receipt(job: Job, task: Task, body: dict[str, Any]) -> None:
    objects, key = receipt_place(job, task)
    objects.put(key, _sealed({"job": job.identity, "task": list(task), **body}))


def read_receipt(job: Job, task: Task) -> dict[str, Any] | None:
    """The receipt's content, or None if there is no valid one of this job and task."""
    objects, key = receipt_place(job, task)
    data = objects.get(key)
    body = None if data is None else _unsealed(data)
    if body is None or body.get("job") != job.identity or body.get("task") != list(task):
        return None
    return body if _is_whole(job, task, body) else None


def read_receipts(job: Job, tasks: Iterable[Task]) -> Iterator[dict[str, Any] | None]:
    """The receipts of many tasks, in order."""
    return each(job, read_receipt, tasks)


def each(job: Job, look: Callable[[Job, Task], T], tasks: Iterable[Task]) -> Iterator[T]:
    """``look(job, task)`` for many tasks, in order; in an object store, which takes its time, many at once.

    One at first and more with every step, so that who stops early has not asked for much.
    """
    tasks, size = iter(tasks), 1
    if open_objects(job.scratch).is_local and open_objects(job.destination).is_local:
        yield from (look(job, task) for task in tasks)
        return
    with ThreadPoolExecutor(RECEIPTS_AT_ONCE) as pool:
        while batch := list(islice(tasks, size)):
            yield from pool.map(partial(look, job), batch)
            size = min(RECEIPTS_AT_ONCE * size, 32 * RECEIPTS_AT_ONCE)


def _is_whole(job: Job, task: Task, body: dict[str, Any]) -> bool:
    """Does a receipt say what those who read it will ask for, and nothing impossible?"""
    plan = job.plan
    if task.kind == "index":
        return True
    if task.kind == "split":
        block = plan.block(task.level, task.number)
        children = len(plan.children(task.level - 1, block.parent))
        rows, sums = body.get("rows"), body.get("sums")
        return (
            _is_list(rows, children, lambda x: type(x) is int and x >= 0)
            and sum(rows) == block.stop - block.start  # type: ignore[arg-type]
            and _is_list(sums, 1 + len(job.fields), lambda x: _is_hex(x, 32 * children))
        )
    start, stop = plan.bucket_ranks(plan.levels - 1, task.number)
    if job.kind == "gather" and not _is_hex(body.get("keys"), 32):
        return False
    digests = body.get("digests")
    if not isinstance(digests, dict) or digests.keys() != {f.name for f in job.fields}:
        return False
    return all(
        _is_list(digests[f.name], -(-(stop - start) // f.object_rows), lambda x: _is_hex(x, 32)) for f in job.fields
    )


def _is_hex(found: Any, length: int) -> bool:
    return isinstance(found, str) and re.fullmatch(f"[0-9a-f]{{{length}}}", found) is not None


def withdraw(job: Job, task: Task) -> None:
    """Remove a receipt, so that the next run does the task again."""
    objects, key = receipt_place(job, task)
    objects.delete(key)


def write_run(job: Job) -> None:
    """Claim destination and scratch for this job."""
    text = _sealed({"job": job.identity, "request": json.loads(job.request), "plan": job.to_json()})
    open_objects(job.scratch, fsync=job.fsync).put("run.json", text)
    open_objects(job.destination, fsync=job.fsync).put(RUN_KEY, text)


def read_run(objects: Objects, key: str = RUN_KEY) -> dict[str, Any] | None:
    """The job a half-done destination belongs to, or None."""
    data = objects.get(key)
    if data is None:
        return None
    body = _unsealed(data)
    kinds = {"job": str, "request": dict, "plan": dict}
    if body is None or any(not isinstance(body.get(k), kind) for k, kind in kinds.items()):
        other = _format_of(data)
        what = "is damaged" if other in (None, FORMAT) else f"has format {other!r}, this reads {FORMAT}"
        raise FormatError(
            f"{key} {what}, so this half-done run cannot be resumed; delete the destination "
            "(or give --overwrite) and start again"
        )
    return body


def _format_of(data: bytes) -> Any:
    """The version that a sealed file names, if it can be made out."""
    try:
        return json.loads(data)["body"]["format"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def job_from(body: dict[str, Any], options: str = "{}") -> Job:
    """The job that `write_run` wrote down."""
    d = dict(body["plan"])
    try:
        plan = d.pop("plan")
        tupled: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in plan.items() if k != "model"}
        fields = [
            None if f is None else Field(**{**f, "row_shape": tuple(f["row_shape"])})
            for f in (*d.pop("fields"), d.pop("source_row"))
        ]
        return Job(
            plan=Plan(**tupled, model=MemoryModel(**plan["model"])),
            keys=Keys(**d.pop("keys")),
            source=Place(d.pop("source"), options),
            destination=Place(d.pop("destination"), options),
            scratch=Place(d.pop("scratch"), options),
            fields=tuple(f for f in fields[:-1] if f is not None),
            source_row=fields[-1],
            key_rows=None if (keyed := d.pop("key_rows", None)) is None else (keyed[0], keyed[1]),
            **d,
        )
    except (KeyError, TypeError, ValueError) as err:
        raise FormatError(f"{RUN_KEY} is damaged: {type(err).__name__}: {err}") from err


def write_bounds(job: Job, bounds: U64) -> None:
    """Keep the boundaries between leaves, uint64 ``(leaves - 1, 3)``: array first, checksum last."""
    objects = open_objects(job.scratch, fsync=job.fsync)
    put_array(objects, "bounds", bounds)
    check = hashlib.sha256(bounds.astype("<u8").tobytes()).hexdigest()
    objects.put("bounds.json", _sealed({"job": job.identity, "bounds": check}))


def read_bounds(job: Job) -> U64 | None:
    """The boundaries, or None if they are absent, damaged or another job's."""
    objects = open_objects(job.scratch)
    data = objects.get("bounds.json")
    body = None if data is None else _unsealed(data)
    if body is None or body.get("job") != job.identity:
        return None
    try:
        bounds = get_array(objects, "bounds")
    except FormatError:
        return None
    if bounds is None or hashlib.sha256(bounds.tobytes()).hexdigest() != body.get("bounds"):
        return None
    return bounds


def write_marker(job: Job, sums: dict[str, str], files: dict[str, bytes]) -> None:
    """The last write of a run: from here on the store is complete.

    ``files`` are the store's small files, all that is no chunk: `verify` will know them again.
    """
    plan = job.plan
    body: dict[str, Any] = {
        "format": FORMAT,
        "kind": "shuffle",
        "version": __version__,
        "rows": plan.rows,
        "seed": job.keys.seed,
        "order": ORDER_NAME,
        "levels": plan.levels,
        "source": public_url(job.source.url),
        "source_identity": job.source_identity,
        "source_row": job.source_row is not None,
        "fill_missing": job.fill_missing,
        "fields": {f.name: {"sum": sums[f.name], "object_rows": f.object_rows} for f in job.fields},
        "files": {key: hashlib.sha256(data).hexdigest() for key, data in sorted(files.items())},
    }
    if (job.keys.hi_bits, job.keys.lo_bits) != (64, 64):
        body["key_bits"] = [job.keys.hi_bits, job.keys.lo_bits]
    body |= json.loads(job.facts).get("marker", {})
    if body["kind"] == "collection":  # in no order but its own; the seed is that of the digests
        del body["order"], body["levels"]
    body["sha256"] = _digest(body)
    objects = open_objects(job.destination, fsync=job.fsync)
    objects.put(MARKER_KEY, group_metadata({"actshuffle": body}))


def _sealed(body: dict[str, Any]) -> bytes:
    text = json.dumps({"format": FORMAT, **body}, sort_keys=True)
    check = hashlib.sha256(text.encode()).hexdigest()
    return f'{{"sha256": "{check}", "body": {text}}}'.encode()


def _unsealed(data: bytes) -> dict[str, Any] | None:
    try:
        document = json.loads(data)
        body: dict[str, Any] = document["body"]
        text = json.dumps(body, sort_keys=True)
        if hashlib.sha256(text.encode()).hexdigest() != document["sha256"] or body["format"] != FORMAT:
            return None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return body
