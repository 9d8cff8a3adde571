"""One writer for each place: two real processes meet, one dies, parts share; where there are no locks, claims tell."""

from __future__ import annotations

import errno
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import actshuffle
from actshuffle.errors import DestinationInUseError
from actshuffle.executors import Serial
from actshuffle.jobs import Step, locks, run_in_folder
from actshuffle.jobs.locks import CLAIMS, SUFFIX, Locks
from actshuffle.storage.place import as_place
from actshuffle.testing import differences
from support import processes
from support.executors import Paused
from support.finished import shuffled
from support.stores import files, group, values

N = 60
SHAPE: dict[str, Any] = {"block_bytes": 400, "run_bytes": 1, "chunk_rows": 5, "fsync": False}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A source, a shuffle of it, and files to import."""
    group(tmp_path / "src.zarr", {"x": values(N, (4,)), "doc": values(N, (), "<i4") % 1000})
    group(tmp_path / "new.zarr", {"x": values(9, (4,), seed=3), "doc": values(9, (), "<i4", seed=3) % 1000})
    actshuffle.shuffle(tmp_path / "src.zarr", tmp_path / "done.zarr", seed=5, **SHAPE)
    np.save(tmp_path / "a.npy", values(N, (4,)))
    return tmp_path


# What writes, and where.
COMMANDS: dict[str, tuple[str, Callable[..., Any]]] = {
    "run": ("dst.zarr", lambda at, **o: actshuffle.shuffle(at / "src.zarr", at / "dst.zarr", seed=5, **SHAPE, **o)),
    "stats": ("done.zarr", lambda at, **o: actshuffle.stats(at / "done.zarr", **o)),
    "append": ("done.zarr", lambda at, **o: actshuffle.append(at / "done.zarr", at / "new.zarr", **SHAPE, **o)),
    "append to": (
        "grown.zarr",
        lambda at, **o: actshuffle.append(at / "done.zarr", at / "new.zarr", at / "grown.zarr", **SHAPE, **o),
    ),
    "sample": ("some.zarr", lambda at, **o: actshuffle.sample(at / "src.zarr", 20, at / "some.zarr", seed=5, **o)),
    "filter": (
        "cut.zarr",
        lambda at, **o: actshuffle.filter_rows(at / "done.zarr", at / "cut.zarr", drop_tokens=[1], token="doc", **o),
    ),
    "import": ("got.zarr", lambda at, **o: actshuffle.import_store(at / "a.npy", at / "got.zarr", **o)),
    "split": (
        "cut.zarr",
        lambda at, **o: actshuffle.split(at / "done.zarr", {str(at / "cut.zarr"): 9}, copy=True, **o),
    ),
    "split by": (
        "cut.zarr",
        lambda at, **o: actshuffle.split(at / "done.zarr", {str(at / "cut.zarr"): 0.9}, by="row", copy=True, **o),
    ),
    "view": ("cut.zarr", lambda at, **o: actshuffle.split(at / "done.zarr", {str(at / "cut.zarr"): 9}, **o)),
    "concat": ("both", lambda at, **_: actshuffle.concat([at / "src.zarr", at / "new.zarr"], at / "both")),
    "folder": ("jobs", lambda at, **o: run_in_folder("n", at / "jobs", {}, [Step("s", count, tasks=2)], **o)),
    "overwrite": (
        "done.zarr",
        lambda at, **o: actshuffle.shuffle(at / "src.zarr", at / "done.zarr", overwrite=True, **o),
    ),
}


def count(job: Any, task: Any) -> tuple[dict[str, Any], int]:
    return {"number": task.number}, 1


def command(name: str, home: Path, flags: Path) -> None:
    COMMANDS[name][1](home, executor=Paused(flags))


def hold(place: str, shared: str, flags: Path) -> None:
    with Locks() as held:
        held.take(as_place(place), shared=shared)
        (flags / "at work").touch()
        processes.until((flags / "go on").exists)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# --- Two processes ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_refuses_a_place_that_another_process_writes(
    name: str, home: Path, tmp_path_factory: Any
) -> None:
    place, call = COMMANDS[name]
    flags = tmp_path_factory.mktemp("flags") / "flags"
    with processes.busy(hold, str(home / place), "", flags=flags) as holder:
        before = tree(home)
        with pytest.raises(DestinationInUseError) as raised:
            call(home)
        assert tree(home) == before
        message = str(raised.value)
        assert f"{home / place} is in use: process {holder.pid} on {os.uname().nodename} (since 20" in message
        assert "Wait until that process has ended, stop it, or choose another path" in message
        assert raised.value.exit_code == 2
        os.kill(holder.pid, signal.SIGKILL)
        holder.join()
        call(home)  # at once: a dead process holds nothing
    assert not list(home.glob("*.actshuffle-*"))


@pytest.mark.parametrize("name", ["run", "stats", "append"])
@pytest.mark.parametrize("end", ["killed", "goes on"])
def test_two_at_once(name: str, end: str, home: Path, tmp_path_factory: Any) -> None:
    flags = tmp_path_factory.mktemp("flags") / "flags"
    with processes.busy(command, name, home, flags=flags) as first:
        with pytest.raises(DestinationInUseError, match=f"process {first.pid} on"):
            COMMANDS[name][1](home)
        if end == "killed":
            os.kill(first.pid, signal.SIGKILL)
            assert processes.ended(first) == -signal.SIGKILL
            COMMANDS[name][1](home)
        else:
            (flags / "go on").touch()
            assert processes.ended(first) == 0
    if name == "run":
        assert differences(home / "src.zarr", home / "dst.zarr", 5) == []
    elif name == "stats":
        assert actshuffle.read_stats(home / "done.zarr").rows == N
    else:
        both = actshuffle.concat([home / "src.zarr", home / "new.zarr"], home / "both").path
        assert actshuffle.verify(both, home / "done.zarr").ok
    assert {p.name for p in home.iterdir()} <= {"src.zarr", "new.zarr", "done.zarr", "a.npy", "dst.zarr", "both"}


def test_control_without_the_lock_two_are_let_through(
    home: Path, tmp_path_factory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = tmp_path_factory.mktemp("flags") / "flags"
    with processes.busy(command, "run", home, flags=flags) as first:
        monkeypatch.setattr(Locks, "take", lambda *_, **__: None)
        COMMANDS["run"][1](home)
        assert first.is_alive()


def test_a_scratch_that_two_destinations_of_one_name_share(home: Path, tmp_path_factory: Any) -> None:
    """As on two machines with a disk each, and one scratch: its name follows from the path of the destination."""
    flags = tmp_path_factory.mktemp("flags") / "flags"
    job = None

    def planned(found: Any) -> None:
        nonlocal job
        job = found
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        COMMANDS["run"][1](home, scratch=home / "spill", planned=planned)
    assert job is not None
    with processes.busy(hold, job.scratch.url, "", flags=flags), pytest.raises(DestinationInUseError, match="scratch-"):
        COMMANDS["run"][1](home, scratch=home / "spill")


@pytest.mark.parametrize("busy", ["a", "a.b"])
def test_every_part_of_a_split_is_held(busy: str, home: Path, tmp_path_factory: Any) -> None:
    """Also one whose name begins like that of another part."""
    flags = tmp_path_factory.mktemp("flags") / "flags"
    with processes.busy(hold, str(home / busy), "", flags=flags), pytest.raises(DestinationInUseError):
        actshuffle.split(home / "done.zarr", {"a": 5, "a.b": 5}, folder=home, copy=True)
    actshuffle.split(home / "done.zarr", {"a": 5, "a.b": 5}, folder=home, copy=True)


# --- The lock itself ----------------------------------------------------------------------------


def test_parts_of_one_job_share_and_nobody_else_does(tmp_path: Path) -> None:
    place = as_place(tmp_path / "out")
    with processes.busy(hold, str(tmp_path / "out"), "this job", flags=tmp_path / "flags") as part:
        for shared in ("", "another job"):
            with Locks() as mine, pytest.raises(DestinationInUseError, match=f"process {part.pid} on"):
                mine.take(place, shared=shared)
        with Locks() as mine:
            mine.take(place, shared="this job")
            (tmp_path / "flags/go on").touch()
            assert processes.ended(part) == 0
            with Locks() as third, pytest.raises(DestinationInUseError, match=f"process {os.getpid()} on"):
                third.take(place)
    assert not (tmp_path / f"out{SUFFIX}").exists()
    with Locks() as mine:
        mine.take(place)


def test_all_ways_to_a_place_have_one_lock(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    ways = (tmp_path / "link", f"file://{tmp_path}/real", f"{tmp_path}/link/../real")
    with Locks() as mine:
        mine.take(as_place(tmp_path / "real"))
        mine.take(as_place(tmp_path / "real"))  # once more by the same holder is nothing new
        for way in ways:
            with Locks() as other, pytest.raises(DestinationInUseError):
                other.take(as_place(way))


def test_folders_that_were_made_for_a_lock_alone_go_with_it(tmp_path: Path) -> None:
    with Locks() as mine:
        mine.take(as_place(tmp_path / "a/b/out"))
        assert (tmp_path / f"a/b/out{SUFFIX}").exists()
    assert not (tmp_path / "a").exists()


def test_the_lock_of_a_dead_process_says_nothing(tmp_path: Path) -> None:
    path = tmp_path / f"out{SUFFIX}"
    path.write_text("torn")
    with Locks() as mine:
        mine.take(as_place(tmp_path / "out"))
        assert json.loads(path.read_text())["process"] == os.getpid()
    assert not path.exists()


def test_a_file_that_its_holder_removes_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The holder ends after another process has opened the file, and before that locks it."""
    first, opened = Locks(), locks._opened
    first.take(as_place(tmp_path / "out"))

    def late(path: Path, home: Path) -> tuple[int, Path]:
        found = opened(path, home)
        first.__exit__(None, None, None)
        return found

    monkeypatch.setattr(locks, "_opened", late)
    with Locks() as mine:
        mine.take(as_place(tmp_path / "out"))
        monkeypatch.setattr(locks, "_opened", opened)
        with Locks() as other, pytest.raises(DestinationInUseError):
            other.take(as_place(tmp_path / "out"))


