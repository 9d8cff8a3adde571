"""`evaluate` equals a plain double loop, its intervals cover, and it stops where it should."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

import zarr

import actshuffle
import saetrain
from saetrain.cli import main
from saetrain.errors import ConfigError, DataError
from saetrain.probing import fidelity
from saetrain.probing.corpus import Corpus, Cutting, Scale
from saetrain.training.metrics import ratio_interval
from saetrain.training.outcome import read_evaluation
from support.causal import dictionary, saved, texts, tiny
from support.sae import MemorySource, Planted, one_rank, small

CONTEXT = 12


def loop(model: Any, sae: Any, made: list[tuple[str, str]], limit: float, mean: Tensor) -> dict[str, Tensor]:
    """Sums of each document, one window and one token after the other, in plain transformers."""
    found: dict[str, list[float]] = {}
    block = model.blocks[model.layer - 1]
    for _, text in made:
        tokens = model.tokens_of(text)
        sums = dict.fromkeys(("tokens", "clean", *fidelity.VARIANTS, *(f"kl_{v}" for v in fidelity.VARIANTS)), 0.0)
        for at in range(0, len(tokens), CONTEXT - 1):
            window = [1, *tokens[at : at + CONTEXT - 1]]
            if len(window) < 3:
                continue
            ids = torch.tensor([window])
            plain = model.model(input_ids=ids, output_hidden_states=True)
            x = plain.hidden_states[model.layer][0]
            for variant in ("clean", *fidelity.VARIANTS):
                new = x.clone()
                for t in range(1, len(window)):
                    if x[t].norm() <= limit and variant != "clean":
                        out = {"sae": sae(x[t][None])[0], "zero": 0 * x[t], "mean": mean.to(x)}
                        new[t] = out[variant]
                hook = block.register_forward_hook(
                    lambda _, __, out, new=new: (new[None], *out[1:]) if isinstance(out, tuple) else new[None]
                )
                logits = model.model(input_ids=ids).logits[0].double()
                hook.remove()
                for t in range(1, len(window) - 1):
                    if x[t].norm() > limit:
                        continue
                    p, q = (v.log_softmax(-1) for v in (plain.logits[0, t].double(), logits[t]))
                    sums[variant] -= float(q[window[t + 1]])
                    if variant == "clean":
                        sums["tokens"] += 1
                    else:
                        sums[f"kl_{variant}"] += float((p.exp() * (p - q)).sum())
        for name, value in sums.items():
            found.setdefault(name, []).append(value)
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in found.items()}


@pytest.mark.parametrize("activation", ["topk", "jumprelu"])
@torch.no_grad()
def test_evaluation_equals_a_plain_double_loop(activation: str) -> None:
    model, made = tiny(dtype=torch.float64), texts(7)
    sae = dictionary(activation, dtype=torch.float64)
    corpus = Corpus(model, made, Cutting(context=CONTEXT, prefix="<s>", seed=5))
    found = saetrain.evaluate(sae, model, corpus, drop_norm=1.3)
    limit = found.scale.limit
    sums = loop(model, sae, [made[i] for i in corpus.order], limit, found.scale.mean)
    assert sums["tokens"].tolist() == found.sums["tokens"]
    assert 0 < found.total("heavy") < found.total("rows")
    for name in ("clean", *fidelity.VARIANTS):
        assert sums[name].tolist() == pytest.approx(found.sums[f"ce_{name}"], rel=1e-9)
    for name in fidelity.VARIANTS:
        assert torch.allclose(
            sums[f"kl_{name}"], torch.tensor(found.sums[f"kl_{name}"], dtype=torch.float64), rtol=1e-9
        )
    told = found.to_json()
    for name in fidelity.ABLATIONS:
        expected = ratio_interval(sums[name] - sums["sae"], sums[name] - sums["clean"])
        assert told["loss_recovered"][name] == pytest.approx(expected._asdict())
        share = 1 - float(sums["kl_sae"].sum() / sums[f"kl_{name}"].sum())
        assert told["kl_recovered"][name]["value"] == pytest.approx(share)
    assert (
        told["saebench"]["model_performance_preservation"]["ce_loss_score"] == told["loss_recovered"]["zero"]["value"]
    )


@torch.no_grad()
def test_row_measures_equal_one_line_formulas() -> None:
    model, sae = tiny(), dictionary("jumprelu")
    corpus = Corpus(model, texts(6), Cutting(context=CONTEXT))
    found = saetrain.evaluate(sae, model, corpus, drop_norm=0.0)
    x = torch.cat([model.hidden(b.tokens).reshape(-1, 16) for d in corpus for b in d.batches])
    acts = sae.encode(x)
    y, mean = sae.decode(acts).double(), found.scale.mean
    x, told = x.double(), found.to_json()
    quality = told["saebench"]["reconstruction_quality"]
    assert told["rows"] == len(x)
    assert told["fvu"]["value"] == pytest.approx(float((x - y).square().sum() / (x - mean).square().sum()))
    assert quality["explained_variance"] == pytest.approx(1 - told["fvu"]["value"])
    assert quality["mse"] == pytest.approx(float((x - y).square().mean()))
    assert quality["cossim"] == pytest.approx(float(torch.cosine_similarity(x, y).mean()), rel=1e-6)
    assert told["l0"]["value"] == pytest.approx(float((acts > 0).sum(1).double().mean()))
    density = (acts > 0).double().mean(0)
    misc = told["saebench"]["misc_metrics"]
    assert misc["freq_over_10_percent"] == pytest.approx(float((density > 0.1).double().mean()))
    assert misc["frac_alive"] == pytest.approx(float((density > 0).double().mean()))
    shrinkage = told["saebench"]["shrinkage"]
    assert shrinkage["l2_ratio"] == pytest.approx(float((y.norm(dim=1) / x.norm(dim=1)).mean()))
    assert shrinkage["relative_reconstruction_bias"] == pytest.approx(float(y.square().sum() / (x * y).sum()))


def test_a_perfect_dictionary_recovers_everything_and_the_mean_nothing() -> None:
    model = tiny(dtype=torch.float64)
    corpus = Corpus(model, texts(5), Cutting(context=CONTEXT))
    eye = torch.eye(16, dtype=torch.float64)
    both, zero = torch.cat([eye, -eye]), torch.zeros(32, dtype=torch.float64)
    exact = saetrain.SAE("relu", both, zero, both, zero[:16], False)
    found = saetrain.evaluate(exact, model, corpus).recovered
    assert found["zero"].value == pytest.approx(1.0, abs=1e-12)
    scale = Scale(zero[:16] + 1.0, 1.0, 1)
    flat = saetrain.SAE("relu", both, zero, both * 0, scale.mean, False)
    found = saetrain.evaluate(flat, model, corpus, scale=scale).recovered
    assert found["mean"].value == pytest.approx(0.0, abs=1e-12)


def test_bad_requests_are_refused() -> None:
    model = tiny()
    corpus = Corpus(model, texts(3), Cutting(context=CONTEXT))
    with pytest.raises(ConfigError, match="half-width"):
        saetrain.evaluate(dictionary(), model, corpus, within=-1)
    with pytest.raises(DataError, match="1 usable documents"):
        saetrain.evaluate(dictionary(), model, Corpus(model, texts(1)))
    wide = saetrain.SAE("relu", torch.zeros(4, 20), torch.zeros(4), torch.zeros(4, 20), torch.zeros(20), False)
    with pytest.raises(DataError, match="rows of 20 numbers"):
        saetrain.evaluate(wide, model, corpus)


# --- Intervals


def population(size: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Documents of skewed lengths, with losses that vary between them: tops and bottoms of the ratio."""
    dice = np.random.default_rng(0)
    bottom = dice.gamma(2.0, 100.0, size)
    return bottom * np.clip(0.97 + 0.05 * dice.standard_normal(size), 0, 1.2), bottom


