"""What Python lets people say and the command line does not: one sentence each, and nothing is written."""

import dataclasses
import inspect
import itertools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import actshuffle
from actshuffle.errors import ClusterError, InfeasibleError, RequestError, SourceError
from actshuffle.executors import Dask, Serial, executor_for
from support.finished import shuffled
from support.stores import group, values

WRONG = [5.5, -1, b"x", object(), "a\0b"]


@pytest.fixture
def src(tmp_path: Path) -> Path:
    group(tmp_path / "in.zarr", {"x": values(30, (4,)), "y": values(30)})
    return tmp_path / "in.zarr"


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return shuffled(tmp_path / "s.zarr")


@pytest.mark.parametrize("wrong", [*WRONG, None, True], ids=repr)
def test_what_is_no_path(wrong, src, store, tmp_path):
    new = tmp_path / "new"
    for call in (
        lambda: actshuffle.shuffle(wrong, new),
        lambda: actshuffle.shuffle(src, wrong),
        lambda: actshuffle.verify(wrong, store),
        lambda: actshuffle.open_dataset(wrong),
        lambda: actshuffle.Loader(wrong, 5),
        lambda: actshuffle.stats(wrong),
        lambda: actshuffle.info(wrong),
        lambda: actshuffle.status(wrong),
        lambda: actshuffle.concat(wrong, new),
        lambda: actshuffle.append(store, wrong, new),
        lambda: actshuffle.import_store(wrong, new),
        lambda: actshuffle.quality(wrong),
    ):
        with pytest.raises((RequestError, SourceError)) as raised:
            call()
        assert "\n" not in str(raised.value)
    assert not new.exists()


@pytest.mark.parametrize(
    "argument",
    [
        *("seed", "memory", "chunk_rows", "fields", "scratch", "gather", "workers", "client", "executor", "overwrite"),
        *("fsync", "storage_options", "progress", "planned", "source_row", "codec", "levels", "missing_chunks"),
    ],
)
@pytest.mark.parametrize("wrong", WRONG, ids=repr)
def test_arguments_of_the_wrong_kind(argument, wrong, src, tmp_path):
    if (argument, wrong) == ("scratch", 5.5):
        wrong = 7
    with pytest.raises(RequestError):
        actshuffle.shuffle(src, tmp_path / "new", **{argument: wrong})
    assert not (tmp_path / "new").exists()


def test_a_text_is_no_switch(src, store):
    """`overwrite="no"` would count as yes."""
    before = (store / "_actshuffle/zarr.json").read_bytes()
    with pytest.raises(RequestError, match="overwrite must be True or False, got 'no'"):
        actshuffle.shuffle(src, store, seed=9, overwrite="no")  # type: ignore[arg-type]
    assert (store / "_actshuffle/zarr.json").read_bytes() == before


def test_one_name_is_a_list_of_one(src, store, tmp_path):
    actshuffle.shuffle(src, tmp_path / "x.zarr", seed=1, fields="x", memory="200MB")
    assert "y" not in actshuffle.open_dataset(tmp_path / "x.zarr").fields
    name = next(iter(actshuffle.open_dataset(store).fields))
    assert [*actshuffle.Loader(store, 5, fields=name).fields] == [name]
    with pytest.raises(RequestError, match="sources must be a list of paths"):
        actshuffle.concat(str(src), tmp_path / "c")


@pytest.mark.parametrize("wrong", [5.5, b"x", "abc", object(), None], ids=repr)
def test_numbers_of_rows(wrong, src, store, tmp_path):
    for call in (
        lambda: actshuffle.sample(src, wrong, tmp_path / "new"),
        lambda: actshuffle.head(store, wrong, tmp_path / "new"),
        lambda: actshuffle.split(store, wrong),
        lambda: actshuffle.order(wrong, 1),
        lambda: actshuffle.order(5, wrong),
        lambda: actshuffle.came_from(store, [wrong]),
        lambda: actshuffle.where_is(store, [wrong]),
        lambda: actshuffle.plan(src, workers=wrong or "none"),
    ):
        with pytest.raises(RequestError):
            call()
    assert not (tmp_path / "new").exists()
    assert len(actshuffle.order(np.int64(5), np.int32(1))) == 5


