"""The command line as people and scripts use it: words, exit codes, pure JSON, Ctrl-C, the live display."""

from __future__ import annotations

import fcntl
import inspect
import io
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from importlib.util import find_spec

import click
import numpy as np
import pytest
import zarr
from click.testing import CliRunner

import actshuffle
from actshuffle import __version__, jobs, machine
from actshuffle.arrays.codecs import CODECS
from actshuffle.cli.app import COMMANDS, RESUME, main
from actshuffle.errors import ConservationError, RequestError, StorageFullError
from actshuffle.executors import choice
from actshuffle.planning import strategy
from actshuffle.progress import observer
from actshuffle.progress.display import Display, bar, shown
from actshuffle.progress.meter import Meter, clock_face
from actshuffle.storage import objects
from support.oracle import assert_is_oracle
from support.processes import alive, until
from support.stores import array, group, values

SIZE = ["--block-bytes", "2KB", "--run-bytes", "1", "--chunk-rows", "16"]  # of many small tasks
PROGRAM = [sys.executable, "-m", "actshuffle"]
ALONE = ["--workers", "0", "--no-fsync"]
LOG_LINE = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  "


def call(*args, code=0, **extra):
    """The outcome of a command; an unexpected exit code shows the output."""
    outcome = CliRunner().invoke(main, [str(a) for a in args], prog_name="actshuffle", **extra)
    assert outcome.exit_code == code, f"{outcome.exit_code}: {outcome.stdout}\n{outcome.stderr}"
    assert "Traceback" not in outcome.stderr
    return outcome


def command(name):
    return main.get_command(click.Context(main), name)


@pytest.fixture
def src(tmp_path):
    path = tmp_path / "acts.zarr"
    group(path, {"act": values(500, (8,), "<f2"), "token": values(500, (), "<i4")})
    return path


@pytest.fixture
def dst(tmp_path):
    return tmp_path / "shuffled.zarr"


@pytest.fixture
def done(src, dst):
    """A finished run's destination."""
    call("run", src, dst, "--seed", 5, *SIZE, *ALONE)
    return dst


# --- Words that scripts rely on -------------------------------------------------------------------


def test_codecs_are_those_of_the_engine():
    (codec,) = (p for p in command("run").params if p.name == "codec")
    assert list(codec.type.choices) == list(CODECS)


@pytest.mark.parametrize("name", COMMANDS)
def test_list_of_commands_says_what_each_says_first(name):
    told = click.Command(name, help=COMMANDS[name][1])
    assert told.get_short_help_str(200) == command(name).get_short_help_str(200)
    assert command(name).name == name
    assert command(f"{name}x") is None


def test_help_lists_commands_in_the_order_of_their_table():
    listed = re.findall(r"^  ([a-z-]+)  +[A-Z]", call("--help").stdout.partition("Commands:")[2], re.MULTILINE)
    assert listed == list(COMMANDS)


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_has_examples_and_fits_a_terminal(command):
    args = [] if command is None else [command]
    text = call(*args, "--help").stdout
    assert text == call(*args, "-h").stdout
    assert "actshuffle run acts.zarr" in text if command is None else "Example" in text
    assert max(map(len, text.splitlines())) <= 80
    if command is None:
        assert "_ACTSHUFFLE_COMPLETE=bash_source actshuffle" in text


def test_version():
    assert call("--version").stdout == f"actshuffle {__version__}\n"


def test_python_dash_m():
    out = subprocess.run([*PROGRAM, "--version"], capture_output=True, text=True)
    assert (out.returncode, out.stdout) == (0, f"actshuffle {__version__}\n")


