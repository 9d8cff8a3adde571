"""Commands that train, and that draw what was trained."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from saetrain.cli.options import FOLDER, LOOK, PATH, RED_ERROR, F, all_of, first_rank, print_json
from saetrain.compute.mesh import RENDEZVOUS, Mesh
from saetrain.config import Config, field_help, parse_field
from saetrain.data import Store
from saetrain.errors import ConfigError
from saetrain.training.launch import end_with_launcher, launch
from saetrain.training.train import fit

ZARR = ("zarr.json", ".zgroup", ".zarray")  # files of a folder that is a Zarr store
SWEPT = ("arch", "d_sae", "k", "lr", "sparsity", "aux_coef")  # settings in which the runs of one sweep may differ


# --- Options


def _settings(*, lists: bool) -> Callable[[F], F]:
    """An option for each setting, as text; with `lists`, some take several values."""
    options = []
    for field in fields(Config):
        default = f"{field.default:.4g}" if isinstance(field.default, float) else field.default
        note = "" if field.default in (0, -1, "", ()) else f"  [default: {default}]"
        metavar = "A,B" if lists and field.name in SWEPT else "X"
        flag, text = f"--{field.name.replace('_', '-')}", f"{field_help()[field.name]}.{note}"
        options.append(click.option(flag, field.name, metavar=metavar, help=text))
    return all_of(*options)


TRAIN = all_of(
    click.argument("store", type=PATH),
    click.option("--out", type=FOLDER, help="Folder of the run(s).  [default: the store's name with .sae]"),
    click.option("--nproc", metavar="N", type=int, default=1, help="Ranks on this machine; torchrun starts them too."),
    click.option("--heldout", type=PATH, help="Store to evaluate on, in place of the tail of STORE."),
)


# --- Commands


@click.command("fit")
@TRAIN
@_settings(lists=False)
@LOOK
@click.pass_context
def _fit(ctx: click.Context, /, store: Path, out: Path | None, **options: Any) -> None:
    """Train one autoencoder on STORE, a finished actshuffle store.

    The same command again resumes a run that was stopped.  SIGTERM and Ctrl-C finish the step under way and write a
    checkpoint first; the exit code is then 143 or 130.  A run whose held-out FVU ends above 1 exits with 1.

    \b
    Examples:
      saetrain fit shuffled.zarr
      saetrain fit shuffled.zarr --arch batchtopk --k 32 --d-sae 16384 --out run
    """
    given = _given(options)
    runs = {out or _beside(store): Config(**{name: parse_field(name, text) for name, text in given.items()})}
    _train(ctx, store, runs, lambda found: found[0], **options)


@click.command("sweep")
@TRAIN
@_settings(lists=True)
@LOOK
@click.pass_context
def _sweep(ctx: click.Context, /, store: Path, out: Path | None, **options: Any) -> None:
    """Train several autoencoders over one read of STORE.

    Settings marked A,B take lists; each combination of their values is a run in a folder of its own.  If one diverges,
    the others go on, and the exit code is 1.

    \b
    Example:
      saetrain sweep shuffled.zarr --k 16,32,64 --lr 1e-3,2e-3 --out sweep
    """
    runs = _combinations(out or _beside(store), _given(options))
    _train(ctx, store, runs, lambda found: {"runs": found}, **options)


@click.command("report")
@click.argument("runs", type=PATH, nargs=-1, required=True)
@click.option("--out", type=FOLDER, help="Folder of the two files.  [default: the first run]")
@LOOK
def _report(runs: tuple[Path, ...], out: Path | None, as_json: bool) -> None:
    """Draw and compare RUNS: report.png and report.html.

    \b
    Example:
      saetrain report run sweep/*
    """
    from saetrain.training.report import report  # imports matplotlib

    written = report(runs, out or runs[0])
    print_json({"files": [str(path) for path in written]}, as_json)
    if not as_json:
        click.echo("\n".join(map(str, written)))


# --- Training


def _beside(store: Path) -> Path:
    return store.with_name(store.name.removesuffix(".zarr") + ".sae")


def _refuse_stores(runs: Iterable[Path]) -> None:
    """A run inside a Zarr store would become part of it."""
    for out, folder in ((run, folder) for run in runs for folder in (run, *run.parents)):
        if found := next((name for name in ZARR if (folder / name).exists()), None):
            raise ConfigError(
                f"--out {out} would be inside the Zarr store {folder} (it has {found}); name another folder"
            )


def _given(options: dict[str, Any]) -> dict[str, str]:
    """The texts of the settings that were given, taken out of the options of a command."""
    taken = {field.name: options.pop(field.name) for field in fields(Config)}
    return {name: text for name, text in taken.items() if text is not None}


def _combinations(out: Path, given: dict[str, str]) -> dict[Path, Config]:
    """Folder and settings of each run of a sweep: the product of the lists."""
    lists = {n: t.split(",") for n, t in given.items() if n in SWEPT and "," in t}
    if not lists:
        raise ConfigError("a sweep needs a list, as in --k 16,32")
    base = {n: parse_field(n, t) for n, t in given.items() if n not in lists}
    runs: dict[Path, Config] = {}
    for choice in itertools.product(*lists.values()):
        picked: dict[str, Any] = {n: parse_field(n, t) for n, t in zip(lists, choice, strict=True)}
        name = "-".join(f"{n}={t}" for n, t in zip(lists, choice, strict=True))
        if out / name in runs:
            raise ConfigError(f"the list of a sweep gives {name} twice")
        runs[out / name] = Config(**base, **picked)
    return runs


def _train(
    ctx: click.Context,
    store: Path,
    runs: dict[Path, Config],
    document: Callable[[list[dict[str, Any]]], dict[str, Any]],
    *,
    nproc: int,
    heldout: Path | None,
    as_json: bool,
) -> None:
    """Train on this rank, or on `nproc` of them; `document` makes the JSON from the facts of each run."""
    if nproc < 1:
        raise ConfigError(f"--nproc must be 1 or more, got {nproc}")
    _refuse_stores(runs)
    if nproc > 1 and RENDEZVOUS not in os.environ:
        ctx.exit(launch(ctx.obj["arguments"], nproc))
    end_with_launcher()
    config = next(iter(runs.values()))
    mesh = Mesh.start(config.device, config.tensor_parallel)
    ctx.find_root().call_on_close(mesh.close)  # after an error is printed

    def say(text: str) -> None:
        if mesh.rank == 0:
            click.echo(text, file=sys.stderr if as_json else sys.stdout)

    source = Store(store, config)
    for text in filter(None, (source.flattening(), source.warning())):
        say(text)
    lines = fit(source, runs, mesh, heldout=Store(heldout, config) if heldout else None, say=say)
    number = max(line.pop("signal") for line in lines.values())
    ends = {run: line.pop("diverged") for run, line in lines.items()}
    facts = [
        {"run": str(run), "stopped": line.pop("stopped"), "diverged": ends[run], "metrics": line}
        for run, line in lines.items()
    ]
    print_json(document(facts), as_json)
    bad = [f"{run}: {reason}" for run, reason in ends.items() if reason]
    if bad and first_rank():
        click.echo(f"{RED_ERROR} {len(bad)} of {len(ends)} runs failed: {'; '.join(bad)}", err=True)
    ctx.exit(1 if bad else 128 + number if number else 0)


COMMANDS = _fit, _sweep, _report
