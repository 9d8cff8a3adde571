"""From a request to a job: look at the source, plan, and refuse an impossible request before the first byte."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from actshuffle.arrays import virtual
from actshuffle.arrays.field import Field
from actshuffle.arrays.inventory import take_inventory
from actshuffle.arrays.marker import altered_files, array_names, is_finished, read_marker
from actshuffle.arrays.metadata import ZarrArray, is_group, open_node, output_field, source_arrays, source_field
from actshuffle.arrays.names import MARKER_KEY, OUR_GROUP, SOURCE_ROW
from actshuffle.engine import manifest
from actshuffle.engine.job import Facts, Job, Kind
from actshuffle.engine.preview import Outlook, check_gather, check_room, is_remote, plan_for
from actshuffle.engine.request import Request
from actshuffle.engine.scratch import check_memory, clear_scratch, recorded_scratch, scratch_place
from actshuffle.errors import DestinationExistsError, FormatError, InfeasibleError, RequestError, ResumeMismatchError
from actshuffle.executors.base import Executor
from actshuffle.executors.base import check_memory as check_limit
from actshuffle.jobs.locks import Locks
from actshuffle.ordering.keys import Keys
from actshuffle.planning.memory import SPILL_ROW
from actshuffle.planning.tree import Plan
from actshuffle.storage.objects import Objects, open_objects
from actshuffle.storage.place import Place, as_place, local_path
from actshuffle.units import counted, format_bytes


def prepare(
    src: Place,
    dst: Place,
    request: Request,
    crew: Executor,
    *,
    locks: Locks | None = None,
    overwrite: bool = False,
    fsync: bool = True,
) -> Job:
    """The job to run.  Its destination is free, or half done or finished by the same request.

    Writes nothing, but takes ``locks`` of the destination before it looks there, and of a scratch in another folder.
    With ``overwrite`` it removes the store at the destination, once everything else is in order.  It asks the crew
    for its memory only if the request names none.
    """
    check_places(src, dst, request.scratch)
    check_limit(crew, request.memory)
    if crew.tasks_per_worker > 1:  # they share the memory of one process
        request = request.filled(tasks_per_worker=crew.tasks_per_worker)
    arrays = source_arrays(src, request.fields)
    if locks is not None:
        locks.take(dst)
    recorded, marker = look_at(dst, overwrite)
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
        seed = secrets.randbits(63) if marker is None else marker.get("seed", 0)
        outlook = Outlook(src, dst, arrays, crew.workers, crew.one_machine, crew.task_memory)
        settled = outlook.choose(request.filled(seed=seed))
    job = make_job(src, dst, arrays, settled, fsync=fsync)
    for part in job.known.behind:
        check_places(Place(part, src.options), dst, request.scratch)
    if recorded is not None:
        begun = manifest.job_from(recorded).plan
        if begun.model.block_copies >= job.plan.model.block_copies:  # else its blocks are too large for this memory
            job = dataclasses.replace(job, plan=begun)  # another version may have cut the work otherwise
        if recorded["job"] != job.identity:
            was, now = recorded.get("plan"), json.loads(json.dumps(job.to_json()))
            changed = dict.fromkeys(_SAID[k] for k in _SAID if not isinstance(was, dict) or was.get(k) != now[k])
            raise ResumeMismatchError(
                f"{dst.url} is half done, and was begun otherwise: {', '.join(changed)}; --overwrite starts again"
            )
    elif marker is not None:
        if differing := "; ".join(_changed(job, request, marker)):
            raise DestinationExistsError(
                f"{dst.url} is finished with other arguments: {differing}. Choose another path, or --overwrite "
                "replaces it"
            )
    else:
        _check_space(job)
        check_room(job.plan, crew.workers, crew.tasks_per_worker, gather=job.kind.gathers)
    if locks is not None and settled.scratch is not None:  # others may have a destination of this name elsewhere
        locks.take(job.scratch)
    if overwrite:
        remove(open_objects(dst, fsync=fsync))
        clear_scratch(job)
    return job


def remove(objects: Objects) -> None:
    """Delete a store: its marker first, so that nobody takes the rest for a whole store, and its metadata last, so
    that an interrupted deletion can be asked for again."""
    objects.delete(MARKER_KEY)
    objects.settle([OUR_GROUP])
    for name in objects.names(""):
        if name not in (*_METADATA, OUR_GROUP):
            objects.delete_prefix(name)
    objects.delete_prefix("")


_METADATA = ("zarr.json", ".zgroup", ".zarray", ".zattrs")


# The difference between two jobs in words, by the field that differs: all fields that decide the work.
_SAID = {
    "source": "SRC is another path",
    "destination": "DST was another path",
    "scratch": "--scratch was another path",
    "source_identity": "SRC has other rows",
    "attributes": "SRC has other attributes",
    "fields": "the arrays are others",
    "keys": "--seed was another",
    "source_row": "--source-row was another",
    "fill_missing": "--missing-chunks was another",
    "kind": "--gather was another, or SRC is of another kind",
    "plan": "the client of the object store was another, which holds less in memory (storage option client)",
    "request": "options have other values",
    "key_rows": "SRC stands for other rows",
    "facts": "SRC stands for other rows",
}


def make_job(src: Place, dst: Place, arrays: dict[str, ZarrArray], request: Request, *, fsync: bool = True) -> Job:
    """The job of a request whose seed is settled.  Reads metadata and lists the objects of the source."""
    assert request.seed is not None
    beyond: dict[str, Any] = {}
    gappy: set[str] = set()
    fields = [source_field(name, array) for name, array in arrays.items()]
    if request.gather:
        check_gather(src, request, next(iter(arrays.values())).shape[0])
    if not request.fill_missing and (found := virtual.inventory(src, list(arrays))) is not None:
        identity, beyond = found
    else:
        identity, gappy = take_inventory(src, arrays, fill_missing=request.fill_missing)
    if request.gather and beyond:  # rows that lie in other stores or files are brought into memory first
        gappy = set(arrays)
    # A missing chunk has no file to read: zarr reads that array, and makes up the fill values.
    fields = [dataclasses.replace(f, source_key="") if f.name in gappy else f for f in fields]
    if request.source_row and SOURCE_ROW in arrays:
        raise RequestError(
            f"{src.url} has an array named {SOURCE_ROW!r} already (is it shuffled?), the name of the "
            "output's provenance: leave it out with --fields, or give --no-source-row"
        )
    kind, asked = _kind_of(src, beyond), request
    if request.gather:
        kind = Kind.GATHER
    elif kind is not Kind.SHUFFLE:  # leaves alone, as many as memory asks for; they need no runs
        asked = request.changed(run_bytes=1)
    plan = plan_for(arrays, fields, asked, src, dst)
    if kind.gathers:
        staged = sum(f.row_bytes for f in fields if is_remote(src) or not f.source_key)
        plan = dataclasses.replace(plan, staged=plan.rows * staged)
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
    """How a job treats the rows of this source, which a virtual source records."""
    try:
        return Kind(beyond.get("kind", Kind.SHUFFLE))
    except ValueError as err:
        raise FormatError(f"{src} is damaged: {err}") from err


def _spans(row_bytes: int, widest: int, plan: Plan) -> int:
    """How many chunks of the widest field one chunk of this field spans: narrow rows get longer chunks.

    The number divides a leaf, so that each leaf holds a whole number of this field's objects.  The chunk is no
    larger than one of the widest field, since the plan counts memory for that.
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
    """A path that tells places apart: the resolved one on disk, or that of the URL."""
    path = local_path(place)
    if path is None:
        return Path(place.url)
    try:
        return path.resolve()
    except (OSError, RuntimeError) as err:  # links in a circle, names too long
        raise RequestError(f"cannot use {place.url}: {err}") from err


