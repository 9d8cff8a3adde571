"""`sae-quality`: FVU, dead latents and planted features found over seeds, by our defaults, other ways, and peers.

A case is one way of training on one kind of rows; it runs in a process of its own, in the environment of its tool, once
for each seed.  A seed draws the initial weights, and planted rows too, so all cases see the same rows for a seed, and
the differences from our default are of pairs.  Peers run at their default rate and at those of `RATES`; their best
mean FVU counts.  Cases that the same day's results have, with the same settings, are not run again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import numpy as np

import actshuffle
from benchmarks import plots
from benchmarks.results import Bench, table
from benchmarks.sae.forms import FORMS
from benchmarks.sae.tools import TOOLS

ROOT = Path(__file__).parents[2]
RATES = (1e-3, 4e-3, 8e-3, 1.6e-2)  # of peers, besides each one's default
PLANTED = {"d": 64, "features": 256, "active": 6.0}
# Student's t, two-sided 95 %, by the number of values less one.
T95 = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
MEASURES = {"fvu": "held-out FVU", "never_fired": "dead on held-out rows", "found": "planted features found"}


def run(
    bench: Bench,
    *,
    store: Path | None,
    field: str,
    d_sae: int,
    k: int,
    steps: int,
    batch: int,
    planted_d_sae: int,
    planted_k: int,
    planted_steps: int,
    seeds: int,
    peer_seeds: int,
    forms: list[str] | None,
    jobs: int,
    python: tuple[tuple[str, str], ...] = (),
) -> None:
    kinds: dict[str, dict[str, Any]] = {}
    test = 16 * batch
    same = {"batch": batch, "test": test}
    if planted_steps:
        kinds["planted"] = same | {
            "planted": PLANTED, "d_sae": planted_d_sae, "k": planted_k, "steps": planted_steps, "rows": None,
        }  # fmt: skip
    if steps and store is not None:
        path = bench.work / "rows.npy"
        np.save(path, _rows(store, field, steps * batch + test))
        kinds["store"] = same | {"planted": None, "d_sae": d_sae, "k": k, "steps": steps, "rows": str(path)}
    interpreters = {"saetrain": sys.executable, **dict(python)}
    if unknown := set(interpreters) - {tool.module for tool in TOOLS.values()}:
        raise click.ClickException(f"no tool is called {', '.join(sorted(unknown))}")
    cases = []
    for kind, what in kinds.items():
        for form in forms or FORMS:
            cases.append(what | {"kind": kind, "tool": "saetrain", "form": form, "lr": None, "seeds": seeds})
        for name, tool in TOOLS.items():
            if tool.module in interpreters and tool.module != "saetrain":
                for lr in (None, *RATES):
                    cases.append(what | {"kind": kind, "tool": name, "form": "default", "lr": lr, "seeds": peer_seeds})
    done = _earlier(bench)
    todo = [case for case in cases if _key(case) not in done]
    bench.plan(len(todo))
    with ThreadPoolExecutor(jobs) as crew:
        for case, found in crew.map(lambda case: (case, _trial(case, interpreters)), todo):
            done[_key(case)] = {n: v for n, v in case.items() if n != "rows"} | found
            bench.did(f"{case['kind']}, {_name(case)}: " + "  ".join(_texts(found["lines"])))
            _publish(bench, [*done.values()])
    _publish(bench, [*done.values()])


def _rows(store: Path, field: str, count: int) -> np.ndarray[Any, Any]:
    data = actshuffle.open_dataset(store)
    if data.rows < count:
        raise click.ClickException(f"{store} has {data.rows:,} rows; {count:,} are needed, each seen once")
    return np.asarray(data.read(field, 0, count), np.float32)


def _trial(case: dict[str, Any], interpreters: dict[str, str]) -> dict[str, Any]:
    given = case | {"seeds": list(range(case["seeds"]))}
    command = [interpreters[TOOLS[case["tool"]].module], "-m", "benchmarks.sae.trial"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, input=json.dumps(given), capture_output=True, text=True, env=environment)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        return {"failed": last[0], "lines": []}
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def _key(case: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(case[n] for n in ("kind", "tool", "form", "lr", "seeds", "steps", "batch", "d_sae", "k"))


def _earlier(bench: Bench) -> dict[tuple[Any, ...], dict[str, Any]]:
    path = bench.results / "results.json"
    found = json.loads(path.read_text())["figures"]["cases"] if path.exists() else []
    return {_key(case): case for case in found if case["lines"]}


def _name(case: dict[str, Any]) -> str:
    if case["tool"] == "saetrain":
        return FORMS[case["form"]].words
    return f"{case['tool']}, {'default rate' if case['lr'] is None else 'rate ' + format(case['lr'], 'g')}"


def interval(values: list[float]) -> tuple[float, float]:
    """The mean, and half the width of its 95 % interval."""
    n = len(values)
    return float(np.mean(values)), float(T95[n - 1] * np.std(values, ddof=1) / n**0.5) if n > 1 else float("nan")


def _texts(lines: list[dict[str, Any]]) -> Iterator[str]:
    for name in MEASURES:
        if lines and name in lines[0]:
            mean, half = interval([line[name] for line in lines])
            yield f"{name} {mean:.4f} +- {half:.4f}"


def summary(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each kind of rows, our forms and each peer at its best rate, with differences from our default."""
    found = []
    for kind in dict.fromkeys(case["kind"] for case in cases):
        here = [case for case in cases if case["kind"] == kind and case["lines"]]
        base = next((c for c in here if c["tool"] == "saetrain" and c["form"] == "default"), None)
        chosen = [case for case in here if case["tool"] == "saetrain"]
        for tool in dict.fromkeys(case["tool"] for case in here if case["tool"] != "saetrain"):
            tries = [case for case in here if case["tool"] == tool]
            chosen.append(min(tries, key=lambda case: interval([x["fvu"] for x in case["lines"]])[0]))
        for case in chosen:
            row: dict[str, Any] = {"kind": kind, "name": _name(case), "ours": case["tool"] == "saetrain"}
            row |= {"is_default": case is base, "seeds": len(case["lines"])}
            row["l0"] = float(np.mean([line["l0"] for line in case["lines"]]))
            for name in MEASURES:
                if name in case["lines"][0]:
                    row[name] = interval([line[name] for line in case["lines"]])
                    pairs = [*zip(case["lines"], base["lines"], strict=False)] if base is not None else []
                    row[f"{name}_less"] = interval([a[name] - b[name] for a, b in pairs]) if pairs else None
            found.append(row)
    return found


