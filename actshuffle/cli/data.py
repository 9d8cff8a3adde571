"""Commands that look at the numbers of a store: `stats`, `quality`.  `app` adds them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from actshuffle.cli.options import COUNT, LOOK, WORK, Parsed
from actshuffle.cli.session import at_work, show
from actshuffle.errors import RequestError
from actshuffle.units import format_bytes

INCOMPLETE = click.option("--incomplete", is_flag=True, help="Take a store of ours without its completion marker.")


@click.command()
@click.argument("store", type=click.Path())
@click.option("--png", type=click.Path(dir_okay=False, path_type=Path), help="Also draw them here.")
@click.option("--read", "only_read", is_flag=True, help="Show those kept in the store; compute nothing.")
@click.option("--write/--no-write", default=True, help="Keep them in a finished store.  [default: yes]")
@INCOMPLETE
@WORK
@click.pass_context
def stats(
    ctx: click.Context,
    store: str,
    png: Path | None,
    only_read: bool,
    write: bool,
    incomplete: bool,
    workers: int | None,
    scheduler: str | None,
    storage_options: dict[str, Any] | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Mean, variance, norms, outliers, NaNs and Infs of each array, in one pass.

    Works on threads of this process unless given --workers or --scheduler.

    \b
    Examples:
      actshuffle stats shuffled.zarr --png stats.png
      actshuffle stats shuffled.zarr --read --json
    """
    from actshuffle.checking import statspass as module

    if png is not None and not png.absolute().parent.is_dir():
        raise RequestError(f"there is no folder {png.parent} for the picture")
    if only_read:
        found = module.read_stats(store, storage_options=storage_options)
    else:
        threads = workers is None and scheduler is None
        with at_work(ctx, 0 if threads else workers, scheduler, quiet) as (executor, display):
            found = module.stats(
                store,
                executor=None if threads else executor,
                write=write,
                incomplete=incomplete,
                storage_options=storage_options,
                progress=display,
            )
    if not quiet or as_json:
        show(found.as_dict(), str(found), as_json)
    if png is not None:
        found.png(png)


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise ValueError(f"must be between 0 and 1, got {text}")
    return value


@click.command()
@click.argument("store", type=click.Path())
@click.option("--batch-size", type=COUNT, default=4096, show_default=True, help="Rows of a batch.")
@click.option("--documents", default="document", show_default=True, help="The array that tells documents.")
@click.option("--positions", default="position", show_default=True, help="Places within documents.")
@click.option(
    "--buffer-rows", type=COUNT, help="Score a loader with a shuffle buffer of so many rows.  [default: stored order]"
)
@click.option("--epoch", type=COUNT, default=0, show_default=True, help="Which epoch of the loader.")
@click.option("--seed", type=COUNT, default=0, show_default=True, help="Of loader and simulation.")
@click.option(
    "--alpha",
    type=Parsed("fraction", _fraction),
    default=0.01,
    show_default=True,
    help="Chance that a uniform shuffle fails.",
)
@INCOMPLETE
@LOOK
@click.pass_context
def quality(
    ctx: click.Context,
    store: str,
    batch_size: int,
    documents: str,
    positions: str,
    buffer_rows: int | None,
    epoch: int,
    seed: int,
    alpha: float,
    incomplete: bool,
    storage_options: dict[str, Any] | None,
    as_json: bool,
) -> None:
    """How well the batches of a store are mixed, beside those of a uniform shuffle.

    Exit code 0 if nothing tells them apart, else 1.

    \b
    Examples:
      actshuffle quality shuffled.zarr
      actshuffle quality activations.zarr --buffer-rows 1000000
    """
    from actshuffle.checking import scores as module
    from actshuffle.loading.dataset import open_finished_or_plain
    from actshuffle.loading.loader import Loader

    dataset = open_finished_or_plain(store, incomplete=incomplete, storage_options=storage_options)
    rows = 0 if buffer_rows is None and not dataset.shuffled else buffer_rows
    loader = Loader(dataset, batch_size, buffer_rows=rows, seed=seed)
    if buffer_rows:
        held = 2 * loader.order.buffer_rows * loader.layout.row_bytes
        click.echo(f"a buffer of {loader.order.buffer_rows:,} rows takes up to {format_bytes(held)}", err=True)
    report = module.quality(loader, documents=documents, positions=positions, epoch=epoch, alpha=alpha, seed=seed)
    show(report.as_dict(), str(report), as_json)
    ctx.exit(0 if report.passed else 1)


commands: list[click.Command] = [stats, quality]
