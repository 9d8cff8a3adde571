"""The plan of a run, without the run: memory, levels, and whether a source allows its rows to be gathered."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from actshuffle.arrays import virtual
from actshuffle.arrays.codecs import CODECS
from actshuffle.arrays.field import Field
from actshuffle.arrays.metadata import ZarrArray, source_arrays, source_buffer, source_field
from actshuffle.engine.gather import rate_apart
from actshuffle.engine.request import Request
from actshuffle.engine.scratch import free_shared
from actshuffle.errors import InfeasibleError, RequestError
from actshuffle.executors.base import SHARE
from actshuffle.machine import free_memory, machine_memory
from actshuffle.planning.memory import MemoryModel
from actshuffle.planning.planner import LOCAL_RUN_BYTES, REMOTE_RUN_BYTES, Levels, make_plan
from actshuffle.planning.requests import requests
from actshuffle.planning.strategy import APART_FROM, Candidate, Site, candidates, cheapest
from actshuffle.planning.tree import Plan
from actshuffle.storage.directio import is_in_memory
from actshuffle.storage.objects import open_objects
from actshuffle.storage.place import Place, as_place, local_path
from actshuffle.units import format_bytes, parse_bytes, parse_count, switches, whole

PREFERRED_MEMORY = 2 << 30  # a worker takes more only if that saves a level
LOOKS = 64  # samples of the page cache


def plan(
    src: str | Path | None = None,
    dst: str | Path | None = None,
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
    gather: bool | None = None,
    random_reads: bool | None = None,
    workers: int | None = None,
    remote: bool | None = None,
    storage_options: dict[str, Any] | None = None,
) -> Plan:
    """The plan that `actshuffle.shuffle` would follow now, for a store or for a number of rows and bytes per row.

    For a store it is the plan of the cheapest way (`actshuffle.planning.strategy`), unless an argument names one.
    Give ``src``, or ``rows`` and ``row_bytes``.  Without ``memory`` or ``block_bytes`` the plan is made for this
    machine.  It is made for a ``dst``; without one, for scratch and output in an object store if ``src`` is a URL or
    ``remote`` says so.  Nothing is looked for at ``dst``.  Raises `InfeasibleError`, with the arithmetic, where no plan
    is possible.
    """
    return ways(**locals())[1]


def ways(
    src: str | Path | None,
    dst: str | Path | None = None,
    *,
    workers: int | None = None,
    remote: bool | None = None,
    **options: Any,
) -> tuple[list[Candidate], Plan]:
    """The ways among which the planner chooses, none where an argument names one, and the plan of `plan`."""
    rows, row_bytes, request = options.get("rows"), options.get("row_bytes"), Request.among(options)
    if (src is None) == (rows is None or row_bytes is None):
        raise RequestError("give a source, or both rows and row bytes")
    crew = whole("workers", workers or 0) or 1
    most = int(SHARE * machine_memory() / crew)  # of memory for a worker
    switches(remote=bool(remote) if remote is None else remote)
    home = _home(src, dst, remote, options.get("storage_options"))
    if src is None:
        if request.gather:
            raise RequestError("rows are gathered from a store: give one")
        request = request.filled(tasks_wanted=tasks_for(crew))
        if request.memory is None and request.block_bytes is None:
            request = request.changed(memory=min(PREFERRED_MEMORY, most))
        assert rows is not None
        assert row_bytes is not None
        width = parse_bytes(row_bytes)
        copies = copies_at(home)
        model = MemoryModel(width, remote=is_remote(home), output_copies=copies, block_copies=copies)
        return [], plan_rows(parse_count(rows), model, request)
    place = as_place(src, options.get("storage_options"))
    arrays = source_arrays(place, request.fields)
    outlook = Outlook(place, home, arrays, crew, True, lambda: most)
    found = outlook.candidates(request)
    made = outlook.plan(request.changed(**cheapest(found).asks) if found else request)
    check_room(made, crew, gather=bool(request.gather))
    return found, made


@dataclass(frozen=True)
class Outlook:
    """The facts about a source, a destination and the workers that are known before a plan is made.

    ``most`` asks for the memory that a worker has.
    """

    src: Place
    dst: Place
    arrays: dict[str, ZarrArray]
    workers: int
    one_machine: bool
    most: Callable[[], int]

    @cached_property
    def fields(self) -> list[Field]:
        found = [source_field(name, array) for name, array in self.arrays.items()]
        return found if virtual.open_reader(self.src) is None else [replace(f, source_key="") for f in found]

    def settle(self, request: Request) -> Request:
        """The request with tasks for all workers, and with a moderate share of a worker's memory, or with all of it
        where that saves a level."""
        request = request.filled(tasks_wanted=tasks_for(self.workers))
        if request.memory is not None or request.block_bytes is not None:
            return request
        most = request.changed(memory=self.most() * request.tasks_per_worker)
        some = request.changed(memory=min(PREFERRED_MEMORY * request.tasks_per_worker, most.memory or 0))
        try:
            wide, lean = self._plan(most), self._plan(some)
        except InfeasibleError:
            return most
        return some if lean.levels <= wide.levels else most

    def plan(self, request: Request) -> Plan:
        """The plan of a request; a gather is checked first."""
        if request.gather:
            check_gather(self.src, request, self._rows)
        return self._plan(self.settle(request))

    def _plan(self, request: Request) -> Plan:
        return plan_for(self.arrays, self.fields, request, self.src, self.dst)

    def choose(self, request: Request) -> Request:
        """The settled request for the cheapest way, where the request leaves a choice."""
        found = self.candidates(request)
        return self.settle(request.changed(**cheapest(found).asks) if found else request)

    def candidates(self, request: Request) -> list[Candidate]:
        """All ways to the output that a request allows; none where it allows one only."""
        if not (wanted := choices(request, self.workers)):
            return []
        if virtual.open_reader(self.src) is not None and not virtual.is_whole(self.src, self._rows):
            return []

        def planned(**asks: Any) -> Plan:
            return self._plan(self.settle(request.changed(**asks)))

        return [one for one in candidates(self._site(request), planned) if one.name in wanted]

    @property
    def _rows(self) -> int:
        return int(next(iter(self.arrays.values())).shape[0])

    def _site(self, request: Request) -> Site:
        remote, path = is_remote(self.src), local_path(self.src)
        # Which arrays have gaps, and must be read through zarr, is not known before the inventory.
        coded = sum(f.row_bytes for f in self.fields if not f.source_key or request.fill_missing)
        return Site(
            workers=self.workers,
            one_machine=self.one_machine,
            free=free_memory(),
            shared=free_shared(),
            cached=0.0 if remote else _cached(self.src, self._rows, self.fields),
            fields=len(self.fields),
            staged=sum(f.row_bytes for f in self.fields) if remote else coded,
            coded=coded,
            remote=remote,
            remote_output=is_remote(self.dst),
            elastic=request.memory is None,
            resident=path is not None and is_in_memory(path.stat().st_dev),
            wide=sum(f.row_bytes >= APART_FROM for f in self.fields),
            rate=partial(_rate_apart, self.src, self._rows, self.fields),
        )


def choices(request: Request, workers: int) -> set[str]:
    """The ways among which the planner may choose: none where the request names one.

    Whoever gives M or P asks for the arithmetic of passes, and whoever gives a number of levels for that number; a
    single level may be gathered, since all workers then have a part of it.
    """
    if request.gather or request.given & {"block_bytes", "run_bytes", "spill_memory"}:
        return set()
    gathered = set() if "gather" in request.given else {"gather", "memory", "disk"}
    if "random_reads" in request.given:
        gathered -= {"disk"}
    if request.levels == "auto":
        return gathered | {"spill", "levels"}
    return gathered | {"levels"} if gathered and request.levels == 1 and workers > 1 else set()


def _cached(src: Place, rows: int, fields: Sequence[Field]) -> float:
    """The share of a source's bytes that the page cache holds, by samples of its widest plain array."""
    plain = [f for f in fields if f.source_key]
    if not plain or not rows:
        return 1.0  # what a codec makes takes longer than the reads
    widest, objects = max(plain, key=lambda f: f.row_bytes), open_objects(src)
    spans = [next(widest.spans(row, row + 1)) for row in (secrets.randbelow(rows) for _ in range(LOOKS))]
    return sum(objects.is_cached(key, offset) for key, offset, _ in spans) / LOOKS


