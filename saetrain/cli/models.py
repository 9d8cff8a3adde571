"""What the commands with a language model share: their options, and opening what these name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from saetrain.cli.options import all_of
from saetrain.cli.values import COUNT, DEVICE, MULTIPLE, PATH, TEXT
from saetrain.errors import CheckpointError, ConfigError
from saetrain.opening import load
from saetrain.probing.causal import DTYPES, LanguageModel
from saetrain.probing.closing import layer_named
from saetrain.probing.corpus import Corpus, Cutting
from saetrain.runs.trained import recorded
from saetrain.sae import SAE
from saetrain.training.checkpoint import find

MODEL = all_of(
    click.argument("run", type=PATH),
    click.option(
        "--model", type=TEXT, required=True, metavar="NAME", help="Causal model of transformers: a name or a folder."
    ),
    click.option(
        "--layer",
        type=COUNT,
        metavar="N",
        help="Hidden state that the dictionary rebuilds, as in `collect`.  [default: that of the run's layer_N]",
    ),
    click.option("--tokenizer", type=TEXT, metavar="NAME", help="Its tokenizer, if it lies elsewhere."),
    click.option("--model-dtype", type=click.Choice(DTYPES), default="float32", help="Of the model's computation."),
    click.option("--device", type=DEVICE, default="auto", help="cpu, cuda or auto."),
)
CORPUS = all_of(
    click.option("--field", type=TEXT, default="text", help="Name of the text in JSON and tables."),
    click.option("--context", type=COUNT, metavar="N", default=0, help="Tokens of a window.  [default: 128]"),
    click.option(
        "--prefix", type=TEXT, metavar="TOKEN", help="Begin windows with bos, an id, or a token; see `collect`."
    ),
    click.option("--windows", type=COUNT, default=0, metavar="N", help="Most windows of a document; 0 takes all."),
    click.option("--seed", type=COUNT, default=0, help="Of the order of documents, and of other choices."),
    click.option(
        "--drop-norm",
        type=MULTIPLE,
        metavar="X",
        default=10.0,
        help="Leave rows beyond so many times the median norm as they are; 0 leaves none.",
    ),
)
FILES = click.option("--text", type=PATH, multiple=True, required=True, help="Files and folders of text; repeatable.")


def open_both(run: Path, options: dict[str, Any], attention: str | None = None) -> tuple[SAE, LanguageModel]:
    """The dictionary and the model that options name; the dictionary goes to the model's device."""
    sae = load(run)
    if sae.arrays:
        wide = f"from {', '.join(sae.inputs)} to {', '.join(sae.outputs)}"
        raise ConfigError(f"{run} goes {wide}; a running model is edited with autoencoders of one array only")
    layer = options["layer"] if options["layer"] is not None else layer_of(run)
    model = LanguageModel.load(
        options["model"],
        layer,
        tokenizer=options["tokenizer"],
        dtype=options["model_dtype"],
        device=options["device"],
        attention=attention,
    )
    model.check_width(sae.W_dec.shape[1])
    return sae.to(model.device), model


def layer_of(run: Path) -> int:
    """The layer whose array a run was trained on, if its settings or its config.json name it."""
    try:
        field = find(run).config.field
    except CheckpointError:
        field = ""
    return layer_named(field or _recorded_field(run), f"{run} does not say which layer its rows are of")


def _recorded_field(run: Path) -> str:
    """The array of a run that was not told which to take, from the config.json of it or of its checkpoint's run."""
    for folder in (run, *run.parents[:2]):
        if (folder / "config.json").exists():
            return str(recorded(folder)[1].get("field", ""))
    return ""


def open_text(model: LanguageModel, options: dict[str, Any]) -> Corpus:
    cutting = Cutting(options["context"], options["prefix"] or "", options["windows"], options["seed"])
    return Corpus.read(model, options["text"], cutting, options["field"])
