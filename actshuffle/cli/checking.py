"""Commands that look at stores and check them: verify, info, stats and quality."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from actshuffle.checking import contents, scores, statspass, verifier
from actshuffle.cli.session import Answer, look, work
from actshuffle.cli.values import COUNT, FRACTION, PATH, POSITIVE, TEXT, FilePath
from actshuffle.errors import RequestError
from actshuffle.loading.dataset import open_finished_or_plain
from actshuffle.loading.loader import Loader
from actshuffle.units import counted, format_bytes

INCOMPLETE = click.option("--incomplete", is_flag=True, help="Accept a store of ours without its completion marker.")


@click.command()
@click.argument("src", type=PATH)
@click.argument("dst", type=PATH)
@click.option("--quick", is_flag=True, help="Check random rows only.")
@click.option(
    "--rows", "sample_rows", type=POSITIVE, default=4096, help="Rows to sample with --quick.  [default: 4096]"
)
@click.option("--mixing", is_flag=True, help="Add statistics of how well the order mixes.")
@work(here=True)
def verify(executor: Any, display: Any, src: str, dst: str, **options: Any) -> Answer:
    """Check that DST is SRC in the order of its seed.  Exits with 1 if it is not.

    Of a view, the whole store that has its rows is checked; a grown store is checked against the concatenation of
    its sources.  What has no order of its own, a collection, is refused (exit code 2).

    Works on threads of this process unless --workers or --scheduler is given.

    \b
    Examples:
      actshuffle verify acts.zarr shuffled.zarr
      actshuffle verify acts.zarr shuffled.zarr --quick --rows 10000
    """
    report = verifier.verify(src, dst, executor=executor, progress=display, **options)
    return Answer(report.as_dict(), report.on_command_line, ok=report.ok)


@click.command()
@click.argument("path", type=PATH)
@look
def info(path: str, storage_options: dict[str, Any] | None) -> Answer:
    """Show the contents of a store, and whether a run finished it.

    \b
    Example:
      actshuffle info shuffled.zarr
    """
    found = contents.info(path, storage_options)
    return Answer(found, contents.info_text(found))


@click.command()
@click.argument("store", type=PATH)
@click.option("--png", type=FilePath(dir_okay=False, path_type=Path), help="Also draw the statistics in this file.")
@click.option("--read", "only_read", is_flag=True, help="Show the statistics kept in the store; compute nothing.")
@click.option("--write/--no-write", default=True, help="Keep the statistics in a finished store.  [default: yes]")
@INCOMPLETE
@work(here=True)
def stats(executor: Any, display: Any, store: str, png: Path | None, only_read: bool, **options: Any) -> Answer:
    """Compute mean, variance, norms, outliers, NaNs and Infs of each array, in one pass.

    Works on threads of this process unless --workers or --scheduler is given.

    \b
    Examples:
      actshuffle stats shuffled.zarr --png stats.png
      actshuffle stats shuffled.zarr --read --json
    """
    if png is not None and not png.absolute().parent.is_dir():
        raise RequestError(f"there is no folder {png.parent} for the picture")
    if only_read:
        found = statspass.read_stats(store, storage_options=options["storage_options"])
    else:
        found = statspass.stats(store, executor=executor, progress=display, **options)
    return Answer(found.as_dict(), str(found), wraps=False, then=lambda: png and found.png(png))


@click.command()
@click.argument("store", type=PATH)
@click.option("--batch-size", type=POSITIVE, default=4096, show_default=True, help="Rows per batch.")
@click.option(
    "--documents", type=TEXT, default="document", show_default=True, help="Array that holds document numbers."
)
@click.option(
    "--positions", type=TEXT, default="position", show_default=True, help="Array that holds positions in documents."
)
@click.option(
    "--buffer-rows", type=COUNT, help="Score a loader with a shuffle buffer of this size.  [default: stored order]"
)
@click.option("--epoch", type=COUNT, default=0, show_default=True, help="Epoch of the loader.")
@click.option("--seed", type=COUNT, default=0, show_default=True, help="Seed of the loader and the simulation.")
@click.option("--alpha", type=FRACTION, default=0.01, show_default=True, help="Chance that a uniform shuffle fails.")
@INCOMPLETE
@look
def quality(store: str, batch_size: int, buffer_rows: int | None, seed: int, **options: Any) -> Answer:
    """Compare how well the batches of a store are mixed with a uniform shuffle.

    The exit code is 0 if nothing tells them apart, else 1.

    \b
    Examples:
      actshuffle quality shuffled.zarr
      actshuffle quality activations.zarr --buffer-rows 1000000
    """
    opening = {name: options.pop(name) for name in ("incomplete", "storage_options")}
    dataset = open_finished_or_plain(store, **opening)
    rows = 0 if buffer_rows is None and not dataset.shuffled else buffer_rows
    loader = Loader(dataset, batch_size, buffer_rows=rows, seed=seed)
    if buffer_rows:
        held = 2 * loader.order.buffer_rows * loader.layout.row_bytes
        click.echo(f"a buffer of {counted(loader.order.buffer_rows, 'row')} takes up to {format_bytes(held)}", err=True)
    report = scores.quality(loader, seed=seed, **options)
    return Answer(report.as_dict(), str(report), ok=report.passed)