def _rate_apart(src: Place, rows: int, fields: Sequence[Field], seconds: float) -> float:
    """Rows of the widest array that the disk gives in a second, each from a random place."""
    return rate_apart(open_objects(src, direct=True), max(fields, key=lambda f: f.row_bytes), rows, seconds)


def plan_for(arrays: dict[str, ZarrArray], fields: Sequence[Field], request: Request, src: Place, dst: Place) -> Plan:
    """The plan for some source arrays under a settled request."""
    if request.random_reads and (is_remote(src) or not all(f.source_key for f in fields)):
        raise RequestError(
            f"rows of {src} must be decoded or fetched before they can be gathered: leave --random-reads out"
        )
    remote, copies = is_remote(dst), copies_at(dst)
    coded = not CODECS[request.codec].raw or (request.chunks_per_shard or 1) > 1
    model = MemoryModel(
        row_bytes=sum(f.row_bytes for f in fields),
        source_buffer=source_buffer(list(arrays.values()), remote=is_remote(src) and not remote),
        remote=remote,
        output_copies=2 if coded else copies,
        block_copies=copies,
    )
    widest = max(fields, key=lambda f: f.row_bytes)
    widest_row = max(widest.row_bytes, 8 if request.source_row else 0)
    rows = next(iter(arrays.values())).shape[0]
    made = plan_rows(rows, model, request, widest_row=widest_row, source_chunk_rows=widest.source_chunk_rows)
    return replace(made, apart=request.random_reads)


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


