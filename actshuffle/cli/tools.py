"""Commands on shuffled stores: trace, cut, append.  `app` adds them and those of `sources`."""

from __future__ import annotations

import re
from typing import Any

import click

from actshuffle.cli.options import CODEC, COUNT, LOOK, WORK, Parsed
from actshuffle.cli.session import at_work, show
from actshuffle.cli.sources import CHUNK_ROWS, LIST, MEMORY, OVERWRITE, SCRATCH, collect, done, import_
from actshuffle.errors import RequestError


def _share(text: str) -> tuple[str, int | float | str]:
    name, equals, share = text.rpartition("=")
    if not equals or not name:
        raise RequestError(f"write a part as NAME=SHARE, like train.zarr=0.9; got {text!r}")
    if share == "rest":
        return name, share
    if re.fullmatch(r"[0-9_]+", share):
        return name, int(share)
    try:
        value = float(share.removesuffix("%")) / (100 if share.endswith("%") else 1)
    except ValueError:
        raise RequestError(f"{share!r} is no count, no fraction and not rest") from None
    return name, int(value) if value > 1 and value.is_integer() else value


SHARE = Parsed("NAME=SHARE", _share)
ORDERED = click.option("--ordered", is_flag=True, help="Also from a store that is not shuffled.")
COPY = click.option("--copy", is_flag=True, help="Copy the rows, instead of a view that names them.")


@click.command("came-from")
@click.argument("dst", type=click.Path())
@click.argument("rows", type=COUNT, nargs=-1, required=True, metavar="ROW...")
@click.option("--context", type=COUNT, default=5, help="Tokens on both sides.  [default: 5]")
@click.option("--source", type=click.Path(), help="Where the source is now, if it has moved.")
@click.option(
    "--text/--no-text", "decode", default=True, help="Decode tokens, if the tokenizer is here.  [default: yes]"
)
@LOOK
def came_from(dst: str, rows: tuple[int, ...], as_json: bool, **options: Any) -> None:
    """Say where rows of DST came from: source row, document, position, token and its neighbours.

    \b
    Example:
      actshuffle came-from shuffled.zarr 0 17 123_456_789
    """
    from actshuffle.loading import trace

    origins = trace.came_from(dst, rows, **options)
    show({"rows": [o.as_dict() for o in origins]}, "\n".join(map(str, origins)), as_json)


@click.command("where-is")
@click.argument("dst", type=click.Path())
@click.argument("source_rows", type=COUNT, nargs=-1, required=True, metavar="SOURCE_ROW...")
@LOOK
def where_is(dst: str, source_rows: tuple[int, ...], as_json: bool, **options: Any) -> None:
    """Say at which rows of DST some source rows are.

    \b
    Example:
      actshuffle where-is shuffled.zarr 81234
    """
    from actshuffle.loading import trace

    found = [int(row) for row in trace.where_is(dst, source_rows, **options)]
    lines = [
        f"source row {a:,}: " + (f"row {b:,}" if b >= 0 else "not in this store")
        for a, b in zip(source_rows, found, strict=True)
    ]
    show({"rows": [None if b < 0 else b for b in found]}, "\n".join(lines), as_json)


