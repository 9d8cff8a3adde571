"""Who does the tasks of a command: this process, workers, or a cluster."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import click

from actshuffle.executors import Executor, connected, executor_for
from saetrain.cli.options import all_of
from saetrain.cli.values import TEXT
from saetrain.errors import ConfigError

SCHEDULER = all_of(
    click.option(
        "--scheduler", type=TEXT, metavar="ADDRESS", help="Run on the Dask cluster at this address: tls://host:8786."
    ),
    click.option("--insecure", is_flag=True, help="Allow a --scheduler on another machine without TLS."),
)


def crew(
    workers: int | None, scheduler: str | None, insecure: bool, *, imports: Sequence[str] = ()
) -> AbstractContextManager[Executor]:
    """The executor that --workers and SCHEDULER ask for; its own processes import modules first."""
    if workers is not None and scheduler is not None:
        raise ConfigError("give --workers or --scheduler, not both")
    if scheduler is not None:
        return connected(scheduler, insecure=insecure)
    return executor_for(workers or 0, imports=imports)
