"""Commands that make stores: of stores (split, head, sample, filter, concat, append), of files, and of a model."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from actshuffle.building import collection, filtering, growth, importers, joining, sampling, splitting
from actshuffle.building.models import DTYPES
from actshuffle.checking import contents
from actshuffle.cli.options import knob, knobs
from actshuffle.cli.session import Answer, look, work
from actshuffle.cli.values import COUNT, LIST, MULTIPLE, NUMBERS, PART, PATH, POSITIVE, RENAMED, SHAPE, SHARE, TEXT
from actshuffle.errors import RequestError
from actshuffle.foreign.formats import FORMATS
from actshuffle.units import counted


def _document(outcome: growth.Appended | collection.Collected | filtering.Filtered) -> dict[str, Any]:
    return {"bytes" if name == "nbytes" else name: value for name, value in asdict(outcome).items()}


SHUFFLED = "shuffled.zarr"  # a name for what comes next
OTHER_SEEDS = "note: a split with another seed draws other lots, so its parts overlap these"
COPY = click.option("--copy", is_flag=True, help="Copy the rows, instead of naming them in a view.")
ORDERED = click.option("--ordered", is_flag=True, help="Allow a store that is not shuffled.")
OUT = click.option("--out", type=PATH, required=True, help="Store to write.")
SKIP_FIRST = click.option(
    "--skip-first", type=COUNT, default=0, help="Drop the rows of the first tokens of each window.  [default: 0]"
)
DROP_TOKENS = click.option("--drop-tokens", metavar="ID,ID", type=NUMBERS, help="Drop the rows of these tokens.")
RENUMBER = click.option(
    "--renumber/--no-renumber", default=True, help="Number documents on from store to store.  [default: yes]"
)
FLOATS = click.Choice(list(DTYPES))
OVERWRITE = click.option("--overwrite", is_flag=True, help="Replace a store that is there.")


@click.command()
@click.argument("store", type=PATH)
@click.argument("parts", type=SHARE, nargs=-1, required=True, metavar="NAME=SHARE...")
@click.option(
    "--by",
    type=click.Choice(splitting.BY),
    help="Let the number of the document, or of the source row, decide the part, so that appended stores split alike.",
)
@click.option("--seed", type=COUNT, default=0, help="Seed of --by.  [default: 0]")
@click.option("--folder", type=PATH, help="Folder of the parts.  [default: here]")
@COPY
@ORDERED
@work()
def split(executor: Any, display: Any, store: str, parts: tuple[tuple[str, Any], ...], **options: Any) -> Answer:
    """Cut a shuffled STORE into parts: fractions, counts, or "rest".

    A part is a contiguous range of rows, and so a uniform sample; it takes no space unless --copy is given.  With
    --by, any STORE is cut by a rule that appended rows do not change, and no document is in two parts.

    \b
    Examples:
      actshuffle split shuffled.zarr train.zarr=0.9 val.zarr=rest
      actshuffle split acts.zarr train=0.9 val=rest --by document
    """
    if len(dict(parts)) < len(parts):
        raise RequestError("two parts have the same name")
    made = splitting.split(store, dict(parts), executor=executor, progress=display, **options)
    document: dict[str, Any] = {"parts": {name: {"path": d.path, "rows": d.rows} for name, d in made.items()}}
    named = f"names rows of {store}, copies none"
    lines = [f"{d.path}: {counted(d.rows, 'row')} ({named if d.kind == 'plain' else d.kind})" for d in made.values()]
    if options["seed"]:
        lines.append(OTHER_SEEDS)
    if note := splitting.note_on_ranges(made):
        document["note"] = note
        lines.append(f"note: {note}")
    first = next(iter(made.values()))
    then = ("actshuffle", "run", first.path, SHUFFLED) if first.kind == "plain" else ()
    return Answer(document, "\n".join(lines), next=then)


@click.command()
@click.argument("store", type=PATH)
@click.argument("rows", type=POSITIVE)
@click.argument("out", type=PATH, required=False)
@COPY
@ORDERED
@look
def head(store: str, rows: int, out: str | None, **options: Any) -> Answer:
    """Show the first ROWS rows of STORE, or make them the store OUT.

    \b
    Examples:
      actshuffle head shuffled.zarr 5
      actshuffle head shuffled.zarr 1e6 small.zarr
    """
    if out is not None:
        made = splitting.head(store, rows, out, **options)
        return Answer({"path": made.path, "rows": made.rows}, f"{made.path}: {counted(made.rows, 'row')} ({made.kind})")
    found = contents.first_rows(store, rows, options["storage_options"])
    lines = [f"{name}\n  " + "\n  ".join(shown) for name, shown in found.items()]
    return Answer({"arrays": found}, "\n".join(lines))


@click.command()
@click.argument("src", type=PATH)
@click.argument("rows", type=POSITIVE)
@click.argument("dst", type=PATH)
@knobs(["seed", "fields", "memory", "chunk_rows", "codec", "scratch"])
@OVERWRITE
@work()
def sample(executor: Any, display: Any, src: str, rows: int, dst: str, **options: Any) -> Answer:
    """Write an exactly uniform sample of ROWS rows of SRC to DST, in random order.

    DST equals the first rows of a shuffle of all of SRC under the same seed, but no other rows are read.

    \b
    Example:
      actshuffle sample acts.zarr 1e6 sample.zarr --seed 7
    """
    made = sampling.sample(src, rows, dst, executor=executor, progress=display, **options)
    document = {
        "destination": made.destination,
        "rows": made.plan.rows,
        "bytes": made.nbytes,
        "seed": made.seed,
        "seconds": made.seconds,
    }
    return Answer(document, str(made))


@click.command("filter")
@click.argument("src", type=PATH)
@click.argument("dst", type=PATH)
@SKIP_FIRST
@DROP_TOKENS
@click.option(
    "--drop-norm", type=MULTIPLE, default=0.0, help="Drop rows over so many times the median norm.  [default: 0, none]"
)
@click.option("--arrays", metavar="A,B", type=LIST, help="Arrays whose norms count.  [default: all of float vectors]")
@click.option(
    "--position", metavar="NAME", type=TEXT, help="Array of places in the window.  [default: window_position]"
)
@click.option("--token", metavar="NAME", type=TEXT, help="Array of token ids.  [default: token, or another usual name]")
@knobs(["memory", "block_bytes", "chunk_rows", "codec", "scratch"])
@OVERWRITE
@work()
def filter_(executor: Any, display: Any, src: str, dst: str, **options: Any) -> Answer:
    """Write the rows of SRC that pass a filter to DST, in their order.

    All arrays lose the same rows, and DST says how many by which option.  A filter that was stopped resumes when the
    same command is given again.

    \b
    Examples:
      actshuffle filter acts.zarr clean.zarr --drop-norm 10
      actshuffle filter acts.zarr clean.zarr --skip-first 1 --drop-tokens 0,2
    """
    options["drop_tokens"] = options["drop_tokens"] or ()
    made = filtering.filter_rows(src, dst, executor=executor, progress=display, **options)
    return Answer(_document(made), str(made), next=("actshuffle", "run", dst, SHUFFLED))


@click.command()
@click.argument("sources", type=PATH, nargs=-1, required=True)
@click.option("--out", type=PATH, required=True, help="Folder that will name the sources.")
@knob("fields")
@RENUMBER
@look
def concat(sources: tuple[str, ...], out: str, **options: Any) -> Answer:
    """Join several SOURCES into one source for run, without copying a row.

    \b
    Example:
      actshuffle concat monday.zarr tuesday.zarr --out both
      actshuffle run both shuffled.zarr
    """
    made = joining.concat(sources, out, **options)
    document = {"path": made.path, "rows": made.rows, "arrays": sorted(made.fields)}
    return Answer(document, f"{made.path}: {counted(made.rows, 'row')} of {counted(len(sources), 'source')}")


@click.command()
@click.argument("dst", type=PATH)
@click.argument("new", type=PATH)
@click.option("--out", type=PATH, help="Write old and new rows here, and leave DST as it is.")
@click.option("--again", is_flag=True, help="Allow rows that are in DST already.")
@RENUMBER
@knob("memory")
@knob("chunk_rows", shown="as in DST")
@knob("scratch")
@OVERWRITE
@work()
def append(executor: Any, display: Any, dst: str, new: str, **options: Any) -> Answer:
    """Add the rows of NEW to the shuffled store DST.

    The result equals a shuffle of all rows from scratch, for one read and one write of the old rows.  DST changes
    in the last step, at once.  The same command again resumes.

    \b
    Example:
      actshuffle append shuffled.zarr wednesday.zarr
    """
    made = growth.append(dst, new, executor=executor, progress=display, **options)
    return Answer(_document(made), str(made), next=("actshuffle", "info", options["out"] or dst))


@click.command("import")
@click.argument("paths", type=PATH, nargs=-1, required=True)
@OUT
@click.option(
    "--format", type=click.Choice(list(FORMATS)), help="Format of the files.  [default: by the endings of their names]"
)
@click.option("--columns", metavar="A,B", type=LIST, help="Columns to take.  [default: all of numbers]")
@click.option("--name", "names", type=RENAMED, multiple=True, help="Give the array of a column another name.")
@click.option(
    "--flatten/--no-flatten",
    default=None,
    help="Make a row of each token, where items are sequences.  [default: if SAELens wrote them]",
)
@click.option(
    "--together/--apart",
    default=None,
    help="Read numbered .npy files as parts of one array.  [default: by the endings of their names]",
)
@click.option("--split", type=TEXT, help="Split of a datasets folder.")
@click.option("--dtype", type=TEXT, help="Data type of raw files (no header).")
@click.option("--row-shape", type=SHAPE, help="Row shape of raw files (no header): 4096, or 12,64.")
@knobs(["memory", "chunk_rows", "codec", "scratch"])
@OVERWRITE
@work()
def import_(
    executor: Any, display: Any, paths: tuple[str, ...], out: str, names: tuple[tuple[str, str], ...], **options: Any
) -> Answer:
    """Make a store of .npy or memmap files, safetensors, parquet, datasets folders, or torch tensors.

    Reports which column became which array.  No code in any of the files is run.

    \b
    Examples:
      actshuffle import acts.npy tokens.npy --out acts.zarr
      actshuffle import saelens-cache/ --out acts.zarr --name token_ids=token
      actshuffle import memmap.bin --dtype float16 --row-shape 4096 --out a.zarr
    """
    made = importers.import_store(paths, out, names=dict(names), executor=executor, progress=display, **options)
    return Answer(made.as_dict(), str(made), next=("actshuffle", "run", out, SHUFFLED))


@click.command()
@click.option("--model", type=TEXT, required=True, help="Name or path of the model, as transformers takes it.")
@click.option(
    "--text",
    type=PATH,
    required=True,
    multiple=True,
    help="File or folder of text, JSON lines, CSV, parquet ...; may be given again.",
)
@OUT
@click.option("--layers", metavar="N,N", type=NUMBERS, help="Hidden states to take; 0 is the embedding.")
@click.option("--hooks", metavar="A,B", type=LIST, help="Modules whose outputs to take.")
@click.option("--gradients", is_flag=True, help="Also write the gradient of the loss with respect to each layer.")
@click.option("--dtype", type=FLOATS, default="float32", help="Data type of the store.  [default: float32]")
@click.option(
    "--model-dtype", type=FLOATS, default="float32", help="Data type in which the model computes.  [default: float32]"
)
@click.option("--context", type=POSITIVE, help="Tokens per window.  [default: 128, or as many as the model takes]")
@click.option(
    "--special",
    type=click.Choice(["drop", "keep"]),
    default="drop",
    help="Drop or keep the rows of special tokens.  [default: drop]",
)
@click.option(
    "--prefix",
    metavar="TOKEN",
    type=TEXT,
    help="Token to begin each window with, whose rows are dropped: bos, an id, or a token.",
)
@SKIP_FIRST
@DROP_TOKENS
@click.option(
    "--drop-norm",
    type=MULTIPLE,
    help="Drop rows over so many times the median norm of a layer; 0 drops none.  [default: 10]",
)
@click.option("--batch-tokens", type=POSITIVE, default=8192, help="Most tokens of one forward pass.  [default: 8192]")
@click.option("--tokens-per-document", type=POSITIVE, help="Most tokens to take of a document.  [default: all]")
@click.option("--rows", type=POSITIVE, help="Most rows to take in total.  [default: all]")
@click.option(
    "--field",
    type=TEXT,
    default="text",
    help="Field of JSON objects, or column of tables, that holds the text.  [default: text]",
)
@click.option("--tokenizer", type=TEXT, help="Name or path of the tokenizer.  [default: that of the model]")
@click.option(
    "--device",
    type=TEXT,
    default="auto",
    help="Device of the model: cpu, cuda, cuda:1, ...  [default: cuda if there is one]",
)
@click.option("--part", type=PART, help="Do part I of N, while other processes do the others.")
@knob("block_bytes", help="Size of a block: the work lost if the process is killed.", shown="128MiB")
@knobs(["chunk_rows", "codec"])
@OVERWRITE
@work(here=True)  # another process doubles the model's memory and halves its threads
def collect(executor: Any, display: Any, model: str, text: tuple[str, ...], out: str, **options: Any) -> Answer:
    """Collect activations of a language model over text, one row per token.

    A collection that was stopped resumes when the same command is given again.  With --part, several processes
    fill one store.

    \b
    Examples:
      actshuffle collect --model gpt2 --layers 3,5 --text corpus/ --out acts.zarr
      actshuffle collect --model gpt2 --hooks h.3.mlp --text a.jsonl \\
        --out acts.zarr --part 1/4
    """
    options |= {name: options[name] or () for name in ("layers", "hooks", "drop_tokens")}
    made = collection.collect(model, text, out, executor=executor, progress=display, **options)
    return Answer(_document(made), str(made), next=("actshuffle", "run", out, SHUFFLED) if made.complete else ())
