"""The command line.  With session.py the only code that prints: results to stdout, all else to stderr.

Exit codes: 0 done; 2 the request or the input is bad (nothing was written); 1 anything else.
The library is imported inside the commands, so that help and completion are quick.
"""

from __future__ import annotations

import errno
import sys
import traceback
import warnings
from typing import TYPE_CHECKING, Any, NoReturn

import click

from actshuffle._version import __version__
from actshuffle.cli import data, tools
from actshuffle.cli.options import CLUSTER, COUNT, LOOK, SHAPE, SIZE, WORK, WORKERS, forecast_cluster
from actshuffle.cli.session import at_work, print_json, show, signals, wrapped
from actshuffle.errors import ActshuffleError, RequestError
from actshuffle.units import format_bytes

if TYPE_CHECKING:
    from actshuffle.engine.job import Job
    from actshuffle.planning.tree import Plan

RESUME = "stopped; what is finished is kept: run the same command again to resume"


# --- The group: errors -------------------------------------------------------------------


class _Group(click.Group):
    """Turns whatever a command raises into one line and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)  # as defined below

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


# --- Commands -------------------------------------------------------------------------------------


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
      actshuffle plan acts.zarr                  what a run would do
      actshuffle run acts.zarr shuffled.zarr     do it; the same again resumes
      actshuffle verify acts.zarr shuffled.zarr  look whether it is right
    """


