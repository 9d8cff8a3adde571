"""Commands that write for other tools and read from them."""

from __future__ import annotations

from pathlib import Path

import click

from saetrain import exchange
from saetrain.cli.options import LOOK, print_json
from saetrain.cli.values import FOLDER, PATH


@click.command("export")
@click.argument("run", type=PATH)
@click.argument("to", type=FOLDER)
@click.option(
    "--format",
    type=click.Choice(["saelens", "sparsify"]),
    default="saelens",
    help="Tool to write for.  [default: saelens]",
)
@LOOK
def _export(run: Path, to: Path, format: str, as_json: bool) -> None:
    """Write RUN to the folder TO for another tool.

    RUN is a run or one of its checkpoints.

    \b
    Example:
      saetrain export run folder --format sparsify
    """
    exchange.export(run, to, format)
    if shape := exchange.row_shape(run):
        click.echo(f"rows of shape {tuple(shape)} were flattened: {format} must give this model flat rows", err=True)
    print_json({"run": str(run), "to": str(to), "format": format} | ({"row_shape": shape} if shape else {}), as_json)
    if not as_json:
        names = ", ".join(sorted(path.name for path in to.iterdir()))
        click.echo(f"{to}: {names}, as {format} reads them; in Python: saetrain.load({str(to)!r})")


@click.command("import")
@click.argument("folder", type=PATH)
@click.argument("run", type=FOLDER)
@LOOK
def _import(folder: Path, run: Path, as_json: bool) -> None:
    """Turn another tool's FOLDER into the new RUN.

    SAELens or sparsify wrote FOLDER; RUN gets one checkpoint, at step 0.

    \b
    Example:
      saetrain import folder run
    """
    exchange.bring(folder, run)
    print_json({"folder": str(folder), "run": str(run)}, as_json)
    if not as_json:
        click.echo(f"{run}: one checkpoint, of {folder}; in Python: saetrain.load({str(run)!r})")


COMMANDS = _export, _import