@click.command()
@click.argument("store", type=click.Path())
@click.argument("parts", type=SHARE, nargs=-1, required=True, metavar="NAME=SHARE...")
@click.option("--folder", type=click.Path(), help="Where the parts go.  [default: here]")
@COPY
@ORDERED
@WORK
@click.pass_context
def split(
    ctx: click.Context,
    /,
    store: str,
    parts: tuple[tuple[str, Any], ...],
    workers: int | None,
    scheduler: str | None,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Cut a shuffled STORE into parts: fractions, counts, or "rest".

    A part is a contiguous range of rows, and so a uniform sample; it takes no space, unless with --copy.

    \b
    Examples:
      actshuffle split shuffled.zarr train.zarr=0.9 val.zarr=rest
      actshuffle split shuffled.zarr probe.zarr=10000 --copy
    """
    from actshuffle.building import cut

    if len(dict(parts)) < len(parts):
        raise RequestError("two parts have the same name")
    with at_work(ctx, workers, scheduler, quiet) as (executor, display):
        made = cut.split(store, dict(parts), executor=executor, progress=display, **options)
    document = {"parts": {name: {"path": d.path, "rows": d.rows} for name, d in made.items()}}
    text = "\n".join(f"{d.path}: {d.rows:,} rows ({d.kind})" for d in made.values())
    done(document, text, as_json, quiet)


@click.command()
@click.argument("store", type=click.Path())
@click.argument("rows", type=COUNT)
@click.argument("out", type=click.Path(), required=False)
@COPY
@ORDERED
@LOOK
def head(store: str, rows: int, out: str | None, as_json: bool, **options: Any) -> None:
    """Show the first ROWS rows of STORE, or make them the store OUT.

    \b
    Examples:
      actshuffle head shuffled.zarr 5
      actshuffle head shuffled.zarr 1e6 small.zarr
    """
    from actshuffle.building import cut

    if out is not None:
        made = cut.head(store, rows, out, **options)
        show({"path": made.path, "rows": made.rows}, f"{made.path}: {made.rows:,} rows ({made.kind})", as_json)
        return
    found = cut.first_rows(store, rows, options["storage_options"])
    lines = [f"{name}\n  " + "\n  ".join(shown) for name, shown in found.items()]
    show({"arrays": found}, "\n".join(lines), as_json)


@click.command()
@click.argument("src", type=click.Path())
@click.argument("rows", type=COUNT)
@click.argument("dst", type=click.Path())
@click.option("--seed", type=COUNT, help="The order's seed.  [default: drawn, and recorded in DST]")
@click.option("--fields", metavar="A,B", type=LIST, help="Arrays to take.  [default: all]")
@MEMORY
@CHUNK_ROWS
@CODEC
@SCRATCH
@OVERWRITE
@WORK
@click.pass_context
def sample(
    ctx: click.Context,
    /,
    src: str,
    rows: int,
    dst: str,
    workers: int | None,
    scheduler: str | None,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Write an exactly uniform sample of ROWS rows of SRC to DST, in random order.

    It is what the first rows of the whole, shuffled under the same seed, would be; only they are read.

    \b
    Example:
      actshuffle sample acts.zarr 1e6 sample.zarr --seed 7
    """
    from actshuffle.building import cut

    with at_work(ctx, workers, scheduler, quiet) as (executor, display):
        made = cut.sample(src, rows, dst, executor=executor, progress=display, **options)
    document = {
        "destination": made.destination,
        "rows": made.plan.rows,
        "bytes": made.nbytes,
        "seed": made.seed,
        "seconds": made.seconds,
    }
    done(document, str(made), as_json, quiet)


@click.command()
@click.argument("sources", type=click.Path(), nargs=-1, required=True)
@click.option("--out", type=click.Path(), required=True, help="The folder that will name them.")
@click.option("--fields", metavar="A,B", type=LIST, help="Arrays to take.  [default: all]")
@LOOK
def concat(sources: tuple[str, ...], out: str, as_json: bool, **options: Any) -> None:
    """Make several SOURCES one source for run, without copying a row.

    \b
    Example:
      actshuffle concat monday.zarr tuesday.zarr --out both
      actshuffle run both shuffled.zarr
    """
    from actshuffle.building.joining import concat as put_together

    made = put_together(sources, out, **options)
    document = {"path": made.path, "rows": made.rows, "arrays": sorted(made.fields)}
    show(document, f"{made.path}: {made.rows:,} rows of {len(sources)} sources", as_json)


@click.command()
@click.argument("dst", type=click.Path())
@click.argument("new", type=click.Path())
@click.option("--out", type=click.Path(), help="Write old and new here, and leave DST as it is.")
@click.option("--again", is_flag=True, help="Also if these rows are in DST already.")
@MEMORY
@CHUNK_ROWS
@SCRATCH
@OVERWRITE
@WORK
@click.pass_context
def append(
    ctx: click.Context,
    /,
    dst: str,
    new: str,
    workers: int | None,
    scheduler: str | None,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Add the rows of NEW to the shuffled store DST.

    The result is what shuffling all of them from scratch would give, for one read and one write of the
    old rows.  DST changes in the last step, at once.  The same command again resumes.

    \b
    Example:
      actshuffle append shuffled.zarr wednesday.zarr
    """
    from actshuffle.building.growth import append as grow

    with at_work(ctx, workers, scheduler, quiet) as (executor, display):
        made = grow(dst, new, executor=executor, progress=display, **options)
    document = {
        "destination": made.destination,
        "rows": made.rows,
        "added": made.added,
        "bytes": made.nbytes,
        "seconds": made.seconds,
        "done_before": made.done_before,
    }
    done(document, str(made), as_json, quiet)


commands: list[click.Command] = [came_from, where_is, split, head, sample, concat, append, import_, collect]