def check_gather(src: Place, request: Request, rows: int) -> None:
    """Refuse sources whose rows have no numbers of their own, and arguments that make no sense in one pass."""
    if request.levels not in ("auto", 1) or request.spill_memory:
        raise RequestError("gathering is one level without spill: leave --levels and --spill-memory out")
    if virtual.open_reader(src) is not None and not virtual.is_whole(src, rows):
        raise RequestError(
            f"rows of {src} are some of another store's, and cannot be gathered by their numbers: leave --gather out"
        )


def check_room(plan: Plan, workers: int, tasks_per_worker: int = 1, *, gather: bool) -> None:
    """Refuse to have more in the machine's memory than fits beside the workers: a source to gather from, or spill."""
    if gather:
        held, each = 0 if plan.apart else plan.rows * plan.row_bytes, plan.memory
        what, advice = f"to gather rows, the source's {format_bytes(held)} must lie", "or leave --gather out"
    else:
        held, each = plan.kept_bytes, min(plan.memory, tasks_per_worker * _task_bytes(plan))
        what, advice = f"{format_bytes(held)} of spill are to stay", "or less --spill-memory"
    if held and held + workers * each > machine_memory():
        raise InfeasibleError(
            f"{what} in memory beside {workers} worker{'s' * (workers != 1)} with {format_bytes(each)} each, and there "
            f"are {format_bytes(machine_memory())}: give less --memory, fewer --workers, {advice}"
        )


def _task_bytes(plan: Plan) -> int:
    """Bytes of memory that the largest task of a plan takes at most, which may be less than it is allowed."""
    leaf = plan.model.leaf_bytes(min(plan.leaf_rows, plan.rows), plan.object_rows * plan.row_bytes)
    return max([leaf, *map(plan.model.split_bytes, plan.block_rows)])


_SOME_STORE, _SOME_DISK = Place("store://"), Place("/")  # stand for a destination without a name; nothing opens them


def _home(src: str | Path | None, dst: str | Path | None, remote: bool | None, options: dict[str, Any] | None) -> Place:
    """The destination that a plan is made for."""
    if dst is not None:
        return as_place(dst, options)
    if remote is None and src is not None:
        return as_place(src, options)  # beside it
    return _SOME_STORE if remote else _SOME_DISK


def is_remote(place: Place) -> bool:
    return place == _SOME_STORE or not open_objects(place).is_local


def copies_at(place: Place) -> int:
    """The copies of an object that the client of a place holds while it writes the object there."""
    return 0 if place == _SOME_STORE else open_objects(place).copies


def requests_of(made: Plan, src: str | Path | None, dst: str | Path | None = None, **options: Any) -> dict[str, int]:
    """About how many requests the run of a plan sends to object stores; empty if it sends none.

    Takes the arguments of `plan`.
    """
    given, remote = options.get("storage_options"), options.get("remote")
    output = is_remote(_home(src, dst, remote, given))
    source = output if src is None else is_remote(as_place(src, given))
    return requests(made, source=source, output=output) if source or output else {}
