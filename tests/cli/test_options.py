"""Every option of actshuffle that takes a value has a domain, and a value outside it is refused before all else."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner

import actshuffle
from actshuffle.cli.app import main
from support.stores import group, values

WHOLE = ["2.5", "nan", "inf", "-inf", "many", "", "1e30"]
COUNT, POSITIVE = ["-1", *WHOLE], ["0", "-1", *WHOLE]
SEED = COUNT[:-1]  # as large as people like
SIZE, ROOM = ["0", "-1", "nan", "inf", "1e30", "lots", "", "8XB"], ["-1", "nan", "inf", "1e30", "lots", ""]
REAL, REAL_ABOVE_0 = ["-1", "nan", "inf", "much", ""], ["0", "-1", "nan", "inf", "much", ""]
NAMES, TEXT, CHOICE, JSON = ["", "a,,b", ","], [""], ["", "absent"], ["", "{", "[1]", "nan"]
# Values outside the domain of each option: by command and name, or by name.
OUTSIDE: dict[str, list[str]] = {
    "seed": SEED,
    "levels": ["0", "-1", "2.5", "nan", "inf", "1e30", "few", "", "100"],
    "memory": SIZE,
    "block_bytes": SIZE,
    "run_bytes": SIZE,
    "spill_memory": ROOM,
    "chunk_rows": POSITIVE,
    "chunks_per_shard": POSITIVE,
    "codec": CHOICE,
    "fields": NAMES,
    "missing_chunks": CHOICE,
    "scratch": TEXT,
    "workers": COUNT,
    "scheduler": TEXT,
    "storage_options": JSON,
    "out": TEXT,
    "plan rows": COUNT,
    "row_bytes": SIZE,
    "hosts": POSITIVE,
    "workers_per_host": POSITIVE,
    "network": SIZE,
    "disk": SIZE,
    "store": SIZE,
    "stream": SIZE,
    "requests": REAL_ABOVE_0,
    "latency": REAL,
    "put_price": REAL,
    "get_price": REAL,
    "host_price": REAL,
    "scratch_price": REAL,
    "stragglers": ["", "0.1", "-0.1:4", "1.1:4", "nan:4", "0.1:0.5", "0.1:inf", "0.1:nan", "0.1:4:4"],
    "mtbf": REAL,
    "repair": REAL,
    "simulation_seed": COUNT,
    "sample_rows": POSITIVE,
    "came-from context": COUNT,
    "source": TEXT,
    "folder": TEXT,
    "by": CHOICE,
    "format": CHOICE,
    "columns": NAMES,
    "names": ["", "=", "a=", "=b", "a"],
    "split": TEXT,
    "import dtype": TEXT,
    "row_shape": ["", "0", "-1", "4,0", "2.5", "nan", "1e30", "4,", "1" + 30 * "0"],
    "model": TEXT,
    "text": TEXT,
    "layers": ["", "-1", "2.5", "nan", "1,", "1" + 30 * "0"],
    "hooks": NAMES,
    "dtype": CHOICE,
    "model_dtype": CHOICE,
    "context": POSITIVE,
    "special": CHOICE,
    "prefix": TEXT,
    "skip_first": COUNT,
    "drop_norm": ["-1", "0.5", "1", "nan", "inf", "much", ""],
    "arrays": NAMES,
    "position": TEXT,
    "token": TEXT,
    "drop_tokens": ["", "-1", "2.5", "nan", "1,"],
    "batch_tokens": POSITIVE,
    "tokens_per_document": POSITIVE,
    "rows": POSITIVE,
    "field": TEXT,
    "tokenizer": TEXT,
    "device": TEXT,
    "part": ["", "0/2", "3/2", "1/0", "-1/2", "1", "1/2/3", "a/b", "1/1e3"],
    "png": TEXT,
    "batch_size": POSITIVE,
    "documents": TEXT,
    "positions": TEXT,
    "buffer_rows": COUNT,
    "epoch": COUNT,
    "alpha": ["0", "1", "-1", "2", "nan", "inf", "some", ""],
}
# What each command needs beside an option; all of it is in order.
ARGUMENTS = {
    "run": ["src.zarr", "new.zarr"],
    "plan": ["src.zarr"],
    "verify": ["src.zarr", "done.zarr"],
    "info": ["done.zarr"],
    "status": ["done.zarr"],
    "came-from": ["done.zarr", "0"],
    "where-is": ["done.zarr", "0"],
    "split": ["done.zarr", "new.zarr=9"],
    "head": ["done.zarr", "5"],
    "sample": ["src.zarr", "5", "new.zarr"],
    "filter": ["done.zarr", "new.zarr"],
    "concat": ["src.zarr", "src.zarr", "--out", "new.zarr"],
    "append": ["done.zarr", "more.zarr"],
    "import": ["a.npy", "--out", "new.zarr"],
    "collect": ["--model", "absent", "--text", "a.txt", "--layers", "1", "--out", "new.zarr"],
    "stats": ["done.zarr"],
    "quality": ["done.zarr"],
}


def commands() -> dict[str, click.Command]:
    context = click.Context(main)
    found = {name: main.get_command(context, name) for name in main.list_commands(context)}
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
    folder = tmp_path_factory.mktemp("options")
    for name, rows in (("src", 60), ("more", 9)):
        group(folder / f"{name}.zarr", {"x": values(rows, (4,)), "document": values(rows, (), "<i4")})
    actshuffle.shuffle(folder / "src.zarr", folder / "done.zarr", seed=1, chunk_rows=9)
    np.save(folder / "a.npy", values(9, (4,)))
    (folder / "a.txt").write_text("some words")
    return folder


def tree(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in (folder, *folder.rglob("*"))}


def test_every_option_has_values_outside_its_domain() -> None:
    assert [(command, option.name) for command, option in options() if not outside(command, option)] == []
    used = {key for c, o in options() for key in (f"{c} {o.name}", o.name)}
    assert set(OUTSIDE) <= used
    assert set(ARGUMENTS) == set(commands())


def test_control_an_option_without_a_domain_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    @click.command()
    @click.option("--novel", type=int)
    def command(novel: int) -> None: ...

    inner = commands()
    monkeypatch.setattr(sys.modules[__name__], "commands", lambda: {**inner, "novel": command})
    with pytest.raises(AssertionError, match="novel"):
        test_every_option_has_values_outside_its_domain()


@pytest.mark.parametrize("command", ARGUMENTS)
def test_values_outside_are_refused_and_nothing_is_written(
    command: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    before = tree(folder)
    for option in (option for name, option in options() if name == command):
        [flag] = option.opts
        for text in outside(command, option):
            out = CliRunner().invoke(main, [command, *ARGUMENTS[command], f"{flag}={text}", "--json"])
            told = json.loads(out.stdout)
            assert out.exit_code == 2, (flag, text, out.output)
            assert told["error"] == "bad-request", (flag, text, told)
            assert told["message"].startswith(f"Invalid value for '{flag}'"), (flag, text, told)
            assert len(told["message"]) > len(f"Invalid value for '{flag}': ") + 10
            assert tree(folder) == before, (flag, text)


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        *[("sample", ["src.zarr", rows, "new.zarr"]) for rows in (*POSITIVE, "61")],
        *[("head", ["done.zarr", rows, "new.zarr"]) for rows in (*POSITIVE, "61")],
        *[(name, ["done.zarr", "--", row]) for name in ("came-from", "where-is") for row in (*COUNT, "60")],
        *[
            ("split", ["done.zarr", f"new.zarr={share}"])
            for share in ("-1", "nan", "inf", "-inf", "1.5", "61", "x", "")
        ],
        *[(name, ["", *rest[1:]]) for name, rest in ARGUMENTS.items() if not rest[0].startswith("--")],
    ],
)
def test_arguments_outside_are_refused_and_nothing_is_written(
    command: str, arguments: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    before = tree(folder)
    arguments = arguments if "--" in arguments else ["--", *arguments] if "--out" not in arguments else arguments
    out = CliRunner().invoke(main, [command, "--json", *arguments])
    assert (out.exit_code, json.loads(out.stdout)["error"]) == (2, "bad-request"), out.output
    assert tree(folder) == before


def test_values_inside_are_accepted(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The least and the greatest of each kind."""
    monkeypatch.chdir(folder)
    greatest: Any = 2**63 - 1
    for arguments in (
        ["plan", "--rows", greatest, "--row-bytes", "1", "--memory", "1GB", "--run-bytes", "1"],
        ["plan", "--rows", "0", "--row-bytes", "9e18", "--memory", "9e18", "--latency", "0", "--mtbf", "0"],
        ["plan", "src.zarr", "--hosts", "1", "--stragglers", "1:1", "--repair", "0", "--requests", "1e-9"],
        ["run", "src.zarr", tmp_path / "new.zarr", "--seed", 2**100, "--chunk-rows", "1", "--spill-memory", "0"],
        ["quality", "done.zarr", "--batch-size", "1", "--buffer-rows", "0", "--alpha", "1e-300"],
    ):
        out = CliRunner().invoke(main, [str(a) for a in arguments])
        assert "Invalid value" not in out.output, (arguments, out.output)
        assert "unexpected" not in out.output, (arguments, out.output)
