"""The state of the run that writes a store, read from its receipts alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from actshuffle.arrays.marker import is_begun, read_marker
from actshuffle.arrays.names import UNFILTERED
from actshuffle.engine import manifest, tasks
from actshuffle.engine.scratch import recorded_scratch
from actshuffle.errors import IncompleteStoreError
from actshuffle.jobs.running import first_unfinished
from actshuffle.storage.objects import open_objects
from actshuffle.storage.place import as_place, public_url
from actshuffle.units import counted


def status(dst: str | Path, storage_options: dict[str, Any] | None = None) -> dict[str, Any]:
    """The state of the run that writes ``dst``: tasks done by level, read from the receipts.

    Returns plain values: ``state`` is "complete" or "half done"; ``levels`` has ``level``, ``tasks`` and ``done`` of
    each level.  Raises `IncompleteStoreError` if ``dst`` is not an output of actshuffle.
    """
    place = as_place(dst, storage_options)
    objects = open_objects(place)
    if read_marker(objects) is not None:
        return {"path": public_url(place.url), "state": "complete", "levels": []}
    body = manifest.read_run(objects)
    if body is None and is_begun(place):
        unfiltered = status(place.beside(UNFILTERED).url, storage_options)
        return {**unfiltered, "path": public_url(place.url), "state": "half done"}
    if body is None:
        raise IncompleteStoreError(f"{dst} is not an output of actshuffle, finished or half done")
    # The places in the record are not used: the file may come from somebody else.
    job = replace(manifest.job_from(body, place.options), destination=place, scratch=recorded_scratch(place, body))
    levels = []
    stages = tasks.stages(job)
    first = first_unfinished(job, stages)
    for level, stage in enumerate(stages, 1):
        done = stage.count if level <= first else sum(stage.is_done(job, task) for task in stage.tasks())
        levels.append({"level": level, "tasks": stage.count, "done": done})
    state = {"path": public_url(place.url), "state": "half done", "levels": levels}
    return {**state, "request": body["request"], "scratch": public_url(job.scratch.url)}


def status_text(found: dict[str, Any]) -> str:
    """The result of `status` as text for people."""
    if found["state"] == "complete":
        return f"{found['path']}: complete"
    lines = [f"{found['path']}: half done; run it again with the same arguments to resume"]
    for x in found["levels"]:
        share = x["done"] / x["tasks"] if x["tasks"] else 1.0
        lines.append(
            f"  level {x['level']} of {len(found['levels'])}   {x['done']:,} of "
            f"{counted(x['tasks'], 'task')} ({share:.0%})"
        )
    if "request" not in found:
        return "\n".join([*lines, "  all rows are collected; those that --drop-norm leaves are copied next"])
    lines.append("  arguments: " + ", ".join(f"{k}={v}" for k, v in sorted(found["request"].items())))
    lines.append(f"  scratch: {found['scratch']}")
    return "\n".join(lines)
