"""Commands that write for other tools and read from them."""

from __future__ import annotations

from pathlib import Path

import click

from saetrain.cli.options import LOOK, print_json
from saetrain.cli.values import FOLDER, PATH, TEXT
from saetrain.exchange import folders as exchange


@click.command("export")
@click.argument("run", type=PATH)
@click.argument("to", type=FOLDER)
@click.option(
    "--format",
    type=click.Choice(["saelens", "sparsify"]),
    default="saelens",
    help="Tool to write for.  [default: saelens]",
)
@click.option("--model-id", type=TEXT, metavar="NAME", help="Name of the model.  [default: as collect recorded it]")
@click.option("--hook-name", type=TEXT, metavar="NAME", help="Place in the model.  [default: that of the array]")
@LOOK
def _export(run: Path, to: Path, format: str, model_id: str | None, hook_name: str | None, as_json: bool) -> None:
    """Write RUN to the folder TO for another tool.

    RUN is a run or one of its checkpoints.  TO gets the weights as safetensors, cfg.json with the names of the model
    and of the place in it, and README.md with the figures, as the hub has them: `hf upload USER/NAME TO` puts it there.

    \b
    Examples:
      saetrain export run folder
      saetrain export run folder --format sparsify
    """
    named = exchange.export(run, to, format, model=model_id, hook=hook_name)
    if shape := exchange.row_shape(run):
        click.echo(f"rows of shape {tuple(shape)} were flattened: {format} must give this model flat rows", err=True)
    told = {"run": str(run), "to": str(to), "format": format, "names": named}
    print_json(told | ({"row_shape": shape} if shape else {}), as_json)
    if not as_json:
        of = f" of {named['model_name']}" if "model_name" in named else ""
        at = f" at {named['hook_name']}" if "hook_name" in named else ""
        click.echo(f"{to}: a {format} dictionary{of}{at}, with README.md; in Python: saetrain.load({str(to)!r})")
        click.echo(f"hf upload USER/NAME {to} puts it on the hub")
        if not of or not at:
            click.echo("no name of the model or of the place in it is known: --model-id, --hook-name", err=True)


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
