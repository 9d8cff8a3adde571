"""The command line: `python -m benchmarks --help`."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click

from actshuffle.cli.values import COUNT, SIZE  # sizes and counts, parsed as in the product
from actshuffle.machine import cores
from actshuffle.units import parse_bytes
from benchmarks import results


class _List(click.ParamType[Any]):
    """Several values of one kind, separated by commas."""

    name = "list"

    def __init__(self, convert: Callable[[str], Any], choices: tuple[str, ...] = ()) -> None:
        self._convert, self._choices = convert, choices

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        if not isinstance(value, str):
            return list(value)
        try:
            found = [self._convert(part.strip()) for part in value.split(",")]
        except ValueError as err:
            self.fail(str(err), param, ctx)
        unknown = [v for v in found if self._choices and v not in self._choices]
        if unknown:
            self.fail(f"{unknown[0]!r} is none of {', '.join(self._choices)}", param, ctx)
        return found


SIZES, INTS = _List(parse_bytes), _List(int)
MODES = _List(str, ("cached", "disk"))
TINY: dict[str, dict[str, Any]] = {
    "floor": {"size": 1 << 20, "rounds": 1, "processes": [1], "chunk": 1 << 18},
    "shuffle": {
        "sizes": [1 << 20],
        "rounds": 1,
        "workers": [0, 1],
        "row_bytes": [512],
        "levels": [0, 1, 2, 3],
        "memory": 28 << 20,
        "chunk": 1 << 18,
        "whole": [1 << 20],
        "whole_rounds": 1,
    },
    "strategies": {
        "limit": None,
        "factors": [],
        "sizes": [1 << 20],
        "row_bytes": 512,
        "memory": 64 << 20,
        "rounds": 1,
        "chunk": 1 << 18,
    },
    "growth": {
        "start": 1 << 18,
        "factors": [1, 4],
        "memory": 28 << 20,
        "block": 1 << 17,
        "run_bytes": 1 << 14,
        "rounds": 1,
        "workers": 0,
    },
    "costs": {"size": 1 << 20, "row_bytes": 512, "memory": 96 << 20, "rounds": 1},
    "scheduler": {"tasks": 300, "workers": 1},
    "loader": {
        "size": 1 << 20,
        "widths": [384],
        "threads": [1, 2],
        "modes": ["cached", "disk"],
        "batch_sizes": [64],
        "chunk": 1 << 18,
        "rounds": 1,
        "disk_rounds": 1,
    },
    "verify": {
        "size": 1 << 20,
        "row_bytes": [512],
        "threads": [1, 2],
        "modes": ["cached", "disk"],
        "chunk": 1 << 18,
        "rounds": 1,
    },
    "revisions": {"other": None, "names": ["loader"], "size": 1 << 20, "modes": ["cached"], "rounds": 1},
    "s3": {
        "size": 1 << 20,
        "row_bytes": [512],
        "levels": [2],
        "workers": 1,
        "memory": 256 << 20,
        "chunk": 1 << 18,
        "rounds": 1,
    },
    "calibrate": {
        "known": [1 << 20, 1 << 21],
        "held_out": [3 << 20],
        "memories": [28 << 20],
        "rounds": 1,
        "held_memory": 28 << 20,
        "workers": [0, 1],
        "levels": [2],
    },
    "peers": {"size": 1 << 20, "row_bytes": 512, "memory": None, "workers": 1, "rounds": 1, "seconds": 60.0},
    "sae-peers": {
        "store": None,
        "d_sae": 128,
        "k": 4,
        "steps": 6,
        "batch": 64,
        "rounds": 1,
        "speed_batch": 64,
        "wide": [32, 64, 4],
        "planted_steps": 6,
    },
    "sae-quality": {
        "store": None,
        "steps": 0,
        "batch": 64,
        "planted_d_sae": 128,
        "planted_k": 4,
        "planted_steps": 40,
        "seeds": 2,
        "forms": ["default", "normalised-auxk", "resampling"],
        "jobs": 1,
    },
    "sae-order": {"store": None, "d_sae": 64, "k": 4, "batch": 128, "buffer": 512, "dead": 2},
    "features": {"rows": 2000, "width": 16, "latents": [64], "k": 4, "workers": 0, "rounds": 1},
    "features-peers": {"rows": 2000, "width": 16, "latents": 256, "k": 4, "workers": 0, "some": 128},
    "features-growth": {
        "rows": [1000, 4000],
        "latents": [256],
        "latent_rows": [1000],
        "width": 16,
        "k": 4,
        "memory": 64 << 20,
        "workers": 0,
    },
    "features-large": {
        "store": None,
        "latents": 2048,
        "rows": 600,
        "width": 16,
        "k": 4,
        "near": 4,
        "memory": 64 << 20,
        "workers": 0,
        "checked": 64,
        "costs": None,
    },
    "features-forecast": {
        "width": 16,
        "k": 4,
        "calibrate": ["1000x256", "2000x512"],
        "held": ["2000x256"],
        "large": "1000000000x34000000",
        "large_width": 4096,
    },
    "view": {"latents": 512, "described": 256, "rows": 2000, "width": 16, "k": 4, "asked": 2},
    "sae-speed": {"archs": ["topk", "jumprelu"], "width": 16, "d_sae": 64, "k": 4, "batch": 64, "steps": 2},
    "sae-memory": {
        "archs": ["jumprelu"],
        "width": 64,
        "d_sae": 8192,
        "batch": 512,
        "k": 4,
        "tile": 64,
        "moments": "full",
        "steps": 1,
    },
    "sae-ranks": {"width": 16, "d_sae": 2048, "small": 64, "ranks": [1, 2]},
}


def _common(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option("--tiny", is_flag=True, help="Run in miniature, as a test of the benchmark."),
        click.option(
            "--out", type=click.Path(path_type=Path), help="Results folder.  [default: benchmarks/results/DATE-NAME]"
        ),
        click.option(
            "--work",
            type=click.Path(path_type=Path),
            help="Folder for the data, on the disk to measure.  [default: benchmarks/.work]",
        ),
    ):
        command = option(command)
    return command


def _start(name: str, run: Callable[..., None], options: dict[str, Any]) -> None:
    work, out, tiny = (options.pop(k) for k in ("work", "out", "tiny"))
    settings = options | (TINY[name] if tiny else {})
    shown = {k: v for k, v in settings.items() if k not in ("python", "add", "other")}
    with results.bench(name, work, out, {"tiny": True} if tiny else shown) as bench:
        run(bench, **settings)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
def main() -> None:
    """Measure the cost of a shuffle, beside the cost of moving the same bytes.

    \b
    Each command writes benchmarks/results/DATE-NAME/: results.json, README.md and plots.
    """


@main.command()
@click.option("--size", type=SIZE, default="2GB", help="Data to copy.")
@click.option("--processes", type=INTS, default=f"1,{cores()}", help="Process counts to try.")
@click.option("--modes", type=MODES, default="cached,disk", help="Where the data is.")
@click.option("--rounds", type=COUNT, default=5, help="Times that everything is measured.")
@click.option("--chunk", type=SIZE, default="32MiB", help="Size of the chunk files.")
@_common
def floor(**options: Any) -> None:
    """Measure memory and disk: memcpy, read, write and copy by our own copier."""
    from benchmarks import floor as module

    _start("floor", module.run, options)


@main.command()
@click.option("--sizes", type=SIZES, default="2GB", help="Data sizes.")
@click.option("--row-bytes", type=SIZES, default="64B,512B,2KiB,8KiB", help="Row widths.")
@click.option("--workers", type=INTS, default=f"0,1,{cores()}", help="Dask workers; 0 is serial.")
@click.option("--levels", type=INTS, default="0,1,2,3", help="Passes over the data; 1 gathers rows; 0 is the default.")
@click.option("--modes", type=MODES, default="cached,disk", help="Where the data is.")
@click.option("--rounds", type=COUNT, default=5, help="Times that everything is measured.")
@click.option("--memory", type=SIZE, default="256MiB", help="Most memory that one worker uses.")
@click.option("--chunk", type=SIZE, default="32MiB", help="Size of the source's chunk files.")
@click.option("--whole", type=SIZES, default="100MB,500MB,2GB,8GB", help="Data sizes of the default command.")
@click.option("--whole-rounds", type=COUNT, default=3, help="Times that it is run at each size.")
@click.option("--whole-only", is_flag=True, help="Measure the default command, and nothing else.")
@click.option("--engine-only", is_flag=True, help="Measure the engine, and nothing else.")
@click.option("--unchecked", is_flag=True, help="Measure the default way without its digests too.")
@click.option("--python", type=(str, click.Path(exists=True)), multiple=True, help="TOOL INTERPRETER: as in peers.")
@_common
def shuffle(**options: Any) -> None:
    """Measure the default command beside other tools, and the engine as a fraction of the copier."""
    from benchmarks import shuffle as module

    if options["whole_only"] and options["engine_only"]:
        raise click.UsageError("--whole-only and --engine-only leave nothing to measure: give one of them")
    if options["unchecked"] and (0 not in options["levels"] or options["whole_only"]):
        raise click.UsageError("--unchecked measures the engine's default way: give --levels 0, and no --whole-only")
    _start("shuffle", module.run, options)


@main.command()
@click.option("--limit", type=SIZE, help="Memory of a cgroup for each run, page cache and all.")
@click.option("--factors", type=_List(float), default="1.5,3", help="Data sizes, in multiples of memory.")
@click.option("--sizes", type=SIZES, default=None, help="Data sizes, instead of --factors.")
@click.option("--row-bytes", type=SIZE, default="8KiB", help="Row width.")
@click.option("--memory", type=SIZE, help="Most memory that one worker uses.  [default: chosen]")
@click.option("--rounds", type=COUNT, default=3, help="Times that each way is run.")
@click.option("--chunk", type=SIZE, default="32MiB", help="Size of the source's chunk files.")
@_common
def strategies(**options: Any) -> None:
    """Compare the way that the planner chooses with all ways that can be forced, at more data than memory."""
    from benchmarks import strategies as module

    _start("strategies", module.run, options)


@main.command()
@click.option("--url", required=True, help="An empty place in a bucket: s3://bucket/benchmark.")
@click.option("--storage-options", default="{}", help="Options of the URL, as JSON.")
@click.option("--size", type=SIZE, default="1GB", help="Data to shuffle.")
@click.option("--row-bytes", type=SIZES, default="8KiB", help="Row widths.")
@click.option("--levels", type=INTS, default="2", help="Passes over the data; 0 leaves the choice to the planner.")
@click.option("--workers", type=COUNT, default=cores(), help="Dask workers.")
@click.option("--memory", type=SIZE, default="512MiB", help="Most memory that one worker uses.")
@click.option("--chunk", type=SIZE, default="32MiB", help="Size of the source's chunks.")
@click.option("--rounds", type=COUNT, default=3, help="Times that everything is measured.")
@_common
def s3(**options: Any) -> None:
    """Measure shuffle and verify in an object store beside a plain copy and read by obstore."""
    from benchmarks import s3 as module

    # Credentials are no part of the settings that results show.
    run = partial(module.run, storage_options=json.loads(options.pop("storage_options")))
    _start("s3", run, options)


@main.command()
@click.option("--size", type=SIZE, default="2GB", help="Data to shuffle.")
@click.option("--row-bytes", type=SIZE, default="8KiB", help="Row width.")
@click.option("--memory", type=SIZE, help="Total memory, for peers with such a setting.  [default: their own]")
@click.option("--workers", type=COUNT, default=cores(), help="Processes or threads of each peer.")
@click.option("--rounds", type=COUNT, default=3, help="Times that each peer is run.")
@click.option("--seconds", type=float, default=1800.0, help="Time limit of one run.")
@click.option("--most-memory", type=SIZE, help="Kill a run that holds more than this.  [default: 80%]")
@click.option("--only", type=_List(str), default=None, help="Run only these peers.")
@click.option(
    "--python",
    type=(str, click.Path(exists=True)),
    multiple=True,
    help="PEER INTERPRETER: run a peer with another Python.",
)
@click.option(
    "--add",
    type=click.Path(exists=True, path_type=Path),
    multiple=True,
    help="results.json of an earlier run, whose peers join the table.",
)
@_common
def peers(**options: Any) -> None:
    """Compare with other tools on the same rows: time, memory, uniformity."""
    from benchmarks.peers import driver as module

    _start("peers", module.run, options)


@main.command()
@click.option("--start", type=SIZE, default="64MB", help="Size of the smallest data.")
@click.option("--factors", type=INTS, default="1,2,4,8,16,32,64", help="Multiples of that size.")
@click.option("--row-bytes", type=SIZE, default="8KiB", help="Row width.")
@click.option("--memory", type=SIZE, default="96MiB", help="Most memory that one worker uses, at every size.")
@click.option("--block", type=SIZE, default=None, help="Size of the rows of one task (M).  [from --memory]")
@click.option("--run-bytes", type=SIZE, default="1MiB", help="Least size that is read in one piece (P).")
@click.option("--workers", type=COUNT, default=0, help="Dask workers; 0 is serial.")
@click.option("--rounds", type=COUNT, default=3, help="Times that each size is run.")
@_common
def growth(**options: Any) -> None:
    """Measure time and peak memory as the data grows at a fixed memory limit."""
    from benchmarks import growth as module

    _start("growth", module.run, options)


@main.command()
@click.option("--size", type=SIZE, default="1GB", help="Data to shuffle.")
@click.option("--row-bytes", type=SIZE, default="8KiB", help="Row width.")
@click.option("--levels", type=COUNT, default=2, help="Passes over the data.")
@click.option("--memory", type=SIZE, default="256MiB", help="Most memory that the process uses.")
@click.option("--mode", type=click.Choice(["cached", "disk"]), default="disk", help="Where the data is.")
@click.option("--rounds", type=COUNT, default=5, help="Times that everything is measured.")
@_common
def costs(**options: Any) -> None:
    """Measure the cost that digests, the cluster and the source's codecs add to a shuffle."""
    from benchmarks import costs as module

    _start("costs", module.run, options)