@pytest.mark.parametrize(("words", "found"), [("actshuffle ve", "verify"), ("actshuffle run --mem", "--memory")])
def test_shell_completion(words, found):
    env = {"_ACTSHUFFLE_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    code = "from actshuffle.cli.app import main; main(prog_name='actshuffle')"
    out = subprocess.run([sys.executable, "-c", code], env=os.environ | env, capture_output=True, text=True)
    assert found in out.stdout


# --- What a good command prints -------------------------------------------------------------------


def test_run_writes_the_oracle_and_one_line(src, dst):
    out = call("run", src, dst, "--seed", 5, *SIZE, *ALONE)
    assert_is_oracle(src, dst)
    assert out.stdout.startswith("500 rows, 10 KB, 2 levels, seed 5: ")
    assert out.stdout.count("\n") == 1


def test_run_as_json_is_one_object_and_nothing_else(src, dst):
    out = call("run", src, dst, "--seed", 5, "--json", *SIZE, *ALONE)
    result = json.loads(out.stdout)
    assert out.stdout.count("\n") == 1
    assert result["plan"].pop("levels") == 2
    assert {k: result[k] for k in ("rows", "bytes", "seed", "resumed", "workers", "destination")} == {
        "rows": 500,
        "bytes": 10_000,
        "seed": 5,
        "resumed": 0,
        "workers": 1,
        "destination": str(dst),
    }
    assert result["seconds"] > 0
    assert result["bytes_per_second"] > 0
    assert result["tasks"] == sum(result["plan"]["tasks"])


def test_log_lines_are_dated_and_say_where_stages_begin_and_end(src, dst):
    lines = call("run", src, dst, *SIZE, *ALONE).stderr.splitlines()
    assert all(re.match(LOG_LINE, line) for line in lines)
    said = [re.sub(r"  +", "  ", re.sub(LOG_LINE, "", line)) for line in lines]
    assert re.fullmatch(r"plan  2 levels, \d+ blocks, 18 KB scratch, \S+ MB per worker", said[0])
    found = [re.match(r"(boundaries|level . of 2|clearing)  (begins|done)", line).groups() for line in said[1:-1]]
    assert re.fullmatch(rf"in all  \S+ s; next: actshuffle verify {src} {dst}", said[-1])
    stages = ("boundaries", "level 1 of 2", "level 2 of 2", "clearing")
    assert found == [(stage, what) for stage in stages for what in ("begins", "done")]


def test_quiet_prints_nothing(src, dst):
    out = call("run", src, dst, "--quiet", *ALONE)
    assert out.output == ""
    assert call("verify", src, dst, "--quiet", "--workers", 0).output == ""


def test_quiet_json_prints_the_object_alone(src, dst):
    out = call("run", src, dst, "--quiet", "--json", *ALONE)
    assert out.stderr == ""
    assert json.loads(out.stdout)["rows"] == 500


def test_options_reach_the_engine(src, dst):
    out = call(
        "run",
        src,
        dst,
        "--seed",
        "1e3",
        "--memory",
        "64MiB",
        "--fields",
        "token",
        "--no-source-row",
        "--levels",
        "1",
        "--codec",
        "crc32c",
        "--chunk-rows",
        "100",
        "--chunks-per-shard",
        "2",
        "--scratch",
        dst.parent / "elsewhere",
        "--json",
        *ALONE,
    )
    result = json.loads(out.stdout)
    assert (result["seed"], result["plan"]["memory"], result["plan"]["object_rows"]) == (1000, 64 << 20, 200)
    assert_is_oracle(src, dst, seed=1000, fields=["token"], source_row=False)
    assert zarr.open_array(str(dst / "token"), mode="r").shards == (200,)


def test_storage_options_come_from_the_environment_too(src):
    call("info", src, env={"ACTSHUFFLE_STORAGE_OPTIONS": '{"anon": true}'})
    call("info", src, env={"ACTSHUFFLE_STORAGE_OPTIONS": "anon"}, code=2)


def test_plan_reproduces_the_published_table():
    args = ["--rows", "100e9", "--row-bytes", "1KB", "--block-bytes", "100GB", "--run-bytes", "1GB"]
    found = json.loads(call("plan", *args, "--json").stdout)
    assert found["levels"] == 3
    assert [x["bytes"] for x in found["reach"]] == [10**11, 10**13, 10**15, 10**17]
    assert "3" in call("plan", *args).stdout


def test_plan_of_a_store(src):
    found = json.loads(call("plan", src, "--memory", "64MB", "--json").stdout)
    assert (found["rows"], found["row_bytes"], found["levels"]) == (500, 20, 1)


TWO_LEVELS = ("--block-bytes", "100KB", "--run-bytes", 1)


@pytest.mark.parametrize(
    ("codec", "options", "chosen", "levels"),
    [
        (None, (), "gather", 1),
        ("auto", (), "memory", 1),
        (None, ("--no-gather",), "spill", 2),
        (None, ("--workers", 10**9), "levels", 2),  # no room beside so many
        (None, TWO_LEVELS, None, 3),
        (None, ("--gather",), None, 1),
        (None, ("--levels", 3), None, 3),
        (None, ("--spill-memory", 0), None, 2),
    ],
)
def test_plan_shows_the_ways_and_the_one_that_a_run_takes(tmp_path, monkeypatch, codec, options, chosen, levels):
    monkeypatch.setattr(strategy, "OVERHEAD", 0.0)  # so that little data is like much
    src = tmp_path / "wide.zarr"
    array(src, values(10_000, (2048,), "u1"), chunks=(20, 2048), compressors=codec)
    options = (src, *(() if "--block-bytes" in options else ("--memory", "50MB" if codec else "30MB")), *options)
    found = json.loads(call("plan", *options, "--json").stdout)
    ways = found.get("candidates", [])
    assert found.get("gathers_well") is (None if "--gather" in options else "--workers" not in options)
    assert [one["strategy"] for one in ways if one["chosen"]] == ([chosen] if chosen else [])
    assert found["levels"] == levels
    text = call("plan", *options).stdout
    assert ("ways to the same output" in text) is bool(chosen)
    for one in ways:
        assert one["reason"] in text
        assert (one["seconds"] is None) == (one["bytes"] is None)
    if chosen:
        assert f"-> {chosen}" in text


def test_verify_info_and_status_of_a_good_store(src, done):
    report = json.loads(call("verify", src, done, "--json", "--workers", 0).stdout)
    assert report["ok"] is True
    assert report["problems"] == []
    assert call("verify", src, done, "--quick", "--rows", 64, "--workers", 0).stdout.startswith("verified")
    mixing = json.loads(call("verify", src, done, "--mixing", "--json", "--workers", 0).stdout)
    assert mixing["mixing"]
    assert json.loads(call("info", done, "--json").stdout)["rows"] == 500
    assert "act" in call("info", done).stdout
    assert json.loads(call("status", done, "--json").stdout)["state"] == "complete"
    assert "complete" in call("status", done).stdout


def test_verify_of_a_damaged_store_exits_with_1(src, done):
    chunk = next(p for p in sorted((done / "act").rglob("*")) if p.is_file() and p.name != "zarr.json")
    data = bytearray(chunk.read_bytes())
    data[3] ^= 1
    chunk.write_bytes(data)
    out = call("verify", src, done, "--workers", 0, code=1)
    assert str(chunk.relative_to(done)) in out.stdout
    assert json.loads(call("verify", src, done, "--json", "--workers", 0, code=1).stdout)["ok"] is False
    call("verify", src, done, "--quiet", "--workers", 0, code=1)


# --- What a bad command prints --------------------------------------------------------------------


def _no_source(src, dst):
    return [src.with_name("nothing.zarr"), dst], "no such source"


def _not_zarr(src, dst):
    src = src.with_name("folder")
    src.mkdir()
    (src / "note.txt").write_text("not zarr")
    return [src, dst], "folder"


def _a_file(src, dst):
    path = src.with_name("file.bin")
    path.write_bytes(b"\0" * 100)
    return [path, dst], "file.bin"


def _finished(src, dst):
    call("run", src, dst, "--seed", 5, *ALONE)
    return [src, dst, "--seed", 6], "--overwrite"


def _not_ours(src, dst):
    dst.mkdir()
    (dst / "thesis.tex").write_text("precious")
    return [src, dst, "--overwrite"], "no Zarr store"


def _inside(src, dst):
    return [src, src / "shuffled.zarr"], "inside"


def _levels_too_few(src, dst):
    return [src, dst, "--levels", "1", *SIZE], "--levels 2"


def _memory_too_small(src, dst):
    return [src, dst, "--memory", "1MB"], "--memory"


def _unequal(src, dst):
    path = src.with_name("unequal.zarr")
    group(path, {"a": values(10), "b": values(11)})
    return [path, dst], "11"


def _objects(src, dst):
    path = src.with_name("objects.zarr")
    array(path, np.array(["a", "bcd"], "T"), chunks=(2,))
    return [path, dst], "objects.zarr"


def _no_such_field(src, dst):
    return [src, dst, "--fields", "act,nothing"], "nothing"


BAD = [
    _no_source,
    _not_zarr,
    _a_file,
    _finished,
    _not_ours,
    _inside,
    _levels_too_few,
    _memory_too_small,
    _unequal,
    _objects,
    _no_such_field,
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", BAD, ids=lambda case: case.__name__.strip("_"))
def test_bad_input_is_refused_before_anything_is_written(case, src, dst, monkeypatch):
    args, words = case(src, dst)
    monkeypatch.setattr(choice, "local_cluster", None)  # no cluster is started for it either
    before = sorted(p for p in src.parent.rglob("*"))
    out = call("run", *args, code=2)
    assert out.stderr.startswith("error: ")
    assert words in out.stderr
    assert out.stdout == ""
    as_json = call("run", *args, "--json", code=2)
    message = json.loads(as_json.stdout)
    assert message["error"] in {"bad-request", "bad-source", "infeasible", "exists"}
    assert message["message"] == out.stderr.removeprefix("error: ").rstrip("\n")
    assert sorted(p for p in src.parent.rglob("*")) == before


def test_scratch_without_room(src, dst, monkeypatch):
    monkeypatch.setattr(objects.LocalObjects, "free_bytes", lambda self: 1000)
    out = call("run", src, dst, *SIZE, *ALONE, "--json", code=2)
    assert json.loads(out.stdout)["error"] == "infeasible"
    assert "1 KB free" in out.stderr
    assert not dst.exists()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--bogus"], "--bogus"),
        (["--seed", "-1"], "--seed"),
        (["--workers", "-1"], "--workers"),
        (["--memory", "lots"], "512MB"),
        (["--memory", "1e999GB"], "--memory"),
        (["--chunk-rows", "many"], "whole number"),
        (["--levels", "few"], "auto"),
        (["--fields", "a,,b"], "act,token"),
        (["--codec", "lzma"], "crc32c"),
        (["--missing-chunks", "guess"], "refuse"),
        (["--storage-options", "{"], "JSON"),
        (["--storage-options", "[1]"], "object"),
        (["--workers", "2", "--scheduler", "tcp://127.0.0.1:1"], "not both"),
    ],
)
def test_bad_options_are_usage_errors(args, words, src, dst):
    out = call("run", src, dst, *args, "--json", code=2)
    assert words in out.stderr
    assert json.loads(out.stdout)["error"] == "bad-request"
    assert not dst.exists()


