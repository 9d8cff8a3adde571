"""From a request to a job: look at the source, plan, and refuse what cannot work before the first byte."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from actshuffle.arrays import virtual
from actshuffle.arrays.field import Field
from actshuffle.arrays.inventory import take_inventory
from actshuffle.arrays.marker import is_finished, read_marker
from actshuffle.arrays.metadata import (
    ZarrArray,
    is_group,
    open_node,
    output_field,
    source_arrays,
    source_buffer,
    source_field,
)
from actshuffle.arrays.names import MARKER_KEY, OUR_GROUP, SOURCE_ROW
from actshuffle.engine import manifest
from actshuffle.engine.job import Facts, Job, Kind
from actshuffle.engine.request import Request
from actshuffle.engine.scratch import check_memory, clear_scratch, recorded_scratch, scratch_place
from actshuffle.errors import DestinationExistsError, FormatError, InfeasibleError, RequestError, ResumeMismatchError
from actshuffle.executors.base import SHARE, Executor
from actshuffle.machine import machine_memory
from actshuffle.ordering.keys import Keys
from actshuffle.planning.memory import MemoryModel
from actshuffle.planning.planner import LOCAL_RUN_BYTES, REMOTE_RUN_BYTES, make_plan
from actshuffle.planning.tree import Plan
from actshuffle.storage.objects import Objects, open_objects
from actshuffle.storage.place import Place, as_place, local_path
from actshuffle.units import format_bytes


def check(src: Place, fields: Sequence[Field], request: Request) -> None:
    """Refuse sources whose rows cannot be read one by one: remote, virtual, compressed or sharded."""
    if request.levels not in ("auto", 1) or request.spill_memory:
        raise RequestError("gathering is one level without spill: leave --levels and --spill-memory out")
    if not open_objects(src).is_local:
        raise RequestError(
            f"rows can be gathered from a store on this machine, and {src} is elsewhere: leave --gather out"
        )
    if virtual.open_reader(src) is not None:
        raise RequestError(
            f"rows of {src} lie in other stores or files, and cannot be gathered one by one: leave --gather out"
        )
    decoded = [f.name for f in fields if not f.source_key]
    if decoded:
        raise RequestError(
            f"rows of {', '.join(decoded)} must be decoded by the chunk, so they cannot be gathered one by "
            "one: leave --gather out"
        )


def check_room(plan: Plan, workers: int) -> None:
    """Refuse to gather from a source that has no room in memory beside the workers."""
    size, memory = plan.rows * plan.row_bytes, machine_memory()
    need = size + workers * plan.memory
    if need > memory:
        raise InfeasibleError(
            f"to gather rows, the source's {format_bytes(size)} must lie in memory beside "
            f"{workers} worker{'s' * (workers != 1)} with {format_bytes(plan.memory)} each, and there are "
            f"{format_bytes(memory)}: give less --memory, fewer --workers, or leave --gather out"
        )


PREFERRED_MEMORY = 2 << 30  # more than this a worker takes only if it saves a level


def prepare(
    src: Place, dst: Place, request: Request, crew: Executor, *, overwrite: bool = False, fsync: bool = True
) -> Job:
    """The job to run, with the destination checked to be free or half done by the same job.

    Nothing is written; with ``overwrite``, what is at the destination goes once all else is in order.  The crew
    is asked for its memory only if the request names none.
    """
    check_places(src, dst, request.scratch)
    arrays = source_arrays(src, request.fields)
    recorded = _recorded(dst, overwrite)
    if recorded is not None:
        settled = Request.recorded(recorded["request"])
        if differing := request.against(settled):
            raise ResumeMismatchError(
                f"{dst.url} is half done with other arguments: {differing}. "
                "Give the same to resume, or --overwrite to start again"
            )
        if request.scratch is None:
            recorded_scratch(dst, recorded)
    else:
        settled = request.filled(seed=secrets.randbits(63), tasks_wanted=tasks_for(crew.workers))
        if settled.memory is None and settled.block_bytes is None:
            settled = _with_memory(settled, arrays, crew, remote=_is_remote(dst), remote_source=_is_remote(src))
    job = make_job(src, dst, arrays, settled, fsync=fsync)
    for part in job.known.behind:
        check_places(Place(part, src.options), dst, request.scratch)
    if recorded is not None:
        if recorded["job"] != job.identity:
            was, now = recorded.get("plan"), json.loads(json.dumps(job.to_json()))
            changed = sorted(k for k in now if not isinstance(was, dict) or was.get(k) != now[k])
            raise ResumeMismatchError(
                f"{dst.url} is half done, and since then {', '.join(changed)} changed"
                f"{' (the source is not what it was)' if 'source_identity' in changed else ''}; "
                "--overwrite starts again"
            )
    else:
        _check_space(job)
        if job.kind.gathers:
            check_room(job.plan, crew.workers)
    if overwrite:
        _remove(open_objects(dst, fsync=fsync))
        clear_scratch(job)
    return job


def _remove(objects: Objects) -> None:
    """Delete a store: its marker first, so that nobody takes what is left for whole; what shows that it
    was a store last, so that a deletion that was cut short can be asked for again."""
    objects.delete(MARKER_KEY)
    objects.settle([OUR_GROUP])
    for name in objects.names(""):
        if name not in (*_METADATA, OUR_GROUP):
            objects.delete_prefix(name)
    objects.delete_prefix("")


_METADATA = ("zarr.json", ".zgroup", ".zarray", ".zattrs")


def make_job(src: Place, dst: Place, arrays: dict[str, ZarrArray], request: Request, *, fsync: bool = True) -> Job:
    """Plan a request whose seed is settled.  Reads metadata and lists the source's objects."""
    assert request.seed is not None
    beyond: dict[str, Any] = {}
    gappy: set[str] = set()
    fields = [source_field(name, array) for name, array in arrays.items()]
    if request.gather:
        check(src, fields, request)
    if not request.fill_missing and (found := virtual.inventory(src, list(arrays))) is not None:
        identity, beyond = found
    else:
        identity, gappy = take_inventory(src, arrays, fill_missing=request.fill_missing)
    # A missing chunk has no file to read: leave that array to zarr, which makes up fill values.
    fields = [dataclasses.replace(f, source_key="") if f.name in gappy else f for f in fields]
    if request.source_row and SOURCE_ROW in arrays:
        raise RequestError(
            f"{src.url} has an array named {SOURCE_ROW!r} already (is it shuffled?), the name of the "
            "output's provenance: leave it out with --fields, or give --no-source-row"
        )
    kind, asked = _kind_of(src, beyond), request
    if request.gather:
        if gappy:
            raise RequestError(
                f"{', '.join(sorted(gappy))} of {src} lacks chunks, whose rows cannot be gathered: leave --gather out"
            )
        kind = Kind.GATHER
    elif kind is not Kind.SHUFFLE:  # leaves alone, as many as memory asks for: nothing is split into runs
        asked = request.changed(run_bytes=1)
    plan = plan_for(arrays, fields, asked, remote=_is_remote(dst), remote_source=_is_remote(src))
    if not kind.ranked:
        plan = dataclasses.replace(plan, levels=1, widths=(1,), block_rows=(), spill_memory=0)
    widest = max(f.row_bytes for f in fields)

    def output(field: Field, array: ZarrArray | None) -> Field:
        spans = _spans(field.row_bytes, widest, plan)
        return output_field(field, array, plan.rows, spans * plan.chunk_rows, spans * plan.object_rows, request.codec)

    node = open_node(src)
    attributes = dict(node.attrs) if is_group(node) else {}
    return Job(
        plan=plan,
        keys=Keys(request.seed, *request.key_bits),
        source=src,
        destination=dst,
        scratch=scratch_place(dst, request.scratch),
        fields=tuple(output(f, arrays[f.name]) for f in fields),
        source_row=output(Field(SOURCE_ROW, "", 8, (), 1, ""), None) if request.source_row else None,
        attributes=json.dumps(attributes, sort_keys=True),
        source_identity=identity,
        request=json.dumps(request.to_json(), sort_keys=True),
        fill_missing=request.fill_missing,
        fsync=fsync,
        kind=kind,
        key_rows=beyond.get("key_rows") and tuple(beyond["key_rows"]),
        facts=Facts.text(beyond),
    )