@main.command()
@click.option("--size", type=SIZE, default="1GB", help="Data that was shuffled.")
@click.option("--row-bytes", type=SIZES, default="8KiB,512B", help="Row widths.")
@click.option("--threads", type=INTS, default=f"1,{cores()}", help="Threads of verify.")
@click.option("--modes", type=MODES, default="cached,disk", help="Where the data is.")
@click.option("--chunk", type=SIZE, default="32MiB", help="Size of the source's chunk files.")
@click.option("--rounds", type=COUNT, default=5, help="Times that everything is measured.")
@_common
def verify(**options: Any) -> None:
    """Measure verify as a fraction of a plain read of both stores."""
    from benchmarks import verify as module

    _start("verify", module.run, options)


@main.command()
@click.option("--tasks", type=COUNT, default=1_000_000, help="Tasks that do nothing.")
@click.option("--workers", type=COUNT, default=cores(), help="Dask worker processes.")
@_common
def scheduler(**options: Any) -> None:
    """Measure tasks that do nothing, through the real executor and a real Dask scheduler."""
    from benchmarks import scheduler as module

    _start("scheduler", module.run, options)


@main.command()
@click.option("--size", type=SIZE, default="1GB", help="Bytes of each store.")
@click.option("--widths", type=INTS, default="384,4096", help="Values of a row.")
@click.option("--threads", type=INTS, default=f"1,{cores()}", help="Threads of the loader and of the plain read.")
@click.option("--modes", type=MODES, default="cached,disk", help="Where the data is.")
@click.option("--batch-sizes", type=INTS, default="1024,4096", help="Rows of a batch.")
@click.option("--chunk", type=SIZE, default="32MiB", help="Size of the chunk files.")
@click.option("--rounds", type=COUNT, default=15, help="Times that everything is measured.")
@click.option("--disk-rounds", type=COUNT, default=5, help="Times that the cases on disk are measured.")
@_common
def loader(**options: Any) -> None:
    """Measure the loader and stats, beside a plain sequential read of the same files."""
    from benchmarks import loader as module

    _start("loader", module.run, options)