def _publish(bench: Bench, cases: list[dict[str, Any]]) -> None:
    rows = summary(cases)
    images = plots.draw(bench, lambda folder: [_draw(folder, rows)])
    bench.publish({"cases": cases, "summary": rows}, page(cases, rows), images)


def page(cases: list[dict[str, Any]], rows: list[dict[str, Any]]) -> Iterator[str]:
    versions = {TOOLS[c["tool"]].package: c["version"] for c in cases if c["lines"]}
    yield ", ".join(f"{name} {version}" for name, version in versions.items()) + ".\n"
    for case in cases:
        if "failed" in case:
            yield f"{_name(case)} on {case['kind']} rows failed: {case['failed']}\n"
    for kind in dict.fromkeys(row["kind"] for row in rows):
        here, case = [row for row in rows if row["kind"] == kind], next(c for c in cases if c["kind"] == kind)
        yield f"## {'Planted rows' if kind == 'planted' else 'Rows of a store'}\n"
        yield (
            f"{case['steps']:,} steps of {case['batch']:,} rows, {case['d_sae']:,} latents, k = {case['k']}; measured "
            f"on {case['test']:,} held-out rows"
            + (", {features} true features in {d} dimensions".format(**PLANTED) if kind == "planted" else "")
            + ". Means over seeds with 95 % intervals of Student's t; differences are from our default, by seed.\n"
        )
        shown = [name for name in MEASURES if name in here[0]]
        head = ["", "seeds", "L0"]
        for name in shown:
            head += [MEASURES[name], "difference"]
        yield from table(head, ([row["name"], row["seeds"], f"{row['l0']:.1f}", *_cells(row, shown)] for row in here))
        yield ""


def _cells(row: dict[str, Any], shown: list[str]) -> Iterator[str]:
    for name in shown:
        (mean, half), less = row[name], row[f"{name}_less"]
        yield f"{mean:.4f} ± {half:.4f}"
        yield "" if less is None or row["is_default"] else f"{less[0]:+.4f} ± {less[1]:.4f}"


def _draw(folder: Path, rows: list[dict[str, Any]]) -> str:
    import matplotlib.pyplot as plt

    if not rows:
        return ""
    kinds = [*dict.fromkeys(row["kind"] for row in rows)]
    tall = max(sum(row["kind"] == kind for row in rows) for kind in kinds)
    shape = {"squeeze": False, "figsize": (9.5, (0.9 + 0.26 * tall) * len(kinds))}
    figure, axes = plt.subplots(len(kinds), len(MEASURES), **shape)  # type: ignore[arg-type]
    for line, kind in zip(axes, kinds, strict=True):
        here = [row for row in rows if row["kind"] == kind]
        for axis, (name, title) in zip(line, MEASURES.items(), strict=True):
            if name not in here[0]:
                axis.set_visible(False)
                continue
            colours = [plots.BLUE if row["ours"] else plots.GREY for row in here]
            for at, (row, colour) in enumerate(zip(here, colours, strict=True)):
                axis.errorbar(row[name][0], at, xerr=np.nan_to_num(row[name][1]), fmt="o", color=colour, ms=4)
            axis.set_yticks(range(len(here)), [row["name"] for row in here] if axis is line[0] else [], fontsize=8)
            axis.invert_yaxis()
            axis.set_title(f"{title}, {kind}", fontsize=9)
            axis.grid(axis="x")
    figure.tight_layout()
    figure.savefig(folder / "quality.png")
    plt.close(figure)
    return "quality.png"
