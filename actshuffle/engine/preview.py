"""The plan of a run, without the run: memory, levels, and whether a source allows its rows to be gathered."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from actshuffle.arrays import virtual
from actshuffle.arrays.codecs import CODECS
from actshuffle.arrays.field import Field
from actshuffle.arrays.metadata import ZarrArray, source_arrays, source_buffer, source_field
from actshuffle.engine.request import Request
from actshuffle.errors import InfeasibleError, RequestError
from actshuffle.executors.base import SHARE, Executor
from actshuffle.machine import machine_memory
from actshuffle.planning.memory import MemoryModel
from actshuffle.planning.planner import LOCAL_RUN_BYTES, REMOTE_RUN_BYTES, Levels, make_plan
from actshuffle.planning.tree import Plan
from actshuffle.storage.objects import open_objects
from actshuffle.storage.place import Place, as_place
from actshuffle.units import format_bytes, parse_bytes, parse_count, whole

PREFERRED_MEMORY = 2 << 30  # a worker takes more only if that saves a level
WIDE_ROW = 2 << 10  # bytes; gathering takes 0.6 of the time of two levels for rows of 8 KiB, and 1.1 of it for 512 B


def plan(
    src: str | Path | None = None,
    *,
    rows: str | float | None = None,
    row_bytes: str | int | None = None,
    levels: Levels = "auto",
    memory: str | int | None = None,
    block_bytes: str | int | None = None,
    run_bytes: str | int | None = None,
    chunk_rows: int | None = None,
    chunks_per_shard: int | None = None,
    codec: str = "none",
    fields: Iterable[str] | None = None,
    spill_memory: str | int | None = None,
    gather: bool = False,
    workers: int | None = None,
    remote: bool = False,
    storage_options: dict[str, Any] | None = None,
) -> Plan:
    """The plan that `actshuffle.shuffle` would follow, for a store or for a number of rows and bytes per row.

    Give ``src``, or ``rows`` and ``row_bytes``.  Without ``memory`` or ``block_bytes`` the plan is made for this
    machine.  ``remote`` means that scratch and output are in an object store.  Raises `InfeasibleError`, with the
    arithmetic, where no plan is possible.
    """
    if (src is None) == (rows is None or row_bytes is None):
        raise RequestError("give a source, or both rows and row bytes")
    if gather and src is None:
        raise RequestError("rows are gathered from a store: give one")
    crew = whole("workers", workers or 0) or 1
    request = Request.among(locals()).filled(tasks_wanted=tasks_for(crew))
    if request.memory is None and request.block_bytes is None:
        request = request.changed(memory=default_memory(crew))
    if src is None:
        assert rows is not None
        assert row_bytes is not None
        width = parse_bytes(row_bytes)
        model = MemoryModel(width, remote=True, output_copies=2) if remote else MemoryModel(width)
        return plan_rows(parse_count(rows), model, request)
    place = as_place(src, storage_options)
    arrays, described = _described(place, request.fields)
    if gather:
        check_gather(place, described, request)
    made = plan_for(arrays, described, request, remote=remote, remote_source=is_remote(place))
    if gather:
        check_room(made, crew)
    return made


def gathers_well(
    src: str | Path,
    made: Plan,
    *,
    fields: Iterable[str] | None = None,
    workers: int | None = None,
    storage_options: dict[str, Any] | None = None,
) -> bool:
    """True if gathering reads and writes less than this plan of several levels, and takes less time.

    The source must fit into this machine's memory, and its rows must be so wide that reading each by itself is
    quicker than another level.
    """
    place = as_place(src, storage_options)
    _, described = _described(place, fields)
    try:
        check_gather(place, described, Request())
        check_room(made, workers or 1)
    except (RequestError, InfeasibleError):
        return False
    return made.levels > 1 and max(f.row_bytes for f in described) >= WIDE_ROW


def _described(place: Place, fields: Iterable[str] | None) -> tuple[dict[str, ZarrArray], list[Field]]:
    arrays = source_arrays(place, None if fields is None else tuple(fields))
    return arrays, [source_field(name, array) for name, array in arrays.items()]


def plan_for(
    arrays: dict[str, ZarrArray], fields: Sequence[Field], request: Request, *, remote: bool, remote_source: bool
) -> Plan:
    """The plan for some source arrays under a settled request.

    ``remote`` means that spill and output are in an object store, ``remote_source`` that the source is.
    """
    coded = not CODECS[request.codec].raw or (request.chunks_per_shard or 1) > 1
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
    """The plan for a number of rows under a settled request; ``source`` goes to `make_plan`."""
    return make_plan(
        rows,
        model.row_bytes,
        levels=request.levels,
        memory=request.memory,
        tasks_per_worker=request.tasks_per_worker,
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


def tasks_for(workers: int) -> int | None:
    """A number of tasks that keeps all workers busy to the end; None for one worker, which any number keeps busy."""
    return 3 * workers if workers > 1 else None


def default_memory(workers: int) -> int:
    """A moderate share of this machine's memory for each worker, in bytes."""
    return min(PREFERRED_MEMORY, int(SHARE * machine_memory() / workers))


def with_memory(request: Request, arrays: dict[str, ZarrArray], crew: Executor, src: Place, dst: Place) -> Request:
    """The request with a moderate share of a worker's memory, or with all of it where that saves a level."""
    fields = [source_field(name, array) for name, array in arrays.items()]
    where = {"remote": is_remote(dst), "remote_source": is_remote(src)}
    most = request.changed(memory=crew.task_memory() * request.tasks_per_worker)
    some = request.changed(memory=min(PREFERRED_MEMORY * request.tasks_per_worker, most.memory or 0))
    try:
        wide, lean = plan_for(arrays, fields, most, **where), plan_for(arrays, fields, some, **where)
    except InfeasibleError:
        return most
    return some if lean.levels <= wide.levels else most


def check_gather(src: Place, fields: Sequence[Field], request: Request) -> None:
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
    """Refuse to gather from a source that does not fit into memory beside the workers."""
    size, memory = plan.rows * plan.row_bytes, machine_memory()
    need = size + workers * plan.memory
    if need > memory:
        raise InfeasibleError(
            f"to gather rows, the source's {format_bytes(size)} must lie in memory beside "
            f"{workers} worker{'s' * (workers != 1)} with {format_bytes(plan.memory)} each, and there are "
            f"{format_bytes(memory)}: give less --memory, fewer --workers, or leave --gather out"
        )


def is_remote(place: Place) -> bool:
    return not open_objects(place).is_local