@pytest.mark.parametrize("args", [["run"], ["run", "a"], ["nothing"], ["verify", "a"], []])
def test_incomplete_commands_are_usage_errors(args):
    call(*args, code=2)


@pytest.mark.parametrize("args", [[], ["--rows", "10"], ["acts.zarr", "--rows", "10", "--row-bytes", "8"]])
def test_plan_needs_a_source_or_its_size(args):
    assert "error: " in call("plan", *args, code=2).stderr


@pytest.mark.parametrize("command", ["verify", "status"])
def test_a_store_that_is_not_ours_is_refused(command, src):
    args = [src, src] if command == "verify" else [src]
    assert json.loads(call(command, *args, "--json", code=2).stdout)["error"] == "incomplete"


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (ConservationError("rows of act are not the rows that were put in"), "conservation", "rows of act"),
        (StorageFullError("no space left while writing 8 MB"), "no-space", "no space left"),
        (MemoryError(), "memory", "--memory"),
        (PermissionError(13, "Permission denied", "/a/b"), "io", "Permission denied: /a/b"),
        (KeyboardInterrupt(), "interrupted", "the same command again resumes"),
        (ZeroDivisionError("division by zero"), "error", "unexpected ZeroDivisionError"),
    ],
)
def test_failures_exit_with_1_and_one_line(error, code, words, src, dst, monkeypatch):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr("actshuffle.engine.run.shuffle", fail)
    out = call("run", src, dst, "--json", *ALONE, code=1)
    assert words in out.stderr
    assert out.stderr.count("\n") == 1
    message = json.loads(out.stdout)
    assert message["error"] == code
    assert words in message["message"]
    shown = CliRunner().invoke(main, ["run", str(src), str(dst), "--debug", *ALONE])
    assert "Traceback" in shown.stderr