def test_intervals_cover_over_500_resamples_of_a_known_population() -> None:
    top, bottom = population(100_000)
    truth, dice, covered = top.sum() / bottom.sum(), np.random.default_rng(1), 0
    for _ in range(500):
        take = dice.choice(len(top), 120, replace=False)
        found = ratio_interval(torch.from_numpy(top[take]), torch.from_numpy(bottom[take]))
        covered += found.low <= truth <= found.high
    assert 0.93 <= covered / 500 <= 0.97
    narrow = 0
    for _ in range(500):  # negative control: intervals of half the width
        take = dice.choice(len(top), 120, replace=False)
        found = ratio_interval(torch.from_numpy(top[take]), torch.from_numpy(bottom[take]))
        narrow += abs(found.value - truth) <= (found.high - found.low) / 4
    assert narrow / 500 < 0.9


def sequential_coverage(within: float, repeats: int) -> tuple[float, float]:
    """Coverage and mean number of documents of the stopping rule of `evaluate` on the population."""
    top, bottom = (torch.from_numpy(v) for v in population(20_000))
    truth = float(top.sum() / bottom.sum())
    dice, covered, used = np.random.default_rng(2), 0, 0
    for _ in range(repeats):
        order = torch.from_numpy(dice.permutation(len(top))[:4000])
        for look in fidelity._looks():
            found = ratio_interval(top[order[:look]], bottom[order[:look]])
            if (found.high - found.low) / 2 <= within or look > 3000:
                break
        covered += found.low <= truth <= found.high
        used += look
    return covered / repeats, used / repeats