@main.command()
@click.argument("src", type=click.Path())
@click.argument("dst", type=click.Path())
@click.option("--seed", type=COUNT, help="The order's seed.  [default: drawn, and recorded in DST]")
@SHAPE
@click.option("--source-row/--no-source-row", default=None, help="Write each row's origin.  [default: yes]")
@click.option(
    "--missing-chunks",
    type=click.Choice(["refuse", "fill"]),
    help="An absent chunk of SRC is an error, or fill values.  [default: refuse]",
)
@click.option("--scratch", type=click.Path(), help="Where the intermediate goes.  [default: beside DST]")
@click.option("--overwrite", is_flag=True, help="Replace a store at DST.")
@click.option("--fsync/--no-fsync", default=True, help="Make objects durable at once.  [default: yes]")
@WORK
@click.pass_context
def run(
    ctx: click.Context,
    /,
    src: str,
    dst: str,
    workers: int | None,
    scheduler: str | None,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Write the rows of SRC to DST in exactly uniform random order.

    SRC is a Zarr v2 or v3 array, or a group of arrays of equal length; DST becomes a Zarr v3 group.
    A run that was stopped goes on where it was when the same command is given again.

    \b
    Examples:
      actshuffle run acts.zarr shuffled.zarr
      actshuffle run acts.zarr shuffled.zarr --seed 7 --memory 8GB --workers 16
      actshuffle run s3://b/acts s3://b/shuffled --scheduler tls://10.0.0.1:8786
    """
    from actshuffle.engine.run import shuffle
    from actshuffle.planning.report import plan_report

    with at_work(ctx, workers, scheduler, quiet) as (executor, display):

        def planned(job: Job) -> None:
            display.line("plan", _plan_line(job.plan))
            display.before(job.plan.rows * job.plan.row_bytes)

        result = shuffle(src, dst, executor=executor, progress=display, planned=planned, **options)
    if as_json:
        print_json(
            {
                "destination": result.destination,
                "rows": result.plan.rows,
                "bytes": result.nbytes,
                "seed": result.seed,
                "seconds": result.seconds,
                "bytes_per_second": result.nbytes / result.seconds if result.seconds else None,
                "already_finished": result.already_finished,
                "tasks": result.tasks,
                "resumed": result.resumed,
                "workers": result.workers,
                "plan": plan_report(result.plan),
            }
        )
    elif not quiet:
        click.echo(wrapped(str(result), sys.stdout))


def _plan_line(plan: Plan) -> str:
    blocks = sum(plan.blocks(level) for level in range(1, plan.levels))
    levels = f"{plan.levels} level{'s' * (plan.levels != 1)}"
    scratch = f"{blocks:,} block{'s' * (blocks != 1)}, {format_bytes(plan.scratch_bytes)} scratch"
    return f"{levels}, {scratch if blocks else 'no scratch'}, {format_bytes(plan.memory)} per worker"


GATHER_HINT = "The source fits into this machine's memory: with --gather it is read and written once, without scratch."


@main.command()
@click.argument("src", type=click.Path(), required=False)
@click.option("--rows", type=COUNT, help="Rows, where there is no SRC yet: 100e9.")
@click.option("--row-bytes", type=SIZE, help="Bytes of a row, where there is no SRC yet.")
@SHAPE
@WORKERS
@CLUSTER
@LOOK
def plan(
    as_json: bool, levels: int | str | None, codec: str | None, simulate: bool, simulation_seed: int, **options: Any
) -> None:
    """Say what a run would do: levels, tasks, memory, disk.  Writes nothing.

    With --hosts, also how long it would take on so many, what limits it, and what it would cost.

    \b
    Examples:
      actshuffle plan acts.zarr --memory 8GB
      actshuffle plan --rows 100e9 --row-bytes 1KB --memory 100GB --run-bytes 1GB
      actshuffle plan --rows 122e9 --row-bytes 8KiB --memory 16GB --hosts 200
    """
    from actshuffle.engine import preview
    from actshuffle.planning.forecast import forecast, text
    from actshuffle.planning.report import plan_report, plan_text

    cluster = forecast_cluster(options)
    if cluster is not None and options["gather"]:
        raise RequestError("--gather is for one machine: leave --hosts out")
    if cluster is not None:
        options["workers"] = options["workers"] or cluster.workers
        options["memory"] = options["memory"] or "4GB"  # of theirs; this machine's is not theirs
        options["remote"] = cluster.scratch == "store"
    made = preview.plan(levels=levels or "auto", codec=codec or "none", **options)  # type: ignore[arg-type]
    found, told = plan_report(made), plan_text(made)
    if options["src"] and cluster is None and not options["gather"]:
        known = {name: options[name] for name in ("src", "fields", "workers", "storage_options")}
        found["gathers_well"] = preview.gathers_well(made=made, **known)
        if found["gathers_well"]:
            told += "\n\n" + GATHER_HINT
    if cluster is not None:
        found["forecast"] = forecast(made, cluster, simulated=simulate, seed=simulation_seed)
        told += "\n\n" + text(found["forecast"])
    show(found, told, as_json)


@main.command()
@click.argument("src", type=click.Path())
@click.argument("dst", type=click.Path())
@click.option("--quick", is_flag=True, help="Look at random rows only.")
@click.option("--rows", "sample_rows", type=COUNT, default=4096, help="... that many.  [default: 4096]")
@click.option("--mixing", is_flag=True, help="Add statistics of how well the order mixes.")
@WORK
@click.pass_context
def verify(
    ctx: click.Context,
    /,
    src: str,
    dst: str,
    workers: int | None,
    scheduler: str | None,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Check that DST is SRC in the order of its seed.  Exits with 1 if it is not.

    \b
    Examples:
      actshuffle verify acts.zarr shuffled.zarr
      actshuffle verify acts.zarr shuffled.zarr --quick --rows 10000
    """
    from actshuffle.checking.verifier import verify as check

    with at_work(ctx, workers, scheduler, quiet) as (executor, display):
        report = check(src, dst, executor=executor, progress=display, **options)
    if not quiet or as_json:
        show(report.as_dict(), wrapped(str(report), sys.stdout), as_json)
    ctx.exit(0 if report.ok else 1)


@main.command()
@click.argument("path", type=click.Path())
@LOOK
def info(path: str, storage_options: dict[str, Any] | None, as_json: bool) -> None:
    """Say what a store holds, and whether a run finished it.

    \b
    Example:
      actshuffle info shuffled.zarr
    """

    from actshuffle.checking import contents

    found = contents.info(path, storage_options)
    show(found, contents.info_text(found), as_json)


@main.command()
@click.argument("dst", type=click.Path())
@LOOK
def status(dst: str, storage_options: dict[str, Any] | None, as_json: bool) -> None:
    """Say how far the run that writes DST is.

    \b
    Example:
      actshuffle status shuffled.zarr
    """

    from actshuffle.engine import state

    found = state.status(dst, storage_options)
    show(found, state.status_text(found), as_json)


for command in (*tools.commands, *data.commands):
    main.add_command(command)
