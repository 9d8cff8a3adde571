"""The options that commands share, and how their values are read."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

import click

from actshuffle.arrays.codecs import CODECS
from actshuffle.errors import ActshuffleError, RequestError
from actshuffle.units import parse_bytes, parse_count

F = TypeVar("F", bound=Callable[..., Any])


class Parsed(click.ParamType[Any]):
    """An option read by one of our own functions, whose refusal becomes a usage error."""

    def __init__(self, name: str, parse: Callable[[str], Any]) -> None:
        self.name, self._parse = name, parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return self._parse(value) if isinstance(value, str) else value
        except (ActshuffleError, ValueError, OverflowError) as err:
            self.fail(str(err), param, ctx)


def _levels(text: str) -> int | str:
    if text == "auto":
        return text
    if not text.isdecimal():
        raise RequestError(f"levels must be auto or a whole number, got {text!r}")
    return int(text)


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    if not all(names):
        raise RequestError(f"cannot read {text!r} as array names; write them like act,token")
    return names


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as err:
        raise RequestError(f"not JSON: {err}") from None
    if not isinstance(value, dict):
        raise RequestError('must be a JSON object like {"anon": true}')
    return value


def _rate(text: str) -> int:
    return parse_bytes(text.strip().removesuffix("/s"))


def _stragglers(text: str) -> tuple[float, float]:
    try:
        share, times = (float(part) for part in text.split(":"))
    except ValueError:
        raise RequestError(f"write stragglers like 0.01:4 (1% take 4 times as long), got {text!r}") from None
    return share, times


SIZE = Parsed("size", parse_bytes)
RATE = Parsed("rate", _rate)
COUNT = Parsed("count", parse_count)
CODEC = click.option(
    "--codec",
    type=click.Choice(list(CODECS)),
    metavar="NAME",
    help=f"Codec of the output arrays: {', '.join(CODECS)}.  [default: none]",
)


def _options(*options: Callable[[F], F]) -> Callable[[F], F]:
    """Several options as one decorator, in the order given."""

    def apply(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return apply


SHAPE = _options(
    click.option(
        "--levels",
        metavar="N",
        type=Parsed("levels", _levels),
        help="Passes over the data.  [default: auto, the fewest that fit]",
    ),
    click.option(
        "--memory", type=SIZE, help="Most memory of one worker.  [default: a share of the machine, 2GiB at most]"
    ),
    click.option("--block-bytes", type=SIZE, help="Rows of one task, in bytes (M).  [default: from --memory]"),
    click.option(
        "--run-bytes", type=SIZE, help="Least that is read in one piece (P).  [default: 256KiB; remote, 4MiB]"
    ),
    click.option(
        "--spill-memory",
        type=SIZE,
        help="How much of the spill may stay in memory, beside the workers'.  [default: none]",
    ),
    click.option(
        "--gather",
        is_flag=True,
        default=None,
        help="One pass without spill, from a source that fits into this machine's memory.",
    ),
    click.option("--chunk-rows", type=COUNT, help="Rows of a chunk of the widest array.  [default: about 32MiB]"),
    click.option("--chunks-per-shard", type=COUNT, help="Chunks of a shard.  [default: 1; more beyond 10^6 chunks]"),
    CODEC,
    click.option("--fields", metavar="A,B", type=Parsed("names", _names), help="Arrays to take.  [default: all]"),
)
WORKERS = click.option(
    "--workers",
    metavar="N",
    type=COUNT,
    help="Worker processes; 0 works in this one.  [default: one per core; 0 below 256MB]",
)
INSECURE = "actshuffle.insecure"  # in a context's meta


def _remember_insecure(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    ctx.meta[INSECURE] = value


SCHEDULER = _options(
    click.option("--scheduler", metavar="ADDRESS", help="Run on this Dask cluster: tls://host:8786."),
    click.option(
        "--insecure",
        is_flag=True,
        expose_value=False,
        callback=_remember_insecure,
        help="Let --scheduler be on another machine without TLS.",
    ),
)
STORAGE = click.option(
    "--storage-options",
    metavar="JSON",
    type=Parsed("JSON", _json_object),
    envvar="ACTSHUFFLE_STORAGE_OPTIONS",
    help="For URLs, as fsspec takes them.  [env: ACTSHUFFLE_STORAGE_OPTIONS]",
)
JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
QUIET = click.option("--quiet", is_flag=True, help="Print errors only, and what --json asks for.")
DEBUG = click.option("--debug", is_flag=True, expose_value=False, help="Show tracebacks and Dask's own log.")
LOOK = _options(STORAGE, JSON, DEBUG)  # of commands that look at something
WORK = _options(WORKERS, SCHEDULER, STORAGE, JSON, QUIET, DEBUG)  # of those with work to share


# The hosts of a forecast; their names are those of `forecast_cluster`.
CLUSTER = _options(
    click.option("--hosts", type=COUNT, help="Forecast the run on so many hosts; see docs/scaling.md."),
    click.option("--workers-per-host", type=COUNT, default=16, help="Worker processes.  [default: 16]"),
    click.option("--network", type=RATE, default="3GB/s", help="Of a host, each way.  [default: 3GB/s]"),
    click.option(
        "--disk", type=RATE, help="Of a host's disks, where scratch is on them.  [default: scratch is in the store]"
    ),
    click.option("--store-rate", type=RATE, help="Of the object store in all."),
    click.option("--requests", type=float, help="GETs and PUTs a second that the store takes in all."),
    click.option("--latency", type=float, default=0.03, help="Seconds per request.  [default: 0.03]"),
    click.option("--stream", type=RATE, help="Of one worker, whatever its host can do."),
    click.option("--price-per-put", type=float, default=0.0, help="Dollars per 1,000."),
    click.option("--price-per-get", type=float, default=0.0, help="Dollars per 1,000."),
    click.option("--price-per-host", type=float, default=0.0, help="Dollars per hour."),
    click.option("--price-per-gb", type=float, default=0.0, help="Dollars per month, of scratch."),
    click.option("--simulate", is_flag=True, help="Play the run out task by task, not by arithmetic."),
    click.option(
        "--stragglers",
        metavar="SHARE:TIMES",
        type=Parsed("stragglers", _stragglers),
        default="0:1",
        help="0.01:4 means that 1% of the tasks take 4 times as long.",
    ),
    click.option("--mtbf", type=float, default=0.0, help="Hours between failures of a host."),
    click.option("--repair", type=float, default=10.0, help="Minutes until it is back.  [default: 10]"),
    click.option("--simulation-seed", type=COUNT, default=0, help="Of what is drawn.  [default: 0]"),
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
