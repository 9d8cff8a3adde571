"""The names that an export records, of the model and of the place in it, and its README for the hub.

An array ``layer_10`` of `actshuffle collect` is hidden state 10, the residual stream after ten blocks, which
TransformerLens and SAELens call ``blocks.9.hook_resid_post``.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from actshuffle.units import counted
from saetrain.training.log import read_log

CARD = "README.md"
LOADING = {
    "saelens": ("saelens", "from sae_lens import SAE\n\nsae = SAE.load_from_disk({folder!r})"),
    "sparsify": ("sparsify", "from sparsify import Sae\n\nsae = Sae.load_from_disk({folder!r})"),
}


def about(run: Path) -> dict[str, Any]:
    """The facts that config.json of a run, or of a checkpoint's run, records beside the settings."""
    for folder in (run, run.parent.parent):
        try:
            return dict(json.loads((folder / "config.json").read_text())["about"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return {}


def origin(facts: dict[str, Any], model: str | None, hook: str | None) -> dict[str, Any]:
    """The entries of SAELens' metadata that name the model and the place; those given win over those recorded."""
    known = facts.get("model") or {}
    named = {"model_name": model or known.get("name"), **hooks(str(facts.get("input", "")), known)}
    if hook is not None:
        named["hook_name"] = hook
    if known:
        named["prepend_bos"] = facts.get("prefix") is not None
    return {name: value for name, value in named.items() if value is not None}


def hooks(field: str, model: dict[str, Any]) -> dict[str, str]:
    """The names of an array that was collected from a model; none where another tool has none for it."""
    if not model or "," in field:
        return {}
    if not (layer := re.fullmatch(r"layer_(\d+)", field)):
        return {"hook_name": field, "hf_hook_name": field}
    number = int(layer[1])
    if number == 0:
        return {"hook_name": "blocks.0.hook_resid_pre"}
    # The last hidden state has the model's final norm.
    return {"hook_name": f"blocks.{number - 1}.hook_resid_post"} if number < model["layers"] else {}


def card(run: Path, to: Path, format: str, cfg: dict[str, Any], named: dict[str, Any], step: int) -> str:
    """The text of README.md, with the figures of the last evaluation up to this step."""
    library, loading = LOADING[format]
    model, place = named.get("model_name"), named.get("hook_name")
    facts, steps = about(run), [x for x in read_log(_whole(run)) if "eval_fvu" in x and x["step"] <= step]
    head = ["---", f"library_name: {library}", "tags:", "- sparse-autoencoder", "- saetrain"]
    if model:
        head.append(f"base_model: {json.dumps(model)}")
    where = f" of {model}" if model else ""
    where += f" at {place}" if place else ""
    latents = cfg["d_sae"] if format == "saelens" else cfg["num_latents"]
    sizes = f"{counted(cfg['d_in'], 'number')} a row, {counted(latents, 'latent')}"
    made = cfg.get("metadata", {}).get("variant", "topk")
    lines = [*head, "---", "", f"# {to.name}", "", f"A {made} dictionary for activations{where}: {sizes}.", ""]
    lines += ["| | |", "|---|---|", f"| architecture | {cfg.get('architecture', cfg.get('activation'))} |"]
    if "rows" in facts:
        lines.append(f"| rows of the store, array | {facts['rows']:,}, {facts.get('input') or facts.get('field')} |")
    if steps:
        last = steps[-1]
        ends = "eval_fvu_low" in last
        between = f" (95 %: {last['eval_fvu_low']:.4f} to {last['eval_fvu_high']:.4f})" if ends else ""
        lines += [
            f"| tokens of training | {last['tokens']:,} |",
            f"| held-out variance not explained (FVU) | {last['eval_fvu']:.4f}{between} |",
            f"| active latents a token (L0) | {last['eval_l0']:.1f} |",
            f"| latents that no held-out row activates | {last['eval_dead']:.1%} |",
        ]
    if (prefix := facts.get("prefix")) is not None:
        lines.append(f"| each window began with | {json.dumps(prefix)} |")
    code = ["```python", *loading.format(folder=to.name).splitlines(), "```"]
    ours = ["```python", "import saetrain", "", f"sae = saetrain.load({to.name!r})", "```"]
    return "\n".join([*lines, "", *code, "", *ours, "", "Trained and exported by saetrain.", ""])


def _whole(run: Path) -> Path:
    return run if (run / "metrics.jsonl").exists() else run.parent.parent
