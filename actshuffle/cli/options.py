"""Options that commands share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import click

from actshuffle.cli.values import COUNT, JSON, PATH, POSITIVE, RATE, REAL, REAL_ABOVE_0, STRAGGLERS, TEXT, Parsed
from actshuffle.engine.request import KNOBS
from actshuffle.errors import RequestError
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
    kind, flag, help = found.kind, "--" + found.argument.replace("_", "-"), help or found.help
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


def _remember_insecure(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    ctx.meta[INSECURE] = value


SCHEDULER = _options(
    click.option(
        "--scheduler", metavar="ADDRESS", type=TEXT, help="Run on the Dask cluster at this address: tls://host:8786."
    ),
    click.option(
        "--insecure",
        is_flag=True,
        expose_value=False,
        callback=_remember_insecure,
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


# The hosts of a forecast; their names are those of `forecast_cluster`.
CLUSTER = _options(
    click.option("--hosts", type=POSITIVE, help="Forecast the run on this many hosts; see docs/scaling.md."),
    click.option("--workers-per-host", type=POSITIVE, default=16, help="Worker processes per host.  [default: 16]"),
    click.option("--network", type=RATE, default="3GB/s", help="Network rate of a host, each way.  [default: 3GB/s]"),
    click.option(
        "--disk", type=RATE, help="Rate of a host's disks, if they hold the scratch.  [default: the store holds it]"
    ),
    click.option("--store-rate", type=RATE, help="Total rate of the object store.  [default: unlimited]"),
    click.option(
        "--requests",
        type=REAL_ABOVE_0,
        help="Total GETs and PUTs per second of the object store.  [default: unlimited]",
    ),
    click.option("--latency", type=REAL, default=0.03, help="Seconds per request.  [default: 0.03]"),
    click.option("--stream", type=RATE, help="Highest rate of one worker.  [default: that of its host]"),
    click.option("--price-per-put", type=REAL, default=0.0, help="Dollars per 1,000 PUTs."),
    click.option("--price-per-get", type=REAL, default=0.0, help="Dollars per 1,000 GETs."),
    click.option("--price-per-host", type=REAL, default=0.0, help="Dollars per host and hour."),
    click.option("--price-per-gb", type=REAL, default=0.0, help="Dollars per GB of scratch and month."),
    click.option("--simulate", is_flag=True, help="Simulate the run task by task, instead of by arithmetic."),
    click.option(
        "--stragglers",
        metavar="SHARE:TIMES",
        type=STRAGGLERS,
        default="0:1",
        help="Share of slow tasks: 0.01:4 means that 1% of the tasks take 4 times as long.",
    ),
    click.option("--mtbf", type=REAL, default=0.0, help="Hours between failures of a host.  [default: none fails]"),
    click.option("--repair", type=REAL, default=10.0, help="Minutes until a failed host is back.  [default: 10]"),
    click.option("--simulation-seed", type=COUNT, default=0, help="Seed of the simulation.  [default: 0]"),
)


def forecast_cluster(given: dict[str, Any]) -> Any:
    """Take the options of `CLUSTER` out of what a command was given: the cluster, None without hosts."""
    from actshuffle.planning.cost import Cluster

    names = ("network", "disk", "requests", "latency", "stream", "workers_per_host", "hosts")
    plain = {name: given.pop(name) for name in names}
    store, (share, times) = given.pop("store_rate"), given.pop("stragglers")
    hours, minutes = given.pop("mtbf"), given.pop("repair")
    prices = [given.pop(f"price_per_{what}") for what in ("put", "get", "host", "gb")]
    if plain["hosts"] is None:
        return None
    return Cluster(
        **plain,
        store=store,
        straggling=share,
        slowness=times,
        mtbf=3600 * hours,
        repair=60 * minutes,
        put_price=prices[0] / 1000,
        get_price=prices[1] / 1000,
        host_price=prices[2] / 3600,
        scratch_price=prices[3] / (1e9 * 30 * 86400),
    )