def _inside(path: Path, folder: Path) -> bool:
    return path == folder or folder in path.parents


def look_at(dst: Place, overwrite: bool) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """The record of a half-done run at the destination, or the marker of a finished one.

    Refuses a destination that may not be touched.
    """
    objects = open_objects(dst)
    path = local_path(dst)
    if path is not None and objects.size("") is not None and not path.is_dir():
        raise DestinationExistsError(f"{path} is a file")
    names = set(objects.names(""))
    stored = names & {"zarr.json", ".zgroup", ".zarray"}
    if overwrite:
        if names and not stored and OUR_GROUP not in names:
            raise DestinationExistsError(f"{dst.url} is no Zarr store; it is not overwritten, remove it by hand")
        return None, None
    finished = is_finished(objects)
    recorded = None
    with contextlib.suppress(FormatError) if finished else contextlib.nullcontext():
        recorded = manifest.read_run(objects)
    if recorded is not None:  # beside a marker: finished, but not yet cleared
        return recorded, None
    if (marker := read_marker(objects)) is not None:
        if marker["kind"] == "view":
            raise DestinationExistsError(f"{dst.url} is a view; --overwrite replaces it")
        if altered := next(altered_files(objects, marker), None):
            key, problem = altered
            raise FormatError(f"{dst.url} is finished, but {key} {problem}: verify it, or --overwrite starts again")
        return None, marker
    if next(iter(objects.list("")), None) is not None:
        raise DestinationExistsError(
            f"{dst.url} exists and is not a half-done shuffle; choose another path"
            + (", or --overwrite to replace it" if stored or OUR_GROUP in names else "")
        )
    return None, None


