"""The sampled effect of an ablation: equal to the whole, covered by its interval, from as many windows as needed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

import saetrain
from saetrain.cli import main
from saetrain.errors import ConfigError, DataError
from saetrain.probing import attribution, removal
from saetrain.probing.corpus import Corpus, Cutting
from support.causal import dictionary, saved, texts, tiny

FEATURES = [5, 17]


def test_the_whole_sample_equals_the_plain_loop() -> None:
    model, sae = tiny(2, "gpt2", torch.float64), dictionary("jumprelu", dtype=torch.float64)
    corpus = Corpus(model, texts(20), Cutting(context=8, prefix="<s>"))
    found = saetrain.ablate(sae, model, corpus, FEATURES, sample=10**6, drop_norm=0.0)
    total, tokens, silent = 0.0, 0, 0
    for document in corpus:
        for window in (w for batch in document.batches for w in batch.tokens.tolist()):
            loss = attribution.loss(window, 1)
            edit = saetrain.Steering(sae, [saetrain.Turn(i, "ablate") for i in FEATURES])
            with torch.no_grad():
                plain, without = (float(loss(model.run(torch.tensor([window]), e).logits[0])) for e in (None, edit))
                fires = bool((sae.encode(model.hidden(torch.tensor([window]))[0, 1:])[:, FEATURES] > 0).any())
            assert fires or plain == without
            total, tokens, silent = total + without - plain, tokens + len(window) - 2, silent + (not fires)
    assert (found.tokens, found.silent) == (tokens, silent)
    assert silent > 0
    assert found.effect.value == pytest.approx(total / tokens)
    assert found.effect.low == found.effect.high == found.effect.value  # nothing was left to chance
    part = saetrain.ablate(sae, model, corpus, FEATURES, sample=30, drop_norm=0.0)
    assert part.drawn < found.drawn
    assert part.effect.low < found.effect.value < part.effect.high


def population() -> tuple[list[float], list[float]]:
    """Effects of windows that grow and scatter with the activation, and the activations."""
    dice = np.random.default_rng(0)
    largest = dice.gamma(1.0, 1.0, 4000)
    return list(0.3 * largest + largest * dice.standard_normal(4000)), list(largest)


def estimate(seed: int, sample: int, within: float = 0.0) -> removal.Removal:
    effects, largest = population()
    found = removal.Removal(removal.stratify(effects, largest, seed), 1000, 100_000)
    removal.draw(found, lambda effect: effect, sample, within)
    return found


def test_intervals_cover_over_500_samples_of_a_known_population() -> None:
    truth = sum(population()[0]) / 100_000
    found = [estimate(seed, 200).effect for seed in range(500)]
    covered = np.mean([f.low <= truth <= f.high for f in found])
    assert 0.93 <= covered <= 0.97
    assert abs(np.mean([f.value for f in found]) - truth) < 4 * np.std([f.value for f in found]) / 500**0.5
    half = np.mean([abs(f.value - truth) <= (f.high - f.low) / 4 for f in found])
    assert half < 0.85  # negative control
    # Strata pay: a simple random sample of the same size has a wider interval.
    effects, drawn = np.array(population()[0]), estimate(0, 200)
    simple = 1.96 * effects.std() * 4000 / np.sqrt(drawn.drawn) / 100_000
    assert (drawn.effect.high - drawn.effect.low) / 2 < 0.9 * simple


def test_the_sample_that_is_needed_gives_the_width_that_is_wanted() -> None:
    for within in (0.002, 0.0008):
        halves = [(f.high - f.low) / 2 for f in (estimate(seed, 1, within).effect for seed in range(30))]
        assert np.median(halves) == pytest.approx(within, rel=0.1)
    wide, narrow = estimate(1, 1, 0.002), estimate(1, 1, 0.0008)
    assert narrow.drawn > 1.5 * wide.drawn
    assert estimate(1, 10**6).drawn == 4000


def test_requests_that_make_no_sense_are_refused() -> None:
    model, sae = tiny(), dictionary("jumprelu")
    corpus = Corpus(model, texts(3), Cutting(context=8))
    with pytest.raises(ConfigError, match="no feature 99"):
        saetrain.ablate(sae, model, corpus, [99])
    with pytest.raises(ConfigError, match="windows are 1 or more"):
        saetrain.ablate(sae, model, corpus, [1], sample=0)
    assert sae.threshold is not None
    sae.threshold[1] = 1e9
    with pytest.raises(DataError, match="never fire"):
        saetrain.ablate(sae, model, corpus, [1])


def test_the_command_prints_the_effect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dictionary("jumprelu").save(tmp_path / "sae")
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": t}) for _, t in texts(12)))
    arguments = ["ablate", tmp_path / "sae", "--model", saved(tmp_path / "model"), "--layer", 2, "--device", "cpu"]
    arguments += ["--text", text, "--context", 8, "--feature", 5, "--feature", 17, "--sample", 20]
    assert main([*map(str, arguments), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    corpus = Corpus(tiny(), texts(12), Cutting(context=8))
    expected = saetrain.ablate(dictionary("jumprelu"), tiny(), corpus, FEATURES, sample=20).to_json()
    assert told["effect"] == pytest.approx(expected["effect"], rel=1e-4)
    assert told["windows_needed"] == expected["windows_needed"]
    assert main([*map(str, arguments)]) == 0
    assert "nats a token" in capsys.readouterr().out