@main.command()
@click.option(
    "--other",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    required=True,
    help="Checkout of the older revision, with its environment (`make .venv/test.done`).",
)
@click.option("--names", type=_List(str, ("shuffle", "loader")), default="shuffle,loader", help="Benchmarks to run.")
@click.option("--size", type=SIZE, default="1GB", help="Data of each benchmark.")
@click.option("--modes", type=MODES, default="cached", help="Where the data is.")
@click.option("--rounds", type=COUNT, default=3, help="Times that everything is measured.")
@_common
def revisions(**options: Any) -> None:
    """Compare this checkout with one of an older revision, each by its own benchmarks, in turn."""
    from benchmarks import revisions as module

    _start("revisions", module.run, options)


@main.command()
@click.option("--known", type=SIZES, default="400MB,1.2GB", help="Sizes to fit to.")
@click.option("--held-out", type=SIZES, default="800MB,1.6GB", help="Sizes to predict.")
@click.option("--memories", type=SIZES, default="96MiB,192MiB", help="Memory of one worker in the runs to fit to.")
@click.option("--held-memory", type=SIZE, default="144MiB", help="Memory of one worker in the runs to predict.")
@click.option("--mode", type=click.Choice(["disk", "cached"]), default="disk", help="Where the data is.")
@click.option("--workers", type=INTS, default=f"0,1,{cores()}", help="Dask workers; 0 is serial.")
@click.option("--levels", type=INTS, default="2,3", help="Passes over the data.")
@click.option("--row-bytes", type=SIZE, default="8KiB", help="Row width.")
@click.option("--rounds", type=COUNT, default=3, help="Times that each is run.")
@_common
def calibrate(**options: Any) -> None:
    """Fit the cost model's constants on this machine, and test its predictions on other runs."""
    from benchmarks import calibrate as module

    _start("calibrate", module.run, options)