def test_intervals_at_the_stopping_time_cover_nearly_as_often() -> None:
    few, many = sequential_coverage(0.02, 500), sequential_coverage(0.005, 500)
    assert few[1] < 60 < 250 < many[1]
    assert 0.88 <= few[0] < 0.96
    assert 0.93 <= many[0] <= 0.97


def test_evaluation_stops_at_the_wanted_width() -> None:
    model, made, sae = tiny(), texts(200, longest=12), dictionary()
    corpus = Corpus(model, made, Cutting(context=CONTEXT, seed=1))
    whole = saetrain.evaluate(sae, model, corpus, most=60)
    assert (whole.stopped, whole.documents) == ("most", 60)
    looks = [n for _, n in zip(range(12), fidelity._looks(), strict=False)]
    half = {n: max(_half(_at(whole, name, n)) for name in fidelity.ABLATIONS) for n in looks if n <= 60}
    within = sorted(half.values())[1]
    first = next(n for n in half if half[n] <= within)
    found = saetrain.evaluate(sae, model, corpus, within=within)
    assert (found.stopped, found.documents) == ("within", first)
    never = saetrain.evaluate(sae, model, Corpus(model, made[:20], Cutting(context=CONTEXT)), within=1e-9)
    assert (never.stopped, never.documents) == ("all", 20)


def _at(found: Any, name: str, count: int) -> Any:
    sums = (found.sums[f"{key}_{name}"][:count] for key in ("recovered", "lost"))
    return ratio_interval(*(torch.tensor(values, dtype=torch.float64) for values in sums))


def _half(interval: Any) -> float:
    return float(interval.high - interval.low) / 2


# --- The command


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data, folder = Planted.make(2048, 16, 24), tmp_path_factory.mktemp("run")
    with one_rank() as mesh:
        saetrain.fit(MemorySource(data.rows, data.documents), {folder: small("topk")}, mesh)
    return folder


