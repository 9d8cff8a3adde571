"""From a request to a job: look at the source, plan, and refuse what cannot work before the first byte."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from actshuffle.arrays import virtual
from actshuffle.arrays.field import Field
from actshuffle.arrays.inventory import take_inventory
from actshuffle.arrays.marker import is_finished, read_marker
from actshuffle.arrays.metadata import (
    CODECS,
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
from actshuffle.engine.request import Request, _checked_request
from actshuffle.engine.scratch import check_memory, clear_scratch, recorded_scratch, scratch_place
from actshuffle.errors import DestinationExistsError, FormatError, InfeasibleError, RequestError, ResumeMismatchError
from actshuffle.executors.base import SHARE
from actshuffle.machine import machine_memory
from actshuffle.ordering.keys import Keys
from actshuffle.planning.memory import MemoryModel
from actshuffle.planning.planner import LOCAL_RUN_BYTES, REMOTE_RUN_BYTES, make_plan
from actshuffle.planning.tree import Plan
from actshuffle.storage.objects import Objects, open_objects
from actshuffle.storage.place import Place, as_place, local_path
from actshuffle.units import format_bytes


def check(src: Place, fields: Sequence[Field], given: dict[str, Any]) -> None:
    """Refuse to gather rows from where they cannot be had one by one."""
    if given.get("levels", "auto") not in ("auto", 1) or given.get("spill_memory"):
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

# Derived from the machine or the cluster, not from what the user typed: never a reason to refuse.
_SOFT = {"tasks_wanted", "tasks_per_worker"}


def prepare(
    src: Place,
    dst: Place,
    request: Request,
    *,
    most_memory: Callable[[], int],  # asked only when nobody says how much memory
    workers: int = 1,
    overwrite: bool = False,
    fsync: bool = True,
) -> Job:
    """The job to run, with the destination checked to be free or half done by the same job.

    Nothing is written; with ``overwrite``, what is at the destination goes once all else is in order.
    """
    check_places(src, dst, request.scratch)
    arrays = source_arrays(src, request.fields)
    given = request.given()
    recorded = _recorded(dst, overwrite)
    if recorded is not None:
        before = _checked_request(recorded["request"])
        held = {"gather": False, **before}
        differing = {k for k, v in given.items() if k not in _SOFT and held.get(k) != v}
        if differing:
            raise ResumeMismatchError(
                f"{dst.url} is half done with other arguments: "
                + "; ".join(f"{k} was {before.get(k)!r}, now {given[k]!r}" for k in sorted(differing))
                + ". Give the same to resume, or --overwrite to start again"
            )
        given = before
        if request.scratch is None:
            recorded_scratch(dst, recorded)
    else:
        given.setdefault("seed", secrets.randbits(63))
        if "memory" not in given and "block_bytes" not in given:
            given["memory"] = _settle_memory(
                arrays,
                given,
                most_memory() * given.get("tasks_per_worker", 1),
                remote=not open_objects(dst).is_local,
                remote_source=not open_objects(src).is_local,
            )
    job = make_job(src, dst, arrays, given, fsync=fsync)
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
            check_room(job.plan, workers)
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


def make_job(src: Place, dst: Place, arrays: dict[str, ZarrArray], given: dict[str, Any], *, fsync: bool = True) -> Job:
    """Plan a request whose values are all settled.  Reads metadata and lists the source's objects."""
    fill_missing = bool(given.get("fill_missing", False))
    beyond: dict[str, Any] = {}
    gappy: set[str] = set()
    fields = [source_field(name, array) for name, array in arrays.items()]
    if given.get("gather"):
        check(src, fields, given)
    if not fill_missing and (found := virtual.inventory(src, list(arrays))) is not None:
        identity, beyond = found
    else:
        identity, gappy = take_inventory(src, arrays, fill_missing=fill_missing)
    # A missing chunk has no file to read: leave that array to zarr, which makes up fill values.
    fields = [dataclasses.replace(f, source_key="") if f.name in gappy else f for f in fields]
    with_rows = bool(given.get("source_row", True))
    if with_rows and SOURCE_ROW in arrays:
        raise RequestError(
            f"{src.url} has an array named {SOURCE_ROW!r} already (is it shuffled?), the name of the "
            "output's provenance: leave it out with --fields, or give --no-source-row"
        )
    codec = given.get("codec", "none")
    if codec not in CODECS:
        raise RequestError(f"unknown codec {codec!r}; choose from {', '.join(CODECS)}")
    kind, asked = _kind_of(src, beyond), given
    if given.get("gather"):
        if gappy:
            raise RequestError(
                f"{', '.join(sorted(gappy))} of {src} lacks chunks, whose rows cannot be gathered: leave --gather out"
            )
        kind = Kind.GATHER
    elif kind is not Kind.SHUFFLE:  # leaves alone, as many as memory asks for: nothing is split into runs
        asked = {**given, "run_bytes": 1}
    remote, remote_source = (not open_objects(place).is_local for place in (dst, src))
    plan = plan_for(arrays, fields, asked, remote=remote, remote_source=remote_source)
    if not kind.ranked:
        plan = dataclasses.replace(plan, levels=1, widths=(1,), block_rows=(), spill_memory=0)
    rows = plan.rows
    scratch = scratch_place(dst, given.get("scratch"))
    outputs, widest = [], max(f.row_bytes for f in fields)
    for field in fields:
        spans = _spans(field.row_bytes, widest, plan)
        outputs.append(
            output_field(field, arrays[field.name], rows, spans * plan.chunk_rows, spans * plan.object_rows, codec)
        )
    provenance = None
    if with_rows:
        bare = Field(SOURCE_ROW, "", 8, (), 1, "")
        spans = _spans(8, widest, plan)
        provenance = output_field(bare, None, rows, spans * plan.chunk_rows, spans * plan.object_rows, codec)
    node = open_node(src)
    attributes = dict(node.attrs) if is_group(node) else {}
    hi_bits, lo_bits = given.get("key_bits", (64, 64))
    return Job(
        plan=plan,
        keys=Keys(given["seed"], hi_bits, lo_bits),
        source=src,
        destination=dst,
        scratch=scratch,
        fields=tuple(outputs),
        source_row=provenance,
        attributes=json.dumps(attributes, sort_keys=True),
        source_identity=identity,
        request=json.dumps(given, sort_keys=True),
        fill_missing=fill_missing,
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
    arrays: dict[str, ZarrArray], fields: Sequence[Field], given: dict[str, Any], *, remote: bool, remote_source: bool
) -> Plan:
    """The plan for some source arrays under settled arguments.

    ``remote`` says that spill and output are in an object store, ``remote_source`` that the source is.
    """
    coded = given.get("codec", "none") != "none" or (given.get("chunks_per_shard") or 1) > 1
    model = MemoryModel(
        row_bytes=sum(f.row_bytes for f in fields),
        source_buffer=source_buffer(list(arrays.values()), remote=remote_source),
        remote=remote,
        output_copies=2 if coded or remote else 0,
    )
    widest = max(fields, key=lambda f: f.row_bytes)
    usual_run = REMOTE_RUN_BYTES if remote else LOCAL_RUN_BYTES
    sharing, memory = given.get("tasks_per_worker", 1), given.get("memory")
    plan = make_plan(
        next(iter(arrays.values())).shape[0],
        model.row_bytes,
        levels=given.get("levels", "auto"),
        memory=None if memory is None else memory // sharing,
        block_bytes=given.get("block_bytes"),
        run_bytes=usual_run if (run := given.get("run_bytes")) is None else run,
        chunk_rows=given.get("chunk_rows"),
        chunks_per_shard=given.get("chunks_per_shard"),
        widest_row=max(widest.row_bytes, 8 if given.get("source_row", True) else 0),
        source_chunk_rows=widest.source_chunk_rows,
        tasks_wanted=given.get("tasks_wanted", 1),
        spill_memory=given.get("spill_memory", 0),
        gather=bool(given.get("gather")),
        model=model,
    )
    return dataclasses.replace(plan, memory=plan.memory * sharing)


def default_memory(workers: int) -> int:
    """A moderate share of this machine for each of some workers, bytes."""
    return min(PREFERRED_MEMORY, int(SHARE * machine_memory() / workers))


def _settle_memory(arrays: dict[str, ZarrArray], given: dict[str, Any], most: int, **where: bool) -> int:
    """A moderate share of the worker, unless all of it saves a level."""
    fields = [source_field(name, array) for name, array in arrays.items()]
    some: int = min(PREFERRED_MEMORY * given.get("tasks_per_worker", 1), most)
    try:
        wide = plan_for(arrays, fields, {**given, "memory": most}, **where)
        lean = plan_for(arrays, fields, {**given, "memory": some}, **where)
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