STORE = click.Path(path_type=Path)


@main.command(name="sae-peers")
@click.option("--store", type=STORE, default="demo/shuffled.zarr", help="Shuffled activations.")
@click.option("--d-sae", type=COUNT, default=1024, help="Number of latents.")
@click.option("--k", type=COUNT, default=32, help="Active latents per token.")
@click.option("--steps", type=COUNT, default=120, help="Steps on the store's rows; 0 leaves these out.")
@click.option("--batch", type=COUNT, default=1024, help="Rows per step.")
@click.option("--planted-steps", type=COUNT, default=400, help="Steps on planted rows; 0 leaves these out.")
@click.option("--rounds", type=COUNT, default=10, help="Rounds of the speed comparison; 0 leaves it out.")
@click.option("--speed-batch", type=COUNT, default=2048, help="Rows per step in the speed comparison.")
@click.option("--wide", type=INTS, default="768,12288,64", help="A second width, latents, k for speed.")
@click.option("--only", type=_List(str), default=None, help="Run only these tools, named by module.")
@_common
def sae_peers(**options: Any) -> None:
    """Compare saetrain and other trainers on the same rows: FVU, planted features found, speed."""
    from benchmarks.sae import peers as module

    _start("sae-peers", module.run, options)


@main.command(name="sae-quality")
@click.option("--store", type=STORE, default=None, help="Shuffled activations; without them rows are planted only.")
@click.option("--field", default="activations", help="Array of the store.")
@click.option("--d-sae", type=COUNT, default=1024, help="Number of latents, on the store's rows.")
@click.option("--k", type=COUNT, default=32, help="Active latents per token, on the store's rows.")
@click.option("--steps", type=COUNT, default=200, help="Steps on the store's rows; 0 leaves these out.")
@click.option("--batch", type=COUNT, default=512, help="Rows per step.")
@click.option("--planted-d-sae", type=COUNT, default=512, help="Number of latents, on planted rows.")
@click.option("--planted-k", type=COUNT, default=8, help="Active latents per token, on planted rows.")
@click.option("--planted-steps", type=COUNT, default=400, help="Steps on planted rows; 0 leaves these out.")
@click.option("--seeds", type=COUNT, default=3, help="Seeds of our own forms.")
@click.option("--peer-seeds", type=COUNT, default=5, help="Seeds of peers.")
@click.option("--forms", type=_List(str), default=None, help="Only these of our own forms.")
@click.option("--jobs", type=COUNT, default=1, help="Processes at a time.")
@click.option("--python", type=(str, click.Path(exists=True)), multiple=True, help="TOOL INTERPRETER: as in peers.")
@_common
def sae_quality(**options: Any) -> None:
    """Compare our defaults, other ways to train, and peers on FVU, dead latents and features found, over seeds."""
    from benchmarks.sae import quality as module

    _start("sae-quality", module.run, options)


