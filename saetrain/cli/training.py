"""Commands that train, and that draw what was trained."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from actshuffle.errors import words_of
from actshuffle.units import counted
from saetrain.cli.options import LOOK, RED_ERROR, F, all_of, first_rank, print_json
from saetrain.cli.values import COUNT, FOLDER, PATH, POSITIVE, TEXT
from saetrain.compute.launch import end_with_launcher, launch
from saetrain.compute.mesh import RENDEZVOUS, Mesh
from saetrain.config import Config, field_help, parse_field, resolve
from saetrain.data import Store
from saetrain.errors import ConfigError
from saetrain.exchange.folders import weights_of
from saetrain.probing.causal import DTYPES
from saetrain.probing.closing import Closing
from saetrain.runs.fitting import bar, beside, extended, reached, refuse_stores
from saetrain.runs.sweeps import SWEPT, combinations
from saetrain.training.start import with_inherited
from saetrain.training.train import fit

HAVE_COMMAS = ("field", "output", "widths", "log")  # settings of which one value may have commas


# --- Options


def settings_options(*, lists: bool) -> Callable[[F], F]:
    """An option for each setting, as text; with `lists`, some take several values."""
    options = []
    for field in fields(Config):
        default = f"{field.default:.4g}" if isinstance(field.default, float) else field.default
        note = "" if field.default in (0, -1, "", ()) else f"  [default: {default}]"
        metavar = "A,B" if lists and field.name in SWEPT and field.name not in HAVE_COMMAS else "X"
        flag, text = f"--{field.name.replace('_', '-')}", f"{field_help()[field.name]}.{note}"
        options.append(click.option(flag, field.name, metavar=metavar, help=text))
    return all_of(*options)


NPROC = click.option(
    "--nproc", metavar="N", type=POSITIVE, default=1, help="Ranks on this machine; torchrun starts them too."
)
REPORT = click.option("--report/--no-report", default=True, help="Draw report.html at the end.  [default: draw]")
EVALUATE = all_of(
    click.option(
        "--evaluate",
        type=PATH,
        multiple=True,
        metavar="TEXT",
        help="At the end, measure what --model loses on this text through the dictionary; repeatable.",
    ),
    click.option("--model", type=TEXT, metavar="NAME", help="Of --evaluate: the causal model that the rows came from."),
    click.option("--model-dtype", type=click.Choice(DTYPES), help=f"Of its computation.  [default: {DTYPES[0]}]"),
    click.option("--layer", type=COUNT, metavar="N", help="Its hidden state.  [default: that of layer_N]"),
    click.option(
        "--prefix", type=TEXT, metavar="TOKEN", help="Of --evaluate: begin windows with it, as `collect` did."
    ),
    click.option("--windows", type=COUNT, metavar="N", help="Most windows of a document; 0 takes all."),
)
TRAIN = all_of(
    click.argument("store", type=TEXT),
    click.option("--out", type=FOLDER, help="Folder of the run(s).  [default: the store's name with .sae]"),
    click.option("--config", type=PATH, help="JSON file of settings, as a run's config.json; other options win."),
    NPROC,
    click.option(
        "--heldout",
        type=TEXT,
        help="Store to evaluate on, in place of the tail of STORE, which is trained on too unless --holdout says not.",
    ),
    EVALUATE,
    REPORT,
)


# --- Commands


@click.command("fit")
@TRAIN
@settings_options(lists=False)
@LOOK
@click.pass_context
def _fit(ctx: click.Context, /, store: str, out: Path | None, config: Path | None, report: bool, **more: Any) -> None:
    """Train one autoencoder on STORE, a finished actshuffle store.

    The same command again resumes a run that was stopped.  SIGTERM and Ctrl-C finish the step under way and write a
    checkpoint first; the exit code is then 143 or 130.  A run whose held-out FVU ends above 1 exits with 1.

    \b
    Examples:
      saetrain fit shuffled.zarr
      saetrain fit shuffled.zarr --arch batchtopk --k 32 --d-sae 16384 --out run
    """
    given = {name: parse_field(name, text) for name, text in given_settings(more).items()}
    runs = {_out(store, out): Config(**with_inherited({**base_settings(config), **given}, weights_of))}
    _train(ctx, store, runs, lambda found: found[0], reported=report, **more)


@click.command("sweep")
@TRAIN
@settings_options(lists=True)
@LOOK
@click.pass_context
def _sweep(ctx: click.Context, /, store: str, out: Path | None, config: Path | None, report: bool, **more: Any) -> None:
    """Train several autoencoders over one read of STORE.

    Settings marked A,B take lists; each combination of their values is a run in a folder of its own, to the bit the
    run that its config.json would start alone.  If one diverges, the others go on, and the exit code is 1.

    \b
    Examples:
      saetrain sweep shuffled.zarr --k 16,32,64 --lr 1e-3,2e-3 --out sweep
      saetrain sweep shuffled.zarr --seed 0,1,2 --d-sae 4096,16384 --out seeds
    """
    runs = _members(_out(store, out), base_settings(config), given_settings(more))
    _train(ctx, store, runs, lambda found: {"runs": found}, reported=report, **more)


@click.command("resume")
@click.argument("run", type=FOLDER)
@click.option("--steps", metavar="N", type=POSITIVE, help="Steps in all, to go on beyond those that the run has.")
@click.option("--store", type=TEXT, metavar="STORE", help="The store, where it was moved.")
@NPROC
@EVALUATE
@REPORT
@LOOK
@click.pass_context
def _resume(ctx: click.Context, /, run: Path, steps: int | None, store: str | None, report: bool, **more: Any) -> None:
    """Go on with RUN, which was stopped, with its own settings and store.

    With more --steps the learning rate follows the schedule of the longer run from here on; all else stays.

    \b
    Examples:
      saetrain resume shuffled.sae
      saetrain resume shuffled.sae --steps 20000
    """
    config, about = extended(run, steps, store)
    _train(
        ctx,
        about["location"],
        {run: config},
        lambda found: found[0],
        heldout=about.get("heldout"),
        reported=report,
        extend=True,
        **more,
    )


@click.command("report")
@click.argument("runs", type=PATH, nargs=-1, required=True)
@click.option("--out", type=FOLDER, help="Folder of the two files.  [default: the first run]")
@LOOK
def _report(runs: tuple[Path, ...], out: Path | None, as_json: bool) -> None:
    """Draw and compare RUNS: report.png and report.html.

    The folder of a sweep stands for its runs.

    \b
    Example:
      saetrain report run sweep
    """
    from saetrain.reporting.report import report  # imports matplotlib

    written = report(runs, out or runs[0])
    print_json({"files": [str(path) for path in written]}, as_json)
    if not as_json:
        click.echo("\n".join(map(str, written)))


# --- Training


def _out(store: str, out: Path | None) -> Path:
    """The folder of the run or runs."""
    if out is None and "://" in store:
        raise ConfigError(f"--out must name a folder of this machine, since {store} is a URL")
    return out or beside(Path(store))


def base_settings(file: Path | None) -> dict[str, Any]:
    """The settings of a JSON file: of a run's config.json, or an object that has nothing else."""
    if file is None:
        return {}
    try:
        found = json.loads(file.read_text())
        held = found.get("config", found) if isinstance(found, dict) else found
        if not isinstance(held, dict):
            raise ConfigError(f"{type(held).__name__}, not an object")
        return {name: getattr(Config.from_json(held), name) for name in held}
    except (OSError, ValueError) as error:
        raise ConfigError(f"--config {file} holds no settings: {words_of(error)}") from error


