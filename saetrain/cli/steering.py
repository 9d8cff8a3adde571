"""The command that turns features up in a running model."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from actshuffle.jobs import hold
from actshuffle.units import counted
from saetrain.cli.models import CORPUS, MODEL, open_both, open_text
from saetrain.cli.options import LOOK, print_json
from saetrain.cli.values import ABOVE_0, COUNT, FOLDER, HEAT, NUMBERS, PATH, PENALTY, PLACE, POSITIVE, TEXT
from saetrain.errors import ConfigError
from saetrain.probing.causal import LanguageModel
from saetrain.probing.corpus import measure_scale
from saetrain.probing.curves import Sample, steer
from saetrain.probing.generation import Sampler, prompt_tokens
from saetrain.probing.turning import METHODS, UNITS, Turn, measure_largest, strength
from saetrain.reading.latents import open_features
from saetrain.sae import SAE

MEASURED = ("clamp", "add")  # methods whose strengths have units
UNKNOWN = {"norm": ("the layer's median norm", "--median-norm"), "max": ("a feature's largest activation", "--largest")}


@click.command("steer")
@MODEL
@click.option(
    "--feature", "features", type=COUNT, multiple=True, required=True, metavar="I", help="To turn; repeatable."
)
@click.option(
    "--prompt", "prompts", type=TEXT, multiple=True, required=True, help="What the model goes on from; repeatable."
)
@click.option("--chat", is_flag=True, help="Prompts are a user's turns, in the model's chat template.")
@click.option("--method", type=click.Choice(METHODS), default="clamp", help="What is done to the activation.")
@click.option(
    "--strengths",
    type=NUMBERS,
    default="0.15,0.3,0.45,0.6",
    metavar="A,B",
    help="Of clamp and add, in units; or factors.",
)
@click.option("--unit", type=click.Choice(UNITS), default="norm", help="Of strengths: the median norm, the maximum, 1.")
@click.option("--text", type=PATH, multiple=True, help="Text on which median norm and maximum are measured.")
@CORPUS
@click.option("--rows", type=POSITIVE, default=20_000, metavar="N", help="Of that text, to measure the maximum on.")
@click.option("--median-norm", type=ABOVE_0, metavar="X", help="Of the layer, in place of --text.")
@click.option("--features", "store", type=PLACE, help="Result of `saetrain features`, in place of --text.")
@click.option(
    "--largest", type=ABOVE_0, multiple=True, metavar="X", help="Largest activation of each feature, likewise."
)
@click.option("--tokens", type=POSITIVE, default=64, metavar="N", help="Most tokens of a text.")
@click.option(
    "--seeds", type=POSITIVE, default=1, metavar="N", help="Texts of each prompt and strength, from seed 0 on."
)
@click.option("--temperature", type=HEAT, default=0.0, metavar="X", help="0 takes the likeliest token each time.")
@click.option("--repetition", type=PENALTY, default=1.0, metavar="X", help="Penalty above 1 for tokens that are there.")
@click.option("--generated-only", is_flag=True, help="Leave the prompt as it is.")
@click.option("--out", type=FOLDER, help="Folder for steer.json and steer.png.")
@LOOK
def _steer(run: Path, out: Path | None, as_json: bool, **options: Any) -> None:
    """Turn features of RUN up in a running model, and measure what that costs.

    Prints the text plain and at each strength, from the same seeds, and for each strength how likely the plain model
    finds the text (coherence), how active the features are when it reads it (concept), and how much it repeats.

    \b
    Example:
      saetrain steer run --model smollm2/ --feature 603 --chat --prompt "What are you?" --features acts.features
    """
    _check_units(options)
    if out:
        click.get_current_context().with_resource(hold(out))
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


def _check_units(options: dict[str, Any]) -> None:
    """Refuse strengths in shares of what nothing given tells, before a model is read."""
    features, given = options["features"], options["largest"]
    if given and len(given) != len(features):
        raise ConfigError(
            f"{counted(len(features), 'feature')} and {counted(len(given), 'largest activation')}: one for "
            "each is needed"
        )
    unit, measured = options["unit"], options["store"] or options["text"]
    told = {"norm": options["median_norm"], "max": options["largest"], "activation": True}[unit]
    if not (told or measured) and options["method"] in MEASURED:
        what, own = UNKNOWN[unit]
        raise ConfigError(
            f"strengths are shares of {what}, which nothing here tells: give --features RESULT of `saetrain features`, "
            f"--text FILE to measure it on, {own} X, or --unit activation"
        )


def _units(sae: SAE, model: LanguageModel, options: dict[str, Any]) -> tuple[float | None, dict[int, float]]:
    """The layer's median norm and the features' largest activations, as far as they are given or can be measured."""
    features, given = options["features"], options["largest"]
    norm, largest = options["median_norm"], dict(zip(features, given, strict=False))
    if options["store"]:
        described = open_features(options["store"])
        known = [feature for feature in features if feature < len(described) and not described[feature].is_dead]
        largest = largest or {feature: described[feature].max for feature in known}
        norm = described.median_norm if norm is None else norm
    if options["text"]:
        corpus = open_text(model, options)
        scale = measure_scale(corpus, options["drop_norm"])
        norm = scale.median_norm if norm is None else norm
        largest = largest or measure_largest(sae, corpus, scale, features, options["rows"])
    if options["unit"] == "norm" and norm is None and options["method"] in MEASURED:
        raise ConfigError(
            f"{options['store']} has no store to measure the median norm on: give --text or --median-norm"
        )
    return norm, largest


def _plans(
    sae: SAE, options: dict[str, Any], norm: float | None, largest: dict[int, float]
) -> tuple[list[tuple[float, list[Turn]]], list[dict[str, Any]]]:
    """What each strength does to each feature, and the same as a table in all units."""
    method, plans, table = options["method"], [], []
    for value in (0.0,) if method == "ablate" else options["strengths"]:
        turns = []
        for feature in options["features"]:
            amount = value
            if method in MEASURED:
                unit = options["unit"]
                found = strength(sae, feature, value, unit, median_norm=norm, largest=largest.get(feature))
                table.append({"strength": value, "feature": feature, **asdict(found)})
                amount = found.activation
            turns.append(Turn(feature, method, amount))
        plans.append((value, turns))
    return plans, table


COMMANDS = (_steer,)
