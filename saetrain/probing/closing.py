"""The end of `fit` and `resume`: run the model through the dictionary that was trained, as `saetrain evaluate` does."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actshuffle import read_texts
from actshuffle.units import counted
from saetrain.errors import ConfigError
from saetrain.opening import load
from saetrain.probing.causal import DTYPES, LanguageModel
from saetrain.probing.corpus import Corpus, Cutting
from saetrain.probing.fidelity import evaluate, scores
from saetrain.training.outcome import keep_evaluation

Say = Callable[[str], None]


@dataclass(frozen=True)
class Closing:
    """What is to be evaluated once a run has ended."""

    text: tuple[Path, ...]
    model: str
    dtype: str
    layer: int
    cutting: Cutting

    @classmethod
    def of(cls, options: Mapping[str, Any], field: str, width: int) -> Closing | None:
        """From the options of a command or a call, before training: refuses what would fail only at its end."""
        given = dict(options)
        text = _paths(given.pop("evaluate"))
        if not text:
            if alone := [name for name, value in given.items() if value is not None]:
                raise ConfigError(
                    f"--{alone[0].replace('_', '-')} is for the evaluation at the end: give --evaluate TEXT"
                )
            return None
        if given["model"] is None:
            raise ConfigError("--evaluate runs a language model: give its name or folder with --model")
        layer = given["layer"]
        if layer is None:
            layer = layer_named(field, f"the rows of {field!r} do not say which layer of the model they are of")
        if (dtype := given["model_dtype"] or DTYPES[0]) not in DTYPES:
            raise ConfigError(f"--model-dtype is one of {', '.join(DTYPES)}, not {dtype!r}")
        next(iter(read_texts(text)))
        _check_size(given["model"], layer, width)
        cutting = Cutting(0, given["prefix"] or "", given["windows"] or 0)
        return cls(text, given["model"], dtype, layer, cutting)

    def run(self, runs: list[Path], device: str, say: Say) -> dict[Path, dict[str, Any]]:
        """Evaluate each run, and keep the result in its folder."""
        model = LanguageModel.load(self.model, self.layer, dtype=self.dtype, device=device)
        corpus = Corpus.read(model, self.text, self.cutting)
        found = {}
        for run in runs:
            say(f"evaluating {run} in {self.model}, layer {self.layer}")
            values = evaluate(load(run).to(model.device), model, corpus).to_json()
            found[run] = {"model": self.model, "text": [str(path) for path in self.text], **values}
            keep_evaluation(run, found[run])
            say(scores(values))
        return found


def layer_named(field: str, otherwise: str) -> int:
    """The number in a name such as layer_12; raises `ConfigError`, which begins with `otherwise`, for other names."""
    named = re.fullmatch(r"layer_(\d+)", field)
    if not named:
        raise ConfigError(f"{otherwise}; give it with --layer")
    return int(named[1])


def _paths(text: str | os.PathLike[str] | Iterable[str | os.PathLike[str]] | None) -> tuple[Path, ...]:
    return tuple(map(Path, [text] if isinstance(text, (str, os.PathLike)) else text or ()))


def _check_size(name: str, layer: int, width: int) -> None:
    """Compare the model's settings with the store; its weights are read at the end."""
    try:
        from transformers import AutoConfig
    except ImportError as error:
        raise ConfigError(
            "--evaluate needs transformers: in a checkout of actshuffle, pip install '.[collect]'"
        ) from error
    try:
        whole = AutoConfig.from_pretrained(name)
        config = whole.get_text_config() if hasattr(whole, "get_text_config") else whole
        size, blocks = int(config.hidden_size), int(config.num_hidden_layers)
    except Exception as error:  # of many kinds, most of them about the name
        raise ConfigError(f"--model {name} cannot be read: {(str(error).splitlines() or [''])[0]}") from error
    if size != width or layer >= blocks:
        raise ConfigError(
            f"--model {name} has {blocks} layers of {counted(size, 'number')}; the rows have {width}, and "
            f"are of layer {layer}"
        )
