"""Transcoders and crosscoders from stores: runs, folded forms, files of ours and of other tools, features, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from torch import Tensor

import actshuffle
import saetrain
from saetrain.cli import main
from saetrain.data import Store
from saetrain.errors import ConfigError, DataError, ExchangeError
from saetrain.exchange.folders import bring, export
from saetrain.features.pipeline import build_features
from saetrain.norms import Norm
from saetrain.tensors import TensorFile
from saetrain.training import checkpoint
from saetrain.training.heldout import Heldout
from saetrain.training.start import Start
from saetrain.variants.table import VARIANTS
from support.sae import matched, one_rank

WIDTHS = {"low": 24, "high": 20, "into": 32, "out": 32, "wide": 24}
RUNS: dict[str, dict[str, Any]] = {
    "crosscoder": {"field": "low,high"},
    "crosscoder-relu": {"field": "low,high", "arch": "relu", "sparsity": 0.5},
    "transcoder": {"field": "into", "output": "out"},
    "transcoder-relu": {"field": "into", "output": "wide", "arch": "relu", "sparsity": 0.1},
    "skip": {"field": "into", "output": "out", "skip": True},
    "skip-jumprelu": {"field": "into", "output": "wide", "skip": True, "arch": "jumprelu", "sparsity": 0.3},
}
SETTINGS = {"d_sae": 64, "k": 3, "steps": 300, "batch_size": 128, "lr": 4e-3, "tile": 128, "device": "cpu"}
FEATURES = 32  # the first 8 are in `low` alone, the next 8 in `high` alone


def planted() -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, np.ndarray[Any, Any]]]:
    """Rows of each array and the directions of the features in it; `out` and `wide` are functions of `into`."""
    rng = np.random.default_rng(0)
    features = (rng.random((12_000, FEATURES)) < 0.08) * rng.uniform(1, 2, (12_000, FEATURES))
    rows, directions = {}, {}
    for name, width in WIDTHS.items():
        made = rng.standard_normal((FEATURES, width))
        made /= np.linalg.norm(made, axis=1, keepdims=True)
        made[{"low": slice(8, 16), "high": slice(0, 8)}.get(name, slice(0, 0))] = 0
        factor, shift = (50.0, -20.0) if name == "high" else (2.0, 3.0)
        noise = 0.01 * rng.standard_normal((len(features), width))
        rows[name], directions[name] = ((features @ made + noise) * factor + shift).astype("f4"), made
    return rows, directions


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A collected store, the same shuffled, and the runs."""
    folder = tmp_path_factory.mktemp("crosscoders")
    group = zarr.create_group(folder / "rows")
    for name, values in planted()[0].items():
        group.create_array(name, data=values, chunks=(2000, values.shape[1]))
    actshuffle.shuffle(folder / "rows", folder / "shuffled.zarr", seed=1, memory="64MB")
    for name, settings in RUNS.items():
        saetrain.fit(folder / "shuffled.zarr", out=folder / name, progress=False, **(SETTINGS | settings))
    return folder


def inputs(name: str) -> Tensor:
    rows = planted()[0]
    return torch.from_numpy(np.concatenate([rows[n] for n in RUNS[name]["field"].split(",")], 1)[:500])


@pytest.mark.parametrize("name", RUNS)
def test_the_dead_share_is_that_of_the_held_out_rows_and_is_reported(name: str, folder: Path, tmp_path: Path) -> None:
    """Counted from the weights that are loaded; in the control only four latents can fire."""
    run = saetrain.Run(folder / name)
    stored, config = zarr.open_group(folder / "shuffled.zarr", mode="r"), run.config
    parts = [np.asarray(stored[n])[-config.holdout :] for n in RUNS[name]["field"].split(",")]
    fired = (run.sae.encode(torch.from_numpy(np.concatenate(parts, 1))) != 0).any(0)
    share = run.lines[-1]["eval_dead"]
    assert share == float((~fired).double().mean())
    assert f"<b>{share:.1%}</b><span>dead latents" in run.report(tmp_path).read_text()
    with one_rank() as mesh:
        model = checkpoint.load(checkpoint.find(folder / name), mesh).model
        model.params["b_enc"][4:] = -1e9
        found = Heldout(Store(folder / "shuffled.zarr", config), config.holdout, mesh).evaluate(model)
    assert float(str(found["eval_dead"])) >= 60 / 64


@pytest.mark.parametrize("name", RUNS)
def test_a_folded_model_computes_what_the_sharded_one_does(name: str, folder: Path) -> None:
    sae, rows = saetrain.load(folder / name), inputs(name)
    with one_rank() as mesh:
        model = checkpoint.load(checkpoint.find(folder / name), mesh).model
        x = model.norm(rows)
        expected, active = model.reconstruct(x)
    found = sae(rows)
    norm = model.out_norm
    torch.testing.assert_close((found - norm.mean) * norm.scale, expected, rtol=1e-3, atol=1e-3, check_dtype=False)
    assert torch.equal((sae.encode(rows) > 0).sum(1), active)
    numbers = sae(rows.numpy())
    assert isinstance(numbers, np.ndarray)
    np.testing.assert_allclose(numbers, found.numpy(), rtol=1e-5)
    assert torch.allclose(sae.array_norms.sum(1), torch.ones(64), atol=1e-5)


