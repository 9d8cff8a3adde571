"""Every option of saetrain has a domain, and a value outside it is refused before anything is written."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
import zarr

import actshuffle
from saetrain.cli import main
from saetrain.cli.app import command_line
from saetrain.config import Config, parse_field
from saetrain.errors import ConfigError
from saetrain.settings import DOMAINS
from support.sae import Planted

FAST = (
    "--steps",
    "4",
    "--d-sae",
    "64",
    "--k",
    "4",
    "--batch-size",
    "64",
    "--device",
    "cpu",
    "--tile",
    "64",
    "--no-report",
)
COUNT, COUNT_OR_NONE = ["0", "-5", "2.5", "nan", "inf", "1e30", "many"], ["-1", "2.5", "nan", "inf", "1e30", "many"]
REAL = ["nan", "inf", "-inf", "-1e-3", "many"]
SHARE = [*REAL, "1.001", "5"]
# Values outside the domain of each setting, as texts.
OUTSIDE = {
    "config": ["nowhere.json", "a-file", "rows.zarr/zarr.json"],
    "arch": ["", "gate", "TopK"],
    "d_sae": COUNT_OR_NONE,
    "k": COUNT,
    "widths": ["64,32", "8,8", "0,4", "-4", "2.5", "many"],
    "sparsity": [*REAL, "-2"],
    "aux_coef": REAL,
    "aux_k": COUNT_OR_NONE,
    "dead_tokens": COUNT_OR_NONE,
    "threshold_rate": SHARE,
    "bandwidth": [*REAL, "0"],
    "tanh_scale": [*REAL, "0"],
    "preact_coef": REAL,
    "batch_size": COUNT_OR_NONE,
    "steps": COUNT_OR_NONE,
    "lr": REAL,
    "lr_warmup": SHARE,
    "lr_decay": SHARE,
    "sparsity_warmup": [*SHARE, "-2"],
    "beta1": [*SHARE, "1", "2"],
    "beta2": [*SHARE, "1", "2"],
    "eps": [*REAL, "0"],
    "clip": REAL,
    "seed": COUNT_OR_NONE,
    "field": ["absent", "x,x", "x,"],
    "output": ["absent", "x,x", ",x"],
    "skip": ["1", "maybe", "true"],
    "log": ["", "mlflow", "wandb,wandb", "auto,wandb"],
    "ema": [*SHARE, "1"],
    "init_from": ["absent", "rows.zarr"],
    "order_seed": ["-2", "2.5", "nan", "1e30", "many"],
    "document_field": ["absent"],
    "holdout": COUNT_OR_NONE,
    "incomplete": ["1", "maybe"],
    "buffer_rows": ["-2", "2.5", "nan", "many"],
    "device": ["", "mps", "cuda:x", "gpu"],
    "compute": ["", "fp8", "int8"],
    "moments": ["", "8", "float32"],
    "tensor_parallel": [*COUNT_OR_NONE, "3"],
    "tile": COUNT_OR_NONE,
    "log_every": COUNT,
    "eval_every": [*COUNT_OR_NONE, "-5"],
    "checkpoint_every": COUNT_OR_NONE,
    "keep": COUNT,
    "nproc": ["0", "-1", "2.5", "many"],
    "out": ["a-file"],
    "heldout": ["absent.zarr", "wide.zarr"],
    "evaluate": ["absent", "a-file"],
    "model": ["absent"],
    "model_dtype": ["", "int8"],
    "layer": COUNT_OR_NONE,
    "prefix": ["<s>"],
    "windows": COUNT_OR_NONE,
}
SWITCHES = {"as_json", "debug", "report"}  # no value


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of rows 16 wide, one of rows 20 wide, and a file."""
    folder = tmp_path_factory.mktemp("options")
    rows = Planted.make(2048, 16, 24).rows.numpy()
    for name, values in (("rows", rows), ("wide", np.random.default_rng(0).random((500, 20), np.float32))):
        zarr.create_array(folder / f"{name}.src", data=values, chunks=(500, values.shape[1]))
        actshuffle.shuffle(folder / f"{name}.src", folder / f"{name}.zarr", seed=1, memory="64MB")
    (folder / "a-file").write_text("")
    return folder


