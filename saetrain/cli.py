"""The command line.  Settings and their help come from `saetrain.settings.Settings`.

Exit codes: 0 done; 2 the request or the input is bad; 128 + N stopped by signal N, with a checkpoint (SIGINT 130,
SIGTERM 143); 1 anything else, also a run that diverged.  Results go to stdout, errors to stderr.  With
--json stdout holds one JSON object, and progress goes to stderr; of several ranks, the first prints it.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import click

from actshuffle import __version__
from actshuffle.errors import ActshuffleError
from saetrain import exchange
from saetrain.compute.mesh import RENDEZVOUS, Mesh
from saetrain.config import Config, field_help, parse_field
from saetrain.data import Store
from saetrain.errors import ConfigError, SaetrainError
from saetrain.training.launch import end_with_launcher, launch
from saetrain.training.train import fit

F = TypeVar("F", bound=Callable[..., Any])
RED_ERROR = click.style("error:", fg="red", bold=True)  # click drops the colour where there is no terminal
ZARR = ("zarr.json", ".zgroup", ".zarray")  # files of a folder that is a Zarr store
SWEPT = ("arch", "d_sae", "k", "lr", "sparsity", "aux_coef")  # settings in which the runs of one sweep may differ


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    try:
        done = command_line.main(arguments, prog_name="saetrain", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.Abort:  # click's name for it
        raise KeyboardInterrupt from None
    return int(done or 0)


# --- Errors


class _Group(click.Group):
    """Turns whatever a command raises into one line and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)  # as defined below

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        # Known even if parsing fails; ranks of --nproc get the same arguments.
        ctx.obj = {"json": "--json" in args, "debug": "--debug" in args, "arguments": list(args)}
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            _print_json({"error": ConfigError.code, "message": error.format_message()}, ctx.obj["json"])
            raise
        except (click.exceptions.Exit, click.ClickException, click.Abort):
            raise
        except (SaetrainError, ActshuffleError) as error:
            _fail(ctx, error.code, str(error), error.exit_code)
        except MemoryError:
            _fail(ctx, "memory", "out of memory; reduce --d-sae or --batch-size, or share the parameters (--nproc)")
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise  # click exits in silence: the reader of our output has left
            where = f": {error.filename}" if error.filename else ""
            _fail(ctx, "io", f"{error.strerror or error}{where}")
        except Exception as error:
            _fail(ctx, "error", f"unexpected {type(error).__name__}: {error} (--debug shows where)")


def _fail(ctx: click.Context, code: str, message: str, exit_code: int = 1) -> NoReturn:
    if ctx.obj["debug"]:
        traceback.print_exc()
    _print_json({"error": code, "message": message}, ctx.obj["json"])
    if _first_rank() or "another rank" not in message:
        click.echo(f"{RED_ERROR} {message}", err=True)
    ctx.exit(exit_code)


def _first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _print_json(document: dict[str, Any], as_json: bool) -> None:
    if as_json and _first_rank():
        click.echo(json.dumps(document))


# --- Options


def _options(*options: Callable[[F], F]) -> Callable[[F], F]:
    """Several options as one decorator, in the order given."""

    def apply(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return apply


def _settings(*, lists: bool) -> Callable[[F], F]:
    """An option for each setting, as text; with `lists`, some take several values."""
    options = []
    for field in fields(Config):
        default = f"{field.default:.4g}" if isinstance(field.default, float) else field.default
        note = "" if field.default in (0, -1, "", ()) else f"  [default: {default}]"
        metavar = "A,B" if lists and field.name in SWEPT else "X"
        flag, text = f"--{field.name.replace('_', '-')}", f"{field_help()[field.name]}.{note}"
        options.append(click.option(flag, field.name, metavar=metavar, help=text))
    return _options(*options)


PATH = click.Path(path_type=Path)
FOLDER = click.Path(path_type=Path, file_okay=False)  # there or not
LOOK = _options(
    click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout."),
    click.option("--debug", is_flag=True, expose_value=False, help="Show tracebacks."),
)
TRAIN = _options(
    click.argument("store", type=PATH),
    click.option("--out", type=FOLDER, help="Folder of the run(s).  [default: the store's name with .sae]"),
    click.option("--nproc", metavar="N", type=int, default=1, help="Ranks on this machine; torchrun starts them too."),
    click.option("--heldout", type=PATH, help="Store to evaluate on, in place of the tail of STORE."),
)


# --- Commands


@click.group(
    cls=_Group,
    no_args_is_help=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="""\b
Shell completion, in the shell's startup file:
  eval "$(_SAETRAIN_COMPLETE=bash_source saetrain)"   # bash
  eval "$(_SAETRAIN_COMPLETE=zsh_source saetrain)"    # zsh
  _SAETRAIN_COMPLETE=fish_source saetrain | source    # fish

\b
Exit codes: 0 done, 2 bad request or bad input, 130 or 143 stopped by Ctrl-C or SIGTERM with a checkpoint,
1 anything else, also a run that diverged.""",
)
@click.version_option(__version__, message="%(prog)s %(version)s")
def command_line() -> None:
    """Train sparse autoencoders from a shuffled activation store.

    \b
      saetrain fit shuffled.zarr                 train one; the same command again resumes
      saetrain report shuffled.sae               draw its curves
      saetrain export shuffled.sae folder        write it for SAELens
    """


@command_line.command("fit")
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


@command_line.command("sweep")
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


@command_line.command("report")
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
    _print_json({"files": [str(path) for path in written]}, as_json)
    if not as_json:
        click.echo("\n".join(map(str, written)))


@command_line.command("export")
@click.argument("run", type=PATH)
@click.argument("to", type=FOLDER)
@click.option(
    "--format",
    type=click.Choice(["saelens", "sparsify"]),
    default="saelens",
    help="Tool to write for.  [default: saelens]",
)
@LOOK
def _export(run: Path, to: Path, format: str, as_json: bool) -> None:
    """Write RUN to the folder TO for another tool.

    RUN is a run or one of its checkpoints.

    \b
    Example:
      saetrain export run folder --format sparsify
    """
    exchange.export(run, to, format)
    if shape := exchange.row_shape(run):
        click.echo(f"rows of shape {tuple(shape)} were flattened: {format} must give this model flat rows", err=True)
    _print_json({"run": str(run), "to": str(to), "format": format} | ({"row_shape": shape} if shape else {}), as_json)


@command_line.command("import")
@click.argument("folder", type=PATH)
@click.argument("run", type=FOLDER)
@LOOK
def _import(folder: Path, run: Path, as_json: bool) -> None:
    """Turn another tool's FOLDER into the new RUN.

    SAELens or sparsify wrote FOLDER; RUN gets one checkpoint, at step 0.

    \b
    Example:
      saetrain import folder run
    """
    exchange.bring(folder, run)
    _print_json({"folder": str(folder), "run": str(run)}, as_json)


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
    _print_json(document(facts), as_json)
    bad = [f"{run}: {reason}" for run, reason in ends.items() if reason]
    if bad and _first_rank():
        click.echo(f"{RED_ERROR} {len(bad)} of {len(ends)} runs failed: {'; '.join(bad)}", err=True)
    ctx.exit(1 if bad else 128 + number if number else 0)