def test_a_folder_that_is_closed_to_us(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As root, the tests may write anywhere; so the refusal is played."""
    real = os.open

    def closed(path: Any, flags: int, *mode: int) -> int:
        if flags & os.O_CREAT:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path, flags, *mode)

    store = shuffled(tmp_path / "done.zarr")
    before = files(store)
    monkeypatch.setattr(locks.os, "open", closed)
    with Locks() as mine:
        mine.take(as_place(store))
        with Locks() as other, pytest.raises(DestinationInUseError, match="another process"):
            other.take(as_place(store))
    assert files(store) == before
    with Locks() as mine:
        mine.take(as_place(store))


# --- Claims, where there are no locks -----------------------------------------------------------


@pytest.fixture
def lockless(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(fd: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(locks.fcntl, "flock", none)


def claim(folder: Path, **changes: Any) -> None:
    """The claim of a process on another host."""
    entry = {**locks._me(""), "host": "elsewhere", **changes}
    folder.mkdir(exist_ok=True)
    (folder / locks.ALONE).write_bytes(locks._line(entry))


def test_the_last_to_claim_goes_on_and_the_other_stops(lockless: None, home: Path) -> None:
    """The other comes while this one works: this one stops before it publishes, and leaves the other's claim."""
    folder = home / f"dst.zarr{CLAIMS}"
    with pytest.raises(DestinationInUseError, match="no longer this process's: process 7 on elsewhere") as raised:
        COMMANDS["run"][1](home, planned=lambda job: claim(folder, process=7))
    assert "publishes nothing" in str(raised.value)
    assert not (home / "dst.zarr/zarr.json").exists()
    COMMANDS["run"][1](home)  # nobody knows whether that process lives: this one comes last
    assert differences(home / "src.zarr", home / "dst.zarr", 5) == []
    assert not folder.exists()


def test_control_a_claim_that_is_not_read_back(lockless: None, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Locks, "check", lambda self: None)
    COMMANDS["run"][1](home, planned=lambda job: claim(home / f"dst.zarr{CLAIMS}"))
    assert (home / "dst.zarr/zarr.json").exists()


def test_claims_are_looked_at_while_tasks_run(lockless: None, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "LOOK_SECONDS", 0)
    folder, done = home / f"dst.zarr{CLAIMS}", []

    class Claims(Serial):
        def map(self, fn: Any, calls: Any) -> Iterator[Any]:
            for call in calls:
                done.append(call)
                if len(done) == 3:
                    claim(folder)
                yield fn(*call)

    with pytest.raises(DestinationInUseError):
        COMMANDS["run"][1](home, executor=Claims())
    assert len(done) == 3


def test_a_living_process_of_this_host_keeps_its_claim(lockless: None, tmp_path: Path) -> None:
    folder = tmp_path / f"out{CLAIMS}"
    sleeper = processes.start(time.sleep, 600)
    try:
        alive = {"host": os.uname().nodename, "process": sleeper.pid}
        claim(folder, **alive, born=locks._born(sleeper.pid))
        with Locks() as mine, pytest.raises(DestinationInUseError, match=f"process {sleeper.pid} on"):
            mine.take(as_place(tmp_path / "out"))
        claim(folder, **alive, born=1)  # the number was another process's before
        with Locks() as mine:
            mine.take(as_place(tmp_path / "out"))
    finally:
        sleeper.kill()
        sleeper.join()


def test_parts_share_claims(lockless: None, tmp_path: Path) -> None:
    place = as_place(tmp_path / "out")
    with Locks() as one, Locks() as two, Locks() as other:
        one.take(place, shared="this job")
        two.take(place, shared="this job")
        one.check()
        two.check()
        other.take(place, shared="another job")
        for part in (one, two):
            with pytest.raises(DestinationInUseError):
                part.check()
        other.check()
    assert not (tmp_path / f"out{CLAIMS}").exists()