def given_settings(options: dict[str, Any]) -> dict[str, str]:
    """The texts of the settings that were given, taken out of the options of a command."""
    taken = {field.name: options.pop(field.name) for field in fields(Config)}
    return {name: text for name, text in taken.items() if text is not None}


def _members(out: Path, base: dict[str, Any], given: dict[str, str]) -> dict[Path, Config]:
    """Folder and settings of each run of a sweep."""
    split = {n: t.split(",") for n, t in given.items() if "," in t and n not in HAVE_COMMAS}
    base = with_inherited(base | {n: parse_field(n, t) for n, t in given.items() if n not in split}, weights_of)
    lists = {n: [(t, parse_field(n, t)) for t in parts] for n, parts in split.items()}
    return {out / name: config for name, config in combinations(base, lists).items()}


def _train(
    ctx: click.Context,
    store: str,
    runs: dict[Path, Config],
    document: Callable[[list[dict[str, Any]]], dict[str, Any]],
    *,
    nproc: int,
    heldout: str | None,
    as_json: bool,
    reported: bool,
    extend: bool = False,
    **closing: Any,
) -> None:
    """Train on this rank, or on `nproc` of them; `document` makes the JSON from the facts of each run."""
    refuse_stores(runs)
    if nproc > 1 and RENDEZVOUS not in os.environ:
        ctx.exit(launch(ctx.obj["arguments"], nproc))
    end_with_launcher()
    began = time.monotonic()
    config = next(iter(runs.values()))
    mesh = Mesh.start(config.device, config.tensor_parallel)
    ctx.find_root().call_on_close(mesh.close)  # after an error is printed
    source = Store(store, config)
    steps = resolve(config, source.d_in, source.rows, heldout=bool(heldout)).steps
    last = Closing.of(closing, source.field, source.d_in)
    out = sys.stderr if as_json else sys.stdout
    with bar(steps, reached(runs), drawn=mesh.rank == 0, out=out) as (printed, tick):
        say = printed if mesh.rank == 0 else lambda text: None
        for text in filter(None, (source.flattening(), source.warning())):
            say(text)
        other = Store(heldout, config) if heldout else None
        lines = fit(source, runs, mesh, heldout=other, say=say, tick=tick, extend=extend, opened=weights_of)
    number = max(line.pop("signal") for line in lines.values())
    ends = {run: line.pop("diverged") for run, line in lines.items()}
    stopped = any(line["stopped"] for line in lines.values())
    facts = [
        {"run": str(run), "stopped": line.pop("stopped"), "diverged": ends[run], "metrics": line}
        for run, line in lines.items()
    ]
    if not stopped and mesh.rank == 0:
        sound = [run for run, reason in ends.items() if not reason]
        measured = last.run(sound, str(mesh.device), say) if last else {}
        for found in facts:
            if run := measured.get(Path(found["run"])):
                found["evaluation"] = run
        if reported:
            _draw(list(ends), say)
    print_json(document(facts), as_json)
    bad = [f"{run}: {reason}" for run, reason in ends.items() if reason]
    if bad and first_rank():
        click.echo(f"{RED_ERROR} {len(bad)} of {counted(len(ends), 'run')} failed: {'; '.join(bad)}", err=True)
    elif not stopped:
        say(f"done in {time.monotonic() - began:,.1f} s; in Python: saetrain.load({str(next(iter(runs)))!r})")
    ctx.exit(1 if bad else 128 + number if number else 0)


def _draw(runs: list[Path], say: Callable[[str], None]) -> None:
    """The report of the runs, in the folder of a single one or in the one that all are in."""
    try:
        from saetrain.reporting.report import report  # imports matplotlib
    except ImportError:
        say("no report: matplotlib is not installed")
        return
    page = report(runs, runs[0] if len(runs) == 1 else runs[0].parent)[0]
    say(f"its curves are in {page}")


COMMANDS = _fit, _resume, _sweep, _report
