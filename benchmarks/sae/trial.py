"""One process of `sae-quality`: trains one tool, or one form of ours, once for each seed, and measures the results.

    INTERPRETER -m benchmarks.sae.trial < CASE.json > LINES.json

It runs in the environment of the tool, which need not have actshuffle's requirements, so it imports no more than torch
unless the tool is saetrain.
"""

from __future__ import annotations

import json
import sys
import warnings
from typing import Any

import numpy as np
import torch

from benchmarks.sae.planted import Planted, matched
from benchmarks.sae.tools import TOOLS, Task, measured, version_of

FOUND = 0.9  # cosine from which a planted feature counts as found


def main() -> None:
    case = json.load(sys.stdin)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")  # those of the tools
    tool = TOOLS[case["tool"]]
    told = {"version": version_of(tool), "torch": torch.__version__}
    mesh = None
    if tool.module == "saetrain":
        from saetrain.compute.mesh import Mesh

        mesh = Mesh.start("cpu")
    lines = [one(case, seed, mesh) for seed in case["seeds"]]
    if mesh is not None:
        mesh.close()
    print("\n" + json.dumps(told | {"lines": lines}))  # some tools print too


def one(case: dict[str, Any], seed: int, mesh: Any) -> dict[str, Any]:
    count, truth = case["steps"] * case["batch"], None
    if planted := case["planted"]:
        made = Planted.make(count + case["test"], seed=seed, **planted)
        rows, truth = made.rows, made.dictionary
    else:
        rows = torch.from_numpy(np.load(case["rows"])).float()
    train, test = rows[:count], rows[count : count + case["test"]]
    task = Task(train, case["d_sae"], case["k"], case["steps"], case["batch"], seed, case["form"])
    run = TOOLS[case["tool"]].make(task, case["lr"], mesh)
    for batch in task.batches():
        run.step(batch)
    trained = run.finish()
    line: dict[str, Any] = {"seed": seed, **measured(trained, test, truth)}
    if truth is not None:
        line["found"] = float((matched(trained.decoder, truth) > FOUND).double().mean())
    return line


if __name__ == "__main__":
    main()
