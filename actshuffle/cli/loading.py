"""Commands that read finished stores: came-from and where-is."""

from __future__ import annotations

from typing import Any

import click

from actshuffle.cli.session import Answer, look
from actshuffle.cli.values import COUNT, PATH
from actshuffle.loading import trace


@click.command("came-from")
@click.argument("dst", type=PATH)
@click.argument("rows", type=COUNT, nargs=-1, required=True, metavar="ROW...")
@click.option("--context", type=COUNT, default=5, help="Tokens to show on both sides.  [default: 5]")
@click.option("--source", type=PATH, help="Path or URL of the source, if it has moved.")
@click.option(
    "--text/--no-text", "decode", default=True, help="Decode tokens, if the tokenizer is here.  [default: yes]"
)
@look
def came_from(dst: str, rows: tuple[int, ...], **options: Any) -> Answer:
    """Show where rows of DST came from: source row, document, position, token and its neighbours.

    \b
    Example:
      actshuffle came-from shuffled.zarr 0 17 123_456_789
    """
    origins = trace.came_from(dst, rows, **options)
    return Answer({"rows": [o.as_dict() for o in origins]}, "\n".join(map(str, origins)))


@click.command("where-is")
@click.argument("dst", type=PATH)
@click.argument("source_rows", type=COUNT, nargs=-1, required=True, metavar="SOURCE_ROW...")
@look
def where_is(dst: str, source_rows: tuple[int, ...], **options: Any) -> Answer:
    """Show which rows of DST hold some source rows.

    \b
    Example:
      actshuffle where-is shuffled.zarr 81234
    """
    found = [int(row) for row in trace.where_is(dst, source_rows, **options)]
    lines = [
        f"source row {a:,}: " + (f"row {b:,}" if b >= 0 else "not in this store")
        for a, b in zip(source_rows, found, strict=True)
    ]
    return Answer({"rows": [None if b < 0 else b for b in found]}, "\n".join(lines))
