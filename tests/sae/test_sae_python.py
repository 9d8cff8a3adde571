"""saetrain from Python: fit, go on, look at the run; and the autoencoder as a module of torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr

import actshuffle
import saetrain
from saetrain.cli import main
from saetrain.errors import ConfigError, DataError, DivergedError, ExchangeError
from saetrain.sae import SAE
from support.sae import Planted

SMALL: dict[str, Any] = {"d_sae": 32, "k": 4, "batch_size": 64, "tile": 64, "device": "cpu"}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("python")
    zarr.create_array(folder / "src.zarr", data=Planted.make(2048, 16, 24).rows.numpy(), chunks=(500, 16))
    actshuffle.shuffle(folder / "src.zarr", folder / "rows.zarr", seed=1, memory="64MB")
    return folder / "rows.zarr"


def test_fit_twice_in_one_process_gives_the_same_run(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = (saetrain.fit(store, out=tmp_path / name, steps=8, **SMALL) for name in "ab")
    assert torch.equal(a.sae.W_dec, b.sae.W_dec)
    assert a.finished
    assert a.config.d_sae == 32
    assert a.metrics.index[-1] == 8
    assert a.metrics["loss"].iloc[-1] == a.lines[-1]["loss"]
    assert a.report().read_text().startswith("<!doctype html>")
    assert "eval_fvu" in a._repr_html_()
    told = capsys.readouterr()
    assert "training topk of 32 latents" in told.out
    assert "8/8" in told.out
    assert told.err == "", "no bar where stderr is no terminal"


def test_keywords_are_the_flags_of_the_command(store: Path, tmp_path: Path) -> None:
    run = saetrain.fit(str(store), out=tmp_path / "python", steps=4, progress=False, **SMALL)
    flags = [text for name, value in SMALL.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    assert main(["fit", str(store), "--out", str(tmp_path / "command"), "--steps", "4", "--no-report", *flags]) == 0
    assert torch.equal(run.sae.W_dec, saetrain.load(tmp_path / "command").W_dec)


def test_a_run_goes_on_by_its_folder_alone(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after 4 of 8 steps and resumed from another folder, it is the run that never stopped."""
    whole = saetrain.fit(store, out=tmp_path / "whole", steps=8, progress=False, **SMALL)
    half = saetrain.fit(store, out=tmp_path / "half", steps=8, checkpoint_every=4, progress=False, **SMALL)
    for path in (half.folder / "checkpoints").glob("step-*8"):
        path.rename(tmp_path / "lost")
    monkeypatch.chdir(tmp_path)
    again = saetrain.resume("half", progress=False)
    assert torch.equal(again.sae.W_dec, whole.sae.W_dec)
    assert not torch.equal(saetrain.load(half.folder / "checkpoints" / "step-00000004").W_dec, whole.sae.W_dec)


def test_more_steps_follow_the_longer_schedule(store: Path, tmp_path: Path) -> None:
    run = saetrain.fit(store, out=tmp_path / "run", steps=4, log_every=1, lr_decay=0.5, progress=False, **SMALL)
    assert main(["resume", str(run.folder), "--steps", "12", "--no-report"]) == 0
    rates = [line["lr"] for line in run.lines]
    assert len(rates) == 12
    assert rates[4] > rates[3], "the first 4 steps had ended with a falling rate"
    assert run.config.steps == 12
    assert run.finished
    with pytest.raises(ConfigError, match=r"has 12 steps; steps may be more, got 8"):
        saetrain.resume(run.folder, steps=8)
    assert main(["fit", str(store), "--out", str(run.folder), "--steps", "20", "--no-report"]) == 2


def test_a_run_starts_from_the_weights_of_another(store: Path, tmp_path: Path) -> None:
    settings = {"batch_size": 64, "tile": 64, "device": "cpu", "progress": False}
    old = saetrain.fit(store, out=tmp_path / "old", steps=8, d_sae=32, k=3, **settings)
    new = saetrain.fit(store, out=tmp_path / "new", init_from=str(old.folder), steps=2, lr=1e-9, **settings)
    assert (new.config.d_sae, new.config.k) == (32, 3)  # of the weights
    torch.testing.assert_close(new.sae.W_dec, old.sae.W_dec)
    random = saetrain.fit(store, out=tmp_path / "random", steps=2, lr=1e-9, d_sae=32, k=3, **settings)
    assert not torch.allclose(random.sae.W_dec, old.sae.W_dec, atol=1e-2)
    out = ["--out", str(tmp_path / "no"), "--init-from", str(old.folder)]
    assert main(["fit", str(store), *out, "--d-sae", "64"]) == 2
    assert not (tmp_path / "no").exists()


def test_a_sweep_has_a_run_for_each_combination(store: Path, tmp_path: Path) -> None:
    settings = {**SMALL, "steps": 4, "arch": "relu", "clip": 0.0, "sparsity": 0.1}
    told: list[str] = []
    sweep = saetrain.fit(
        store, out=tmp_path / "s", sweep={"lr": [1e-3, 1e300], "seed": [0, 1]}, say=told.append, **settings
    )
    assert list(sweep.runs) == ["lr=0.001-seed=0", "lr=0.001-seed=1", "lr=1e+300-seed=0", "lr=1e+300-seed=1"]
    assert list(sweep.diverged) == list(sweep.runs)[2:]
    assert sum("the others go on" in text for text in told) == 2
    frame = sweep.metrics
    assert list(frame.columns[:3]) == ["lr", "seed", "diverged"]
    assert frame["eval_fvu"].notna().sum() == 2
    assert sweep.runs["lr=0.001-seed=1"].config.order_seed == 0
    with pytest.raises(DivergedError):
        saetrain.fit(store, out=tmp_path / "s", sweep={"lr": [1e300], "seed": [0, 1]}, progress=False, **settings)


