"""The command line: one group of commands, in one file per room, and its errors.

A room's file is imported when one of its commands is looked up, so that --version and --help need neither zarr nor
numpy.

Exit codes: 0 done; 2 the request or the input is bad (nothing was written); 1 anything else.
"""

from __future__ import annotations

import difflib
import errno
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

import click

from actshuffle._version import __version__
from actshuffle.cli.console import loading, print_json, signals, wrapped
from actshuffle.errors import ActshuffleError, RequestError

STOPPED = "stopped"
RESUME = (
    "stopped; finished tasks are kept: the same command again resumes, and `actshuffle status` with the path of the "
    "output says how much is done"
)
RESUMED = ("run", "sample", "filter", "append", "import", "collect")


def _engine() -> list[click.Command]:
    from actshuffle.cli.engine import plan, run, status

    return [run, plan, status]


def _checking() -> list[click.Command]:
    from actshuffle.cli.checking import info, quality, stats, verify

    return [verify, info, stats, quality]


def _loading() -> list[click.Command]:
    from actshuffle.cli.loading import came_from, where_is

    return [came_from, where_is]


def _building() -> list[click.Command]:
    from actshuffle.cli.building import append, collect, concat, filter_, head, import_, sample, split

    return [split, head, sample, filter_, concat, append, import_, collect]


# Every command in the order of --help: the commands of its room, and the first sentence of its own help.
COMMANDS: dict[str, tuple[Callable[[], list[click.Command]], str]] = {
    "run": (_engine, "Write the rows of SRC to DST in exactly uniform random order."),
    "plan": (_engine, "Show the plan of a run: levels, tasks, memory, disk."),
    "verify": (_checking, "Check that DST is SRC in the order of its seed."),
    "info": (_checking, "Show the contents of a store, and whether a run finished it."),
    "status": (_engine, "Show the progress of the run that writes DST."),
    "came-from": (
        _loading,
        "Show where rows of DST came from: source row, document, position, token and its neighbours.",
    ),
    "where-is": (_loading, "Show which rows of DST hold some source rows."),
    "split": (_building, 'Cut a shuffled STORE into parts: fractions, counts, or "rest".'),
    "head": (_building, "Show the first ROWS rows of STORE, or make them the store OUT."),
    "sample": (_building, "Write an exactly uniform sample of ROWS rows of SRC to DST, in random order."),
    "filter": (_building, "Write the rows of SRC that pass a filter to DST, in their order."),
    "concat": (_building, "Join several SOURCES into one source for run, without copying a row."),
    "append": (_building, "Add the rows of NEW to the shuffled store DST."),
    "import": (
        _building,
        "Make a store of .npy or memmap files, safetensors, parquet, datasets folders, or torch tensors.",
    ),
    "collect": (_building, "Collect activations of a language model over text, one row per token."),
    "stats": (_checking, "Compute mean, variance, norms, outliers, NaNs and Infs of each array, in one pass."),
    "quality": (_checking, "Compare how well the batches of a store are mixed with a uniform shuffle."),
}

# What other programs, and people, call the commands.
MEANT = {
    word: f"actshuffle {name}"
    for name, words in {
        "run": "shuffle mix permute randomize",
        "plan": "estimate dry-run simulate",
        "verify": "check validate test fsck",
        "info": "ls list show describe inspect",
        "status": "progress",
        "came-from": "trace origin provenance",
        "where-is": "find locate lookup",
        "split": "cut partition train-test-split",
        "head": "peek cat",
        "sample": "subset subsample",
        "filter": "clean drop mask",
        "concat": "join merge combine",
        "append": "add extend grow",
        "import": "convert load from-numpy",
        "collect": "harvest cache extract activations",
        "stats": "statistics",
        "quality": "score mixing",
    }.items()
    for word in words.split()
} | {
    word: f"saetrain {name}"
    for name, words in {"fit": "fit train", "features": "features", "export": "export", "view": "view"}.items()
    for word in words.split()
}


class _Table(click.Group):
    """Lists commands in the order in which they were given."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


class _Group(_Table):
    """Holds the first sentences of its commands, imports the commands when they are looked up, and turns any error
    of one into one line and an exit code."""

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        room, _ = COMMANDS.get(cmd_name, (list, ""))
        with loading():
            return next((command for command in room() if command.name == cmd_name), None)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as err:
            names = MEANT | {name: f"actshuffle {name}" for name in self.list_commands(ctx)}
            near = difflib.get_close_matches(args[0], names, 1)
            if not near:
                raise
            raise click.UsageError(f"no command {args[0]!r}; did you mean `{names[near[0]]}`?", ctx) from err

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        _Table(commands=self.commands).format_commands(ctx, formatter)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        # Known even if parsing fails.
        ctx.obj = {"json": "--json" in args, "debug": "--debug" in args, "started": time.perf_counter()}
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with signals(), warnings.catch_warnings():
                if not ctx.obj["debug"]:
                    warnings.simplefilter("ignore")
                return super().invoke(ctx)
        except click.UsageError as err:
            if ctx.obj["json"]:
                print_json({"error": RequestError.code, "message": err.format_message()})
            raise
        except (click.exceptions.Exit, click.ClickException, click.Abort):
            raise
        except ActshuffleError as err:
            _fail(ctx, err.code, err.on_command_line, err.exit_code)
        except KeyboardInterrupt:
            _fail(ctx, "interrupted", RESUME if ctx.invoked_subcommand in RESUMED else STOPPED)
        except MemoryError:
            _fail(ctx, "memory", "out of memory; give less --memory or fewer --workers")
        except OSError as err:
            if err.errno == errno.EPIPE:
                raise  # click's: whoever read our output has left
            where = f": {err.filename}" if err.filename else ""
            _fail(ctx, "io", f"{err.strerror or err}{where}")
        except Exception as err:
            _fail(ctx, "error", f"unexpected {type(err).__name__}: {err} (--debug shows where)")


def _fail(ctx: click.Context, code: str, message: str, exit_code: int = 1) -> NoReturn:
    if ctx.obj["debug"]:
        traceback.print_exc()
    if ctx.obj["json"]:
        print_json({"error": code, "message": message})
    text = wrapped(message if code == "interrupted" else f"error: {message}", sys.stderr)
    red = click.style("error:", fg="red", bold=True)  # click drops it where there is no terminal
    click.echo(text.replace("error:", red, 1) if text.startswith("error:") else text, err=True)
    ctx.exit(exit_code)


@click.group(
    cls=_Group,
    commands={
        name: click.Command(name, help=sentence, short_help=sentence) for name, (_, sentence) in COMMANDS.items()
    },
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="""\b
Shell completion, in the shell's startup file:
  eval "$(_ACTSHUFFLE_COMPLETE=bash_source actshuffle)"   # bash
  eval "$(_ACTSHUFFLE_COMPLETE=zsh_source actshuffle)"    # zsh
  _ACTSHUFFLE_COMPLETE=fish_source actshuffle | source    # fish

\b
Exit codes: 0 done, 2 bad request or bad input, 1 anything else.""",
)
@click.version_option(__version__, message="%(prog)s %(version)s")
def main() -> None:
    """Exactly uniform, out-of-core shuffling of Zarr activation stores.

    \b
      actshuffle plan acts.zarr                  show the plan of a run
      actshuffle run acts.zarr shuffled.zarr     run it; the same again resumes
      actshuffle verify acts.zarr shuffled.zarr  check the result
    """
