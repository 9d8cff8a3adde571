"""Commands that make stores: import and collect; and what they share with those of `tools`."""

from __future__ import annotations

import re
import sys
from typing import Any

import click

from actshuffle.cli.options import CODEC, COUNT, SIZE, WORK, Parsed
from actshuffle.cli.session import at_work, show, wrapped
from actshuffle.errors import RequestError


def _renamed(text: str) -> tuple[str, str]:
    column, equals, name = text.rpartition("=")
    if not equals or not column or not name:
        raise RequestError(f"write a name as COLUMN=ARRAY, like token_ids=token; got {text!r}")
    return column, name


def _numbers(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"-?\d+(,-?\d+)*", text):
        raise RequestError(f"cannot read {text!r} as numbers; write them like 3,5")
    return tuple(map(int, text.split(",")))


def _list(text: str) -> tuple[str, ...]:
    return tuple(part for part in text.split(",") if part)


def _part(text: str) -> tuple[int, int]:
    if not re.fullmatch(r"\d+/\d+", text):
        raise RequestError(f"write a part as I/N, like 1/4; got {text!r}")
    number, count = text.split("/")
    return int(number), int(count)


RENAMED = Parsed("COLUMN=ARRAY", _renamed)
NUMBERS, LIST, PART = Parsed("numbers", _numbers), Parsed("names", _list), Parsed("I/N", _part)

MEMORY = click.option("--memory", type=SIZE, help="Most memory of one worker.  [default: a share of the machine]")
CHUNK_ROWS = click.option("--chunk-rows", type=COUNT, help="Rows of a chunk of the widest array.")
SCRATCH = click.option(
    "--scratch", type=click.Path(), help="Where the intermediate goes.  [default: beside the output]"
)
OVERWRITE = click.option("--overwrite", is_flag=True, help="Replace what is there.")


def done(document: dict[str, Any], text: str, as_json: bool, quiet: bool) -> None:
    """Print the result in the way that was asked for."""
    if as_json or not quiet:
        show(document, wrapped(text, sys.stdout), as_json)


@click.command("import")
@click.argument("paths", type=click.Path(), nargs=-1, required=True)
@click.option("--out", type=click.Path(), required=True, help="The store to write.")
@click.option(
    "--format",
    type=click.Choice(["npy", "raw", "safetensors", "parquet", "arrow", "torch"]),
    help="Of the files.  [default: told by their names]",
)
@click.option("--columns", metavar="A,B", type=LIST, help="Columns to take.  [default: all of numbers]")
@click.option("--name", "names", type=RENAMED, multiple=True, help="Call a column's array something else.")
@click.option(
    "--flatten/--no-flatten",
    default=None,
    help="Items are sequences, their tokens rows.  [default: if SAELens wrote it]",
)
@click.option(
    "--together/--apart", default=None, help="Numbered .npy files are parts of one array.  [default: by their names]"
)
@click.option("--split", help="Of a datasets folder.")
@click.option("--dtype", help="Of files without a header.")
@click.option("--row-shape", type=NUMBERS, help="Of files without a header: 4096, or 12,64.")
@MEMORY
@CHUNK_ROWS
@CODEC
@SCRATCH
@OVERWRITE
@WORK
@click.pass_context
def import_(
    ctx: click.Context,
    /,
    paths: tuple[str, ...],
    out: str,
    names: tuple[tuple[str, str], ...],
    workers: int | None,
    scheduler: str | None,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Make a store of .npy or memmap files, safetensors, parquet, datasets folders, or torch tensors.

    Says which column became which array.  No code in any of the files is run.

    \b
    Examples:
      actshuffle import acts.npy tokens.npy --out acts.zarr
      actshuffle import saelens-cache/ --out acts.zarr --name token_ids=token
      actshuffle import memmap.bin --dtype float16 --row-shape 4096 --out a.zarr
    """
    from actshuffle.building.importers import import_store

    with at_work(ctx, workers, scheduler, quiet) as (executor, display):
        made = import_store(paths, out, names=dict(names), executor=executor, progress=display, **options)
    done(made.as_dict(), str(made), as_json, quiet)


@click.command()
@click.option("--model", required=True, help="Name or path, as transformers takes it.")
@click.option(
    "--text",
    "text",
    type=click.Path(),
    required=True,
    multiple=True,
    help="A file or folder of text, JSON lines, CSV, parquet ...; may be given again.",
)
@click.option("--out", type=click.Path(), required=True, help="The store to write.")
@click.option("--layers", metavar="N,N", type=NUMBERS, help="Hidden states to take: 0 is the embedding.")
@click.option("--hooks", metavar="A,B", type=LIST, help="Modules whose outputs to take.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    default="float32",
    help="Of the store.  [default: float32]",
)
@click.option(
    "--model-dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    default="float32",
    help="What the model computes in.  [default: float32]",
)
@click.option("--context", type=COUNT, help="Tokens of a window.  [default: 128, or what the model takes]")
@click.option(
    "--special", type=click.Choice(["drop", "keep"]), default="drop", help="Rows of special tokens.  [default: drop]"
)
@click.option("--batch-tokens", type=COUNT, default=8192, help="Of one forward pass.  [default: 8192]")
@click.option("--tokens-per-document", type=COUNT, help="Take no more of each.")
@click.option("--rows", type=COUNT, help="Take no more in all.")
@click.option("--field", default="text", help="The text in a JSON object, or the column of a table.  [default: text]")
@click.option("--tokenizer", help="If it is not the model's own.")
@click.option("--device", default="auto", help="cpu, cuda, cuda:1, ...  [default: cuda if there is one]")
@click.option("--part", type=PART, help="Do part I of N; other processes do the others.")
@click.option("--block-bytes", type=SIZE, help="Rows that a kill can cost.  [default: 128MiB]")
@CHUNK_ROWS
@CODEC
@OVERWRITE
@WORK
@click.pass_context
def collect(
    ctx: click.Context,
    /,
    model: str,
    text: tuple[str, ...],
    out: str,
    workers: int | None,
    scheduler: str | None,
    as_json: bool,
    quiet: bool,
    layers: Any,
    hooks: Any,
    **options: Any,
) -> None:
    """Collect activations of a language model over text, one row per token.

    Stopped, the same command again resumes.  With --part, several processes fill one store.

    \b
    Examples:
      actshuffle collect --model gpt2 --layers 3,5 --text corpus/ --out acts.zarr
      actshuffle collect --model gpt2 --hooks h.3.mlp --text a.jsonl \\
        --out acts.zarr --part 1/4
    """
    from actshuffle.building.collection import collect as gather

    # A second process doubles the model's memory and halves its threads: only where asked for.
    with at_work(ctx, 0 if workers is None and scheduler is None else workers, scheduler, quiet) as (executor, display):
        made = gather(
            model, text, out, layers=layers or (), hooks=hooks or (), executor=executor, progress=display, **options
        )
    document = {
        "destination": made.destination,
        "rows": made.rows,
        "documents": made.documents,
        "bytes": made.nbytes,
        "seconds": made.seconds,
        "complete": made.complete,
    }
    done(document, str(made), as_json, quiet)
