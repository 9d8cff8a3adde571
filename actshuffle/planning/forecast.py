"""The forecast of a run on many hosts: the report of `actshuffle plan --hosts`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from actshuffle.planning import cost, simulate, stages
from actshuffle.planning.cost import Cluster
from actshuffle.planning.tree import Plan
from actshuffle.units import counted, format_bytes, format_seconds


def forecast(plan: Plan, cluster: Cluster, *, simulated: bool = False, seed: int = 0) -> dict[str, Any]:
    """Stages with their limits, seconds, bytes, requests and dollars, as plain values.

    Seconds are the lower bounds by arithmetic, or, if ``simulated``, those of one simulated run.
    """
    found = list(stages.stages(plan, cluster))
    rows: list[dict[str, Any]] = []
    for stage in found:
        least, limit = cost.least_seconds(stage, cluster)
        rows.append(
            {
                "stage": stage.name,
                "tasks": stage.tasks,
                "seconds": least,
                "least_seconds": least,
                "limit": limit,
                "limits": cost.limits(stage, cluster) | {"driver": stage.driver},
                "read_bytes": stage.read,
                "written_bytes": stage.written,
                "gets": stage.gets,
                "puts": stage.puts,
            }
        )
    if simulated:
        for row, played in zip(rows, simulate.simulate(plan, cluster, seed=seed), strict=True):
            row |= {
                "seconds": played.seconds,
                "tail_seconds": played.tail,
                "failures": played.failures,
                "lost_tasks": played.lost,
            }
    seconds = sum(row["seconds"] for row in rows)
    return {
        "simulated": simulated,
        "hosts": cluster.hosts,
        "workers": cluster.workers,
        "scratch_on": cluster.scratch,
        "source_and_destination_on": cluster.ends,
        "seconds": seconds,
        "bytes_per_second": plan.rows * plan.row_bytes / seconds if seconds else 0.0,
        "gets": sum(s.gets for s in found),
        "puts": sum(s.puts for s in found),
        "dollars": cost.dollars(plan, found, cluster, seconds),
        "failures": sum(row.get("failures", 0) for row in rows),
        "lost_tasks": sum(row.get("lost_tasks", 0) for row in rows),
        "stages": rows,
        "concerns": stages.concerns(plan, cluster),
    }


def text(told: dict[str, Any]) -> str:
    """A forecast as lines of text for people."""
    return "\n".join(_lines(told))


def _lines(told: dict[str, Any]) -> Iterator[str]:
    how = "simulated" if told["simulated"] else "at least, by arithmetic"
    places = {"disk": "the hosts' disks", "store": "an object store"}
    scratch, ends = places[told["scratch_on"]], places[told["source_and_destination_on"]]
    where = f"all on {ends}" if scratch == ends else f"scratch on {scratch}, the rest on {ends}"
    yield (
        f"forecast     {format_seconds(told['seconds'])} {how}, {format_bytes(told['bytes_per_second'])}/s end to end"
    )
    yield f"             {counted(told['hosts'], 'host')}, {counted(told['workers'], 'worker')}; {where}"
    yield f"  {'stage':<12}{'tasks':>11}{'time':>14}{'moved':>10}{'requests':>10}  limited by"
    for row in told["stages"]:
        moved = row["read_bytes"] + row["written_bytes"]
        share = row["least_seconds"] / row["seconds"] if row["seconds"] else 1.0
        tail = f"  {100 * share:.0f}% of it, {format_seconds(row.get('tail_seconds', 0.0))} tail"
        yield (
            f"  {row['stage']:<12}{row['tasks']:>11,}{format_seconds(row['seconds']):>14}"
            f"{format_bytes(moved):>10}{row['gets'] + row['puts']:>10,.3g}  {row['limit']}"
            + (tail if told["simulated"] and row["tasks"] else "")
        )
    if told["simulated"]:
        again = "was done again" if told["lost_tasks"] == 1 else "were done again"
        yield f"failures     {counted(told['failures'], 'host')} died, {counted(told['lost_tasks'], 'task')} {again}"
    paid = told["dollars"]
    if paid["total"]:
        yield (
            f"dollars      {paid['total']:,.0f}: hosts {paid['hosts']:,.0f}, requests "
            f"{paid['requests']:,.0f}, scratch {paid['scratch']:,.0f}"
        )
    for concern in told["concerns"]:
        yield f"concern      {concern}"
