"""Every option of the commands beside `fit`, `sweep` and `plan` has a domain, walked from click's own table.

tests/sae/test_sae_options.py does the same for these three, whose options are the settings.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import pytest

from actshuffle.cli.app import main as actshuffle_line
from saetrain.cli.app import COMMANDS, command_line, main
from support.sae import small_results

WHOLE = ["-1", "2.5", "nan", "inf", "-inf", "1e30", "many", "", "1" + 30 * "0"]
COUNT, POSITIVE = WHOLE, ["0", *WHOLE]
REAL, ABOVE_0 = ["-1", "nan", "inf", "-inf", "much", ""], ["0", "-1", "nan", "inf", "much", ""]
SIZE = ["0", "-1", "nan", "inf", "1e30", "lots", "", "8XB"]
TEXT, PATH, CHOICE = [""], [""], ["", "absent"]
FOLDER = ["", "a-file"]
DEVICE = ["", "mps", "cuda:x", "gpu", "meta"]
# Values outside the domain of each option: by command and name, or by name.
OUTSIDE: dict[str, list[str]] = {
    "against": TEXT,
    "beside": TEXT,
    "block_rows": COUNT,
    "context": COUNT,
    "costs": PATH,
    "creator": TEXT,
    "dataset": TEXT,
    "device": DEVICE,
    "documents": COUNT,
    "drop_norm": ["-1", "0.5", "1", "nan", "inf", "much", ""],
    "evaluate": PATH,
    "features": COUNT,
    "field": TEXT,
    "format": CHOICE,
    "hook": TEXT,
    "hook_name": TEXT,
    "interactions": PATH,
    "k": POSITIVE,
    "labels": PATH,
    "largest": ABOVE_0,
    "layer": COUNT,
    "length": POSITIVE,
    "logits": POSITIVE,
    "median_norm": ABOVE_0,
    "memory": SIZE,
    "method": CHOICE,
    "model": TEXT,
    "model_dtype": [*CHOICE, "int8"],
    "model_id": TEXT,
    "most": POSITIVE,
    "near": COUNT,
    "nodes": POSITIVE,
    "nproc": POSITIVE,
    "out": FOLDER,
    "graph out": PATH,
    "origins": ["", "localhost", "ftp://localhost", "http://", "http://localhost/page", "http://["],
    "panel": POSITIVE,
    "port": [*COUNT, "65536"],
    "prefix": TEXT,
    "product": CHOICE,
    "prompt": TEXT,
    "prompts": TEXT,
    "repetition": ["0", "-1", "100", "nan", "inf", "much", ""],
    "rows": POSITIVE,
    "run": FOLDER,
    "sample": POSITIVE,
    "scheduler": TEXT,
    "seed": COUNT,
    "seeds": POSITIVE,
    "set_name": TEXT,
    "shards": POSITIVE,
    "features shards": COUNT,
    "steps": POSITIVE,
    "store": PATH,
    "strengths": ["", "a", "0.1,", "nan", "0.1,inf"],
    "suffix": TEXT,
    "target": TEXT,
    "temperature": ["-1", "100", "nan", "inf", "much", ""],
    "text": PATH,
    "thresholds": ABOVE_0,
    "through": PATH,
    "tokenizer": TEXT,
    "tokens": POSITIVE,
    "unit": CHOICE,
    "upper_layer": COUNT,
    "windows": COUNT,
    "within": REAL,
    "workers": COUNT,
}
MODEL = ["run", "--model", "./absent", "--layer", "1"]
# What each command needs beside an option; all of it is in order.
ARGUMENTS = {
    "resume": ["run"],
    "report": ["run"],
    "features": ["run", "rows.zarr", "new"],
    "export-features": [*("described", "new", "--format", "graph", "--model-id", "m", "--layer", "1", "--set", "s")],
    "export": ["run", "new"],
    "import": ["folder", "new"],
    "evaluate": [*MODEL, "--text", "a.txt"],
    "steer": [*MODEL, "--feature", "1", "--prompt", "w1"],
    "attribute": [*MODEL, "--prompt", "w1"],
    "ablate": [*MODEL, "--feature", "1", "--text", "a.txt"],
    "graph": [*MODEL, "run", "--upper-layer", "2", "--prompt", "w1", "--out", "new.json"],
    "interactions": ["run", "run", "new"],
    "view": ["described", "--no-open"],
}


def commands() -> dict[str, click.Command]:
    context = click.Context(command_line)
    found = {name: command_line.get_command(context, name) for name in COMMANDS if name not in ("fit", "sweep", "plan")}
    return {name: command for name, command in found.items() if command is not None}


def options() -> list[tuple[str, click.Option]]:
    return [
        (name, parameter)
        for name, command in commands().items()
        for parameter in command.params
        if isinstance(parameter, click.Option) and not parameter.is_flag
    ]


def outside(command: str, option: click.Option) -> list[str]:
    return OUTSIDE.get(f"{command} {option.name}", OUTSIDE.get(str(option.name), []))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = small_results(tmp_path_factory.mktemp("domains"))
    (folder / "a-file").write_text("")
    (folder / "a.txt").write_text("w1 w2 w3 w4")
    return folder


def tree(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in (folder, *folder.rglob("*"))}


def files(folder: Path) -> dict[str, int]:
    """What is in a folder; its own time tells of lock files, which come and go beside what they lock."""
    return {path: time for path, time in tree(folder).items() if path != str(folder)}


def test_every_option_has_values_outside_its_domain() -> None:
    assert [(command, option.name) for command, option in options() if not outside(command, option)] == []
    assert set(OUTSIDE) <= {key for c, o in options() for key in (f"{c} {o.name}", o.name)}
    assert set(ARGUMENTS) == set(commands())


def test_a_scheduler_comes_with_the_flag_that_trusts_its_network() -> None:
    """In both programs alike."""
    context = click.Context(actshuffle_line)
    theirs = {name: actshuffle_line.get_command(context, name) for name in actshuffle_line.list_commands(context)}
    flags = {name: {flag for p in c.params for flag in p.opts} for name, c in (theirs | commands()).items() if c}
    there = {name: ("--scheduler" in found, "--insecure" in found) for name, found in flags.items()}
    assert {name for name, both in there.items() if both == (True, True)} >= {"run", "features", "interactions"}
    assert {name for name, (scheduler, insecure) in there.items() if scheduler != insecure} == set()


def test_control_an_option_without_a_domain_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    command = commands()["export"]
    monkeypatch.setattr(command, "params", [*command.params, click.Option(["--novel"], type=int)])
    with pytest.raises(AssertionError, match="novel"):
        test_every_option_has_values_outside_its_domain()


@pytest.mark.parametrize("command", ARGUMENTS)
def test_values_outside_are_refused_and_nothing_is_written(
    command: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    before = tree(folder)
    for option in (option for name, option in options() if name == command):
        [flag] = option.opts
        for text in outside(command, option):
            code = main([command, *ARGUMENTS[command], f"{flag}={text}", "--json"])
            said = capsys.readouterr().out
            told = json.loads(said)
            assert (code, told["error"]) == (2, "bad-request"), (flag, text, said)
            assert told["message"].startswith(f"Invalid value for '{flag}'"), (flag, text, told)
            assert len(told["message"]) > len(f"Invalid value for '{flag}': ") + 10
    assert tree(folder) == before


# --- Values that only the files tell from good ones


@pytest.fixture(scope="module")
def probed(folder: Path) -> Path:
    """The same folder, with a causal model and a dictionary of 48 latents for it."""
    pytest.importorskip("transformers")
    from support.causal import dictionary, saved

    saved(folder / "model")
    dictionary().save(folder / "dict")
    return folder


PROBE = ["dict", "--model", "./model", "--layer", "1"]
TURN = ["steer", *PROBE, "--prompt", "w1", "--tokens", "2"]
GRAPH = ["graph", *PROBE, "dict", "--prompt", "w1 w2 w3"]
SHARE = ["export-features", "described", "new"]
NAMED = ["--model-id", "m", "--layer", "1", "--set", "s"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([*TURN, "--feature", "48", "--median-norm", "1"], "no feature 48: the dictionary has 0 to 47"),
        ([*TURN, "--feature", "1", "--tokens", "1000", "--median-norm", "1"], "the model takes 64"),
        (
            [*TURN, "--feature", "1", "--out", "new"],
            "shares of the layer's median norm, which nothing here tells: give --features RESULT of "
            "`saetrain features`, --text FILE to measure it on, --median-norm X, or --unit activation",
        ),
        ([*TURN, "--feature", "1", "--unit", "max", "--median-norm", "1"], "to measure it on, --largest X, or"),
        ([*TURN, "--feature", "1", "--text", "absent"], "no such file or folder: absent"),
        ([*TURN, "--feature", "1", "--median-norm", "1", "--chat"], "no chat template"),
        ([*TURN, "--feature", "1", "--largest", "1", "--largest", "2"], "1 feature and 2 largest activations"),
        ([*TURN, "--feature", "1", "--features", "rows.zarr"], "no finished result of `saetrain features`"),
        ([*TURN, "--feature", "1", "--strengths", "1e308", "--median-norm", "1e308"], "a finite amount"),
        ([*TURN, "--feature", "1", "--layer", "9", "--median-norm", "1"], "hidden states 0 to 3"),
        ([*TURN, "--feature", "1", "--device", "cuda:9", "--median-norm", "1"], "device cuda:9 is not there"),
        (
            ["steer", "absent", *PROBE[1:], "--feature", "1", "--prompt", "w1", "--median-norm", "1"],
            "no checkpoint in absent",
        ),
        (["evaluate", *PROBE, "--text", "a.txt", "--prefix", "none"], "is no token of ./model"),
        (["evaluate", *PROBE, "--text", "a.txt", "--context", "1"], "a window of 1 token,"),
        (["evaluate", *PROBE, "--text", "a.txt", "--context", "65"], "takes 64 at most"),
        (["evaluate", *PROBE, "--text", "a.txt", "--documents", "1"], "documents 0 (all), 2 or more"),
        (["attribute", *PROBE, "--prompt", "w1 w2", "--target", "none"], "is no token of ./model"),
        (["attribute", *PROBE, "--prompt", "w1 w2", "--shards", "49"], "49 shards of 48 latents"),
        (["attribute", *PROBE], "either --prompt or --text"),
        (["ablate", *PROBE, "--feature", "48", "--text", "a.txt"], "no feature 48"),
        ([*GRAPH, "--upper-layer", "1", "--out", "new"], "the lower first"),
        ([*GRAPH, "--upper-layer", "2", "--out", "absent/new"], "in a folder that is there"),
        ([*GRAPH, "--upper-layer", "2", "--out", "model"], "in a folder that is there"),
    ],
)
def test_values_that_the_model_does_not_take(
    arguments: list[str], words: str, probed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(arguments, words, probed, monkeypatch, capsys)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["features", "run", "rows.zarr", "new", "--incomplete", "--shards", "2"], "--shards must be 1 to 1"),
        (["features", "run", "rows.zarr", "new", "--incomplete", "--block-rows", "70000"], "at most 65,536"),
        (["features", "run", "rows.zarr", "new", "--incomplete", "--memory", "1KB"], "--memory 1 KB is less"),
        (["features", "run", "rows.zarr", "new", "--incomplete", "--field", "absent"], "no array 'absent'"),
        (["features", "run", "rows.zarr", "new", "--incomplete", "--device", "cuda:9"], "cuda:9 is not there"),
        (["features", "run", "rows.zarr", "new", "--incomplete", "--model", "absent"], "is not the folder of a model"),
        (["features", "run", "rows.zarr", "new", "--workers", "1", "--scheduler", "tcp://localhost:1"], "not both"),
        (["features", "run", "rows.zarr", "new", "--scheduler", "tcp://far.invalid:1"], "or --insecure if you trust"),
        (["interactions", "run", "run", "new", "--scheduler", "tcp://far.invalid:1"], "or --insecure if you trust"),
        (["features", "run", "rows.zarr", "new"], "has no completion marker"),
        (["features", "run", "rows.zarr", "run", "--incomplete", "--overwrite"], "holds something else"),
        (
            ["features", "absent", "rows.zarr", "new", "--incomplete"],
            "no checkpoint in absent: there is no such folder",
        ),
        (["features", "run", "absent", "new"], "no such source"),
        (["interactions", "run", "run", "new", "--panel", "1000"], "a multiple of 1024"),
        (["interactions", "run", "run", "new", "--memory", "1KB"], "give --memory"),
        (["interactions", "run", "run", "new", "--through", "absent.npy"], "is not a readable .npy file"),
        (["interactions", "run", "run", "a-file"], "a-file is a file; name a folder"),
        (["interactions", "run", "run", "run", "--overwrite"], "holds something else"),
        (["interactions", "run", "absent", "new"], "no checkpoint in"),
        (["interactions", "run", "run", "new", "--device", "cuda:9"], "cuda:9 is not there"),
        ([*SHARE, "--format", "delphi", *NAMED], "keeps no codes"),
        ([*SHARE, "--format", "graph", *NAMED, "--store", "absent"], "absent is not that store"),
        ([*SHARE, "--format", "neuronpedia", *NAMED, "--model-id", "a/b"], "the name of the model"),
        ([*SHARE, "--format", "neuronpedia", *NAMED, "--set", ".."], "the name of the set"),
        ([*SHARE, "--format", "neuronpedia", *NAMED, "--suffix", "a/b"], "the name of the suffix"),
        (["view", "described", "--no-open", "--store", "absent"], "absent is not that store"),
        (["view", "described", "--no-open", "--run", "rows.zarr"], "has no metrics.jsonl"),
        (["view", "described", "--no-open", "--labels", "a.txt"], "holds no labels"),
        (["view", "described", "--no-open", "--labels", "absent/new"], "there is no such folder"),
        (["export", "absent", "new"], "no checkpoint in absent: there is no such folder"),
        (["import", "folder", "run"], "exists and is not empty"),
        (["resume", "absent"], "does not describe a run: there is no such folder"),
        (["resume", "."], "does not describe a run: it holds 1 run, such as run"),
        (["export", ".", "new"], "no checkpoint in .: it holds 1 run, such as run"),
        (["import", "absent", "new"], "absent is no dictionary of SAELens or sparsify: there is no such folder"),
        (["import", "described", "new"], "described is no dictionary of SAELens or sparsify: it has no cfg.json"),
        (["resume", "run", "--steps", "3"], "has 4 steps"),
        (["resume", "run", "--store", "absent"], "no such source"),
        (["report", "folder"], "no metrics.jsonl"),
    ],
)
def test_values_that_the_files_contradict(
    arguments: list[str], words: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(arguments, words, folder, monkeypatch, capsys)


def refused(
    arguments: list[str], words: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    before = files(folder)
    code = main(arguments)
    told = capsys.readouterr().err
    assert (code, words in told) == (2, True), (code, told)
    assert files(folder) == before


def test_an_imported_run_has_no_store_to_go_on_with(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["import", str(folder / "folder"), str(tmp_path / "run")]) == 0
    refused(["resume", str(tmp_path / "run")], "was imported from", tmp_path, monkeypatch, capsys)


def test_more_logits_than_there_are_tokens_are_all_of_them(probed: Path, tmp_path: Path) -> None:
    out = tmp_path / "graph.json"
    model = ["--model", str(probed / "model"), "--layer", "1"]
    arguments: list[Any] = [probed / "dict", *model, probed / "dict", "--upper-layer", "2", "--prompt", "w1 w2 w3"]
    assert main(["graph", *map(str, arguments), "--logits", "1000", "--out", str(out)]) == 0
    nodes = json.loads(out.read_text())["nodes"]
    assert sum(node["feature_type"] == "logit" for node in nodes) == 62
