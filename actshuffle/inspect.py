"""Looking without touching: the plan of a run before it, the state of one on its way, what a store holds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import zarr

from actshuffle import manifest, tasks
from actshuffle.arrays import SOURCE_ROW, object_grid, open_node, source_arrays, source_field
from actshuffle.data.dataset import is_ours, open_dataset
from actshuffle.errors import IncompleteStoreError, InfeasibleError, RequestError
from actshuffle.gather import check as check_gather
from actshuffle.gather import check_room
from actshuffle.memory import MemoryModel
from actshuffle.objects import as_place, local_path, open_objects
from actshuffle.planner import LOCAL_RUN_BYTES, REMOTE_RUN_BYTES, Levels, make_plan, reach_table
from actshuffle.prepare import default_memory, plan_for, recorded_scratch
from actshuffle.types import Field, Place, Plan
from actshuffle.units import format_bytes, parse_bytes, parse_count

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
    given: dict[str, Any] = {
        "levels": levels,
        "memory": None if memory is None else parse_bytes(memory),
        "block_bytes": None if block_bytes is None else parse_bytes(block_bytes),
        "run_bytes": None if run_bytes is None else parse_bytes(run_bytes),
        "chunk_rows": chunk_rows,
        "chunks_per_shard": chunks_per_shard,
        "codec": codec,
        "spill_memory": 0 if spill_memory is None else parse_bytes(spill_memory),
        "gather": gather,
        "tasks_wanted": 3 * workers if workers and workers > 1 else 1,
    }
    if (src is None) == (rows is None or row_bytes is None):
        raise RequestError("give a source, or both rows and row bytes")
    if gather and src is None:
        raise RequestError("rows are gathered from a store: give one")
    if src is None:
        if given["memory"] is None and given["block_bytes"] is None:
            given["memory"] = default_memory(workers or 1)
        assert rows is not None
        assert row_bytes is not None
        usual_run = REMOTE_RUN_BYTES if remote else LOCAL_RUN_BYTES
        width = parse_bytes(row_bytes)
        return make_plan(
            parse_count(rows),
            width,
            levels=levels,
            memory=given["memory"],
            block_bytes=given["block_bytes"],
            run_bytes=given["run_bytes"] or usual_run,
            chunk_rows=chunk_rows,
            chunks_per_shard=chunks_per_shard,
            tasks_wanted=given["tasks_wanted"],
            model=MemoryModel(width, remote=True, output_copies=2) if remote else None,
            spill_memory=given["spill_memory"],
        )
    place = as_place(src, storage_options)
    arrays, described = _described(place, fields)
    if given["memory"] is None and given["block_bytes"] is None:
        given["memory"] = default_memory(workers or 1)
    if gather:
        check_gather(place, described, given)
    made = plan_for(arrays, described, given, remote=remote, remote_source=local_path(place) is None)
    if gather:
        check_room(made, workers or 1)
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
        check_gather(place, described, {})
        check_room(made, workers or 1)
    except (RequestError, InfeasibleError):
        return False
    return made.levels > 1 and max(f.row_bytes for f in described) >= WIDE_ROW


def _described(place: Place, fields: Iterable[str] | None) -> tuple[dict[str, zarr.Array[Any]], list[Field]]:
    arrays = source_arrays(place, None if fields is None else tuple(fields))
    return arrays, [source_field(name, array) for name, array in arrays.items()]


def plan_report(made: Plan) -> dict[str, Any]:
    """A plan as plain values: what `actshuffle plan --json` prints."""
    depths = range(1, made.levels)
    reads_writes = [made.level_bytes(level) for level in range(1, made.levels + 1)]
    return {
        "levels": made.levels,
        "rows": made.rows,
        "row_bytes": made.row_bytes,
        "bytes": made.rows * made.row_bytes,
        "block_bytes": made.block_bytes,
        "run_bytes": made.run_bytes,
        "fan_out": [-(-made.widths[d - 1] // made.widths[d]) for d in depths],
        "leaves": made.leaves,
        "leaf_rows": made.leaf_rows,
        "block_rows": list(made.block_rows),
        "chunk_rows": made.chunk_rows,
        "object_rows": made.object_rows,
        "tasks": [made.task_count(level) for level in range(1, made.levels + 1)],
        "objects": {"output": -(-made.rows // made.object_rows), "spill": [made.blocks(level) for level in depths]},
        "read_bytes": sum(r for r, _ in reads_writes),
        "written_bytes": sum(w for _, w in reads_writes),
        "io_bytes": sum(r + w for r, w in reads_writes),
        "spill_memory": made.kept_bytes,
        "disk_io_bytes": made.disk_io_bytes,
        "scratch_bytes": made.scratch_bytes,
        "disk_bytes": made.disk_bytes,
        "memory": made.memory,
        "reach": [{"levels": n, "bytes": b} for n, b in reach_table(made.block_bytes, made.run_bytes)],
    }


def plan_text(made: Plan) -> str:
    """A plan for people."""
    r = plan_report(made)
    lines = [
        f"{made.rows:,} rows x {format_bytes(made.row_bytes)} = {format_bytes(r['bytes'])}",
        f"levels       {made.levels}   ({format_bytes(r['io_bytes'])} read and written)",
        f"blocks       M = {format_bytes(made.block_bytes)}, runs P >= {format_bytes(made.run_bytes)}"
        + (f", fan-out {' x '.join(map(str, r['fan_out']))}" if r["fan_out"] else ""),
        f"leaves       {made.leaves:,} of {made.leaf_rows:,} rows ({format_bytes(made.leaf_rows * made.row_bytes)})",
        f"output       {r['objects']['output']:,} objects of {made.object_rows:,} rows in the widest array",
        f"tasks        {' + '.join(f'{t:,}' for t in r['tasks'])}",
        f"memory       {format_bytes(made.memory)} per worker at most"
        + (f", and {format_bytes(r['spill_memory'])} of spill" if r["spill_memory"] else ""),
        f"disk         scratch up to {format_bytes(r['scratch_bytes'])}, "
        f"with the output up to {format_bytes(r['disk_bytes'])}"
        + (f"; {r['disk_io_bytes'] / max(1, 2 * r['bytes']):.2f} times what a copy moves" if r["spill_memory"] else ""),
        "",
        "reach at this M and P: "
        + ",  ".join(f"{x['levels']} level{'s' * (x['levels'] > 1)} {format_bytes(x['bytes'])}" for x in r["reach"]),
    ]
    return "\n".join(lines)


def info(path: str | Path, storage_options: dict[str, Any] | None = None) -> dict[str, Any]:
    """What a store holds: rows, arrays, chunks, codecs, and whether a run of ours finished it.

    ``shuffled`` is the completion marker, whatever its kind; ``unmarked`` says that there is none in a
    store of ours.  A view has no objects of its own.
    """
    place = as_place(path, storage_options)
    objects = open_objects(place)
    marker = manifest.read_marker(objects)
    half_done = marker is None and objects.size(manifest.RUN_KEY) is not None
    if half_done:
        raise IncompleteStoreError(f"{path} is half done: see `actshuffle status {path}`")
    node = open_node(place)
    view = None
    if marker is not None and marker["kind"] == "view":
        view = open_dataset(path, storage_options=storage_options)
    arrays = source_arrays(
        place if view is None else view.root, None if isinstance(node, zarr.Array) or marker is None else _names(marker)
    )
    rows = next(iter(arrays.values())).shape[0] if view is None else view.rows
    described = {
        name: {
            "shape": [rows, *a.shape[1:]],
            "dtype": _dtype_name(a),
            "chunks": list(a.chunks),
            "shards": list(a.shards) if a.shards else None,
            "zarr_format": a.metadata.zarr_format,
            "codecs": _codecs(a),
            "bytes": a.nbytes // max(1, a.shape[0]) * rows,
            "objects": _count(a) if view is None else 0,
            "raw": bool(source_field(name, a).source_key),
        }
        for name, a in arrays.items()
    }
    return {
        "path": manifest.public_url(place.url),
        "rows": rows,
        "bytes": sum(a["bytes"] for a in described.values()),
        "arrays": described,
        "attributes": dict(node.attrs),
        "shuffled": marker,
        "unmarked": marker is None and is_ours(objects),
    }


def info_text(found: dict[str, Any]) -> str:
    """`info` for people."""
    lines = [f"{found['path']}: {found['rows']:,} rows, {format_bytes(found['bytes'])}"]
    table = [("array", "shape", "dtype", "chunk", "objects", "codecs")]
    for name, a in found["arrays"].items():
        chunk = "x".join(map(str, a["chunks"])) + (f" in {'x'.join(map(str, a['shards']))}" if a["shards"] else "")
        table.append(
            (name, "x".join(map(str, a["shape"])), a["dtype"], chunk, f"{a['objects']:,}", " ".join(a["codecs"]))
        )
    widths = [max(len(row[i]) for row in table) for i in range(6)]
    lines += ["  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in table]
    if found["unmarked"]:
        made_by = "no completion marker: half written, or damaged since"
    else:
        made_by = _made_by(found["shuffled"])
    return "\n".join([*lines, made_by])


def _made_by(marker: dict[str, Any] | None) -> str:
    """What a completion marker says, for people."""
    if marker is None:
        return "not an actshuffle output"
    if marker["kind"] == "view":
        return f"view: rows {marker['start']:,} to {marker['stop']:,} of {marker['of']}"
    version = f"(actshuffle {marker.get('version', '?')}, format {marker['format']})"
    source = f", from {marker['source']}" if marker.get("source") else ""
    if marker["kind"] == "collection":
        return f"collection: complete, in the order in which it was made{source} {version}"
    part = marker.get("population", marker["rows"])
    of = f", {marker['rows']:,} of {part:,} rows" if part != marker["rows"] else ""
    levels = f"{marker['levels']} level{'s' * (marker['levels'] != 1)}"
    return f"shuffled: complete, seed {marker['seed']}, {levels}{of}{source} {version}"


def status(dst: str | Path, storage_options: dict[str, Any] | None = None) -> dict[str, Any]:
    """How far the run that writes ``dst`` is: tasks done by level, from the receipts."""
    place = as_place(dst, storage_options)
    objects = open_objects(place)
    if manifest.read_marker(objects) is not None:
        return {"path": manifest.public_url(place.url), "state": "complete", "levels": []}
    body = manifest.read_run(objects)
    if body is None:
        raise IncompleteStoreError(f"{dst} is no output of actshuffle, finished or half done")
    # Its own places are not gone to: the file may be somebody else's.
    job = replace(manifest.job_from(body, place.options), destination=place, scratch=recorded_scratch(place, body))
    levels = []
    first = tasks.first_level(job)
    for level in range(1, job.plan.levels + 1):
        total = job.plan.task_count(level)
        done = total if level < first else sum(tasks.is_done(job, t) for t in job.plan.tasks(level))
        levels.append({"level": level, "tasks": total, "done": done})
    state = {"path": manifest.public_url(place.url), "state": "half done", "levels": levels}
    return {**state, "request": body["request"], "scratch": manifest.public_url(job.scratch.url)}


def status_text(found: dict[str, Any]) -> str:
    """`status` for people."""
    if found["state"] == "complete":
        return f"{found['path']}: complete"
    lines = [f"{found['path']}: half done; run it again with the same arguments to go on"]
    for x in found["levels"]:
        share = x["done"] / x["tasks"] if x["tasks"] else 1.0
        lines.append(
            f"  level {x['level']} of {len(found['levels'])}   {x['done']:,} of {x['tasks']:,} tasks ({share:.0%})"
        )
    lines.append("  arguments: " + ", ".join(f"{k}={v}" for k, v in sorted(found["request"].items())))
    lines.append(f"  scratch: {found['scratch']}")
    return "\n".join(lines)


def _names(marker: dict[str, Any]) -> list[str]:
    return [*marker["fields"], *([SOURCE_ROW] if marker.get("source_row") else [])]


def _dtype_name(array: zarr.Array[Any]) -> str:
    named = array.metadata.to_dict().get("data_type")
    return "bfloat16" if named == "bfloat16" else str(array.dtype)


def _codecs(array: zarr.Array[Any]) -> list[str]:
    names = [type(c).__name__.removesuffix("Codec").lower() for c in (*array.filters, *array.compressors)]
    return names or ["none"]


def _count(array: zarr.Array[Any]) -> int:
    total = 1
    for n, c in zip(array.shape, object_grid(array), strict=True):
        total *= -(-n // c)
    return total


__all__ = ["info", "info_text", "plan", "plan_report", "plan_text", "status", "status_text"]
