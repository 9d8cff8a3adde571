"""Steering is what its formula says, text is the same with and without the cache, and measures are right."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

import actshuffle
import saetrain
from saetrain import Sampler, Steering, Turn
from saetrain.cli import main
from saetrain.errors import ConfigError
from saetrain.exchange.folders import export
from saetrain.probing import curves
from saetrain.probing.corpus import Corpus, Cutting, measure_scale
from saetrain.probing.generation import generate_many, prompt_tokens, stream
from saetrain.probing.turning import measure_largest, strength
from support.causal import WORDS, dictionary, saved, texts, tiny
from support.sae import MemorySource, Planted, one_rank, small

TOKENS = torch.tensor([[3, 9, 17, 4, 33, 20], [8, 8, 21, 60, 2, 41]])
PROMPT = [3, 9, 17]


# --- The formula


@pytest.mark.parametrize("activation", ["relu", "topk", "jumprelu"])
@torch.no_grad()
def test_clamping_equals_the_output_with_the_latent_set_plus_the_error(activation: str) -> None:
    model, sae = tiny(dtype=torch.float64), dictionary(activation, dtype=torch.float64)
    turns = [Turn(5, "clamp", 2.5), Turn(11, "add", 0.75), Turn(17, "scale", 3.0), Turn(30, "ablate")]

    def replaced(x: torch.Tensor, _: int) -> torch.Tensor:
        acts = sae.encode(x.view(-1, 16))
        error = x.view(-1, 16) - sae.decode(acts)
        acts[:, 5], acts[:, 30] = 2.5, 0.0
        acts[:, 11] += 0.75
        acts[:, 17] *= 3.0
        new = (sae.decode(acts) + error).view_as(x)
        new[:, 0] = x[:, 0]
        return new

    found = model.run(TOKENS, Steering(sae, turns)).logits
    assert torch.allclose(found, model.run(TOKENS, replaced).logits, rtol=0, atol=1e-9)
    assert not torch.allclose(found, model.run(TOKENS).logits, atol=1e-3)
    float32 = tiny().run(TOKENS, Steering(sae.to(torch.float32), turns)).logits.double()
    assert float((float32 - found).abs().max() / found.abs().max()) < 1e-5


@torch.no_grad()
def test_the_natural_activation_changes_nothing() -> None:
    model, sae = tiny(), dictionary("relu")
    x = model.hidden(TOKENS)
    acts = sae.encode(x.view(-1, 16)).view(2, 6, -1)
    feature = int((acts[0, 3] > 0).nonzero()[0])
    here = acts[0, 3, feature]

    def at_one_place(x: torch.Tensor, start: int) -> torch.Tensor:
        new = Steering(sae, [Turn(feature, "clamp", float(here))])(x, start)
        kept = x.clone()
        kept[0, 3] = new[0, 3]
        return kept

    plain = model.run(TOKENS).logits
    assert torch.equal(model.run(TOKENS, at_one_place).logits, plain)
    assert torch.equal(model.run(TOKENS, Steering(sae, [Turn(feature, "scale", 1.0)])).logits, plain)
    assert torch.equal(model.run(TOKENS, Steering(sae, [Turn(feature, "add", 0.0)])).logits, plain)
    assert not torch.equal(model.run(TOKENS, Steering(sae, [Turn(feature, "scale", 1.1)])).logits, plain)


@torch.no_grad()
def test_places_and_long_rows_that_are_left_alone() -> None:
    model, sae = tiny(), dictionary("relu")
    x = model.hidden(TOKENS)
    limit = float(x.norm(dim=-1).median())
    edit = Steering(sae, [Turn(7, "clamp", 4.0)], first=2, limit=limit)
    new = edit(x, 0)
    changed = (new != x).any(-1)
    assert torch.equal(changed, (torch.arange(6) >= 2) & (x.norm(dim=-1) <= limit))
    assert 0 < changed.sum() < 8
    shares = ((new - x).norm(dim=-1) / x.norm(dim=-1))[changed]
    assert edit.moved == pytest.approx(float(shares.mean()), rel=1e-5)


def test_turns_that_make_no_sense_are_refused() -> None:
    sae = dictionary()
    for turns, why in (
        ([Turn(48)], "no feature 48"),
        ([Turn(-1)], "no feature -1"),
        ([Turn(3), Turn(3)], "turned twice"),
        ([], "no feature to turn"),
    ):
        with pytest.raises(ConfigError, match=why):
            Steering(sae, turns)
    with pytest.raises(ConfigError, match="'push'"):
        Turn(3, "push")
    with pytest.raises(ConfigError, match="finite"):
        Turn(3, "add", math.nan)


# --- Units


def test_strengths_in_all_units() -> None:
    sae = dictionary()
    sae.W_dec.data *= 2
    found = strength(sae, 3, 0.5, "norm", median_norm=10.0, largest=5.0)
    assert found.activation == pytest.approx(2.5)  # 2.5 times a row of norm 2 is half of 10
    assert (found.of_norm, found.of_max) == (pytest.approx(0.5), pytest.approx(0.5))
    assert strength(sae, 3, 2.0, "max", largest=5.0).activation == 10.0
    assert strength(sae, 3, 2.0, "activation").of_norm is None
    with pytest.raises(ConfigError, match="never fired"):
        strength(sae, 3, 1.0, "max", largest=0.0)
    with pytest.raises(ConfigError, match="median norm"):
        strength(sae, 3, 1.0, "norm")


def test_largest_activations_are_those_of_the_text() -> None:
    model, sae = tiny(), dictionary()
    corpus = Corpus(model, texts(5), Cutting(context=12))
    scale = measure_scale(corpus, 1.2)
    rows = torch.cat([model.hidden(b.tokens).reshape(-1, 16) for d in corpus for b in d.batches])
    acts = sae.encode(rows[rows.norm(dim=1) <= scale.limit])
    assert measure_largest(sae, corpus, scale, [4, 9], 10**6) == pytest.approx(
        {4: float(acts[:, 4].max()), 9: float(acts[:, 9].max())}
    )


# --- Generation


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_text_is_the_same_with_and_without_the_cache(kind: str, temperature: float) -> None:
    model, sae = tiny(1, kind, torch.float64), dictionary(dtype=torch.float64)
    for first in (1, len(PROMPT)):
        for edit in (None, [Turn(5, "clamp", 3.0), Turn(9, "add", 1.0)]):
            both = [
                list(
                    saetrain.generate(
                        model,
                        PROMPT,
                        edit=edit and Steering(sae, edit, first=first),
                        tokens=20,
                        sampler=Sampler(temperature, 4, 1.1),
                        cache=cache,
                    )
                )
                for cache in (True, False)
            ]
            assert both[0] == both[1]


def test_greedy_text_is_that_of_transformers() -> None:
    model = tiny()
    told = model.model.generate(torch.tensor([PROMPT]), max_new_tokens=15, do_sample=False, pad_token_id=1)
    [end] = {1, 2} & set(told[0, 3:].tolist())  # both end a text: of the tokenizer, and of the model's settings
    assert [*saetrain.generate(model, PROMPT, tokens=15), end] == told[0, 3:].tolist()


def test_sampling_follows_the_probabilities_and_the_seed() -> None:
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0])
    drawn = Counter(Sampler(0.5, seed).choose(logits, [0]) for seed in range(4000))
    expected = (logits / 0.5).softmax(0)
    for token in range(4):
        share = float(expected[token])
        assert abs(drawn[token] / 4000 - share) < 4 * math.sqrt(share * (1 - share) / 4000)
    assert Sampler(1.0, 7).choose(logits, [0, 1]) == Sampler(1.0, 7).choose(logits, [2, 3])  # the place counts
    assert len({Sampler(1.0, 7).choose(torch.zeros(50), [0] * n) for n in range(1, 12)}) > 5


def test_repetition_is_punished_as_in_transformers() -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    logits = torch.tensor([1.0, -0.5, 0.9, 0.8], dtype=torch.float64)
    assert Sampler().choose(logits, [0]) == 0
    assert Sampler(repetition=1.2).choose(logits, [0]) == 2
    told = RepetitionPenaltyLogitsProcessor(1.2)(torch.tensor([[0, 1]]), logits[None].clone())
    assert Sampler(repetition=1.2).choose(logits, [0, 1]) == int(told.argmax())


def test_generation_does_not_turn_gradients_off_for_its_reader() -> None:
    written = saetrain.generate(tiny(), PROMPT, tokens=3)
    next(written)
    assert torch.is_grad_enabled()


def test_pieces_of_text_are_whole_characters() -> None:
    class Bytes:
        def text_of(self, tokens: list[int]) -> str:
            return bytes(tokens).decode("utf-8", errors="replace")

    text = "naïve — 🙂 end"
    pieces = list(stream(Bytes(), iter(text.encode())))  # type: ignore[arg-type]
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces)
    cut = list(stream(Bytes(), iter("é".encode()[:1])))  # type: ignore[arg-type]
    assert cut == ["\ufffd"]


def test_prompts_that_do_not_fit_are_refused() -> None:
    model = tiny()
    for prompt, tokens in (([], 5), (PROMPT, 0), (PROMPT, 62)):
        with pytest.raises(ConfigError, match="takes 64 in all"):
            saetrain.generate(model, prompt, tokens=tokens)
    with pytest.raises(ConfigError, match="no chat template"):
        prompt_tokens(model, "w1", chat=True)
    model.tokenizer.chat_template = "{% for m in messages %}w0 {{ m['content'] }} w2 {% endfor %}"
    assert prompt_tokens(model, "w7", chat=True) == [2, 9, 4]
    for bad in ({"temperature": -1.0}, {"temperature": math.nan}, {"repetition": 0.0}):
        with pytest.raises(ConfigError, match="temperature"):
            Sampler(**bad)


# --- Curves


def test_measures_equal_plain_formulas() -> None:
    model, sae = tiny(), dictionary("relu")
    plans = [(at, [Turn(5, "clamp", at), Turn(8, "clamp", at)]) for at in (2.0, 20.0)]
    found = saetrain.steer(sae, model, [PROMPT, [4, 4]], plans, tokens=12, seeds=(0, 1), sampler=Sampler(1.0))
    assert [(s.strength, s.prompt, s.seed) for s in found.samples] == [
        (at, prompt, seed) for at in (None, 2.0, 20.0) for prompt in (0, 1) for seed in (0, 1)
    ]
    for sample in found.samples:
        prompt = [PROMPT, [4, 4]][sample.prompt]
        at = sample.strength
        edit = None if at is None else Steering(sae, [Turn(5, "clamp", at), Turn(8, "clamp", at)])
        written = list(saetrain.generate(model, prompt, edit=edit, tokens=12, sampler=Sampler(1.0, sample.seed)))
        assert model.text_of(written) == sample.text
        with torch.no_grad():
            logp = model.model(torch.tensor([[*prompt, *written]])).logits[0].double().log_softmax(-1)
            acts = sae.encode(model.hidden(torch.tensor([[*prompt, *written]]))[0])[len(prompt) :, [5, 8]]
        likely = [float(logp[len(prompt) + n - 1, token]) for n, token in enumerate(written)]
        assert sample.coherence == pytest.approx(np.mean(likely), rel=1e-5)
        assert sample.concept == pytest.approx(float(acts.double().mean()), rel=1e-5)
        assert sample.largest == pytest.approx(float(acts.max()), rel=1e-5)
        assert sample.moved == (0 if at is None else pytest.approx(edit.moved))  # type: ignore[union-attr]
    plain, weak, strong = found.points
    assert plain.texts == 4
    assert weak.measures["moved"].value < strong.measures["moved"].value
    values = [s.coherence for s in found.samples if s.strength == 2.0]
    assert weak.measures["coherence"].value == pytest.approx(np.mean(values))
    half = 1.959964 * np.std(values, ddof=1) / math.sqrt(4)
    assert weak.measures["coherence"].high - np.mean(values) == pytest.approx(half)


def test_texts_written_together_are_those_written_alone() -> None:
    """Also where some end before others, and whatever the number; so is the share by which each was edited."""
    model, sae, tokens = tiny(dtype=torch.float64), dictionary("relu", dtype=torch.float64), 12
    dice, edit = [Sampler(1.0, seed) for seed in range(40)], Steering(sae, [Turn(5, "clamp", 2.0)])
    texts = generate_many(model, PROMPT, dice, edit=edit, tokens=tokens)
    lengths = [len(text) for text in texts]
    assert min(lengths) < tokens == max(lengths)
    moved = edit.moved_by([min(length + 1, tokens) for length in lengths])
    for sampler, text, share in zip(dice, texts, moved, strict=True):
        alone = Steering(sae, [Turn(5, "clamp", 2.0)])
        assert text == list(saetrain.generate(model, PROMPT, edit=alone, tokens=tokens, sampler=sampler))
        assert share == pytest.approx(alone.moved)
    assert len(set(moved)) > 30
    assert generate_many(model, PROMPT, dice[:3], edit=edit, tokens=tokens) == texts[:3]


def test_shares_and_repetition() -> None:
    assert curves.repeated([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)
    assert curves.repeated([1] * 10) == pytest.approx(6 / 7)
    assert curves.repeated([1, 2]) == 0
    found = curves.wilson(8, 20)  # by hand: (0.4 + 0.09604) / 1.19207, and so on
    assert (found.value, found.low, found.high) == (
        0.4,
        pytest.approx(0.2188, abs=1e-4),
        pytest.approx(0.6134, abs=1e-4),
    )
    assert curves.wilson(0, 20).low == 0


def test_an_empty_text_counts_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sae = tiny(), dictionary()
    monkeypatch.setattr(curves, "generate_many", lambda *_, **__: [[]])
    found = saetrain.steer(sae, model, [PROMPT], [(1.0, [Turn(5, "clamp", 1.0)])])
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["points"][0]["coherence"]["value"] is None


# --- The command


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dictionary as SAELens keeps it, which has no layer."""
    data, folder = Planted.make(2048, 16, 24), tmp_path_factory.mktemp("run")
    with one_rank() as mesh:
        saetrain.fit(MemorySource(data.rows, data.documents), {folder / "run": small("topk")}, mesh)
    export(folder / "run", folder / "saelens")
    return folder / "saelens"