def _kind_of(src: Place, beyond: dict[str, Any]) -> Kind:
    """How a job treats the rows of this source: a virtual source says so."""
    try:
        return Kind(beyond.get("kind", Kind.SHUFFLE))
    except ValueError as err:
        raise FormatError(f"{src} is damaged: {err}") from err


def plan_for(
    arrays: dict[str, ZarrArray], fields: Sequence[Field], request: Request, *, remote: bool, remote_source: bool
) -> Plan:
    """The plan for some source arrays under a settled request.

    ``remote`` says that spill and output are in an object store, ``remote_source`` that the source is.
    """
    coded = request.codec != "none" or (request.chunks_per_shard or 1) > 1
    model = MemoryModel(
        row_bytes=sum(f.row_bytes for f in fields),
        source_buffer=source_buffer(list(arrays.values()), remote=remote_source),
        remote=remote,
        output_copies=2 if coded or remote else 0,
    )
    widest = max(fields, key=lambda f: f.row_bytes)
    widest_row = max(widest.row_bytes, 8 if request.source_row else 0)
    rows = next(iter(arrays.values())).shape[0]
    return plan_rows(rows, model, request, widest_row=widest_row, source_chunk_rows=widest.source_chunk_rows)


def plan_rows(rows: int, model: MemoryModel, request: Request, **source: int) -> Plan:
    """The plan for so many rows under a settled request; ``source`` says what `make_plan` asks of the source."""
    plan = make_plan(
        rows,
        model.row_bytes,
        levels=request.levels,
        memory=None if request.memory is None else request.memory // request.tasks_per_worker,
        block_bytes=request.block_bytes,
        run_bytes=request.run_bytes or (REMOTE_RUN_BYTES if model.remote else LOCAL_RUN_BYTES),
        chunk_rows=request.chunk_rows,
        chunks_per_shard=request.chunks_per_shard,
        tasks_wanted=request.tasks_wanted,
        spill_memory=request.spill_memory,
        gather=request.gather,
        model=model,
        **source,
    )
    return dataclasses.replace(plan, memory=plan.memory * request.tasks_per_worker)