@pytest.mark.parametrize("name", ["context", "batch_tokens", "tokens_per_document", "rows"])
@pytest.mark.parametrize("wrong", [0, -1, 2.5, True, "8"], ids=repr)
def test_limits_of_collect(name, wrong, tmp_path):
    """Before the model is loaded, which is not there."""
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(RequestError, match=f"{name} must be a whole number of at least 1, got"):
        actshuffle.collect("absent", [tmp_path / "a.txt"], tmp_path / "new", layers=[1], **{name: wrong})
    assert not (tmp_path / "new").exists()


class _Client:
    """As much of a Dask client as is looked at."""

    dashboard_link = ""

    def __init__(self, *, asynchronous: bool = False, status: str = "running") -> None:
        self.asynchronous, self.status = asynchronous, status


@pytest.mark.parametrize(
    ("client", "words"),
    [(_Client(asynchronous=True), "asynchronous"), (_Client(status="closed"), "not connected, its status is 'closed'")],
)
def test_clients_that_cannot_be_used(client, words):
    with pytest.raises(RequestError, match=words):
        Dask(client)


def test_a_client_whose_scheduler_died():
    """No fault of the argument: the scheduler was killed after the client had connected."""
    with pytest.raises(ClusterError, match="lost its scheduler"):
        Dask(_Client(status="connecting"))


def test_an_asynchronous_client_of_a_run(src, tmp_path, monkeypatch):
    monkeypatch.setattr(_Client, "__module__", "distributed.client")
    with pytest.raises(RequestError, match="asynchronous"):
        actshuffle.shuffle(src, tmp_path / "new", client=_Client(asynchronous=True))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("workers", [-1, 1.5, "2", True], ids=repr)
def test_numbers_of_workers(workers):
    with pytest.raises(RequestError, match="workers must be 0"), executor_for(workers):
        pass


UNGUARDED = "import sys, actshuffle\nactshuffle.shuffle(sys.argv[1], sys.argv[2], seed=1, workers=1, memory='200MB')\n"
GUARDED = UNGUARDED.replace("\nact", "\nif __name__ == '__main__':\n    act")
CALLED = "import sys, actshuffle\ndef go():\n    " + UNGUARDED.splitlines()[1] + "\ngo()\n"

THREAD = """import sys, threading, actshuffle
def go():
    actshuffle.shuffle(sys.argv[1], sys.argv[2], seed=1, workers=1, memory='200MB')
thread = threading.Thread(target=go)
thread.start()
thread.join()
"""


