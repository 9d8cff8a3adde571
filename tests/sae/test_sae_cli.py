"""The command line: JSON on stdout, one line for an error, exit codes, help."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import torch

import actshuffle
import saetrain
from saetrain.cli import main
from saetrain.cli.app import COMMANDS, command_line
from saetrain.cli.training import HAVE_COMMAS, SWEPT
from saetrain.config import Config
from saetrain.training import checkpoint
from saetrain.training.log import read_log
from saetrain.variants.table import VARIANTS
from support.sae import MemorySource, Planted, one_rank, small

SMALL = (
    "--steps",
    "6",
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


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import zarr

    folder = tmp_path_factory.mktemp("cli")
    rows = Planted.make(2048, 16, 24).rows.numpy()
    zarr.create_array(folder / "src.zarr", data=rows, chunks=(512, 16))
    actshuffle.shuffle(folder / "src.zarr", folder / "rows.zarr", seed=1, memory="64MB")
    return folder / "rows.zarr"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data, folder = Planted.make(2048, 16, 24), tmp_path_factory.mktemp("run")
    with one_rank() as mesh:
        saetrain.fit(MemorySource(data.rows, data.documents), {folder: small("topk")}, mesh)
    return folder


def said(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> tuple[dict[str, Any], str]:
    """The one JSON object on stdout, and stderr."""
    assert main([*map(str, arguments), "--json"]) == code
    out, err = capsys.readouterr()
    assert out.count("\n") == 1
    return json.loads(out), err


# --- JSON


def test_fit_prints_its_facts(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found, err = said(capsys, "fit", store, "--out", tmp_path / "run", *SMALL)
    assert found["run"] == str(tmp_path / "run")
    assert found["stopped"] is False
    assert found["metrics"]["step"] == 6
    assert "eval_fvu" in found["metrics"]
    assert "6/6" in err  # progress is for people
    assert main(["fit", str(store), "--out", str(tmp_path / "plain"), *SMALL]) == 0
    out, err = capsys.readouterr()
    assert "6/6" in out
    assert err == ""


def test_sweep_prints_the_facts_of_each_run(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found, _ = said(capsys, "sweep", store, "--out", tmp_path, *SMALL, "--k", "2,4")
    assert [Path(x["run"]).name for x in found["runs"]] == ["k=2", "k=4"]
    assert found["runs"][0]["metrics"]["l0"] <= 2 < found["runs"][1]["metrics"]["l0"]


def test_of_several_ranks_one_refuses(store: Path, tmp_path: Path) -> None:
    """What they print if all is well is in `tests/sae/test_sae_store.py`."""
    command = [sys.executable, "-m", "saetrain", "fit", store, "--out", tmp_path, "--nproc", "2", "--json", *SMALL]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    refused = subprocess.run(
        [*command, "--field", "other"], env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert refused.returncode == 2
    assert json.loads(refused.stdout)["error"] == "bad-source"


def test_a_report_takes_the_folder_of_a_sweep(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = tmp_path / "sweep"
    for name in ("k8", "k16"):
        shutil.copytree(run, sweep / name)
    (sweep / "report.html").write_text("of before")
    said(capsys, "report", sweep)
    assert all(name in (sweep / "report.html").read_text() for name in ("k8", "k16"))
    said(capsys, "report", *sorted(sweep.iterdir()), "--out", tmp_path / "again")  # as a shell's sweep/* gives them
    assert "k16" in (tmp_path / "again/report.html").read_text()


def test_other_commands_print_their_facts(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found, _ = said(capsys, "report", run, "--out", tmp_path)
    assert [Path(name).name for name in found["files"]] == ["report.html", "report.png"]
    out = tmp_path / "out"
    assert said(capsys, "export", run, out)[0] == {"run": str(run), "to": str(out), "format": "saelens", "names": {}}
    back = tmp_path / "back"
    assert said(capsys, "import", out, back)[0] == {"folder": str(out), "run": str(back)}


# --- Runs that fail


def test_a_run_that_diverges_fails_and_says_so(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["fit", store, "--out", tmp_path / "run", *SMALL, "--lr", "3", "--lr-decay", "0"]
    for _ in range(2):  # the second finds it finished
        found, err = said(capsys, *arguments, code=1)
        assert found["metrics"]["eval_fvu"] > 1
        assert "diverged: the FVU on held-out rows is" in found["diverged"]
        assert "1 of 1 run failed" in err
    assert saetrain.load(tmp_path / "run").k == 4  # its checkpoint is kept


def test_one_diverging_run_does_not_end_a_sweep(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = [*SMALL, "--arch", "relu", "--clip", "0", "--sparsity", "0.1", "--steps"]
    sweep = ["sweep", store, "--out", tmp_path, "--lr", "1e-3,1e300", *small]
    found, err = said(capsys, *sweep, "6", code=1)
    good, bad = found["runs"]
    assert good["diverged"] == ""
    assert good["metrics"]["step"] == 6
    assert "the loss is" in bad["diverged"]
    assert "1 of 2 runs failed" in err
    assert "the others go on" in err
    assert read_log(tmp_path / "lr=1e300")[-1]["diverged"] == bad["diverged"]
    assert list(saetrain.Sweep(tmp_path).diverged) == ["lr=1e300"]
    said(capsys, "fit", store, "--out", tmp_path / "alone", *small, "6", "--lr", "1e-3")
    alone, other = (checkpoint.find(tmp_path / name) for name in ("alone", "lr=1e-3"))
    assert torch.equal(alone.read("W_enc"), other.read("W_enc"))
    _, err = said(capsys, *sweep, "6", code=1)  # given again, it is left out
    assert "lr=1e300 is left out" in err


# --- Errors


@pytest.mark.parametrize(
    ("arguments", "code", "error", "words"),
    [
        (["fit", "absent.zarr"], 2, "bad-source", "no such source"),
        (["fit", "x.zarr", "--arch", "gate"], 2, "bad-request", "arch must be one of topk, batchtopk"),
        (["fit", "x.zarr", "--k", "many"], 2, "bad-request", "--k must be an integer, got 'many'"),
        (["fit", "x.zarr", "--nproc", "0"], 2, "bad-request", "must be an integer from 1 to"),
        (["fit"], 2, "bad-request", "Missing argument 'STORE'"),
        (["fit", "x.zarr", "--novel", "1"], 2, "bad-request", "No such option"),
        (["sweep", "x.zarr"], 2, "bad-request", "a sweep needs a list"),
        (["export", "absent", "out"], 2, "bad-checkpoint", "no checkpoint in absent"),
        (["export", "absent", "out", "--format", "onnx"], 2, "bad-request", "'onnx' is not one of"),
        (["import", "absent", "run"], 2, "bad-exchange", "absent is no dictionary of SAELens or sparsify"),
        (["report", "absent"], 2, "bad-request", "no metrics.jsonl"),
        (["novel"], 2, "bad-request", "No such command"),
    ],
)
def test_errors_have_a_line_a_code_and_an_exit_code(
    arguments: list[str],
    code: int,
    error: str,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    found, err = said(capsys, *arguments, code=code)
    assert found["error"] == error
    assert words in found["message"]
    assert words in err
    assert "Traceback" not in err
    assert main(arguments) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err
    assert list(tmp_path.iterdir()) == []


def test_an_unexpected_error_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def breaks(*_: object) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("saetrain.exchange.folders.bring", breaks)
    assert main(["import", "a", "b"]) == 1
    err = capsys.readouterr().err
    assert err == "error: unexpected ZeroDivisionError: division by zero (--debug shows where)\n"
    assert main(["import", "a", "b", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setattr("saetrain.exchange.folders.bring", lambda *_: Path("/dev/null/x").write_text(""))
    found, err = said(capsys, "import", "a", "b", code=1)
    assert found["error"] == "io"
    assert "/dev/null/x" in err


def test_ctrl_c_says_what_is_kept(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("saetrain.exchange.folders.bring", interrupted)
    monkeypatch.setattr("saetrain.cli.features.build_features", interrupted)
    assert main(["import", "a", "b"]) == 130
    assert capsys.readouterr().err == "stopped\n"
    assert main(["features", "a", "b", "c"]) == 130
    assert capsys.readouterr().err == "stopped; what is finished is kept: the same command again goes on\n"


# --- Help


@pytest.mark.parametrize("name", COMMANDS)
def test_list_of_commands_says_what_each_says_first(name):
    command = command_line.get_command(click.Context(command_line), name)
    assert click.Command(name, help=COMMANDS[name][1]).get_short_help_str(200) == command.get_short_help_str(200)
    room = [one.name for one in COMMANDS[name][0]()]
    assert set(room) <= set(COMMANDS)
    assert command_line.get_command(click.Context(command_line), f"{name}x") is None


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"saetrain {actshuffle.__version__}\n"
    assert main([]) == 2
    assert "Missing command" in capsys.readouterr().err
    for name in command_line.commands:
        assert main([name, "-h"]) == 0
        assert main([name, "--help"]) == 0
    assert "--d-sae" in capsys.readouterr().out
    assert main(["fit", "--help"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert ", ".join(VARIANTS) in told
    assert "[default: 32]" in told


def test_every_setting_is_an_option_of_fit_and_sweep() -> None:
    for name in ("fit", "sweep"):
        options = {p.name: p for p in command_line.get_command(click.Context(command_line), name).params}
        assert set(Config().to_json()) <= set(options)
        swept = {n for n, p in options.items() if p.metavar == "A,B"}
        assert swept == (set(SWEPT) - set(HAVE_COMMAS) if name == "sweep" else set())