def _changed(job: Job, request: Request, marker: dict[str, Any]) -> Iterator[str]:
    """How a request differs from the one that finished the store at its destination, in words.

    Only what decides the bytes of the output counts, and a number of levels that the user named.
    """
    sums = marker.get("kind") == "collection"  # a copy: its seed is that of the digests, and it has no levels
    if "seed" in request.given and not sums and request.seed != marker["seed"]:
        yield f"seed was {marker['seed']}, now {request.seed}"
    if request.levels != "auto" and not sums and request.levels != marker["levels"]:
        yield f"levels were {marker['levels']}, now {request.levels}"
    if job.plan.rows != marker["rows"]:
        yield f"there were {counted(marker['rows'], 'row')}, now {job.plan.rows:,}"
    if job.source_identity != marker.get("source_identity"):
        yield "the source is not the one that it was made from"
    if job.fill_missing != marker.get("fill_missing", False):
        yield f"missing_chunks was {'refuse' if job.fill_missing else 'fill'}"
    now = {f.name: json.loads(f.metadata) for f in job.outputs}
    was = {name: _written(job, name) for name in now}
    had = set(array_names(marker))
    if set(now) != had:
        yield f"arrays were {', '.join(sorted(had))}, now {', '.join(sorted(now))}"
    # Without these the chunks follow from the machine's memory, which need not be the same again.
    chunked = {"memory", "block_bytes", "chunk_rows", "chunks_per_shard"} & request.given
    # Chunks of narrower arrays follow from the number of leaves, too.
    widest = max(f.row_bytes for f in job.outputs)
    chosen = {f.name for f in job.outputs if f.row_bytes == widest} & had
    for part, names in (("codecs", set(now) & had), ("chunk_grid", chosen if chunked else set[str]())):
        if any(was[name].get(part) != now[name].get(part) for name in names):
            yield "the codec was another" if part == "codecs" else "the chunks had another size"


def _written(job: Job, name: str) -> dict[str, Any]:
    """The metadata of an array at the destination; empty where there is none."""
    text = job.at_destination.get(f"{name}/zarr.json")
    try:
        found = json.loads(text or b"{}")
    except (ValueError, RecursionError) as err:
        raise FormatError(f"{name}/zarr.json of {job.destination} is damaged: {err}; --overwrite replaces it") from err
    if not isinstance(found, dict):
        raise FormatError(f"{name}/zarr.json of {job.destination} is damaged: no object; --overwrite replaces it")
    return found


def _check_space(job: Job) -> None:
    plan = job.plan
    out, spill = open_objects(job.destination), open_objects(job.scratch)
    keys = plan.rows * SPILL_ROW * job.kind.gathers
    needs = [
        (job.destination, out.free_bytes(), plan.output_bytes),
        (job.scratch, spill.free_bytes(), plan.scratch_bytes + keys),
    ]
    if plan.kept_bytes:
        check_memory(job)
    places = [local_path(job.destination), local_path(job.scratch)]
    if all(places) and _device(places[0]) == _device(places[1]):
        needs = [(job.destination, out.free_bytes(), plan.disk_bytes + keys)]
    for place, free, need in needs:
        if free is not None and need > free:
            raise InfeasibleError(
                f"{place.url} needs {format_bytes(need)} and its disk has {format_bytes(free)} free "
                f"(output {format_bytes(plan.output_bytes)}, "
                f"scratch up to {format_bytes(plan.scratch_bytes + keys)}); "
                "free some, or give --scratch on another disk"
            )


def _device(path: Path | None) -> int:
    assert path is not None
    return next(p for p in (path, *path.absolute().parents) if p.exists()).stat().st_dev
