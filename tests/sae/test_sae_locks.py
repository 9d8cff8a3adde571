"""Two writers of saetrain do not meet in one place, on file systems with locks and without."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import threading
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

import saetrain
from actshuffle.errors import DestinationInUseError
from actshuffle.jobs import hold, locks
from saetrain.cli import main
from saetrain.exchange import folders as exchange
from saetrain.reporting import report
from saetrain.training import checkpoint, lock
from saetrain.view import labels
from saetrain.writing import put
from support.causal import saved, texts
from support.sae import small_results

FAST: dict[str, Any] = {"d_sae": 64, "k": 4, "batch_size": 64, "device": "cpu", "tile": 64, "incomplete": True}
NAMED = ["--model-id", "m", "--layer", "1", "--set", "s"]
STEER = [
    "--model",
    "model",
    "--layer",
    "2",
    "--feature",
    "1",
    "--prompt",
    "w1 w2",
    "--unit",
    "activation",
    "--strengths",
    "1,2",
]
STEER += ["--tokens", "2", "--seeds", "2"]
KEPT = ["--windows", "1", "--save"]
ASKED = ["--prompt", "w1 w2", "--nodes", "4", "--out", "graph.json"]
# The place that each command writes, and its arguments.
WRITERS = {
    "fit": ("new", ["rows.zarr", "--out", "new", "--incomplete", "true", "--buffer-rows", "0", "--device", "cpu"]),
    "sweep": ("new/k=4", ["rows.zarr", "--out", "new", "--incomplete", "true", "--buffer-rows", "0", "--k", "4,8"]),
    "resume": ("run", ["run", "--steps", "8"]),
    "features": ("new", ["run", "rows.zarr", "new", "--incomplete"]),
    "interactions": ("new", ["run", "run", "new"]),
    "export-features": ("new", ["described", "new", "--format", "neuronpedia", *NAMED]),
    "export": ("new", ["run", "new"]),
    "import": ("new", ["folder", "new"]),
    "steer": ("new", ["run", "--out", "new", *STEER]),
}
# The files that these replace, and their arguments: of two writers at once, the last one's file stays whole.
REPLACED = {
    "steer": (["new/steer.json", "new/steer.png"], WRITERS["steer"][1]),
    "graph": (["graph.json"], ["run", "run", "--model", "model", "--layer", "1", "--upper-layer", "2", *ASKED]),
    "report": (["run/report.html", "run/report.png"], ["run"]),
    "evaluate": (
        ["run/evaluation.json"],
        ["run", "--model", "model", "--layer", "2", "--text", "text.jsonl", "--save"],
    ),
    "resume": (["run/config.json"], ["run", "--steps", "8", "--no-report"]),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = small_results(tmp_path_factory.mktemp("locks"))
    saved(folder / "model")
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for _, text in texts(3)))
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(made, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("command", WRITERS)
def test_every_command_refuses_a_place_that_another_writer_holds(
    command: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place, arguments = WRITERS[command]
    before = names(folder)
    with hold(folder / place):
        assert main([command, *arguments]) == 2
    told = capsys.readouterr().err
    assert f"{place} is in use: process {os.getpid()} on" in told
    assert names(folder) == before


def test_an_autoencoder_is_not_saved_where_another_process_writes(folder: Path) -> None:
    with hold(folder / "new"), pytest.raises(DestinationInUseError, match="new is in use"):
        saetrain.load(folder / "run").save(folder / "new")
    assert not (folder / "new").exists()


@pytest.mark.parametrize("command", REPLACED)
def test_a_file_is_replaced_and_not_written_over(command: str, folder: Path) -> None:
    """Whoever reads the file meanwhile reads the old one to its end, and no second writer gets into it."""
    replaced, arguments = REPLACED[command]
    for name in replaced:
        (folder / name).parent.mkdir(exist_ok=True)
        if not (folder / name).exists():
            (folder / name).write_text("old")
        (folder / f"{name}.old").hardlink_to(folder / name)
    before = {name: (folder / name).read_bytes() for name in replaced}
    assert main([command, *arguments]) == 0
    for name in replaced:
        assert (folder / f"{name}.old").read_bytes() == before[name]
        assert (folder / name).read_bytes() != before[name]
    assert not list(folder.rglob("*.part"))


def test_control_a_file_that_is_written_over_is_seen(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def over(path: Path, data: str | bytes) -> None:
        path.write_bytes(data.encode() if isinstance(data, str) else data)

    monkeypatch.setattr(report, "put", over)
    with pytest.raises(AssertionError):
        test_a_file_is_replaced_and_not_written_over("report", folder)


def test_two_writers_of_one_file_leave_one_of_theirs(tmp_path: Path) -> None:
    texts = [letter * 300_000 for letter in "ab"]
    writers = [threading.Thread(target=lambda t=text: [put(tmp_path / "f", t) for _ in range(5)]) for text in texts]
    for writer in writers:
        writer.start()
    seen = set()
    while any(writer.is_alive() for writer in writers):
        seen |= {(tmp_path / "f").read_text()} if (tmp_path / "f").exists() else set()
    assert seen | {(tmp_path / "f").read_text()} <= set(texts)
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "f", "old")
    (tmp_path / "link").symlink_to("f")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as broken:
        broken.setattr("saetrain.writing.os.fsync", full)
        with pytest.raises(OSError, match="No space"):
            put(tmp_path / "link", "new")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"f": "old", "link": "old"}
    put(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "f").read_text() == "new"


def test_control_without_the_lock_two_are_let_through(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "hold", lambda *places: nullcontext())
    with hold(folder / "new"):
        assert main(["export", "run", "new"]) == 0


# --- File systems without locks -----------------------------------------------------------------


@pytest.fixture
def lockless(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(fd: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(locks.fcntl, "flock", none)


def fit(folder: Path, say: Any = lambda text: None) -> saetrain.Run:
    settings = {**FAST, "steps": 40, "eval_every": 10, "checkpoint_every": 10, "buffer_rows": 0}
    return saetrain.fit(folder / "rows.zarr", out=folder / "new", say=say, **settings)


def claim(folder: Path) -> None:
    """The claim of a process on another host."""
    place = folder / f"new{locks.CLAIMS}"
    place.mkdir(exist_ok=True)
    (place / locks.ALONE).write_bytes(locks._line({**locks._me(""), "host": "elsewhere", "process": 7}))


def test_a_run_is_trained_where_there_are_no_locks(lockless: None, folder: Path) -> None:
    assert fit(folder).finished
    assert not (folder / f"new{locks.CLAIMS}").exists()


def test_a_run_that_another_host_has_claimed_stops_at_its_next_checkpoint(lockless: None, folder: Path) -> None:
    def say(text: str) -> None:
        if "10/40" in text:
            claim(folder)

    with pytest.raises(DestinationInUseError, match="no longer this process's: process 7 on elsewhere"):
        fit(folder, say)
    assert [path.name for path in checkpoint.published(folder / "new")] == ["step-00000010"]


def test_control_a_claim_that_is_not_looked_at(lockless: None, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "hold", lambda *runs: nullcontext(locks.Locks()))
    assert fit(folder, lambda text: claim(folder)).finished


# --- Labels -------------------------------------------------------------------------------------


def test_labels_wait_for_those_of_another_page(tmp_path: Path) -> None:
    one, two = labels.Labels(tmp_path / "labels.json"), labels.Labels(tmp_path / "labels.json")
    fd = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    writer = threading.Thread(target=one.put, args=(1, "a"))
    writer.start()
    writer.join(0.2)
    waits = writer.is_alive()
    os.close(fd)
    writer.join()
    two.put(2, "b")
    assert waits
    assert labels.Labels(tmp_path / "labels.json").all() == {1: "a", 2: "b"}
