"""`peers`: other tools that shuffle, on the same rows, each in separate processes.

The time is that of the whole process, from start to exit, plus the time until its output is on disk
(actshuffle's is when it exits).  Sources start out of the page cache, which is full of another file's pages.
Uniformity is judged twice: by the design, and by actshuffle's mixing statistics on the row numbers of the
peer's output.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterable
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from actshuffle.machine import machine_memory
from actshuffle.ordering import mixing
from actshuffle.units import format_bytes, format_seconds
from benchmarks import cache, measure, plots
from benchmarks.floor import prepare
from benchmarks.peers import IMPORTS, PEERS, Work, formats, versions
from benchmarks.results import Bench, need_space, ranged, spread, table
from benchmarks.sources import make_source

CHUNK = 32 << 20
MOST = 0.8  # share of the machine's memory beyond which a run is killed


def run(
    bench: Bench,
    *,
    size: int,
    row_bytes: int,
    memory: int | None,
    workers: int,
    rounds: int,
    seconds: float,
    most_memory: int | None = None,
    only: list[str] | None = None,
    python: tuple[tuple[str, str], ...] = (),
    add: tuple[Path, ...] = (),
) -> None:
    need_space(bench.work, 6 * size)
    names = [name for name in PEERS if not only or name in only]
    if set(only or ()) - set(PEERS):
        raise ValueError(f"unknown peers {sorted(set(only or ()) - set(PEERS))}; known: {list(PEERS)}")
    interpreters = dict(python)
    zarr_source = make_source(bench.work, size, row_bytes, min(CHUNK, max(size // 8, row_bytes)))
    array = zarr.open_array(zarr_source, mode="r")
    work = Work(
        str(zarr_source), str(bench.work / "out"), array.shape[0], row_bytes, array.chunks[0], workers, memory, seed=1
    )
    limit = most_memory or int(MOST * machine_memory())
    found: list[dict[str, Any]] = []
    bench.plan(rounds * len(names))
    installed = {name: versions_of(name, interpreters.get(name)) for name in names}
    sources = Sources(bench.work, zarr_source)
    for number in range(rounds):
        for name in names:
            one = {"peer": name, "round": number, "versions": installed[name].get("versions")}
            previous = [f for f in found if f["peer"] == name]
            if "versions" not in installed[name]:
                one |= {"outcome": "not installed", "message": installed[name]["message"]}
            elif any(f["outcome"] != "done" for f in previous):
                one |= {"outcome": previous[0]["outcome"], "message": "not tried again"}
            else:
                one |= measured(name, interpreters.get(name), work, sources, seconds, limit)
            found.append(one)
            bench.did(f"{PEERS[name].title}: {told(one)}")
    for earlier in add:
        found = _earlier(earlier, bench.settings) + found
    rows = summary(found)
    images = plots.draw(bench, lambda folder: [plots.peers(folder, rows, work.nbytes)])
    bench.publish({"rounds": found, "summary": rows}, page(rows, work, seconds, limit), images)


def _earlier(path: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The rounds of another run of this benchmark, if it had the same task."""
    document = json.loads(path.read_text())
    for name in ("size", "row_bytes", "memory", "workers"):
        if document["settings"].get(name) != settings.get(name):
            raise ValueError(f"{path} has another {name}: {document['settings'].get(name)}")
    found: list[dict[str, Any]] = document["figures"]["rounds"]
    return found


class Sources:
    """The rows in one format at a time, rebuilt when a peer needs another one."""

    def __init__(self, folder: Path, zarr_source: Path) -> None:
        self.folder, self.zarr = folder, zarr_source
        self._kind = "zarr"

    def path(self, name: str, interpreter: str | None) -> Path:
        kind = PEERS[name].source
        if kind == "zarr":
            return self.zarr
        path = self.folder / f"source-{kind}"
        if kind != self._kind or not path.exists():
            for old in self.folder.glob("source-*"):
                if old != self.zarr:
                    shutil.rmtree(old)
            given = json.dumps({"source": str(self.zarr), "target": str(path)})
            made = measure.run(_command(interpreter, "prepare", name, given))
            if made.outcome != "done":
                raise RuntimeError(f"no {kind} source: {made.message}")
            self._kind = kind
        return path


def _command(interpreter: str | None, action: str, name: str, given: str) -> list[str]:
    return measure.python("-m", "benchmarks.peers", action, name, given, interpreter=interpreter)


def _work(interpreter: str | None, name: str, given: dict[str, Any]) -> list[str]:
    if name == "command":
        words = ("-m", "actshuffle", "run", given["source"], given["target"], "--seed", str(given["seed"]), "--quiet")
        return measure.python(*words)
    return _command(interpreter, "run", name, json.dumps(given))


def remove(folders: Iterable[Path]) -> None:
    for path in folders:
        shutil.rmtree(path, ignore_errors=True)


def versions_of(name: str, interpreter: str | None) -> dict[str, Any]:
    """The versions of a peer's packages, or a message that names the missing one."""
    if name == "spark" and shutil.which("java") is None:
        return {"message": "no Java runtime"}
    if interpreter is None:
        absent = [p for p in PEERS[name].packages if find_spec(IMPORTS.get(p, p)) is None]
        return {"message": f"no {absent[0]}"} if absent else {"versions": versions(name)}
    asked = measure.run(_command(interpreter, "versions", name, "{}"))
    if asked.outcome != "done":
        return {"message": asked.message}
    return {"versions": json.loads(asked.stdout.strip().splitlines()[-1])}