def test_other_arguments_on_a_half_done_destination(src, dst, monkeypatch):
    with monkeypatch.context() as broken:
        broken.setattr("actshuffle.engine.tasks.leaf", _raise_full)
        call("run", src, dst, "--seed", 5, *SIZE, *ALONE, code=1)
    out = call("run", src, dst, "--seed", 6, *SIZE, *ALONE, "--json", code=2)
    assert json.loads(out.stdout)["error"] == "resume-mismatch"
    assert "seed was 5, now 6" in out.stderr
    status = json.loads(call("status", dst, "--json").stdout)
    assert status["state"] == "half done"
    assert status["levels"][0]["done"] == status["levels"][0]["tasks"]
    assert "level 2 of 2   0 of" in call("status", dst).stdout
    assert "half done" in call("info", dst, code=2).stderr
    result = json.loads(call("run", src, dst, *ALONE, "--json").stdout)
    assert result["seed"] == 5
    assert_is_oracle(src, dst)


def _raise_full(job, task):
    raise StorageFullError("no space left while writing 8 MB; free some, and run again to resume")


# --- Clusters -------------------------------------------------------------------------------------


def test_small_work_starts_no_cluster(src, dst, monkeypatch):
    monkeypatch.setattr(choice, "local_cluster", None)
    monkeypatch.setattr(machine, "cores", lambda: 4)
    assert json.loads(call("run", src, dst, "--json").stdout)["workers"] == 1
    call("verify", src, dst)


def test_a_scheduler_that_does_not_answer(src, dst):
    env = os.environ | {"DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT": "1"}
    command = [*PROGRAM, "run", src, dst, "--scheduler", "tcp://127.0.0.1:1", "--json"]
    out = subprocess.run(command, env=env, capture_output=True, text=True)
    assert out.returncode == 1
    assert json.loads(out.stdout)["error"] == "cluster"
    assert re.fullmatch(r"error: no Dask scheduler answers at tcp://127.0.0.1:1 .*\n", out.stderr)


def test_an_address_that_is_none(src, dst):
    assert "address" in call("run", src, dst, "--scheduler", "nonsense", code=2).stderr


@pytest.mark.parametrize(
    "address",
    [
        "tcp://192.0.2.1:8786",
        "192.0.2.1:8786",
        "tcp://scheduler.invalid:8786",
        "ws://192.0.2.1:8786",
        "tcp://[2001:db8::1]:8786",
    ],
)
def test_a_scheduler_elsewhere_without_tls_needs_a_flag(address, src, dst):
    for command in (("run", src, dst), ("verify", src, src)):
        said = call(*command, "--scheduler", address, code=2).stderr
        assert "--insecure" in said
        assert "tls://" in said