def test_the_command_prints_what_the_function_finds(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, made = saved(tmp_path / "model"), texts(6)
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": t}) for _, t in made))
    arguments = ["evaluate", run, "--model", model, "--text", text, "--layer", 2, "--context", CONTEXT]
    assert main([*map(str, arguments), "--device", "cpu", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    expected = saetrain.evaluate(saetrain.load(run), tiny(), Corpus(tiny(), made, Cutting(context=CONTEXT)))
    assert told["loss_recovered"]["mean"]["value"] == pytest.approx(expected.recovered["mean"].value)
    assert math.isfinite(told["ce"]["clean"]["value"])
    assert told["run"] == str(run)
    assert main([*map(str, arguments), "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert "loss recovered" in shown
    assert "95 %" in shown
    assert main([*map(str, arguments[:-4]), "--json"]) == 2  # the run does not say which layer
    assert "--layer" in json.loads(capsys.readouterr().out)["message"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows 16 wide, in an array whose name says the layer."""
    folder = tmp_path_factory.mktemp("store")
    source = zarr.create_group(folder / "src.zarr")
    source.create_array("layer_2", data=Planted.make(2048, 16, 24).rows.numpy(), chunks=(512, 16))
    actshuffle.shuffle(folder / "src.zarr", folder / "rows.zarr", seed=1, memory="64MB")
    return folder / "rows.zarr"


SMALL = ["--steps", "6", "--d-sae", "64", "--k", "4", "--batch-size", "64", "--device", "cpu", "--tile", "64"]


def test_fit_evaluates_at_its_end_and_the_report_says_so(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, made, out = saved(tmp_path / "model"), texts(6), tmp_path / "run"
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": t}) for _, t in made))
    asked = ["--evaluate", text, "--model", model, "--prefix", "<s>", "--windows", 1]
    assert main([*map(str, ["fit", store, "--out", out, *SMALL, *asked]), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["evaluation"]
    corpus = Corpus(tiny(), made, Cutting(prefix="<s>", per_document=1))
    expected = saetrain.evaluate(saetrain.load(out), tiny(), corpus).to_json()
    assert told["layer"] == 2
    assert told["loss_recovered"]["zero"] == pytest.approx(expected["loss_recovered"]["zero"])
    kept = read_evaluation(out)
    assert kept == {"step": 6, **told}
    page = (out / "report.html").read_text()
    value = told["loss_recovered"]["zero"]
    assert f"{value['value']:.4f} ({value['low']:.4f} to {value['high']:.4f})" in page
    assert "step 6 of" not in page
    # The same by hand, which also finds the layer by the name of the only array.
    asked = ["--text", text, "--model", model, "--documents", 3, "--save", "--device", "cpu"]
    assert main([*map(str, ["evaluate", out, *asked])]) == 0
    assert (read_evaluation(out) or {})["documents"] == 3
    # A run that went on says at which step it was measured; one that was never measured says nothing.
    assert main(["fit", str(store), "--out", str(tmp_path / "bare"), *SMALL]) == 0
    assert "through the dictionary" not in (tmp_path / "bare" / "report.html").read_text()
    assert main(["resume", str(out), "--steps", "8"]) == 0
    assert "step 6 of 8" in (out / "report.html").read_text()
    asked = ["--evaluate", text, "--model", model, "--prefix", "<s>", "--windows", 1]
    capsys.readouterr()
    assert main([*map(str, ["resume", out, "--steps", 9, *asked]), "--json"]) == 0
    assert read_evaluation(out) == {"step": 9, **json.loads(capsys.readouterr().out)["evaluation"]}


def test_python_evaluates_at_the_end_as_the_command_does(store: Path, tmp_path: Path) -> None:
    model, made = saved(tmp_path / "model"), texts(6)
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": t}) for _, t in made))
    settings: dict[str, Any] = {"d_sae": 64, "k": 4, "batch_size": 64, "device": "cpu", "tile": 64, "progress": False}
    asked: dict[str, Any] = {"model": str(model), "prefix": "<s>", "windows": 1}
    with pytest.raises(ConfigError, match="give evaluate TEXT"):
        saetrain.fit(store, out=tmp_path / "run", **settings, **asked)
    with pytest.raises(ConfigError, match="model_dtype is one of float32"):
        saetrain.fit(store, out=tmp_path / "run", **settings, **asked, evaluate=text, model_dtype="int8")
    assert not (tmp_path / "run").exists()
    run = saetrain.fit(store, out=tmp_path / "run", steps=2, **settings, **asked, evaluate=text)
    corpus = Corpus(tiny(), made, Cutting(prefix="<s>", per_document=1))
    for step in (2, 3):
        expected = saetrain.evaluate(run.sae, tiny(), corpus).to_json()
        assert run.evaluation is not None
        assert run.evaluation["step"] == step
        assert run.evaluation["loss_recovered"]["zero"] == pytest.approx(expected["loss_recovered"]["zero"])
        run = saetrain.resume(run.folder, steps=3, **asked, evaluate=[text], progress=False)
    assert saetrain.fit(store, out=tmp_path / "bare", steps=1, **settings).evaluation is None


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--evaluate", "{text}"], "--model"),
        (["--model", "{model}"], "--evaluate TEXT"),
        (["--prefix", "<s>"], "--evaluate TEXT"),
        (["--evaluate", "{text}", "--model", "{model}", "--layer", "3"], "3 layers of 16 numbers"),
        (["--evaluate", "{text}", "--model", "{absent}"], "cannot be read"),
        (["--evaluate", "{absent}", "--model", "{model}"], "absent"),
        (["--evaluate", "{text}", "--model", "{model}", "--windows", "-1"], "--windows"),
    ],
)
def test_an_evaluation_that_cannot_be_made_is_refused_before_training(
    given: list[str], words: str, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"text": tmp_path / "text.txt", "model": saved(tmp_path / "model"), "absent": tmp_path / "absent"}
    places["text"].write_text("w1 w2 w3")
    asked = [text.format(**places) for text in given]
    assert main(["fit", str(store), "--out", str(tmp_path / "run"), *SMALL, *asked]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
