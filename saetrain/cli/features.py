"""The command that describes the latents of a dictionary."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from actshuffle.units import counted
from saetrain.cli.crew import SCHEDULER, crew
from saetrain.cli.options import LOOK, print_json
from saetrain.cli.values import COUNT, DEVICE, PATH, PLACE, PLACE_OF_FOLDER, SIZE, TEXT
from saetrain.compute.devices import named_device
from saetrain.errors import ConfigError
from saetrain.features.forecast import check, forecast, read_units, seconds
from saetrain.features.pipeline import MEMORY, build_features, plan_features


@click.command("features")
@click.argument("run", type=PATH)
@click.argument("store", type=PLACE)
@click.argument("out", type=PLACE_OF_FOLDER)
@click.option("--field", type=TEXT, metavar="NAME", help="Array of activations, if STORE has several.")
@click.option("--model", type=PATH, help="Folder of the model, for the logits that latents promote.")
@click.option("--incomplete", is_flag=True, help="Take a STORE that has no completion marker.")
@click.option("--seed", type=COUNT, default=0, help="Decides which rows are sampled.  [default: 0]")
@click.option("--shards", type=COUNT, default=0, help="Parts of the dictionary.  [default: as few as memory allows]")
@click.option("--block-rows", type=COUNT, default=0, help="Rows of one encoder task, at most 65536.  [default: 16384]")
@click.option("--memory", type=SIZE, metavar="SIZE", default=MEMORY, help="Memory of a task.  [default: 1GiB]")
@click.option(
    "--device", type=DEVICE, default="auto", help="Where the encoder product runs: auto, cpu, cuda.  [default: auto]"
)
@click.option("--workers", type=COUNT, default=0, help="Worker processes; 0 works in this one.  [default: 0]")
@SCHEDULER
@click.option("--near", type=COUNT, default=16, help="Neighbours of each latent; 0 looks for none.  [default: 16]")
@click.option("--keep-codes", is_flag=True, help="Keep all activations, by latent and by row.")
@click.option("--costs", type=PATH, help="With --plan: unit costs of this machine, to say how long it takes.")
@click.option("--plan", "planned", is_flag=True, help="Show what the run will take, and write nothing.")
@click.option("--overwrite", is_flag=True, help="Delete what another run left in OUT.")
@LOOK
def _features(
    run: Path,
    store: Path | str,
    out: Path | str,
    memory: int,
    field: str | None,
    workers: int,
    scheduler: str | None,
    insecure: bool,
    costs: Path | None,
    planned: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Describe every latent of RUN on the rows of STORE, into the folder OUT.

    RUN is a run, a checkpoint, or a folder that SAELens or sparsify wrote.  STORE is in document order, as `actshuffle
    collect` writes it.  The same command again resumes a run that was stopped.  docs/features.md defines all figures.

    \b
    Example:
      saetrain features run activations.zarr activations.features --workers 2
    """
    settings["field"] = field or ""
    if planned:
        _show(run, store, out, memory, costs, workers, as_json, settings)
        return
    if costs is not None:
        raise ConfigError("--costs goes with --plan")
    if scheduler is None:
        named_device(settings["device"])
    with crew(workers or None, scheduler, insecure, imports=[build_features.__module__]) as executor:
        if executor.processes:
            click.echo(f"cluster: {executor.described()}", err=True)
        done = build_features(run, store, out, memory=memory, executor=executor, **settings)
    told = {"out": str(out), "tasks": done.tasks, "resumed": done.resumed, "seconds": round(done.seconds, 3)}
    print_json(told | {"already_finished": done.already_finished}, as_json)
    if not as_json:
        if settings["model"] is None:
            click.echo("no logits: --model FOLDER, the model that the rows came from, would give them", err=True)
        text = "already finished" if done.already_finished else f"{counted(done.tasks, 'task')}, {done.seconds:.1f} s"
        click.echo(f"{out}: {text}", file=sys.stdout)


def _show(
    run: Path,
    store: Path | str,
    out: Path | str,
    memory: int,
    costs: Path | None,
    workers: int,
    as_json: bool,
    settings: dict[str, Any],
) -> None:
    for name in ("device", "overwrite"):
        settings.pop(name)
    plan = plan_features(run, store, memory=memory, **settings)
    found = forecast(plan, memory)
    told = found.as_dict() | {"shards": plan.shards, "blocks": plan.blocks, "chunks": plan.chunks}
    if costs is not None:
        told["seconds"] = seconds(plan, found.entries, read_units(costs), max(workers, 1))
    print_json(told, as_json)
    if not as_json:
        click.echo(
            f"{counted(plan.latents, 'latent')} in {counted(plan.shards, 'shard')} and "
            f"{counted(plan.chunks, 'chunk')}, {counted(plan.rows, 'row')} of "
            f"{plan.d_in:,} in {counted(plan.blocks, 'block')}\n{found}"
        )
        if costs is not None:
            steps = ", ".join(f"{step} {s:,.1f}" for step, s in told["seconds"].items())
            click.echo(f"{'time':18}  about {sum(told['seconds'].values()):,.1f} s ({steps})")
    check(found, plan, out, memory)


COMMANDS = (_features,)