def tasks_for(workers: int) -> int | None:
    """Tasks that keep all workers busy to the end; None for one worker, which any number keeps busy."""
    return 3 * workers if workers > 1 else None


def default_memory(workers: int) -> int:
    """A moderate share of this machine for each of some workers, bytes."""
    return min(PREFERRED_MEMORY, int(SHARE * machine_memory() / workers))


def _with_memory(request: Request, arrays: dict[str, ZarrArray], crew: Executor, **where: bool) -> Request:
    """The request with a moderate share of the worker, unless all of it saves a level."""
    fields = [source_field(name, array) for name, array in arrays.items()]
    most = request.changed(memory=crew.task_memory() * request.tasks_per_worker)
    some = request.changed(memory=min(PREFERRED_MEMORY * request.tasks_per_worker, most.memory or 0))
    try:
        wide, lean = plan_for(arrays, fields, most, **where), plan_for(arrays, fields, some, **where)
    except InfeasibleError:
        return most
    return some if lean.levels <= wide.levels else most


def _spans(row_bytes: int, widest: int, plan: Plan) -> int:
    """How many of the widest field's chunks one chunk of this field spans: narrow rows, longer chunks.

    A divisor of the leaf, so that every leaf still holds a whole number of this field's objects; and
    no more bytes than a chunk of the widest field, which is what the plan has memory for.
    """
    objects = plan.leaf_rows // plan.object_rows
    fits = max(1, widest // row_bytes)
    return max(d for d in range(1, min(objects, fits) + 1) if objects % d == 0)


def check_places(src: Place, dst: Place, scratch: str | None) -> None:
    """Refuse a destination or scratch inside the source, or the other way round."""
    source, target = _where(src), _where(dst)
    if _inside(target, source) or _inside(source, target):
        raise RequestError(f"destination {dst} and source {src} must not lie inside each other")
    spill = None if scratch is None else _where(as_place(scratch))
    if spill is not None and (_inside(spill, source) or _inside(spill, target)):
        raise RequestError(f"scratch {scratch} must lie outside source and destination")


def _where(place: Place) -> Path:
    """A path that tells places apart: the real one on disk, else the URL's."""
    path = local_path(place)
    if path is None:
        return Path(place.url)
    try:
        return path.resolve()
    except (OSError, RuntimeError) as err:  # links in a circle, names too long
        raise RequestError(f"cannot use {place.url}: {err}") from err


def _is_remote(place: Place) -> bool:
    return not open_objects(place).is_local


def _inside(path: Path, folder: Path) -> bool:
    return path == folder or folder in path.parents


def _recorded(dst: Place, overwrite: bool) -> dict[str, Any] | None:
    """What a half-done run left at the destination; refuses what may not be touched."""
    objects = open_objects(dst)
    path = local_path(dst)
    if path is not None and objects.size("") is not None and not path.is_dir():
        raise DestinationExistsError(f"{path} is a file")
    names = set(objects.names(""))
    stored = names & {"zarr.json", ".zgroup", ".zarray"}
    if overwrite:
        if names and not stored and OUR_GROUP not in names:
            raise DestinationExistsError(f"{dst.url} is no Zarr store; it is not overwritten, remove it by hand")
        return None
    finished = is_finished(objects)
    recorded = None
    with contextlib.suppress(FormatError) if finished else contextlib.nullcontext():
        recorded = manifest.read_run(objects)
    if recorded is not None:  # beside a marker: done, but for the clearing away
        return recorded
    if finished or read_marker(objects) is not None:
        raise DestinationExistsError(f"{dst.url} is finished; --overwrite replaces it")
    if next(iter(objects.list("")), None) is not None:
        raise DestinationExistsError(
            f"{dst.url} exists and is not a half-done shuffle; choose another path"
            + (", or --overwrite to replace it" if stored or OUR_GROUP in names else "")
        )
    return None


def _check_space(job: Job) -> None:
    plan = job.plan
    out, spill = open_objects(job.destination), open_objects(job.scratch)
    needs = [
        (job.destination, out.free_bytes(), plan.output_bytes),
        (job.scratch, spill.free_bytes(), plan.scratch_bytes),
    ]
    if plan.kept_bytes:
        check_memory(job)
    places = [local_path(job.destination), local_path(job.scratch)]
    if all(places) and _device(places[0]) == _device(places[1]):
        needs = [(job.destination, out.free_bytes(), plan.disk_bytes)]
    for place, free, need in needs:
        if free is not None and need > free:
            raise InfeasibleError(
                f"{place.url} needs {format_bytes(need)} and its disk has {format_bytes(free)} free "
                f"(output {format_bytes(plan.output_bytes)}, "
                f"scratch up to {format_bytes(plan.scratch_bytes)}); "
                "free some, or give --scratch on another disk"
            )


def _device(path: Path | None) -> int:
    assert path is not None
    return next(p for p in (path, *path.absolute().parents) if p.exists()).stat().st_dev
