"""A plan for people and for programs: the text and the JSON that `actshuffle plan` prints."""

from __future__ import annotations

from typing import Any

from actshuffle.planning.planner import reach_table
from actshuffle.planning.strategy import Candidate, cheapest
from actshuffle.planning.tree import Plan
from actshuffle.units import counted, format_bytes, format_seconds


def plan_report(made: Plan) -> dict[str, Any]:
    """A plan as plain values, the output of `actshuffle plan --json`."""
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
    """A plan as text for people."""
    r = plan_report(made)
    lines = [
        f"{counted(made.rows, 'row')} x {format_bytes(made.row_bytes)} = {format_bytes(r['bytes'])}",
        f"levels       {made.levels}   ({format_bytes(r['io_bytes'])} read and written)",
        f"blocks       M = {format_bytes(made.block_bytes)}, runs P >= {format_bytes(made.run_bytes)}"
        + (f", fan-out {' x '.join(map(str, r['fan_out']))}" if r["fan_out"] else ""),
        f"leaves       {made.leaves:,} of {counted(made.leaf_rows, 'row')} "
        f"({format_bytes(made.leaf_rows * made.row_bytes)})",
        f"output       {counted(r['objects']['output'], 'object')} of {counted(made.object_rows, 'row')} "
        "in the widest array",
        f"tasks        {' + '.join(f'{t:,}' for t in r['tasks'])}",
        f"memory       {format_bytes(made.memory)} per worker at most"
        + (f", and {format_bytes(r['spill_memory'])} in tmpfs" if r["spill_memory"] else ""),
        f"disk         scratch up to {format_bytes(r['scratch_bytes'])}, "
        f"with the output up to {format_bytes(r['disk_bytes'])}"
        + (f"; {r['disk_io_bytes'] / max(1, 2 * r['bytes']):.2f} times a copy's bytes" if r["spill_memory"] else ""),
        "",
        "reach at this M and P: "
        + ",  ".join(f"{x['levels']} level{'s' * (x['levels'] > 1)} {format_bytes(x['bytes'])}" for x in r["reach"]),
    ]
    return "\n".join(lines)


def request_text(found: dict[str, int]) -> str:
    """The requests of a run as text for people."""
    return f"requests     about {found['get']:,} GET and {found['put']:,} PUT to object stores"


def way_report(ways: list[Candidate]) -> list[dict[str, Any]]:
    """The ways that a planner compared, as plain values; those that are impossible have no seconds and no bytes."""
    best = cheapest(ways)
    return [
        {
            "strategy": one.name,
            "chosen": one is best,
            "seconds": one.seconds if one.plan else None,
            "bytes": one.nbytes if one.plan else None,
            "levels": one.plan.levels if one.plan else None,
            "reason": one.reason,
        }
        for one in ways
    ]


def way_text(ways: list[Candidate]) -> str:
    """The same as text for people; seconds are rough, and count no start-up."""
    lines = ["ways to the same output, by the time that each takes here and now"]
    for one in way_report(ways):
        took = "impossible" if one["seconds"] is None else f"{format_seconds(one['seconds'])}"
        moved = "" if one["bytes"] is None else format_bytes(one["bytes"])
        mark = "->" if one["chosen"] else ""
        lines.append(f"{mark:>3} {one['strategy']:<8} {took:>12} {moved:>9}  {one['reason']}")
    return "\n".join(lines)
