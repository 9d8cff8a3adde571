"""Options that commands share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any, TypeVar

import click

from actshuffle.cli.values import COUNT, JSON, PATH, POSITIVE, RATE, REAL, REAL_ABOVE_0, STRAGGLERS, TEXT, Parsed
from actshuffle.engine.request import KNOBS
from actshuffle.errors import RequestError
from actshuffle.planning.cost import Cluster
from actshuffle.units import parse_count

F = TypeVar("F", bound=Callable[..., Any])


def _options(*options: Callable[[F], F]) -> Callable[[F], F]:
    """One decorator of several options, in the order given."""

    def apply(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return apply


def knob(name: str, *, help: str = "", shown: str = "") -> Callable[[F], F]:
    """The option of a field of `Request`, with its own help and default in words unless given here."""
    found = KNOBS[name]
    kind, flag, help = found.kind, found.option, help or found.help
    if shown := shown or found.shown:
        help += f"  [default: {shown}]"
    if kind.choices:
        return click.option(flag, metavar=kind.metavar, type=click.Choice(kind.choices), help=help)
    if kind.name == "switch":
        names = f"{flag}/--no-{flag[2:]}" if found.shown else flag
        return click.option(names, is_flag=True, default=None, help=help)

    def parse(text: str) -> Any:
        value = parse_count(text) if kind.name == "count" else kind.read(text)
        if not kind.allows(value):
            raise RequestError(f"must be {kind.domain}, got {text!r}")
        return value

    value = PATH if kind.name == "path" else Parsed(kind.name, parse)
    return click.option(flag, metavar=kind.metavar, type=value, help=help)


def knobs(names: Iterable[str]) -> Callable[[F], F]:
    """The options of several fields of `Request`."""
    return _options(*map(knob, names))


WORKERS = click.option(
    "--workers",
    metavar="N",
    type=COUNT,
    help="Number of worker processes; 0 works in this process.  [default: one per core; 0 below 256MB, and to gather]",
)
INSECURE = "actshuffle.insecure"  # in a context's meta


SCHEDULER = _options(
    click.option(
        "--scheduler", metavar="ADDRESS", type=TEXT, help="Run on the Dask cluster at this address: tls://host:8786."
    ),
    click.option(
        "--insecure",
        is_flag=True,
        expose_value=False,
        callback=lambda ctx, _, value: ctx.meta.update({INSECURE: value}),
        help="Allow a --scheduler on another machine without TLS.",
    ),
)
STORAGE = click.option(
    "--storage-options",
    metavar="JSON",
    type=JSON,
    envvar="ACTSHUFFLE_STORAGE_OPTIONS",
    help="Options for URLs, as fsspec takes them.  [env: ACTSHUFFLE_STORAGE_OPTIONS]",
)
AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
QUIET = click.option("--quiet", is_flag=True, help="Print only errors, and the object of --json.")
DEBUG = click.option("--debug", is_flag=True, expose_value=False, help="Show tracebacks and Dask's own log.")
LOOK = _options(STORAGE, AS_JSON, DEBUG)  # of commands that look at something
WORK = _options(WORKERS, SCHEDULER, STORAGE, AS_JSON, QUIET, DEBUG)  # of those with work to share


def _price(per: str, field: str, units: float, help: str) -> Callable[[F], F]:
    """The option of a price for so many units; the library takes that of one."""
    flag = f"--price-per-{per}"
    return click.option(flag, field, type=REAL, default=0.0, callback=lambda _, __, value: value / units, help=help)


def _seconds(flag: str, unit: int, default: float, help: str) -> Callable[[F], F]:
    """The option of a time in units of so many seconds; the library takes seconds."""
    return click.option(flag, type=REAL, default=default, callback=lambda _, __, value: unit * value, help=help)


# The hosts of a forecast; the names of their options are those of the fields of `Cluster`.
CLUSTER = _options(
    click.option("--hosts", type=POSITIVE, help="Forecast the run on this many hosts; see docs/scaling.md."),
    click.option("--workers-per-host", type=POSITIVE, default=16, help="Worker processes per host.  [default: 16]"),
    click.option("--network", type=RATE, default="3GB/s", help="Network rate of a host, each way.  [default: 3GB/s]"),
    click.option(
        "--disk", type=RATE, help="Rate of a host's disks, if they hold the scratch.  [default: the store holds it]"
    ),
    click.option("--store-rate", "store", type=RATE, help="Total rate of the object store.  [default: unlimited]"),
    click.option(
        "--requests",
        type=REAL_ABOVE_0,
        help="Total GETs and PUTs per second of the object store.  [default: unlimited]",
    ),
    click.option("--latency", type=REAL, default=0.03, help="Seconds per request.  [default: 0.03]"),
    click.option("--stream", type=RATE, help="Highest rate of one worker.  [default: that of its host]"),
    _price("put", "put_price", 1000, "Dollars per 1,000 PUTs."),
    _price("get", "get_price", 1000, "Dollars per 1,000 GETs."),
    _price("host", "host_price", 3600, "Dollars per host and hour."),
    _price("gb", "scratch_price", 1e9 * 30 * 86400, "Dollars per GB of scratch and month."),
    click.option("--simulate", is_flag=True, help="Simulate the run task by task, instead of by arithmetic."),
    click.option(
        "--stragglers",
        metavar="SHARE:TIMES",
        type=STRAGGLERS,
        default="0:1",
        help="Share of slow tasks: 0.01:4 means that 1% of the tasks take 4 times as long.",
    ),
    _seconds("--mtbf", 3600, 0.0, "Hours between failures of a host.  [default: none fails]"),
    _seconds("--repair", 60, 10.0, "Minutes until a failed host is back.  [default: 10]"),
    click.option("--simulation-seed", type=COUNT, default=0, help="Seed of the simulation.  [default: 0]"),
)


def forecast_cluster(given: dict[str, Any]) -> Cluster | None:
    """Take the options of `CLUSTER` out of what a command was given: the cluster, None without hosts."""
    found = {field.name: given.pop(field.name) for field in fields(Cluster) if field.name in given}
    found["straggling"], found["slowness"] = given.pop("stragglers")
    return None if found["hosts"] is None else Cluster(**found)