@pytest.mark.parametrize(
    "address",
    ["tls://192.0.2.1:8786", "wss://192.0.2.1:8786", "tcp://127.0.0.1:8786", "localhost:8786", "tcp://[::1]:8786"],
)
def test_a_scheduler_with_tls_or_on_this_machine_needs_none(address):
    from actshuffle.executors.cluster import check_private

    check_private(address)


def test_the_flag_lets_it_pass(src, dst):
    import dask

    address = "tcp://scheduler.invalid:8786"
    with dask.config.set({"distributed.comm.timeouts.connect": "1s"}):
        said = call("run", src, dst, "--insecure", "--scheduler", address, code=1).stderr
    assert "no Dask scheduler answers" in said


def test_a_given_cluster_is_used_and_left_running(src, dst, cluster):
    client = cluster(2).client
    out = call("run", src, dst, "--seed", 5, *SIZE, "--json", "--scheduler", client.scheduler.address)
    assert json.loads(out.stdout)["workers"] == 2
    assert "cluster         2 workers" in out.stderr
    assert_is_oracle(src, dst)
    call("verify", src, dst, "--scheduler", client.scheduler.address)
    assert client.submit(int, "7").result(timeout=120) == 7


# --- Stopping -------------------------------------------------------------------------------------

SLOW = """
import time
from actshuffle.engine import tasks
from actshuffle.cli.app import main
split = tasks.split
def slowly(job, task):
    PAUSE
    return split(job, task)
tasks.split = slowly
main(prog_name="actshuffle")
"""


def start(*command):
    """A process in a separate process group, as a shell starts one."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([str(c) for c in command], start_new_session=True, **pipes)


def wait_for(process, words):
    """The lines of its stderr up to the one that contains these words."""
    lines = []
    for line in process.stderr:
        lines.append(line)
        if words in line:
            return "".join(lines)
    raise AssertionError(f"never said {words!r}:\n{''.join(lines)}")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl_c", "sigterm"])
def test_stopped_mid_level_then_resumed(number, src, dst):
    args = ["run", src, dst, "--seed", "5", *SIZE, *ALONE]
    process = start(sys.executable, "-c", SLOW.replace("PAUSE", "task.number > 1 and time.sleep(600)"), *args, "--json")
    wait_for(process, "level 1 of 2    begins")
    until(lambda: len(list(dst.parent.glob("*.scratch-*/level1/receipts/[01].json"))) == 2)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert err == f"{RESUME}\n"
    assert json.loads(out)["error"] == "interrupted"
    level = json.loads(call("status", dst, "--json").stdout)["levels"][0]
    assert 0 < level["done"] < level["tasks"]
    result = call(*args)
    assert re.search(r"; [1-9]\d* of \d+ tasks were done before$", result.stdout.rstrip())
    assert_is_oracle(src, dst)


def test_ctrl_c_stops_a_local_cluster_without_a_storm(tmp_path, dst):
    src = tmp_path / "more.zarr"
    array(src, values(40_000, (8,), "<f2"), chunks=(5000, 8))
    args = ["run", src, dst, "--seed", "5", "--block-bytes", "2KB", "--run-bytes", "1", "--chunk-rows", "64"]
    process = start(*PROGRAM, *args, "--workers", "2")
    said = wait_for(process, "begins: ")
    said += wait_for(process, "level 1 of ")
    children = {int(pid) for pid in _children(process.pid)}
    os.killpg(process.pid, signal.SIGINT)  # the terminal's Ctrl-C goes to the workers too
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (1, "")
    err = re.sub(f"{LOG_LINE}level .*\n", "", err)  # how far it is, if that is due just then
    assert re.sub(LOG_LINE, "", err) == (
        f"stopping        Ctrl-C again does not wait for the tasks in flight\n{RESUME}\n"
    )
    page = "http://127.0.0.1:" if find_spec("bokeh") else "no page of Dask: pip install bokeh shows one"
    assert f"cluster         2 workers, {page}" in said
    assert len(children) >= 2
    until(lambda: not any(map(alive, children)))  # the last to go is multiprocessing's own helper
    call(*args, *ALONE)
    assert_is_oracle(src, dst)


UNTIL_STOPPED = """
from pathlib import Path
from actshuffle import machine
from actshuffle.executors import local
class Pool(local.ThreadPoolExecutor):
    def __exit__(self, kind, *others):
        kind is None or Path(FLAGS, "stopped").touch()  # what had not begun is cancelled by now
        return super().__exit__(kind, *others)
def wait(number):
    Path(FLAGS, f"waits-{number}").touch()
    while not Path(FLAGS, "stopped").exists():
        time.sleep(0.01)
