"""Contributions sum to the whole, shards agree, and first order is compared with the truth."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

import saetrain
from saetrain.cli import main
from saetrain.errors import ConfigError
from saetrain.probing import attribution
from saetrain.probing.corpus import Corpus, Cutting, measure_scale
from saetrain.probing.effects import loss_effects
from saetrain.training.metrics import ratio_interval
from support.causal import dictionary, saved, texts, tiny

TOKENS = [3, 9, 17, 4, 33, 20, 8, 8, 21, 60, 2, 41]
METRICS = {
    "logit": attribution.logit(7),
    "difference": attribution.logit(7, 9, position=-3),
    "probability": attribution.log_probability(7),
    "loss": attribution.loss(TOKENS),
}


@pytest.mark.parametrize("activation", ["relu", "topk", "jumprelu"])
@pytest.mark.parametrize("metric", METRICS)
def test_contributions_errors_and_bias_sum_to_the_whole(activation: str, metric: str) -> None:
    model, sae = tiny(dtype=torch.float64), dictionary(activation, dtype=torch.float64)
    found = saetrain.attribute(sae, model, TOKENS, METRICS[metric])
    assert found.gap < 1e-10
    # The whole, and one entry, from the definition.
    x = model.hidden(torch.tensor([TOKENS])).requires_grad_()
    logits = model.run(torch.tensor([TOKENS]), lambda _, __: x).logits[0]
    (g,) = torch.autograd.grad(METRICS[metric](logits), x)
    assert torch.allclose(found.total[1:], (x * g).sum(-1)[0, 1:].detach(), rtol=1e-10)
    assert found.total[0] == 0
    acts = sae.encode(x[0].detach())
    acts[0] = 0
    assert len(found.entries.row) == int((acts > 0).sum()) > 20
    dense = torch.zeros_like(acts)
    dense[found.entries.row, found.entries.feature] = found.entries.value
    assert torch.allclose(dense, acts * (g[0] @ sae.W_dec.T), atol=1e-12)
    assert found.by_feature() == pytest.approx(
        {int(i): float(dense[:, i].sum()) for i in (acts > 0).any(0).nonzero()}, rel=1e-9
    )


def test_a_gap_is_noticed() -> None:
    model, sae = tiny(dtype=torch.float64), dictionary(dtype=torch.float64)
    found = saetrain.attribute(sae, model, TOKENS, METRICS["logit"])
    broken = attribution.Attribution(found.scalar, found.entries, found.bias * 1.001, found.error, found.total)
    assert broken.gap > 1e-6


@pytest.mark.parametrize("activation", ["relu", "topk", "jumprelu"])
@pytest.mark.parametrize("count", [2, 4, 48])
def test_shards_agree_with_the_whole(activation: str, count: int) -> None:
    model, sae = tiny(dtype=torch.float64), dictionary(activation, dtype=torch.float64)
    whole = saetrain.attribute(sae, model, TOKENS, METRICS["loss"])
    shards = attribution.cut(sae, count)
    found = saetrain.attribute(shards, model, TOKENS, METRICS["loss"])
    assert torch.equal(found.entries.feature, whole.entries.feature)
    assert torch.equal(found.entries.row, whole.entries.row)
    for one, other in ((found.entries.value, whole.entries.value), (found.error, whole.error)):
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-12)
    assert found.gap < 1e-10
    if activation == "topk":  # negative control: without the merge, each shard keeps k of its own
        rows = model.hidden(torch.tensor([TOKENS]))[0, 1:]
        assert sum(int((shard.part.encode(rows) > 0).sum()) for shard in shards) > len(found.entries.row)


def test_equal_activations_go_to_the_lowest_latent() -> None:
    both = torch.cat([torch.eye(16), torch.eye(16)])
    sae = saetrain.SAE("topk", both, torch.zeros(32), both, torch.zeros(16), False, 3)
    x = torch.ones(2, 16)
    expected = (sae.encode(x) > 0).nonzero()
    for count in (1, 2, 8):
        found = attribution.active(attribution.cut(sae, count), x, x)
        assert torch.equal(torch.stack([found.row, found.feature], 1), expected)


def test_requests_that_make_no_sense_are_refused() -> None:
    model, sae = tiny(), dictionary()
    with pytest.raises(ConfigError, match="none is left"):
        saetrain.attribute(sae, model, TOKENS, METRICS["logit"], first=12)
    with pytest.raises(ConfigError, match="1 to 48 are possible"):
        attribution.cut(sae, 49)


# --- Against the truth


def test_calibration_equals_ablation_by_hand_and_a_small_edit_has_slope_one() -> None:
    model, sae = tiny(2, "gpt2", torch.float64), dictionary("relu", dtype=torch.float64)
    found = attribution.calibrate(sae, model, TOKENS, METRICS["loss"], features=5, seed=1)
    effects = saetrain.attribute(sae, model, TOKENS, METRICS["loss"]).by_feature()
    for predicted, true in zip(found.predicted.tolist(), found.true.tolist(), strict=True):
        [feature] = [i for i, value in effects.items() if value == predicted]
        edit = saetrain.Steering(sae, [saetrain.Turn(feature, "ablate")])
        with torch.no_grad():
            plain, without = (model.run(torch.tensor([TOKENS]), e).logits[0] for e in (None, edit))
        assert true == pytest.approx(float(METRICS["loss"](plain) - METRICS["loss"](without)), abs=1e-9)
    small = saetrain.SAE("relu", sae.W_enc, sae.b_enc, sae.W_dec * 1e-6, sae.b_dec, False)
    line = attribution.calibrate(small, model, TOKENS, METRICS["loss"], features=40)
    assert line.slope.value == pytest.approx(1, abs=1e-3)
    assert line.slope.low < 1.001
    assert line.r2 > 0.999
    rough = attribution.calibrate(sae, model, TOKENS, METRICS["loss"], features=40)
    assert abs(rough.slope.value - 1) > 0.01  # large edits of a random model are not first order


def test_one_pair_has_no_interval_and_no_correlation() -> None:
    found = attribution.Calibration(torch.tensor([2.0]), torch.tensor([1.0])).to_json()
    assert found == {"pairs": 1, "slope": {"value": 0.5, "low": None, "high": None}, "r2": None}


def test_effects_over_a_text_equal_the_loop_over_features() -> None:
    model, sae = tiny(dtype=torch.float64), dictionary("jumprelu", dtype=torch.float64)
    corpus = Corpus(model, texts(6), Cutting(context=12, prefix="<s>"))
    found = loss_effects(sae, model, corpus, drop_norm=1.3)
    limit = measure_scale(corpus, 1.3).limit
    tops, counts = torch.zeros(6, 48, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
    for number, document in enumerate(corpus):
        for batch in document.batches:
            for window in batch.tokens.tolist():
                counts[number] += len(window) - 2
                x = model.hidden(torch.tensor([window])).requires_grad_()
                logits = model.run(torch.tensor([window]), lambda _, __, x=x: x).logits[0]
                (g,) = torch.autograd.grad(attribution.loss(window, 1)(logits), x)
                for feature in range(48):
                    for t in range(1, len(window)):
                        if x[0, t].norm() <= limit:
                            f = sae.encode(x[0, t].detach()[None])[0, feature]
                            tops[number, feature] += f * (sae.W_dec[feature] @ g[0, t])
    assert (found.documents, found.tokens) == (6, int(counts.sum()))
    for feature in range(48):
        expected = ratio_interval(tops[:, feature], counts)
        assert float(found.mean[feature]) == pytest.approx(expected.value, rel=1e-8, abs=1e-12)
        assert float(found.half[feature]) == pytest.approx((expected.high - expected.low) / 2, rel=1e-6, abs=1e-9)
    assert abs(found.top(1)[0]["value"]) == pytest.approx(float(found.mean.abs().max()))


# --- The command


def test_the_command_prints_contributions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dictionary().save(tmp_path / "sae")
    model = saved(tmp_path / "model")
    arguments = ["attribute", tmp_path / "sae", "--model", model, "--layer", 2, "--device", "cpu"]
    arguments += ["--prompt", "w1 w7 w15 w2", "--target", "w5", "--calibrate", 6]
    assert main([*map(str, arguments), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    expected = saetrain.attribute(dictionary(), tiny(), [3, 9, 17, 4], attribution.logit(7)).to_json()
    assert told["scalar"] == pytest.approx(expected["scalar"], rel=1e-5)
    assert [row["feature"] for row in told["top"]] == [row["feature"] for row in expected["top"]]
    assert told["calibration"]["pairs"] == 6
    assert main([*map(str, arguments)]) == 0
    shown = capsys.readouterr().out
    assert "sum of all parts" in shown
    assert "slope" in shown
    assert main([*map(str, arguments[:-4]), "--json"]) == 0  # the likeliest next token
    assert json.loads(capsys.readouterr().out)["target"] != ""
    assert main([*map(str, arguments), "--target", "nothing", "--json"]) == 2
    assert "'nothing' is no token" in json.loads(capsys.readouterr().out)["message"]
    text = tmp_path / "text.txt"
    text.write_text(texts(1)[0][1])
    (tmp_path / "more.txt").write_text(texts(2)[1][1])
    effects = [*map(str, arguments[:6]), "--text", str(tmp_path / "text.txt"), "--text", str(tmp_path / "more.txt")]
    assert main([*effects, "--device", "cpu", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["documents"] == 2
    assert told["effects"][0]["low"] <= told["effects"][0]["value"] <= told["effects"][0]["high"]
