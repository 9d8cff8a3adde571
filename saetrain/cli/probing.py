"""Commands that put a dictionary into a causal language model."""

from __future__ import annotations

import math
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from saetrain.cli.options import FOLDER, LOOK, PATH, all_of, print_json
from saetrain.errors import CheckpointError, ConfigError
from saetrain.opening import load
from saetrain.probing.causal import DTYPES, LanguageModel
from saetrain.probing.corpus import Corpus, Cutting, measure_scale
from saetrain.probing.curves import Sample, steer
from saetrain.probing.fidelity import evaluate
from saetrain.probing.generation import Sampler, prompt_tokens
from saetrain.probing.turning import METHODS, UNITS, Turn, measure_largest, strength
from saetrain.sae import SAE
from saetrain.training.checkpoint import find

MODEL = all_of(
    click.argument("run", type=PATH),
    click.option("--model", required=True, metavar="NAME", help="Causal model of transformers: a name or a folder."),
    click.option(
        "--layer",
        type=int,
        metavar="N",
        help="Hidden state that the dictionary rebuilds, as in `collect`.  [default: that of the run's layer_N]",
    ),
    click.option("--tokenizer", metavar="NAME", help="Its tokenizer, if it lies elsewhere."),
    click.option("--model-dtype", type=click.Choice(DTYPES), default="float32", help="Of the model's computation."),
    click.option("--device", default="auto", help="cpu, cuda or auto."),
)
TEXT = all_of(
    click.option("--field", default="text", help="Name of the text in JSON and tables."),
    click.option("--context", type=int, metavar="N", default=0, help="Tokens of a window.  [default: 128]"),
    click.option(
        "--prefix", default="", metavar="TOKEN", help="Begin windows with bos, an id, or a token; see `collect`."
    ),
    click.option("--windows", type=int, default=0, metavar="N", help="Most windows of a document; 0 takes all."),
    click.option("--seed", type=int, default=0, help="Of the order of documents, and of other choices."),
    click.option(
        "--drop-norm",
        type=float,
        metavar="X",
        default=10.0,
        help="Leave rows beyond so many times the median norm as they are; 0 leaves none.",
    ),
)
FILES = click.option("--text", type=PATH, multiple=True, required=True, help="Files and folders of text; repeatable.")


@click.command("evaluate")
@MODEL
@FILES
@TEXT
@click.option("--within", type=float, default=0.0, metavar="X", help="Stop at this half-width of the loss recovered.")
@click.option("--documents", type=int, default=0, metavar="N", help="Most documents to read; 0 takes all.")
@LOOK
def _evaluate(run: Path, within: float, documents: int, as_json: bool, **options: Any) -> None:
    """Measure what the model loses when a layer goes through RUN's dictionary.

    RUN is a run, a checkpoint, or a folder that SAELens or sparsify wrote.  Prints cross entropy and KL of the model as
    it is, through the dictionary, and with the layer set to zero and to its mean, with 95 % intervals over documents.

    \b
    Example:
      saetrain evaluate run --model gpt2 --text heldout/ --within 0.005
    """
    sae, model = open_both(run, options)
    corpus = open_text(model, options)
    found = evaluate(sae, model, corpus, within=within, most=documents, drop_norm=options["drop_norm"]).to_json()
    print_json({"run": str(run), "model": options["model"], **found}, as_json)
    if not as_json:
        click.echo(_scores(found))


def _scores(found: dict[str, Any]) -> str:
    """The scores as a small table."""

    def row(name: str, value: dict[str, float]) -> str:
        return f"{name:32}{value['value']:10.4f}   (95 %: {value['low']:.4f} to {value['high']:.4f})"

    lines = [
        *(row(f"cross entropy, {name}", value) for name, value in found["ce"].items()),
        *(row(f"KL, {name}", value) for name, value in found["kl"].items()),
        *(row(f"loss recovered, from {name}", value) for name, value in found["loss_recovered"].items()),
        *(row(f"KL recovered, from {name}", value) for name, value in found["kl_recovered"].items()),
        row("FVU", found["fvu"]),
        row("L0", found["l0"]),
        f"{found['tokens']:,} predictions in {found['documents']:,} of {found['documents_available']:,} documents; "
        f"{found['heavy_rows_left']:,} heavy rows left as they are",
    ]
    return "\n".join(lines)