local.ThreadPoolExecutor, machine.cores = Pool, lambda: 2
"""


def test_ctrl_c_waits_for_the_threads_tasks_in_flight_alone(tmp_path, dst):
    """Of 40 leaves on 2 threads, of which all but four wait until the run stops."""
    src = tmp_path / "more.zarr"
    array(src, values(2000, (8,), "<f2"), chunks=(500, 8))
    flags = tmp_path / "flags"
    flags.mkdir()
    slow = SLOW.replace("tasks.split", "tasks.leaf").replace("PAUSE", "task.number > 3 and wait(task.number)")
    slow = slow.replace("main(", UNTIL_STOPPED.replace("FLAGS", repr(str(flags))) + "main(")
    args = ["run", src, dst, "--seed", "5", "--gather", "--block-bytes", "800", "--chunk-rows", "50"]
    process = start(sys.executable, "-c", slow, *args)
    said = wait_for(process, "level 1 of 1    begins: 40 tasks")
    until(lambda: len(list(dst.glob("_actshuffle/receipts/[0-3].json"))) == 4)
    until(lambda: len(list(flags.glob("waits-*"))) == 2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "2 threads of this process" in said
    assert err.endswith(f"{RESUME}\n")
    again = call(*args)
    assert re.search("; 6 of 40 tasks were done before$", again.stdout.rstrip())
    assert_is_oracle(src, dst)


def test_a_second_ctrl_c_does_not_wait(src, dst):
    stubborn = SLOW.replace(
        "PAUSE",
        """
    try: print("at work", file=sys.stderr, flush=True); time.sleep(600)
    finally: print("stops slowly", file=sys.stderr, flush=True); time.sleep(600)