@pytest.mark.parametrize("name", RUNS)
def test_weights_start_a_model_of_other_rows_as_the_same_function(name: str, folder: Path) -> None:
    rows, theirs = inputs(name), checkpoint.find(folder / name)
    other = [
        None if norm is None else Norm(norm.mean * 1.5 + 1, norm.scale * 3, norm.widths) for norm in theirs.norms()
    ]
    assert other[0] is not None
    with one_rank() as mesh:
        model = VARIANTS[theirs.config.arch](theirs.config, other[0], mesh, other[1])
        Start(name, theirs).fill(model, model.norm(rows))
        found, _ = model.reconstruct(model.norm(rows))
    norm = model.out_norm
    torch.testing.assert_close(found / norm.scale + norm.mean, saetrain.load(folder / name)(rows), rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("name", RUNS)
def test_held_out_rows_are_rebuilt(name: str, folder: Path) -> None:
    last = saetrain.Run(folder / name).lines[-1]
    sae, (rows, _) = saetrain.load(folder / name), planted()
    assert last["eval_fvu"] < 0.25
    wanted = np.concatenate([rows[n] for n in RUNS[name].get("output", RUNS[name]["field"]).split(",")], 1)
    given = np.concatenate([rows[n] for n in RUNS[name]["field"].split(",")], 1)
    error = np.square(sae(given) - wanted).sum(0), np.square(wanted - wanted.mean(0)).sum(0)
    if "," not in RUNS[name]["field"]:
        assert float(error[0].sum() / error[1].sum()) == pytest.approx(last["eval_fvu"], rel=0.15)  # other rows
        return
    low, high = (
        float(part.sum()) for part in (error[0][:24] / error[1][:24].sum(), error[0][24:] / error[1][24:].sum())
    )
    assert low == pytest.approx(last["eval_fvu.low"], rel=0.15)
    assert high == pytest.approx(last["eval_fvu.high"], rel=0.15)


def test_norms_tell_which_array_has_a_feature(folder: Path) -> None:
    """A planted feature of one array alone is found by a latent that has a norm there alone."""
    sae, (_, directions) = saetrain.load(folder / "crosscoder"), planted()
    low, high = sae.split(sae.W_dec.detach()).values()
    share = sae.array_norms[:, 0]
    for rows, name, alone in ((sae.W_dec[:, :24], "low", slice(0, 8)), (sae.W_dec[:, 24:], "high", slice(8, 16))):
        unit = rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-9)
        cosine = torch.from_numpy(directions[name]).float() @ unit.T
        own = share if name == "low" else 1 - share
        cosine[:, own < 0.2] = -1  # a direction of next to no length
        best = cosine[alone].max(1)
        assert float(best.values.mean()) > 0.9
        assert float(own[best.indices].mean()) > 0.85
        shared = cosine[16:].max(1)
        assert float((own[shared.indices] - 0.5).abs().mean()) < 0.2
    assert list(sae.split(sae.W_dec)) == ["low", "high"]
    assert low.shape == (64, 24)
    assert high.shape == (64, 20)


@pytest.mark.parametrize("name", RUNS)
def test_what_is_saved_is_loaded(name: str, folder: Path, tmp_path: Path) -> None:
    sae = saetrain.load(folder / name)
    sae.save(tmp_path / "saved")
    again = saetrain.load(tmp_path / "saved")
    assert torch.equal(again(inputs(name)), sae(inputs(name)))
    assert (again.inputs, again.outputs, again.config) == (sae.inputs, sae.outputs, sae.config)
    assert torch.equal(again.array_norms, sae.array_norms)
    rows = {n: inputs(name)[:, :width] for n, width in sae.inputs.items()}
    assert sae.join(rows).shape == (500, sae.d_in)
    with pytest.raises(ExchangeError, match="are due"):
        sae.join({"nothing": rows[next(iter(rows))]})
    changed = json.loads((tmp_path / "saved" / "cfg.json").read_text())
    (tmp_path / "saved" / "cfg.json").write_text(json.dumps(changed | {"saetrain": 2}))
    with pytest.raises(ExchangeError, match="format 2"):
        saetrain.load(tmp_path / "saved")
    with pytest.raises(ExchangeError):
        bring(tmp_path / "saved", tmp_path / "run")


