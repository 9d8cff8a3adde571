"""Commands that multiply dictionaries."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from actshuffle.units import counted
from saetrain.cli.crew import SCHEDULER, crew
from saetrain.cli.options import LOOK, print_json
from saetrain.cli.values import ABOVE_0, COUNT, DEVICE, PATH, POSITIVE, SIZE, TEXT
from saetrain.products.job import PRODUCTS, interactions, plan_interactions
from saetrain.products.productplan import ProductPlan
from saetrain.products.reading import open_interactions


@click.command("interactions")
@click.argument("a", type=PATH)
@click.argument("b", type=PATH)
@click.argument("out", type=TEXT)
@click.option(
    "--product", type=click.Choice(PRODUCTS), default=PRODUCTS[0], help="Rows of A, and rows of B, that meet."
)
@click.option(
    "--through", type=PATH, help="A .npy or .safetensors file with a matrix [width of A, width of B] between."
)
@click.option("--cosine", is_flag=True, help="Divide rows by their norms first.")
@click.option("--k", type=POSITIVE, default=32, show_default=True, help="Entries to keep of each row and column.")
@click.option("--largest-only", is_flag=True, help="Keep the largest entries, and not the smallest too.")
@click.option(
    "--over", "thresholds", type=ABOVE_0, multiple=True, help="Count entries above this size; may be repeated."
)
@click.option("--drop-same", is_flag=True, help="Leave out entries of a latent with itself.")
@click.option("--memory", type=SIZE, default="1GiB", show_default=True, help="Memory of one task.")
@click.option("--panel", type=POSITIVE, help="Rows of A and of B in a task, a multiple of 1024.  [default: what fits]")
@click.option("--device", type=DEVICE, default="cpu", show_default=True, help="Where to multiply: cpu or cuda.")
@click.option("--plan", "only_plan", is_flag=True, help="Print the costs, and do nothing.")
@click.option("--overwrite", is_flag=True, help="Replace what another run of this command left in OUT.")
@click.option("--workers", metavar="N", type=COUNT, help="Worker processes.  [default: none, this one]")
@SCHEDULER
@LOOK
def _interactions(
    a: Path,
    b: Path,
    out: str,
    only_plan: bool,
    overwrite: bool,
    largest_only: bool,
    workers: int | None,
    scheduler: str | None,
    insecure: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Multiply the dictionaries A and B, and keep the largest entries of each row and column in OUT.

    A and B are runs, checkpoints, folders of SAELens or sparsify, or files of one matrix.  The product encoder-decoder
    is the direct path from latents of B, a dictionary of an earlier layer, to latents of A.  OUT states which share of
    the energy of each row and column the kept entries hold.  The same command again resumes.

    \b
    Examples:
      saetrain interactions layer16.sae layer12.sae out
      saetrain interactions run run out --product decoder-decoder --cosine --drop-same --plan
    """
    settings["smallest"] = not largest_only
    plan = plan_interactions(a, b, **settings)
    if only_plan:
        _show_plan(plan, workers, as_json)
        return
    with crew(workers, scheduler, insecure) as executor:
        if executor.processes:
            click.echo(f"cluster: {executor.described()}", err=True)
        done = interactions(a, b, out, **settings, overwrite=overwrite, executor=executor)
    found = open_interactions(out)
    if not as_json:
        state = "already finished" if done.already_finished else f"{counted(done.tasks, 'task')}, {done.seconds:.1f} s"
        click.echo(f"{out}: {state}\n{found!r}")
    print_json({"out": out, "tasks": done.tasks, "resumed": done.resumed, "kept": found.kept}, as_json)


def _show_plan(plan: ProductPlan, workers: int | None, as_json: bool) -> None:
    started = time.perf_counter()
    sizes, seconds = plan.sizes(), plan.seconds() / max(workers or 1, 1)
    found = {"shape": list(plan.shape), "width": plan.a.width, "panel": plan.panel}
    found |= {**sizes._asdict(), "seconds": seconds}
    print_json(found, as_json)
    if as_json:
        return
    (rows, columns), (down, across) = plan.shape, plan.panels
    lines = [
        ("product", f"{rows:,} x {columns:,} of width {plan.a.width:,}; {sizes.operations:.2e} operations"),
        ("tasks", f"{sizes.tasks:,}, of which {down * across:,} on panels of {counted(plan.panel, 'row')}"),
        ("memory", f"{sizes.memory:,} bytes a task"),
        ("read", f"{sizes.read:,} bytes"),
        ("scratch", f"{sizes.scratch:,} bytes on disk, while it runs"),
        ("store", f"{sizes.store:,} bytes"),
        ("time", f"{seconds:,.1f} s, from one tile timed in {time.perf_counter() - started:.1f} s"),
    ]
    for name, text in lines:
        click.echo(f"{name:<9}{text}")


COMMANDS = (_interactions,)