@click.command("steer")
@MODEL
@click.option("--feature", "features", type=int, multiple=True, required=True, metavar="I", help="To turn; repeatable.")
@click.option("--prompt", "prompts", multiple=True, required=True, help="What the model goes on from; repeatable.")
@click.option("--chat", is_flag=True, help="Prompts are a user's turns, in the model's chat template.")
@click.option("--method", type=click.Choice(METHODS), default="clamp", help="What is done to the activation.")
@click.option("--strengths", default="0.15,0.3,0.45,0.6", metavar="A,B", help="Of clamp and add, in units; or factors.")
@click.option("--unit", type=click.Choice(UNITS), default="norm", help="Of strengths: the median norm, the maximum, 1.")
@click.option("--text", type=PATH, multiple=True, help="Text on which median norm and maximum are measured.")
@TEXT
@click.option("--rows", type=int, default=20_000, metavar="N", help="Of that text, to measure the maximum on.")
@click.option("--median-norm", type=float, metavar="X", help="Of the layer, in place of --text.")
@click.option("--largest", type=float, multiple=True, metavar="X", help="Largest activation of each feature, likewise.")
@click.option("--tokens", type=int, default=64, metavar="N", help="Most tokens of a text.")
@click.option("--seeds", type=int, default=1, metavar="N", help="Texts of each prompt and strength, from seed 0 on.")
@click.option("--temperature", type=float, default=0.0, metavar="X", help="0 takes the likeliest token each time.")
@click.option("--repetition", type=float, default=1.0, metavar="X", help="Penalty above 1 for tokens that are there.")
@click.option("--generated-only", is_flag=True, help="Leave the prompt as it is.")
@click.option("--out", type=FOLDER, help="Folder for steer.json and steer.png.")
@LOOK
def _steer(run: Path, out: Path | None, as_json: bool, **options: Any) -> None:
    """Turn features of RUN up in a running model, and measure what that costs.

    Prints the text plain and at each strength, from the same seeds, and for each strength how likely the plain model
    finds the text (coherence), how active the features are when it reads it (concept), and how much it repeats.

    \b
    Example:
      saetrain steer run --model smollm2/ --feature 603 --chat --prompt "What are you?" --text corpus/ --out steered
    """
    sae, model = open_both(run, options)
    norm, largest = _units(sae, model, options)
    plans, table = _plans(sae, options, norm, largest)
    prompts = [prompt_tokens(model, prompt, chat=options["chat"]) for prompt in options["prompts"]]

    def told(sample: Sample) -> None:
        name = "plain" if sample.strength is None else f"{sample.strength:g}"
        click.echo(f"--- {name}, prompt {sample.prompt}, seed {sample.seed}\n{sample.text}", err=as_json)

    found = steer(
        sae,
        model,
        prompts,
        plans,
        tokens=options["tokens"],
        seeds=range(options["seeds"]),
        sampler=Sampler(options["temperature"], 0, options["repetition"]),
        generated_only=options["generated_only"],
        limit=options["drop_norm"] * norm if norm and options["drop_norm"] else math.inf,
        unit=options["unit"],
        told=told,
    )
    files: list[str] = []
    if out:
        from saetrain.probing.drawing import write_curves  # imports matplotlib

        files = [str(path) for path in write_curves(found, out)]
    facts = {"run": str(run), "model": options["model"], "median_norm": norm, "largest": largest, "strengths": table}
    print_json({**facts, **found.to_json(), "files": files}, as_json)
    if not as_json:
        click.echo("\n".join(["", found.table(), *files]))


def _units(sae: SAE, model: LanguageModel, options: dict[str, Any]) -> tuple[float | None, dict[int, float]]:
    """The layer's median norm and the features' largest activations, as far as they are given or can be measured."""
    features, given = options["features"], options["largest"]
    if given and len(given) != len(features):
        raise ConfigError(f"{len(features)} features and {len(given)} largest activations: one for each is needed")
    norm, largest = options["median_norm"], dict(zip(features, given, strict=False))
    if options["text"]:
        corpus = open_text(model, options)
        scale = measure_scale(corpus, options["drop_norm"])
        norm = scale.median_norm if norm is None else norm
        largest = largest or measure_largest(sae, corpus, scale, features, options["rows"])
    needed = {"norm": norm, "max": largest, "activation": True}[options["unit"]]
    if not needed and options["method"] in ("clamp", "add"):
        raise ConfigError(f"strengths in units of {options['unit']} need --text, or --median-norm and --largest")
    return norm, largest


def _plans(
    sae: SAE, options: dict[str, Any], norm: float | None, largest: dict[int, float]
) -> tuple[list[tuple[float, list[Turn]]], list[dict[str, Any]]]:
    """What each strength does to each feature, and the same as a table in all units."""
    method, plans, table = options["method"], [], []
    for text in ["0"] if method == "ablate" else options["strengths"].split(","):
        try:
            value = float(text)
        except ValueError:
            raise ConfigError(f"strengths are numbers with commas between them, got {text!r}") from None
        turns = []
        for feature in options["features"]:
            amount = value
            if method in ("clamp", "add"):
                unit = options["unit"]
                found = strength(sae, feature, value, unit, median_norm=norm, largest=largest.get(feature))
                table.append({"strength": value, "feature": feature, **asdict(found)})
                amount = found.activation
            turns.append(Turn(feature, method, amount))
        plans.append((value, turns))
    return plans, table


# --- What the commands share


def open_both(run: Path, options: dict[str, Any], attention: str | None = None) -> tuple[SAE, LanguageModel]:
    """The dictionary and the model that options name; the dictionary goes to the model's device."""
    sae = load(run)
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
    """The layer whose array a run was trained on, if its settings name it."""
    try:
        field = find(run).config.field
    except CheckpointError:
        field = ""
    named = re.fullmatch(r"layer_(\d+)", field)
    if not named:
        raise ConfigError(f"{run} does not say which layer its rows are of; give it with --layer")
    return int(named[1])


def open_text(model: LanguageModel, options: dict[str, Any]) -> Corpus:
    cutting = Cutting(options["context"], options["prefix"], options["windows"], options["seed"])
    return Corpus.read(model, options["text"], cutting, options["field"])


COMMANDS = _evaluate, _steer