@pytest.mark.parametrize(
    ("name", "architecture"), [("transcoder-relu", "transcoder"), ("skip-jumprelu", "jumprelu_skip_transcoder")]
)
def test_saelens_transcoders(name: str, architecture: str, folder: Path, tmp_path: Path) -> None:
    """The file holds what SAELens' formula needs to give our numbers."""
    export(folder / name, tmp_path / "out")
    cfg = json.loads((tmp_path / "out" / "cfg.json").read_text())
    assert (cfg["architecture"], cfg["d_in"], cfg["d_out"]) == (architecture, 32, 24)
    file = TensorFile(tmp_path / "out" / "sae_weights.safetensors")
    held, rows = {n: file.read(n) for n in file.specs}, inputs(name)
    pre = rows @ held["W_enc"] + held["b_enc"]
    acts = pre.relu() * (pre > held["threshold"] if "threshold" in held else 1)
    out = acts @ held["W_dec"] + held["b_dec"] + (rows @ held["W_skip"].T if "W_skip" in held else 0)
    torch.testing.assert_close(out, saetrain.load(folder / name)(rows), rtol=1e-3, atol=1e-3)
    assert ("W_skip" in held) == ("skip" in name)


def test_sparsify_transcoders(folder: Path, tmp_path: Path) -> None:
    export(folder / "skip", tmp_path / "out", "sparsify")
    cfg = json.loads((tmp_path / "out" / "cfg.json").read_text())
    assert cfg["transcode"] is cfg["skip_connection"] is True
    file = TensorFile(tmp_path / "out" / "sae.safetensors")
    held, rows = {n: file.read(n) for n in file.specs}, inputs("skip")
    pre = (rows @ held["encoder.weight"].T + held["encoder.bias"]).relu()
    value, latent = pre.topk(3)
    acts = torch.zeros_like(pre).scatter_(1, latent, value)
    out = acts @ held["W_dec"] + held["b_dec"] + rows @ held["W_skip"].T
    torch.testing.assert_close(out, saetrain.load(folder / "skip")(rows), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "format", "words"),
    [
        ("crosscoder", "saelens", "no format for crosscoders"),
        ("crosscoder", "sparsify", "no format for crosscoders"),
        ("transcoder", "saelens", "no topk transcoder"),
        ("transcoder-relu", "sparsify", "one width"),
    ],
)
def test_formats_that_cannot_hold_it(name: str, format: str, words: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ExchangeError, match=words):
        export(folder / name, tmp_path / "out", format)


@pytest.mark.parametrize("name", ["crosscoder", "skip"])
def test_a_run_goes_on(name: str, folder: Path, tmp_path: Path) -> None:
    settings = SETTINGS | RUNS[name] | {"steps": 40, "checkpoint_every": 20, "keep": 3}
    store = folder / "shuffled.zarr"
    whole = saetrain.fit(store, out=tmp_path / "run", progress=False, **settings).sae
    checkpoint._remove(checkpoint.step_folder(tmp_path / "run", 40))  # as if it had stopped before
    again = saetrain.resume(tmp_path / "run", progress=False).sae
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


@pytest.mark.parametrize("name", ["crosscoder", "transcoder"])
def test_features_of_what_goes_in(name: str, folder: Path, tmp_path: Path) -> None:
    build_features(folder / name, folder / "rows", tmp_path / "out", incomplete=True)
    found = saetrain.open_features(tmp_path / "out")
    rows = planted()[0]
    given = np.concatenate([rows[n] for n in RUNS[name]["field"].split(",")], 1)
    counts = (saetrain.load(folder / name).encode(given) > 0).sum(0)
    assert [found[i].count for i in range(64)] == counts.tolist()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"field": "low,low"}, "different arrays"),
        ({"field": "low,"}, "different arrays"),
        ({"field": "into", "skip": True}, "needs an output"),
        ({"field": "into", "output": "into", "skip": True}, "needs an output"),
        ({"field": "into", "output": "absent"}, "no array 'absent'"),
        ({"field": "low,absent"}, "no array 'absent'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    settings: dict[str, Any], words: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises((ConfigError, DataError), match=words):
        saetrain.fit(folder / "shuffled.zarr", out=tmp_path / "run", progress=False, **(SETTINGS | settings))
    assert not (tmp_path / "run").exists()


def test_the_command_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--d-sae", "64", "--k", "3", "--steps", "20", "--batch-size", "64", "--device", "cpu", "--tile", "64"]
    arguments = [str(folder / "shuffled.zarr"), "--field", "into", "--output", "out,wide", "--skip", "true"]
    assert main(["fit", *arguments, *flags, "--out", str(tmp_path / "run"), "--no-report"]) == 0
    assert "(into to out,wide, 32 wide)" in capsys.readouterr().out
    about = json.loads((tmp_path / "run" / "config.json").read_text())["about"]
    assert (about["input"], about["output"], about["d_out"]) == ("into", "out,wide", 56)
    assert main(["steer", str(tmp_path / "run"), "--model", "none", "--text", "x", "--feature", "1"]) == 2


def test_control_the_matching_sees_random_directions(folder: Path) -> None:
    random = torch.randn(64, 24, generator=torch.Generator().manual_seed(0))
    assert float(matched(random, torch.from_numpy(planted()[1]["low"][:8]).float()).mean()) < 0.7