""",
    )
    stubborn = stubborn.replace("import time", "import sys, time")
    process = start(sys.executable, "-c", stubborn, "run", src, dst, *SIZE, *ALONE)
    wait_for(process, "at work")
    process.send_signal(signal.SIGINT)
    wait_for(process, "stops slowly")
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
    assert process.returncode == 1


def _children(pid):
    out = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
    return out.stdout.split()


def test_whoever_reads_our_output_may_leave(src):
    command = f"{sys.executable} -m actshuffle plan {src} --memory 1GB | true"
    out = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert out.stderr == ""


# --- The display ----------------------------------------------------------------------------------


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_rate_of_many_small_tasks():
    meter = Meter(10_000, 10_000_000, workers=2, now=0.0)
    for task in range(1, 5001):
        meter.advance(1000, True, task * 0.01)
    assert meter.rate(50.0) == pytest.approx(100_000, rel=0.02)
    assert meter.left(50.0) == pytest.approx(50, rel=0.02)
    assert len(meter._marks) < 500


def test_rate_of_few_long_tasks_goes_on_between_them():
    meter = Meter(8, 8000, workers=2, now=0.0)
    assert meter.rate(50.0) is None
    assert meter.left(50.0) is None
    assert meter.estimate(50.0) == 0
    for _ in range(2):
        meter.advance(1000, True, 100.0)
    assert meter.rate(150.0) == pytest.approx(20)
    assert meter.estimate(150.0) == pytest.approx(3000)
    assert meter.left(150.0) == pytest.approx(250)
    assert meter.estimate(1e6) == pytest.approx(3900)  # never past what is in flight
    assert meter.rate(1e6) < 1  # and a stall shows


def test_estimate_never_goes_back():
    meter, rng = Meter(100, 100_000, workers=3, now=0.0), np.random.default_rng(0)
    now, before = 0.0, 0.0
    for _ in range(100):
        for _ in range(5):
            now += rng.exponential(0.5)
            assert before <= meter.estimate(now) <= 100_000
            before = meter.estimate(now)
        meter.advance(1000, True, now)
    assert meter.estimate(now) == 100_000


def test_resumed_tasks_are_done_but_no_speed():
    meter = Meter(100, 100_000, workers=1, now=0.0)
    for task in range(60):
        meter.advance(0, False, task * 0.001)
    assert meter.estimate(1.0) == pytest.approx(60_000)
    assert meter.rate(1.0) is None
    meter.advance(1000, True, 10.0)
    assert meter.rate(10.0) == pytest.approx(100, rel=0.02)
    assert meter.mean_rate(10.0) == pytest.approx(100)
    assert meter.resumed == 60


def test_more_reports_than_tasks_do_no_harm():
    meter = Meter(2, 0, workers=1, now=0.0)
    for now in range(7):
        meter.advance(0, True, float(now))
    assert meter.estimate(7.0) == 2
    assert meter.left(7.0) == 0


def test_bar_is_as_wide_as_asked():
    for fancy in (True, False):
        for fraction in (-1, 0, 0.001, 0.5, 0.999, 1, 2):
            assert sum(map(len, bar(fraction, 20, fancy=fancy))) == 20
    assert bar(1, 4) == ("━━━━", "")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (86400, "24:00:00"), (200_000, "2 d 7 h")]
)
def test_clock_face(seconds, text):
    assert clock_face(seconds) == text


def test_log_lines_come_every_few_seconds_at_most():
    stream, clock = io.StringIO(), Clock()
    display = Display(stream, clock=clock)
    display.begin("level 1 of 2", 10_000, 10_000_000)
    for task in range(10_000):
        clock.now = task * 0.01
        display.advance(1000, True)
    display.end()
    lines = stream.getvalue().splitlines()
    assert 18 <= len(lines) <= 22  # 100 s
    assert re.fullmatch(LOG_LINE + r"level 1 of 2    501 of 10,000 tasks, 5%, 501 KB, 100 KB/s, 1:35 left", lines[1])
    assert lines[-1].endswith("level 1 of 2    done in 1 min 40 s, 100 KB/s")


def test_a_task_that_tells_of_itself_has_a_rate_and_time_left_from_its_first_batch():
    stream, clock = io.StringIO(), Clock()
    display = Display(stream, clock=clock)
    display.begin("collect", 2, 8000)
    for second in range(1, 5):
        clock.now = float(second)
        display.within(1000, 10)
    display.advance(4000, True)  # all of it was told
    meter = display._meter
    assert (meter.done, meter.fresh, meter.tasks_done) == (4000, 4000, 1)
    assert meter.rate(4.0) == pytest.approx(1000)
    assert meter.left(4.0) == pytest.approx(4)
    for second in range(5, 9):
        clock.now = float(second)
        display.within(1010, 10)  # more than the task has, as edges of batches may be
    display.advance(4000, True)
    display.end()
    lines = stream.getvalue().splitlines()
    assert re.fullmatch(LOG_LINE + r"collect         0 of 2 tasks, 12%, 1 KB, 10 tok/s, 0:07 left", lines[1])
    assert lines[-1].endswith("done in 8.0 s, 10 tok/s")


def test_control_a_task_that_tells_nothing_has_no_rate_before_its_end():
    display = Display(io.StringIO(), clock=Clock())
    display.begin("collect", 2, 8000)
    assert display._meter.left(3.0) is None


def test_log_lines_become_rare_in_a_long_stage():
    stream, clock = io.StringIO(), Clock()
    display = Display(stream, clock=clock)
    display.begin("level 1 of 2", 36_000, 36_000_000)
    for task in range(36_000):
        clock.now = float(task)
        display.advance(1000, True)
    assert stream.getvalue().count("\n") < 36_000 / 60 + 60


class Terminal(io.StringIO):
    encoding = "ascii"

    def isatty(self):
        return True


def test_live_line_is_redrawn_in_place(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    stream = Terminal()
    monkeypatch.setattr("actshuffle.progress.display.QUIET_START", 60.0)
    display = Display(stream, workers=lambda: 2)
    display.line("plan", "2 levels")
    display.begin("level 1 of 2", 4, 4_000_000)
    for _ in range(4):
        times = stream.getvalue().count("level 1 of 2")
        until(lambda: stream.getvalue().count("level 1 of 2") > times)  # noqa: B023
        display.advance(1_000_000, True)
    display.end()
    display.begin("boundaries", 1, 0)  # over at once: not worth a line
    display.advance(0, True)
    display.end()
    display.close()
    display.close()
    lines = stream.getvalue().split("\n")
    assert [line.split("\r")[-1][:14].rstrip() for line in lines] == ["plan", "level 1 of 2", ""]
    drawn = lines[1].split("\r")
    assert len(drawn) > 3
    assert {len(line) for line in drawn} == {77 + len("\x1b[K")}
    assert "so far" in drawn[0]
    assert any(re.search(r"#-+ +\d+%  .* MB/s +0:\d\d left", line) for line in drawn[1:-1])
    assert re.search(r"#  100%     4 MB  .* MB/s +\d+\.\d s", drawn[-1])


@shown
def long_call(*, progress, pause=lambda stage: None):
    """A call of the library with two stages, and a pause in each."""
    progress = observer(progress)
    for stage in ("level 1 of 2", "level 2 of 2"):
        progress.begin(stage, 2, 2000)
        progress.advance(1000, True)
        pause(stage)
        progress.advance(1000, True)
        progress.end()


def test_long_calls_of_the_library_tell_their_progress(monkeypatch):
    monkeypatch.setattr("sys.stderr", stream := io.StringIO())
    monkeypatch.setattr("actshuffle.progress.display.PATIENCE", 0.2)
    long_call(pause=lambda stage: until(lambda: f"{stage}    begins" in stream.getvalue()))
    told = stream.getvalue().splitlines()
    assert [re.sub(rf"{LOG_LINE}|: 2 tasks, 2 KB| [\d.]+ s, .*B/s", "", line) for line in told] == [
        "level 1 of 2    begins",
        "level 1 of 2    done in",
        "level 2 of 2    begins",
        "level 2 of 2    done in",
    ]
    long_call(progress=False, pause=lambda stage: time.sleep(0.3))
    monkeypatch.setattr("actshuffle.progress.display.PATIENCE", 60.0)
    long_call()  # over before anybody waits
    assert stream.getvalue().splitlines() == told
    with pytest.raises(RequestError, match=r"progress must be True, False or an .*, got str"):
        long_call(progress="yes")


class Notebook(io.StringIO):
    """A stream like that of a kernel; a real one is in tests/sae/test_sae_notebook.py."""


Notebook.__module__ = "ipykernel.iostream"


def test_a_notebook_has_a_live_line_without_commands_for_terminals(monkeypatch):
    monkeypatch.setattr("actshuffle.progress.display.PATIENCE", 0.0)
    monkeypatch.setattr("sys.stderr", stream := Notebook())
    long_call(pause=lambda stage: until(lambda: stage in stream.getvalue()))
    drawn = stream.getvalue().split("\n")
    assert [line.split("\r")[-1][:12] for line in drawn] == ["level 1 of 2", "level 2 of 2", ""]
    assert "\r" in drawn[0]
    assert "\x1b" not in stream.getvalue()


def functions_with_progress():
    """The public functions that take an observer."""
    found = {name: getattr(actshuffle, name) for name in actshuffle.__all__}
    functions = {name: f for name, f in found.items() if inspect.isfunction(f)} | {"run_in_folder": jobs.run_in_folder}
    return {name: f for name, f in functions.items() if "progress" in inspect.signature(f).parameters}


def test_all_long_calls_show_progress_by_default():
    taking = functions_with_progress()
    assert {"shuffle", "collect", "verify", "stats", "append", "import_store", "sample", "split"} <= set(taking)
    for name, function in taking.items():
        assert inspect.signature(function).parameters["progress"].default is True, name
        assert function.__globals__ is Display.__init__.__globals__, f"{name} is not shown"


def test_warnings_of_the_engine_come_between_the_lines(src, dst, monkeypatch):
    import logging

    def warn(*args, **options):
        logging.getLogger("actshuffle").warning("a task failed (%s), trying again", "OSError")
        raise ConservationError("enough")

    monkeypatch.setattr("actshuffle.engine.run.shuffle", warn)
    err = call("run", src, dst, *ALONE, code=1).stderr
    assert re.match(LOG_LINE + r"warning         a task failed \(OSError\), trying again\n", err)
    assert call("run", src, dst, *ALONE, "--quiet", code=1).stderr == "error: enough\n"
    assert not logging.getLogger("actshuffle").handlers


@pytest.mark.parametrize("columns", [80, 44])
def test_on_a_terminal_no_line_wraps(columns, src, dst):
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    env = {k: v for k, v in os.environ.items() if k != "NO_COLOR"} | {"TERM": "xterm", "PYTHONUTF8": "1"}
    command = [*PROGRAM, "run", src, dst, "--seed", "12345678901234567890", *SIZE, *ALONE]
    process = subprocess.Popen(list(map(str, command)), stdout=follower, stderr=follower, env=env)
    os.close(follower)
    text = b""
    while True:
        try:
            text += os.read(leader, 4096)
        except OSError:
            break
    assert process.wait(120) == 0
    plain = re.sub(r"\x1b\[[0-9;]*[mK]", "", text.decode()).replace("\r\n", "\n")
    drawn = [part for line in plain.split("\n") for part in line.split("\r")]
    paths = [part for part in drawn if str(src) in part or str(dst) in part]  # which have no place to break
    assert all(len(part) <= columns for part in drawn if not part.startswith("plan") and part not in paths)
    assert "\x1b[32m" in text.decode() or columns < 60
    assert any(part.startswith("level 2 of 2") and "100%" in part for part in drawn)


@pytest.mark.parametrize(
    ("options", "where"),
    [
        (["--gather"], "2 threads of this process"),
        (["--gather", "--workers", "0"], None),
        (["--no-gather", "--memory", "1GB"], None),
    ],
)
def test_rows_from_the_page_cache_are_taken_by_threads(options, where, tmp_path, monkeypatch):
    """Unless a number of workers is given, or the run makes levels; the bytes are those of the oracle."""
    monkeypatch.setattr("actshuffle.machine.cores", lambda: 2)
    src, dst = tmp_path / "src.zarr", tmp_path / "dst.zarr"
    group(src, {"x": values(20_000, (100,))}, chunks=(1000, 100))
    shown = call("run", src, dst, "--seed", "5", "--chunk-rows", "512", *options).stderr
    assert ("threads" in shown) == (where is not None)
    assert where is None or where in shown
    assert_is_oracle(src, dst, 5)