@main.command(name="sae-order")
@click.option("--store", type=STORE, default="demo/activations.zarr", help="Activations in harvest order.")
@click.option("--d-sae", type=COUNT, default=1024, help="Number of latents.")
@click.option("--k", type=COUNT, default=32, help="Active latents per token.")
@click.option("--batch", type=COUNT, default=512, help="Rows per step.")
@click.option("--buffer", type=COUNT, default=16_384, help="Rows of the shuffle buffer.")
@click.option("--dead", type=COUNT, default=40, help="Steps without firing after which a latent is dead.")
@_common
def sae_order(**options: Any) -> None:
    """Train the same SAE on shuffled rows, through a shuffle buffer, and in harvest order."""
    from benchmarks.sae import order as module

    _start("sae-order", module.run, options)


@main.command(name="sae-speed")
@click.option(
    "--archs", type=_List(str), default="topk,batchtopk,matryoshka,relu,jumprelu,gated", help="Variants to time."
)
@click.option("--width", type=COUNT, default=384, help="Width of the activations.")
@click.option("--d-sae", type=COUNT, default=6144, help="Number of latents.")
@click.option("--k", type=COUNT, default=32, help="Active latents per token of the topk family.")
@click.option("--batch", type=COUNT, default=2048, help="Rows per step.")
@click.option("--steps", type=COUNT, default=7, help="Steps that are timed, with and without clocks.")
@click.option("--device", default="auto", help="Where to train, as torch names it.")
@_common
def sae_speed(**options: Any) -> None:
    """Split the time of a training step by piece, beside the least that its operations and bytes allow."""
    from benchmarks.sae import pieces as module

    _start("sae-speed", module.run, options)


