"""Looking without touching: the plan of a run before it, the state of one on its way, what a store holds."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from actshuffle.arrays.field import Field
from actshuffle.arrays.metadata import ZarrArray, source_arrays, source_field
from actshuffle.engine.prepare import check as check_gather
from actshuffle.engine.prepare import check_room, default_memory, plan_for, plan_rows, tasks_for
from actshuffle.engine.request import Request
from actshuffle.errors import InfeasibleError, RequestError
from actshuffle.planning.memory import MemoryModel
from actshuffle.planning.planner import Levels
from actshuffle.planning.tree import Plan
from actshuffle.storage.objects import open_objects
from actshuffle.storage.place import Place, as_place
from actshuffle.units import parse_bytes, parse_count

# Bytes.  Measured: rows of 8 KiB are gathered in 0.6 of the time of two levels, of 512 B in 1.1 of it.
WIDE_ROW = 2 << 10


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
    """The plan `actshuffle.shuffle` would follow, for a store or for so many rows of so many bytes.

    Give ``src``, or ``rows`` and ``row_bytes``.  Without ``memory`` or ``block_bytes`` it is made for
    this machine.  ``remote`` says that scratch and output are in an object store.  Raises
    `InfeasibleError` with the arithmetic when it cannot be done.
    """
    if (src is None) == (rows is None or row_bytes is None):
        raise RequestError("give a source, or both rows and row bytes")
    if gather and src is None:
        raise RequestError("rows are gathered from a store: give one")
    crew = workers or 1
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
    made = plan_for(arrays, described, request, remote=remote, remote_source=not open_objects(place).is_local)
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
    """Would gathering do for a source with less reading and writing than this plan of several levels?

    There must be room for the source in this machine's memory; and rows so narrow that a read for each takes
    longer than another level are better left to it.
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