@pytest.mark.parametrize(
    ("lists", "words"),
    [
        ({"k": 4}, "a sweep over k needs a list of values, got 4"),
        ({"k": []}, "needs a list of values"),
        ({"steps": [4, 8]}, "steps has one value for all runs of a sweep"),
        ({"colour": ["red"]}, "colour is no setting"),
        ({}, "a sweep needs a list"),
        ({"k": [4, 0]}, "k must be"),
    ],
)
def test_sweeps_that_are_none_are_refused(lists: dict[str, Any], words: str, store: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        saetrain.fit(store, out=tmp_path / "s", sweep=lists, **SMALL)
    assert not (tmp_path / "s").exists()


def test_the_config_of_a_run_starts_the_same_run(store: Path, tmp_path: Path) -> None:
    run = saetrain.fit(store, out=tmp_path / "run", steps=4, progress=False, **SMALL)
    command = ["fit", str(store), "--no-report", "--config", str(run.folder / "config.json"), "--out"]
    assert main([*command, str(tmp_path / "again")]) == 0
    assert torch.equal(saetrain.load(tmp_path / "again").W_dec, run.sae.W_dec)
    assert main([*command, str(tmp_path / "other"), "--seed", "1"]) == 0
    assert not torch.equal(saetrain.load(tmp_path / "other").W_dec, run.sae.W_dec)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"k": 4, "colour": "red"}', "colour"),
        ('{"k": 0}', "--k must be"),
        ("[]", "list, not an object"),
        ("{", "line 1"),
    ],
)
def test_a_file_that_holds_no_settings_is_refused(
    text: str, words: str, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "flat.json").write_text(text)
    assert main(["fit", str(store), "--config", str(tmp_path / "flat.json"), "--out", str(tmp_path / "no")]) == 2
    told = capsys.readouterr().err
    assert "flat.json holds no settings: " in told
    assert words in told
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"dsae": 64}, ConfigError, "dsae is no setting; did you mean d_sae?"),
        ({"k": 0}, ConfigError, "k must be"),
        ({"field": "nothing"}, DataError, "no array 'nothing'"),
    ],
)
def test_bad_settings_are_refused_and_nothing_is_written(
    settings: dict[str, Any], error: type[Exception], words: str, store: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=words.replace("?", r"\?")):
        saetrain.fit(store, out=tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


def test_a_worthless_model_is_an_error(store: Path, tmp_path: Path) -> None:
    with pytest.raises(DivergedError):
        saetrain.fit(store, out=tmp_path / "run", steps=8, lr=1e300, clip=0.0, arch="relu", progress=False)


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json does not describe a run"):
        saetrain.resume(tmp_path)


# --- The autoencoder ----------------------------------------------------------------------------


@pytest.fixture(params=["topk", "relu", "jumprelu"])
def sae(request: pytest.FixtureRequest) -> SAE:
    generator = torch.Generator().manual_seed(0)
    W, b = torch.randn(12, 6, generator=generator), torch.randn(12, generator=generator)
    threshold = torch.rand(12, generator=generator) if request.param == "jumprelu" else None
    return SAE(request.param, W, b, W.clone(), b[:6], True, 3 if request.param == "topk" else 0, threshold)


def test_rows_of_any_leading_axes_as_tensors_and_as_numpy(sae: SAE) -> None:
    rows = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(1))
    acts = sae.encode(rows)
    assert acts.shape == (2, 5, 12)
    assert torch.equal(acts.view(-1, 12), sae.encode(rows.view(-1, 6)))
    assert torch.equal(sae(rows), sae.decode(acts))
    torch.testing.assert_close(sae.encode(rows[0, 0]), acts[0, 0])
    found = sae(rows.numpy())
    assert isinstance(found, np.ndarray)
    np.testing.assert_array_equal(found, sae(rows).numpy())
    with pytest.raises(ValueError, match=r"rows of shape \(2, 5\): the last axis of this autoencoder's is 6"):
        sae(rows[0, :2, :5])


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace")  # the exact top-k, which it leaves as it is
def test_it_is_a_module(sae: SAE) -> None:
    rows = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    seen: list[Any] = []
    sae.register_forward_hook(lambda module, given, out: seen.append(out))
    due = sae(rows)
    assert torch.equal(seen[0], due)
    assert repr(sae).startswith(f"SAE({sae.activation}, d_in=6, d_sae=12")
    assert sae.double().W_enc.dtype == torch.float64
    assert set(sae.state_dict()) >= {"W_enc", "b_enc", "W_dec", "b_dec"}
    torch.testing.assert_close(torch.compile(sae.float(), backend="eager")(rows), due)


def test_saved_and_loaded_it_computes_the_same(sae: SAE, tmp_path: Path) -> None:
    sae.save(tmp_path / "sae")
    rows = torch.randn(9, 6, generator=torch.Generator().manual_seed(1))
    assert torch.equal(saetrain.load(tmp_path / "sae")(rows), sae(rows))
    with pytest.raises(ExchangeError, match="not empty"):
        sae.save(tmp_path / "sae")
