"""The command line: one group of commands, in one file per room, and its errors.

Exit codes: 0 done; 2 the request or the input is bad (nothing was written); 1 anything else.
"""

from __future__ import annotations

import errno
import sys
import traceback
import warnings
from typing import Any, NoReturn

import click

from actshuffle._version import __version__
from actshuffle.cli import building, checking, engine, loading
from actshuffle.cli.session import print_json, signals, wrapped
from actshuffle.errors import ActshuffleError, RequestError

RESUME = "stopped; what is finished is kept: run the same command again to resume"


class _Group(click.Group):
    """Turns any error of a command into one line and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)  # in the order of their tables

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        # Known even if parsing fails.
        ctx.obj = {"json": "--json" in args, "debug": "--debug" in args}
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
            _fail(ctx, err.code, str(err), err.exit_code)
        except KeyboardInterrupt:
            _fail(ctx, "interrupted", RESUME if ctx.invoked_subcommand == "run" else "stopped")
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


for command in (
    engine.run,
    engine.plan,
    checking.verify,
    checking.info,
    engine.status,
    loading.came_from,
    loading.where_is,
    building.split,
    building.head,
    building.sample,
    building.concat,
    building.append,
    building.import_,
    building.collect,
    checking.stats,
    checking.quality,
):
    main.add_command(command)