def test_a_thread_of_a_script_without_a_main_guard(src, tmp_path):
    pytest.importorskip("distributed")
    (tmp_path / "script.py").write_text(THREAD)
    command = [sys.executable, tmp_path / "script.py", src, tmp_path / "new.zarr"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert "the thread for which its line 6 waits would start workers" in ran.stderr.strip().splitlines()[-1]
    assert ran.stderr.count("Traceback") == 1
    assert not (tmp_path / "new.zarr").exists()
    guarded = THREAD.replace("thread = ", "if __name__ == '__main__':\n    thread = ").replace(
        "\nthread.", "\n    thread."
    )
    (tmp_path / "script.py").write_text(guarded)
    ran = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "would start workers" not in ran.stderr
    assert (tmp_path / "new.zarr").exists()


@pytest.mark.parametrize(("script", "refused"), [(UNGUARDED, 2), (CALLED, 4), (GUARDED, 0)])
def test_a_script_without_a_main_guard(script, refused, src, tmp_path):
    pytest.importorskip("distributed")
    (tmp_path / "script.py").write_text(script)
    command = [sys.executable, tmp_path / "script.py", src, tmp_path / "new.zarr"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    if not refused:
        assert ran.returncode == 0, ran.stderr
        return
    assert ran.returncode == 1
    last = ran.stderr.strip().splitlines()[-1]
    assert f"its line {refused} would start workers" in last
    assert '`if __name__ == "__main__":`' in last
    assert ran.stderr.count("Traceback") == 1
    assert not (tmp_path / "new.zarr").exists()


def test_an_executor_of_another_class_is_taken(tmp_path):
    """Executors were a protocol in version 0.1.0: a class with the same members still serves."""

    class Theirs:
        workers, one_machine, tasks_per_worker = 1, True, 1

        def map(self, fn, calls):
            return (fn(*call) for call in calls)

        def task_memory(self):
            return 1 << 30

        def close(self): ...

    group(tmp_path / "src", {"x": values(20, (3,))})
    assert actshuffle.shuffle(tmp_path / "src", tmp_path / "dst", executor=Theirs(), fsync=False).plan.rows == 20


class _Sharing(Serial):
    """Two tasks at a time in each process."""

    tasks_per_worker = 2


COMMANDS: dict[str, Callable[..., Any]] = {
    "run": lambda at, out, **options: actshuffle.shuffle(at / "in.zarr", out, seed=1, **options),
    "sample": lambda at, out, **options: actshuffle.sample(at / "in.zarr", 20, out, seed=1, **options),
    "import": lambda at, out, **options: actshuffle.import_store(at / "in.npy", out, **options),
    "append": lambda at, out, **options: actshuffle.append(
        at / "done.zarr", at / "in.zarr", out, again=True, **options
    ),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_tasks_of_one_process_divide_its_memory(command, src, tmp_path):
    """30 MB are enough for one task, and not for two at a time."""
    np.save(tmp_path / "in.npy", values(30, (4,)))
    actshuffle.shuffle(src, tmp_path / "done.zarr", seed=1)
    call, out = COMMANDS[command], tmp_path / "out.zarr"
    with pytest.raises(InfeasibleError, match=r"2 tasks .* each"):
        call(tmp_path, out, memory="30MB", executor=_Sharing())
    call(tmp_path, out, memory="60MB", executor=_Sharing())
    call(tmp_path, tmp_path / "alone.zarr", memory="30MB", executor=Serial())


# What each public function needs beside its switches; True and False alone are switches, not what counts as one.
CALLS: dict[str, Callable[[Path], list[Any]]] = {
    "Loader": lambda at: [at / "s.zarr", 5],
    "append": lambda at: [at / "s.zarr", at / "in.zarr"],
    "came_from": lambda at: [at / "s.zarr", [0]],
    "collect": lambda at: ["model", [at / "a.txt"], at / "new"],
    "concat": lambda at: [[at / "in.zarr"], at / "new"],
    "decoder": lambda at: [actshuffle.open_dataset(at / "s.zarr")],
    "filter_rows": lambda at: [at / "s.zarr", at / "new"],
    "head": lambda at: [at / "s.zarr", 5, at / "new"],
    "import_store": lambda at: [at / "a.npy", at / "new"],
    "open_dataset": lambda at: [at / "s.zarr"],
    "plan": lambda at: [at / "in.zarr"],
    "quality": lambda at: [at / "s.zarr"],
    "sample": lambda at: [at / "in.zarr", 5, at / "new"],
    "shuffle": lambda at: [at / "in.zarr", at / "new"],
    "split": lambda at: [at / "s.zarr", {str(at / "new"): 5}],
    "stats": lambda at: [at / "s.zarr"],
    "verify": lambda at: [at / "in.zarr", at / "s.zarr"],
}


def _switches() -> dict[str, list[str]]:
    """The parameters of public functions that take True or False."""
    found = {}
    for name in actshuffle.__all__:
        public = getattr(actshuffle, name)
        if callable(public) and not dataclasses.is_dataclass(public):
            parameters = inspect.signature(public).parameters.values()
            found[name] = [p.name for p in parameters if str(p.annotation) in ("bool", "bool | None")]
    return {name: names for name, names in found.items() if names}


def test_every_function_with_switches_is_tried():
    assert set(_switches()) == set(CALLS)


@pytest.mark.parametrize("name", CALLS)
def test_what_counts_as_true_is_no_switch(name, src, store, tmp_path):
    np.save(tmp_path / "a.npy", values(30, (4,)))
    (tmp_path / "a.txt").write_text("text")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for switch, wrong in itertools.product(_switches()[name], ["no", 1, np.array([True])]):
        with pytest.raises(RequestError, match=f"{switch} must be True or False, got"):
            getattr(actshuffle, name)(*CALLS[name](tmp_path), **{switch: wrong})
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