def test_the_command_writes_texts_table_and_picture(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(WORDS * 8))
    arguments = ["steer", run, "--model", saved(tmp_path / "model"), "--layer", 2, "--device", "cpu", "--feature", 7]
    arguments += ["--feature", 9, "--prompt", "w1 w2", "--strengths", "0.2,0.5", "--tokens", 8, "--seeds", 2]
    arguments += ["--temperature", 1, "--out", tmp_path / "out"]
    assert main([*map(str, arguments), "--text", str(text), "--context", "32", "--json"]) == 0
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert len(told["samples"]) == 6
    assert [p["strength"] for p in told["points"]] == [None, 0.2, 0.5]
    assert [row["of_norm"] for row in told["strengths"]] == pytest.approx([0.2, 0.2, 0.5, 0.5])
    assert "plain, prompt 0, seed 1" in err
    assert json.loads((tmp_path / "out" / "steer.json").read_text())["points"] == told["points"]
    assert (tmp_path / "out" / "steer.png").read_bytes()[:4] == b"\x89PNG"
    actshuffle.collect(str(tmp_path / "model"), [text], tmp_path / "acts.zarr", layers=[2], drop_norm=0)
    saetrain.build_features(run, tmp_path / "acts.zarr", tmp_path / "features")
    described = saetrain.open_features(tmp_path / "features")
    most = [*map(str, arguments), "--unit", "max", "--features", str(tmp_path / "features"), "--json"]
    assert main(most) == 0
    told = json.loads(capsys.readouterr().out)
    assert [row["activation"] for row in told["strengths"]] == pytest.approx(
        [share * described[feature].max for share in (0.2, 0.5) for feature in (7, 9)]
    )
    assert main([*map(str, arguments), "--features", str(tmp_path / "features"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["median_norm"] == described.median_norm
    assert [row["of_norm"] for row in told["strengths"]] == pytest.approx([0.2, 0.2, 0.5, 0.5])
    assert main([*map(str, arguments), "--median-norm", "9"]) == 0
    shown = capsys.readouterr().out
    assert "coherence" in shown
    assert "steer.png" in shown
    assert main([*map(str, arguments), "--json"]) == 2
    assert "--median-norm" in json.loads(capsys.readouterr().out)["message"]
    assert main([*map(str, arguments), "--median-norm", "9", "--strengths", "a", "--json"]) == 2
    assert "'a'" in json.loads(capsys.readouterr().out)["message"]
