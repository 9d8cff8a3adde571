"""The command line: one group of commands, and its errors.

Settings and their help come from `saetrain.settings.Settings`.

Exit codes: 0 done; 2 the request or the input is bad; 128 + N stopped by signal N, with a checkpoint (SIGINT 130,
SIGTERM 143); 1 anything else, also a run that diverged.  Results go to stdout, errors to stderr.  With
--json stdout holds one JSON object, and progress goes to stderr; of several ranks, the first prints it.
"""

from __future__ import annotations

import difflib
import errno
import signal
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import click

from actshuffle import __version__
from actshuffle.errors import ActshuffleError
from saetrain.cli.options import RED_ERROR, first_rank, print_json
from saetrain.errors import ConfigError, SaetrainError


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


def _training() -> Sequence[click.Command]:
    from saetrain.cli import training

    return training.COMMANDS


def _planning() -> Sequence[click.Command]:
    from saetrain.cli import planning

    return planning.COMMANDS


def _features() -> Sequence[click.Command]:
    from saetrain.cli import features

    return features.COMMANDS


def _exchanging() -> Sequence[click.Command]:
    from saetrain.cli import exchanging

    return exchanging.COMMANDS


def _probing() -> Sequence[click.Command]:
    from saetrain.cli import probing

    return probing.COMMANDS


def _steering() -> Sequence[click.Command]:
    from saetrain.cli import steering

    return steering.COMMANDS


def _relating() -> Sequence[click.Command]:
    from saetrain.cli import relating

    return relating.COMMANDS


def _sharing() -> Sequence[click.Command]:
    from saetrain.cli import sharing

    return sharing.COMMANDS


def _view() -> Sequence[click.Command]:
    from saetrain.cli import view

    return view.COMMANDS


# Every command in the order of --help: the commands of its file, and the first sentence of its own help.  A file is
# imported when one of its commands is looked up, so that --version and --help do not wait for torch.
COMMANDS: dict[str, tuple[Callable[[], Sequence[click.Command]], str]] = {
    "fit": (_training, "Train one autoencoder on STORE, a finished actshuffle store."),
    "plan": (_planning, "Say how much memory `fit` with the same options takes on each rank."),
    "resume": (_training, "Go on with RUN, which was stopped, with its own settings and store."),
    "sweep": (_training, "Train several autoencoders over one read of STORE."),
    "report": (_training, "Draw and compare RUNS: report.png and report.html."),
    "features": (_features, "Describe every latent of RUN on the rows of STORE, into the folder OUT."),
    "export-features": (
        _sharing,
        "Write FEATURES, a result of `saetrain features`, to the folder TO for another tool.",
    ),
    "export": (_exchanging, "Write RUN to the folder TO for another tool."),
    "import": (_exchanging, "Turn another tool's FOLDER into the new RUN."),
    "evaluate": (_probing, "Measure what the model loses when a layer goes through RUN's dictionary."),
    "steer": (_steering, "Turn features of RUN up in a running model, and measure what that costs."),
    "attribute": (_probing, "Find which features of RUN made the model say what it says, to first order."),
    "ablate": (_probing, "Estimate by how much the loss rises without some features of RUN."),
    "graph": (_probing, "Trace from features of RUN to features of UPPER, at a higher layer, and to the next token."),
    "interactions": (
        _relating,
        "Multiply the dictionaries A and B, and keep the largest entries of each row and column in OUT.",
    ),
    "view": (_view, "Look at the latents in FEATURES, the result of `saetrain features`, in a browser."),
}

# What other programs, and people, call the commands.
MEANT = {
    word: f"saetrain {name}"
    for name, words in {
        "fit": "train run",
        "plan": "estimate",
        "resume": "continue",
        "sweep": "grid search",
        "report": "plot curves draw",
        "features": "describe analyze explain",
        "export-features": "neuronpedia dashboard",
        "export": "save push",
        "import": "load convert",
        "evaluate": "eval benchmark",
        "steer": "generate chat",
        "attribute": "attribution",
        "ablate": "ablation",
        "graph": "circuit trace",
        "interactions": "products",
        "view": "serve open show ui",
    }.items()
    for word in words.split()
} | {
    word: f"actshuffle {name}"
    for name, words in {"run": "shuffle", "collect": "collect", "verify": "verify", "split": "split"}.items()
    for word in words.split()
}
RESUME = "stopped; what is finished is kept: the same command again goes on"
RESUMED = ("fit", "resume", "sweep", "features", "export-features", "interactions")


class _Table(click.Group):
    """Lists commands in the order in which they were given."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


class _Group(_Table):
    """Holds the first sentences of its commands, imports the commands when they are looked up, and turns whatever one
    raises into one line and an exit code."""

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        room, _ = COMMANDS.get(cmd_name, (list, ""))
        return next((command for command in room() if command.name == cmd_name), None)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            names = MEANT | {name: f"saetrain {name}" for name in self.list_commands(ctx)}
            near = difflib.get_close_matches(args[0], names, 1)
            if not near:
                raise
            raise click.UsageError(f"no command {args[0]!r}; did you mean `{names[near[0]]}`?", ctx) from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        _Table(commands=self.commands).format_commands(ctx, formatter)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        # Known even if parsing fails; ranks of --nproc get the same arguments.
        ctx.obj = {"json": "--json" in args, "debug": "--debug" in args, "arguments": list(args)}
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            print_json({"error": ConfigError.code, "message": error.format_message()}, ctx.obj["json"])
            raise
        except (click.exceptions.Exit, click.ClickException, click.Abort):
            raise
        except (SaetrainError, ActshuffleError) as error:
            _fail(ctx, error.code, error.on_command_line, error.exit_code)
        except KeyboardInterrupt:
            again = ctx.invoked_subcommand in RESUMED
            _fail(ctx, "interrupted", RESUME if again else "stopped", 128 + signal.SIGINT)
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
    print_json({"error": code, "message": message}, ctx.obj["json"])
    if first_rank() or "another rank" not in message:
        click.echo(message if code == "interrupted" else f"{RED_ERROR} {message}", err=True)
    ctx.exit(exit_code)


@click.group(
    cls=_Group,
    commands={
        name: click.Command(name, help=sentence, short_help=sentence) for name, (_, sentence) in COMMANDS.items()
    },
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
      saetrain features shuffled.sae acts.zarr out   describe what its latents do
      saetrain view out                          look at them in a browser
      saetrain export shuffled.sae folder        write it for SAELens
    """