def options(command: str) -> dict[str, click.Option]:
    found = command_line.get_command(click.Context(command_line), command)
    return {str(p.name): p for p in found.params if isinstance(p, click.Option)}


def test_every_option_has_values_outside_its_domain() -> None:
    for command in ("fit", "sweep"):
        assert set(options(command)) - SWITCHES == set(OUTSIDE)
    assert set(options("plan")) - SWITCHES < set(OUTSIDE)
    assert {f.name for f in fields(Config)} == {"arch", *DOMAINS}


@pytest.mark.parametrize("name", OUTSIDE)
def test_values_outside_are_refused_and_nothing_is_written(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    before = sorted(folder.rglob("*"))
    [flag] = options("fit")[name].opts
    for text in OUTSIDE[name]:
        commands = [["fit", "rows.zarr", *FAST], *([["plan", "rows.zarr"]] if name in options("plan") else [])]
        for command in commands:
            assert main([*command, flag, text]) == 2, text
            told = capsys.readouterr().err
            assert "Traceback" not in told
            assert "unexpected" not in told
            assert any(word in told for word in (name, flag, text)), told
            assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("name", DOMAINS)
def test_values_inside_are_accepted(name: str) -> None:
    default = getattr(Config(), name)
    assert DOMAINS[name].holds(default)
    given: dict[str, list[Any]] = {"sparsity": [0, 3.0], "beta1": [0, 0.999], "seed": [2**63 - 1], "lr_warmup": [0, 1]}
    for value in given.get(name, []):
        assert getattr(Config(**{name: value}), name) == value  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [{"k": 2.5}, {"k": True}, {"lr": math.nan}, {"seed": "1"}, {"widths": [8]}])
def test_python_values_are_held_to_the_same_domains(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Config(**wrong)


def test_a_long_integer_keeps_its_digits() -> None:
    assert parse_field("seed", "9007199254740993") == 9007199254740993
    assert parse_field("steps", "1e6") == 1_000_000


def test_a_device_that_is_not_there_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    there = torch.cuda.device_count()
    assert main(["fit", "rows.zarr", *FAST, "--device", f"cuda:{there}"]) == 2
    assert f"torch finds {there} CUDA devices" in capsys.readouterr().err
    assert not (folder / "rows.sae").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["fit", "rows.zarr", "--out", "rows.zarr"], "inside the Zarr store"),
        (["fit", "rows.zarr", "--out", "rows.zarr/run"], "inside the Zarr store"),
        (["fit", "rows.zarr", "--holdout", "1000000"], "1,000,000 held out do not fill one batch"),
        (["fit", "rows.zarr", "--k", "300"], "--k 300 is more than --d-sae 256"),
        (["fit", "rows.zarr", *FAST, "--batch-size", "5000"], "do not fill one batch of 5,000"),
        (["sweep", "rows.zarr", "--k", "4,4"], "gives k=4 twice"),
        (["sweep", "rows.zarr", "--lr", "1e-3,nan"], "lr must be"),
        (["sweep", "rows.zarr", "--batch-size", "32,64"], "--batch-size has one value for all runs of a sweep"),
        (["fit", "rows.zarr", "--init-from", "nowhere"], "no checkpoint in nowhere"),
        (["export", "rows.zarr", "a-file"], "is a file"),
        (["import", "rows.zarr", "a-file"], "is a file"),
        (["report", "rows.zarr", "--out", "a-file"], "is a file"),
    ],
)
def test_values_that_contradict_each_other_or_the_files(
    arguments: list[str], words: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    before = sorted(folder.rglob("*"))
    assert main(arguments) == 2
    assert words in capsys.readouterr().err
    assert sorted(folder.rglob("*")) == before


def test_a_domain_too_wide_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    anything: Callable[[Any], bool] = lambda value: True  # noqa: E731
    monkeypatch.setitem(DOMAINS, "lr_warmup", type(DOMAINS["lr_warmup"])("anything", anything))
    assert Config(lr_warmup=5).lr_warmup == 5
