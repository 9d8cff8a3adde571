"""Two writers of saetrain do not meet in one place, on file systems with locks and without."""

from __future__ import annotations

import errno
import fcntl
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
from saetrain.training import checkpoint, lock
from saetrain.view import labels
from support.sae import small_results

FAST: dict[str, Any] = {"d_sae": 64, "k": 4, "batch_size": 64, "device": "cpu", "tile": 64, "incomplete": True}
NAMED = ["--model-id", "m", "--layer", "1", "--set", "s"]
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
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_results(tmp_path_factory.mktemp("locks"))


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