@main.command(name="sae-memory")
@click.option("--archs", type=_List(str), default="topk,relu,jumprelu", help="Variants to run.")
@click.option("--width", type=COUNT, default=1024, help="Width of the activations.")
@click.option("--d-sae", type=COUNT, default=16_384, help="Number of latents.")
@click.option("--batch", type=COUNT, default=4096, help="Rows per step.")
@click.option("--k", type=COUNT, default=32, help="Active latents per token of the topk family.")
@click.option("--tile", type=COUNT, default=256, help="Tokens of a tile.")
@click.option("--moments", type=click.Choice(["full", "8bit"]), default="full", help="How Adam's moments are kept.")
@click.option("--steps", type=COUNT, default=2, help="Steps to train.")
@_common
def sae_memory(**options: Any) -> None:
    """Measure the memory of `saetrain fit` beside the plan's figure."""
    from benchmarks.sae import holding as module

    _start("sae-memory", module.run, options)


@main.command(name="sae-ranks")
@click.option("--width", type=COUNT, default=512, help="Width of the activations.")
@click.option("--d-sae", type=COUNT, default=65_536, help="Number of latents.")
@click.option("--small", type=COUNT, default=512, help="Number of latents of the base.")
@click.option("--ranks", type=INTS, default="1,2,4", help="Numbers of ranks to try.")
@_common
def sae_ranks(**options: Any) -> None:
    """Measure each rank's memory as more ranks share a dictionary, and the bytes sent between them."""
    from benchmarks.sae import ranks as module

    _start("sae-ranks", module.run, options)


@main.command()
@click.option("--rows", type=COUNT, default=300_000, help="Rows of the store.")
@click.option("--width", type=COUNT, default=384, help="Width of the activations.")
@click.option("--latents", type=INTS, default="3072,16384", help="Sizes of the dictionary.")
@click.option("--k", type=COUNT, default=32, help="Active latents of a token.")
@click.option("--workers", type=int, default=cores(), help="Worker processes, of one thread each.")
@click.option("--rounds", type=int, default=1, help="Runs of each size.")
@click.option("--store", type=click.Path(exists=True, path_type=Path), help="Rows to describe, not random ones.")
@click.option("--trained", type=click.Path(exists=True, path_type=Path), help="A dictionary of them to measure first.")
@_common
def features(**options: Any) -> None:
    """Time `saetrain features` beside the bare encoder product."""
    from benchmarks.sae import describe as module

    _start("features", module.run, options)


@main.command(name="features-peers")
@click.option("--rows", type=COUNT, default=300_000, help="Rows of the store.")
@click.option("--width", type=COUNT, default=384, help="Width of the activations.")
@click.option("--latents", type=COUNT, default=16_384, help="Size of the dictionary.")
@click.option("--k", type=COUNT, default=32, help="Active latents of a token.")
@click.option("--workers", type=int, default=cores(), help="Worker processes, of one thread each.")
@click.option("--some", type=COUNT, default=256, help="Features that peers describe.")
@click.option("--dashboard", default=None, help="Python of an environment with sae-dashboard.")
@click.option("--delphi", default=None, help="Python of an environment with eai-delphi.")
@_common
def features_peers(**options: Any) -> None:
    """Time `saetrain features` beside a plain loop over columns, SAEDashboard and delphi."""
    from benchmarks.sae import beside as module

    _start("features-peers", module.run, options)