def measured(
    name: str, interpreter: str | None, work: Work, sources: Sources, seconds: float, limit: int
) -> dict[str, Any]:
    target = Path(work.target)
    try:
        source = sources.path(name, interpreter)
    except RuntimeError as err:
        return {"outcome": "failed", "message": str(err)}
    given = asdict(work) | {"source": str(source)}
    prepare("disk", [source])
    try:
        process = measure.run(_work(interpreter, name, given), seconds=seconds, memory=limit)
        result = process.as_dict()
        if process.outcome == "done":
            started = time.monotonic()
            cache.settle([target])
            result["settle"] = time.monotonic() - started
            result["seconds"] += result["settle"]
            result["mixing"] = _mixing(name, interpreter, target, work)
    finally:
        remove((target, *target.parent.glob(f"{target.name}.*"), *target.parent.glob("dask-*")))
    return result


def _mixing(name: str, interpreter: str | None, target: Path, work: Work) -> dict[str, Any]:
    """Check that the output holds every row once, and test its order for uniformity."""
    try:
        if interpreter is None:
            order = formats.read_order(PEERS[name].target, target)
        else:
            file = target.with_suffix(".npy")
            given = json.dumps({"target": str(target), "order": str(file)})
            read = measure.run(_command(interpreter, "order", name, given))
            if read.outcome != "done":
                return {"verdict": "unreadable", "detail": read.message}
            order = np.load(file)
            file.unlink()
    except Exception as err:  # a reader may fail in any way on the peer's output
        return {"verdict": "unreadable", "detail": f"{type(err).__name__}: {err}"}
    counts = np.bincount(order[(order >= 0) & (order < work.rows)], minlength=work.rows)
    if len(order) != work.rows or (counts != 1).any():
        return {"verdict": "not a permutation", "detail": f"{len(order):,} rows, {int((counts == 0).sum()):,} missing"}
    report = mixing.report(order, src_chunk_rows=work.chunk_rows, dst_chunk_rows=work.chunk_rows)
    worst = report.rejected[0] if report.rejected else None
    return {
        "verdict": "pass" if report.passed else "FAIL",
        "tests": len(report.tests),
        "detail": f"{worst.name} {worst.detail}: {worst.direction}, p = {worst.p_value:.1g}" if worst else "",
    }


def told(one: dict[str, Any]) -> str:
    if one["outcome"] != "done":
        return f"{one['outcome']} ({one['message']})" if one["message"] else one["outcome"]
    return f"{format_seconds(one['seconds'])}, {format_bytes(one['memory'])}, mixing {one['mixing']['verdict']}"


def summary(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for name in dict.fromkeys(one["peer"] for one in found):
        ours = [one for one in found if one["peer"] == name]
        done = [one for one in ours if one["outcome"] == "done"]
        peer = PEERS[name]
        row = {
            "peer": name,
            "title": peer.title,
            "exact": peer.exact,
            "why": peer.why,
            "outcome": ours[0]["outcome"] if len(done) < len(ours) else "done",
            "message": ours[0].get("message", ""),
            "versions": ours[0]["versions"],
        }
        if done:
            verdicts = [one["mixing"]["verdict"] for one in done]
            row |= {
                "seconds": spread([one["seconds"] for one in done]),
                "memory": spread([one["memory"] for one in done]),
                "verdict": next((v for v in verdicts if v != "pass"), "pass"),
                "detail": next((one["mixing"]["detail"] for one in done if one["mixing"]["detail"]), ""),
            }
        rows.append(row)
    return rows


def page(rows: list[dict[str, Any]], work: Work, seconds: float, limit: int) -> list[str]:
    base = next((r["seconds"]["median"] for r in rows if r["peer"] == "actshuffle" and "seconds" in r), None)
    limit_told = "their own default" if work.memory is None else format_bytes(work.memory)
    lines = []
    for r in rows:
        made_of = ", ".join(f"{k} {v}" for k, v in (r["versions"] or {}).items())
        if "seconds" in r:
            times = f"{r['seconds']['median'] / base:.1f}x" if base else ""
            cells = [ranged(r["seconds"], "{:.1f}"), times, f"{r['memory']['median'] / 1e9:.2f}"]
            cells += [r["verdict"] + (f" ({r['detail']})" if r["detail"] else "")]
        else:
            cells = [r["outcome"], "", "", ""]
        by_design = ("yes" if r["exact"] else "no") + f": {r['why']}"
        lines.append((r["title"], *cells[:3], by_design, cells[3], made_of))
    failures = [f"- {r['title']}: {r['outcome']}. {r['message']}" for r in rows if "seconds" not in r]
    return [
        f"{work.rows:,} rows of {work.row_bytes} B, {format_bytes(work.nbytes)}; {work.workers} processes or "
        f"threads; memory, for peers with such a setting: {limit_told}. Limits: {format_seconds(seconds)}, "
        f"{format_bytes(limit)}. Seconds are from the start of the process until its output is on disk; "
        "sources are cold, and converting them to a peer's format is not counted. Memory is the peak over "
        "all processes, mapped files not included. *measured* shows mixing statistics of the rows' order in "
        "the output: a pass proves nothing, a FAIL does.",
        "",
        *table(("", "seconds", "", "memory GB", "exactly uniform by design", "measured", "versions"), lines),
        *(["", *failures] if failures else []),
    ]
