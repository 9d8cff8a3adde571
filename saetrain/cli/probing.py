"""Commands that put a dictionary into a causal language model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import torch

from actshuffle.units import counted
from saetrain.cli.models import CORPUS, FILES, MODEL, layer_of, open_both, open_text
from saetrain.cli.options import LOOK, print_json
from saetrain.cli.values import COUNT, PATH, POSITIVE, REAL, TEXT
from saetrain.errors import ConfigError
from saetrain.opening import load
from saetrain.probing.attribution import Metric, attribute, calibrate, cut, log_probability, logit
from saetrain.probing.causal import LanguageModel
from saetrain.probing.effects import loss_effects
from saetrain.probing.fidelity import evaluate, scores
from saetrain.probing.generation import prompt_tokens
from saetrain.probing.graph import trace
from saetrain.probing.removal import ablate
from saetrain.training.outcome import keep_evaluation
from saetrain.writing import put


@click.command("evaluate")
@MODEL
@FILES
@CORPUS
@click.option("--within", type=REAL, default=0.0, metavar="X", help="Stop at this half-width of the loss recovered.")
@click.option("--documents", type=COUNT, default=0, metavar="N", help="Most documents to read; 0 takes all.")
@click.option("--save", is_flag=True, help="Keep the result as RUN/evaluation.json, for `report` and `view`.")
@LOOK
def _evaluate(run: Path, within: float, documents: int, save: bool, as_json: bool, **options: Any) -> None:
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
    found = {"model": options["model"], "text": [str(path) for path in options["text"]], **found}
    if save:
        keep_evaluation(run, found)
    print_json({"run": str(run), **found}, as_json)
    if not as_json:
        click.echo(scores(found))


@click.command("attribute")
@MODEL
@click.option("--prompt", type=TEXT, help="Text whose next token is asked about.")
@click.option("--chat", is_flag=True, help="The prompt is a user's turn, in the model's chat template.")
@click.option("--target", type=TEXT, metavar="TOKEN", help="Token, or its id.  [default: the likeliest next one]")
@click.option("--against", type=TEXT, metavar="TOKEN", help="Take the logit's difference to this token's.")
@click.option("--log-probability", is_flag=True, help="Take the target's log-probability, not its logit.")
@click.option("--shards", type=POSITIVE, default=1, metavar="N", help="Cut the dictionary into so many parts.")
@click.option(
    "--calibrate", "features", type=COUNT, default=0, metavar="N", help="Ablate so many features, to compare."
)
@click.option("--most", type=POSITIVE, default=20, metavar="N", help="Contributions to print.")
@click.option(
    "--text", type=PATH, multiple=True, help="In place of --prompt: the mean effect on the loss of this text."
)
@CORPUS
@click.option("--documents", type=COUNT, default=0, metavar="N", help="Most documents of the text; 0 takes all.")
@LOOK
def _attribute(run: Path, as_json: bool, **options: Any) -> None:
    """Find which features of RUN made the model say what it says, to first order.

    With --prompt, prints the contributions of features to the logit of the next token, with the dictionary's error and
    bias, which sum to the whole.  With --text, prints the features with the largest mean effects on the loss.

    \b
    Examples:
      saetrain attribute run --model gpt2 --prompt "The capital of France is" --calibrate 50
      saetrain attribute run --model gpt2 --text corpus/ --documents 200
    """
    if bool(options["prompt"]) == bool(options["text"]):
        raise ConfigError("give either --prompt or --text")
    sae, model = open_both(run, options)
    facts: dict[str, Any] = {"run": str(run), "model": options["model"]}
    if options["text"]:
        corpus = open_text(model, options)
        effects = loss_effects(sae, model, corpus, most=options["documents"], drop_norm=options["drop_norm"])
        facts |= {"documents": effects.documents, "tokens": effects.tokens, "effects": effects.top(options["most"])}
        print_json(facts, as_json)
        lines = [
            f"feature {row['feature']:>8}  {row['value']:>12.3e} nats  (95 %: {row['low']:.3e} to {row['high']:.3e})"
            for row in facts["effects"]
        ]
    else:
        tokens = prompt_tokens(model, options["prompt"], chat=options["chat"])
        metric, facts["target"] = _scalar(model, tokens, options)
        shards = cut(sae, options["shards"])
        found = attribute(shards, model, tokens, metric).to_json(options["most"])
        names = [model.text_of([token]) for token in tokens]
        for row in found["top"]:
            row["token"] = names[row["position"]]
        facts |= found
        if options["features"]:
            line = calibrate(sae, model, tokens, metric, features=options["features"], seed=options["seed"])
            facts["calibration"] = line.to_json()
        print_json(facts, as_json)
        lines = _contributions(facts)
    if not as_json:
        click.echo("\n".join(lines))


def _scalar(model: LanguageModel, tokens: list[int], options: dict[str, Any]) -> tuple[Metric, str]:
    """The scalar that options name, and its target in words."""
    if options["target"]:
        target = model.token(options["target"])
    else:
        with torch.no_grad():
            target = int(model.run(torch.tensor([tokens])).logits[0, -1].argmax())
    against = model.token(options["against"]) if options["against"] else None
    if options["log_probability"] and against is not None:
        raise ConfigError("--log-probability is of one token: leave --against out")
    metric = log_probability(target) if options["log_probability"] else logit(target, against)
    return metric, model.text_of([target])


def _contributions(found: dict[str, Any]) -> list[str]:
    lines = [f"scalar {found['scalar']:.4f} of {found['target']!r}; {counted(found['active'], 'active feature')}"]
    for row in found["top"]:
        where = f"at {row['position']} {row['token']!r}"
        lines.append(
            f"feature {row['feature']:>8}  {row['contribution']:>10.4f}   {where}, active {row['activation']:.3f}"
        )
    lines += [f"{name:16}  {found[name]:>10.4f}" for name in ("features", "bias", "error")]
    lines.append(f"sum of all parts  {found['total']:>10.4f}   (gap {found['gap']:.1e})")
    if line := found.get("calibration"):
        slope, r2 = line["slope"], line["r2"]
        ends = "" if slope["low"] is None else f" (95 %: {slope['low']:.3f} to {slope['high']:.3f})"
        value = "unknown" if slope["value"] is None else f"{slope['value']:.3f}"
        lines.append(
            f"true ablation over contribution: slope {value}{ends}, r2 {'unknown' if r2 is None else f'{r2:.3f}'}, "
            f"{counted(line['pairs'], 'feature')}"
        )
    return lines


@click.command("ablate")
@MODEL
@click.option(
    "--feature", "features", type=COUNT, multiple=True, required=True, metavar="I", help="To remove; repeatable."
)
@FILES
@CORPUS
@click.option("--sample", type=POSITIVE, default=200, metavar="N", help="Windows to run with and without the features.")
@click.option("--within", type=REAL, default=0.0, metavar="X", help="Run what this half-width needs, nats a token.")
@click.option("--documents", type=COUNT, default=0, metavar="N", help="Most documents of the text; 0 takes all.")
@LOOK
def _ablate(run: Path, features: tuple[int, ...], as_json: bool, **options: Any) -> None:
    """Estimate by how much the loss rises without some features of RUN.

    Every window is run up to the layer; a sample of those in which a feature fires, stratified by its activation, is
    run to the end.

    \b
    Example:
      saetrain ablate run --model gpt2 --feature 603 --text corpus/ --within 1e-4
    """
    sae, model = open_both(run, options)
    corpus = open_text(model, options)
    wanted = {name: options[name] for name in ("sample", "within", "documents", "drop_norm")}
    found = ablate(sae, model, corpus, features, **wanted).to_json()
    print_json({"run": str(run), "model": options["model"], "features": list(features), **found}, as_json)
    if not as_json:
        effect = found["effect"]
        click.echo(
            f"loss without the features: {effect['value']:+.3e} nats a token   "
            f"(95 %: {effect['low']:.3e} to {effect['high']:.3e})\n"
            f"{found['windows_run']:,} of {counted(found['windows'], 'window')} run to the end; the features fire in "
            f"{found['windows'] - found['windows_silent']:,}"
        )
        for share, count in found["windows_needed"].items():
            click.echo(f"a half-width of {share} times the effect needs {counted(count, 'window')}")


@click.command("graph")
@MODEL
@click.argument("upper", type=PATH)
@click.option("--upper-layer", type=COUNT, metavar="N", help="Hidden state of UPPER.  [default: that of its layer_N]")
@click.option("--prompt", type=TEXT, required=True, help="Text whose next token is asked about.")
@click.option("--chat", is_flag=True, help="The prompt is a user's turn, in the model's chat template.")
@click.option("--logits", type=POSITIVE, default=5, metavar="N", help="Likeliest next tokens.")
@click.option("--nodes", type=POSITIVE, default=64, metavar="N", help="Most features of each layer.")
@click.option("--out", type=PATH, required=True, help="File of the graph.")
@LOOK
def _graph(run: Path, upper: Path, out: Path, as_json: bool, **options: Any) -> None:
    """Trace from features of RUN to features of UPPER, at a higher layer, and to the next token.

    Attention patterns and norm scales are frozen.  The file has the schema of attribution graphs that public front ends
    read.

    \b
    Example:
      saetrain graph run12 run20 --model smollm2/ --prompt "The capital of France is" --out graph.json
    """
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise ConfigError(f"--out {out} must be a file in a folder that is there")
    lower, low = open_both(run, options)
    layer = options["upper_layer"] if options["upper_layer"] is not None else layer_of(upper)
    high = LanguageModel(low.model, low.tokenizer, layer, low.name)
    tokens = prompt_tokens(low, options["prompt"], chat=options["chat"])
    above = load(upper).to(low.device)
    found = trace(lower, above, (low, high), tokens, logits=options["logits"], nodes=options["nodes"])
    words = {node.index: low.text_of([node.index]) for node in found.nodes if node.kind == "logit"}
    put(out, json.dumps(found.to_json(out.stem, words)) + "\n")
    facts = {"file": str(out), "nodes": len(found.nodes), "links": len(found.links), "kept": found.kept}
    print_json(facts, as_json)
    if not as_json:
        shares = ", ".join(f"{share:.0%} of layer {layer}" for layer, share in found.kept.items())
        click.echo(
            f"{out}: {counted(len(found.nodes), 'node')} and {counted(len(found.links), 'link')}; influence "
            f"kept: {shares}"
        )


COMMANDS = _evaluate, _attribute, _ablate, _graph