@main.command(name="features-growth")
@click.option("--rows", type=INTS, default="300000,1200000,4800000", help="Rows of the stores.")
@click.option(
    "--latents", type=INTS, default="1024,16384,262144", help="Sizes of the dictionary; the first for all stores."
)
@click.option("--latent-rows", type=INTS, default="1100000,1100000,100000", help="Rows of each of these.")
@click.option("--width", type=COUNT, default=16, help="Width of the activations.")
@click.option("--k", type=COUNT, default=32, help="Active latents of a token.")
@click.option("--memory", type=SIZE, default="192MiB", help="Memory of a task.")
@click.option("--workers", type=int, default=cores(), help="Worker processes, of one thread each.")
@_common
def features_growth(**options: Any) -> None:
    """Measure the memory of `saetrain features` as tokens and latents grow."""
    from benchmarks.sae import growing as module

    _start("features-growth", module.run, options)


@main.command(name="features-large")
@click.option("--store", type=STORE, default=None, help="Activations in document order; without them rows are random.")
@click.option("--latents", type=COUNT, default=1_000_000, help="Latents of a random decoder.")
@click.option("--rows", type=COUNT, default=4096, help="Rows to take of the store, its first.")
@click.option("--width", type=COUNT, default=384, help="Width of random rows.")
@click.option("--k", type=COUNT, default=32, help="Active latents of a token.")
@click.option("--near", type=int, default=16, help="Neighbours of each latent; their time grows with its square.")
@click.option("--memory", type=SIZE, default="1GiB", help="Memory of a task.")
@click.option("--workers", type=int, default=cores(), help="Worker processes, of one thread each.")
@click.option("--checked", type=COUNT, default=256, help="Latents that are computed again by plain products.")
@click.option("--costs", type=STORE, default=None, help="costs.json of features-forecast, for the time to expect.")
@_common
def features_large(**options: Any) -> None:
    """Plan and run `saetrain features` on a dictionary of a million latents, and look into the result."""
    from benchmarks.sae import large as module

    _start("features-large", module.run, options)


@main.command(name="features-forecast")
@click.option("--width", type=COUNT, default=384, help="Width of the activations.")
@click.option("--k", type=COUNT, default=32, help="Active latents of a token.")
@click.option(
    "--calibrate",
    type=_List(str),
    default="16384x2048,65536x2048,32768x8192,8192x16384,2048x65536",
    help="Runs that give the unit costs, as ROWSxLATENTS.",
)
@click.option("--held", type=_List(str), default="131072x3072,49152x12288,16384x32768", help="Runs that are predicted.")
@click.option("--large", default="1000000000x34000000", help="A run that is planned alone.")
@click.option("--large-width", type=COUNT, default=4096, help="Its width.")
@_common
def features_forecast(**options: Any) -> None:
    """Compare predicted and measured times of `saetrain features`, and plan a dictionary too large to run here."""
    from benchmarks.sae import forecasting as module

    _start("features-forecast", module.run, options)


@main.command()
@click.option("--latents", type=COUNT, default=1_000_000, help="Features of the result.")
@click.option("--described", type=COUNT, default=4096, help="Features that are described; the others are copies.")
@click.option("--rows", type=COUNT, default=100_000, help="Rows of the store.")
@click.option("--width", type=COUNT, default=128, help="Width of the activations.")
@click.option("--k", type=COUNT, default=32, help="Active latents of a token.")
@click.option("--asked", type=COUNT, default=30, help="Features to ask for.")
@_common
def view(**options: Any) -> None:
    """Time the page's server on one feature of a million: from a cold cache, from a warm one, and again."""
    from benchmarks.sae import look as module

    _start("view", module.run, options)


@main.command(name="all")
@_common
def everything(**options: Any) -> None:
    """Run all benchmarks in turn, with their defaults."""
    for command in (floor, shuffle, costs, loader, growth, scheduler, calibrate, peers, sae_ranks):
        with click.Context(command) as ctx:
            defaults = {p.name: p.get_default(ctx) for p in command.params if p.name}
            defaults = {p.name: p.type_cast_value(ctx, defaults[p.name]) for p in command.params if p.name}
        ctx.invoke(command, **(defaults | {k: v for k, v in options.items() if k != "out"}))


if __name__ == "__main__":
    main()
