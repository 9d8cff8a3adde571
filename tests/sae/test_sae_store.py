"""From a real store by the command line: defaults, several ranks, signals, bad input."""

from __future__ import annotations

import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr

import actshuffle
from saetrain.cli import main
from saetrain.compute.mesh import Mesh
from saetrain.config import Config
from saetrain.data import Store
from saetrain.errors import CheckpointError, DataError
from saetrain.training import checkpoint
from saetrain.training.log import read_log
from saetrain.training.train import fit
from support.sae import Planted, run_ranks

ROWS, D = 6000, 16
FAST = (
    "--steps",
    "40",
    "--d-sae",
    "64",
    "--k",
    "4",
    "--batch-size",
    "128",
    "--device",
    "cpu",
    "--tile",
    "128",
    "--no-report",
)


def source_store(path: Path, change: Callable[[np.ndarray[Any, Any]], None] | None = None) -> Path:
    data = Planted.make(ROWS, D, 24)
    order = np.argsort(data.documents.numpy(), kind="stable")
    rows = data.rows.numpy()[order].copy()
    if change:
        change(rows)
    group = zarr.create_group(path)
    for name, values in (("acts", rows), ("document", data.documents.numpy()[order]), ("position", np.arange(ROWS))):
        array = group.create_array(name, shape=values.shape, chunks=(500, *values.shape[1:]), dtype=values.dtype)
        array[:] = values
    return path


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    actshuffle.shuffle(source_store(folder / "src.zarr"), folder / "rows.zarr", seed=1, memory="64MB")
    return folder / "rows.zarr"


def run(*arguments: object, **more: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "saetrain", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False, **more)


def test_fit_with_defaults_beside_the_store(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", str(store), "--device", "cpu", "--steps", "24"]) == 0
    folder = store.with_name("rows.sae")
    lines = read_log(folder)
    assert lines[-1]["step"] == 24
    assert lines[-1]["eval_fvu"] < lines[0]["fvu"] < 1
    assert lines[-1]["document_entropy"] > 0.85  # rows of a shuffled batch are of many documents
    about = json.loads((folder / "config.json").read_text())
    assert about["config"]["d_sae"] == 16 * D
    assert "24/24" in capsys.readouterr().out
    assert main(["report", str(folder)]) == 0
    page = (folder / "report.html").read_text()
    assert "FVU, held-out rows" in page
    assert f"{lines[-1]['eval_dead']:.2%}" in page
    assert "http" not in page.replace("http://www.w3.org", "")  # nothing is fetched


@pytest.mark.parametrize("what", ["read", "heldout"])
def test_a_store_that_changes_ends_the_fit_at_its_next_checkpoint(
    what: str, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows are negated after the first checkpoint: that one stays, and no later one is written."""
    stores = {name: tmp_path / f"{name}.zarr" for name in ("read", "heldout")}
    for path in stores.values():
        shutil.copytree(store, path)
    save = checkpoint.save

    def saved(*arguments: Any) -> Path:
        array = zarr.open_array(stores[what], path="acts", mode="r+")
        array[...] = -np.asarray(array)
        return save(*arguments)

    monkeypatch.setattr(checkpoint, "save", saved)
    given = ["--heldout", str(stores["heldout"]), "--out", str(tmp_path / "run"), *FAST, "--checkpoint-every", "10"]
    assert main(["fit", str(stores["read"]), *given]) == 2
    assert f"{stores[what]} changed while it was read" in capsys.readouterr().err
    assert checkpoint.published(tmp_path / "run")[0].name == "step-00000010"
    assert [line["step"] for line in read_log(tmp_path / "run") if line["step"] > 10 and "eval_fvu" in line] == []


def until(condition: Callable[[], bool], patience: float = 120) -> bool:
    """Wait for something to become true; False if it does not."""
    deadline = time.monotonic() + patience
    while not (found := condition()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


def is_free(lock: Path) -> bool:
    """The kernel frees a lock when the last process that holds it has left; one that leaves in order removes it."""
    try:
        with lock.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except FileNotFoundError:
        return True
    return True


def test_ranks_of_nproc_train_the_same(store: Path, tmp_path: Path) -> None:
    assert main(["fit", str(store), "--out", str(tmp_path / "1"), *FAST]) == 0
    done = run("fit", store, "--out", tmp_path / "2", "--nproc", 2, *FAST, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["metrics"]["step"] == 40, "one of them prints"
    a, b = (checkpoint.find(tmp_path / n) for n in ("1", "2"))
    assert len(b.files) == 2
    torch.testing.assert_close(b.read("W_dec"), a.read("W_dec"), rtol=1e-3, atol=1e-4)
    one, two = read_log(tmp_path / "1"), read_log(tmp_path / "2")
    assert [x["loss"] for x in two] == pytest.approx([x["loss"] for x in one], rel=1e-3)
    assert two[-1]["eval_fvu"] == pytest.approx(one[-1]["eval_fvu"], rel=1e-3)
    assert [x["document_entropy"] for x in two] == [x["document_entropy"] for x in one]


@pytest.mark.parametrize(
    ("ranks", "number"),
    [(2, signal.SIGTERM), (1, signal.SIGINT), pytest.param(1, signal.SIGTERM, marks=pytest.mark.soak)],
)
def test_a_signal_checkpoints_and_leaves_cleanly(ranks: int, number: int, store: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    settings = [*FAST, "--steps", "1000000", "--log-every", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "saetrain", "fit", store, "--out", out, "--nproc", str(ranks), *settings]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until(lambda: len(read_log(out)) >= 5 or process.poll() is not None)
    process.send_signal(number)
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 128 + number, errors  # `fit && export` must not export half a dictionary
    assert "Traceback" not in errors
    assert "the same command again goes on" in output
    found = checkpoint.find(out)
    found.verify()
    assert found.state["step"] == read_log(out)[-1]["step"] >= 5


def test_a_second_fit_on_a_run_is_refused_and_ranks_end_with_their_launcher(store: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    settings = [*FAST, "--steps", "1000000", "--log-every", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "saetrain", "fit", store, "--out", out, "--nproc", "2", *settings]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until(lambda: len(read_log(out)) >= 3 or process.poll() is not None)
    second = run("fit", store, "--out", out, *settings)
    assert second.returncode == 2
    assert "is in use: process" in second.stderr
    process.kill()  # the launcher only
    process.wait()
    assert until(lambda: is_free(out.with_name("run.actshuffle-lock"))), "the ranks outlive their launcher"
    lines = len(read_log(out))
    time.sleep(0.5)
    assert len(read_log(out)) == lines
    checkpoint.find(out).verify()


def test_sweep_over_a_store(store: Path, tmp_path: Path) -> None:
    base = [a for a in FAST if a not in ("--k", "4")]
    assert main(["sweep", str(store), "--out", str(tmp_path), "--k", "2,8", *base]) == 0
    lines = {k: read_log(tmp_path / f"k={k}")[-1] for k in (2, 8)}
    assert lines[2]["l0"] <= 2 < lines[8]["l0"] <= 8
    assert lines[8]["eval_fvu"] < lines[2]["eval_fvu"]
    assert main(["report", *(str(tmp_path / f"k={k}") for k in (2, 8)), "--out", str(tmp_path)]) == 0
    assert "k=8" in (tmp_path / "report.html").read_text()


# --- bad input


def refusal(path: Path, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    assert main(["fit", str(path), "--out", str(path.with_suffix(".out")), *FAST, *more]) == 2
    return capsys.readouterr().err


def test_a_store_without_its_marker_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no completion marker" in refusal(source_store(tmp_path / "plain.zarr"), capsys)
    assert "IncompleteStoreError" not in refusal(tmp_path / "absent.zarr", capsys)


def test_arrays_that_are_no_activations_are_refused(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "one axis of floating-point" in refusal(store, capsys, "--field", "document")
    assert "it has ['acts', 'document'" in refusal(store, capsys, "--field", "residual")
    assert "no array 'author'" in refusal(store, capsys, "--document-field", "author")


def test_a_run_of_another_width_is_refused(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert main(["fit", str(store), "--out", str(out), *FAST, "--eval-every", "40"]) == 0
    group = zarr.create_group(tmp_path / "wide.zarr")
    group.create_array("acts", shape=(ROWS, 20), chunks=(500, 20), dtype="float32")[:] = np.random.default_rng(
        0
    ).random((ROWS, 20))
    actshuffle.shuffle(tmp_path / "wide.zarr", tmp_path / "wider.zarr", seed=1, memory="64MB")
    capsys.readouterr()
    assert main(["fit", str(tmp_path / "wider.zarr"), "--out", str(out), *FAST, "--eval-every", "40"]) == 2
    assert "20 wide" in capsys.readouterr().err


@pytest.mark.parametrize("recorded", [False, True])
def test_nans_are_refused_and_placed(recorded: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def spoil(rows: np.ndarray[Any, Any]) -> None:
        rows[1234, 5] = np.nan

    actshuffle.shuffle(source_store(tmp_path / "src.zarr", spoil), tmp_path / "s.zarr", seed=1, memory="64MB")
    if recorded:
        actshuffle.stats(tmp_path / "s.zarr")
    where = int(np.flatnonzero(zarr.open_group(tmp_path / "s.zarr")["source_row"][:] == 1234)[0])  # type: ignore[index]
    said = refusal(tmp_path / "s.zarr", capsys)
    assert f"row {where:,}, column 5" in said


def test_a_store_that_few_rows_rule_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def lengthen(rows: np.ndarray[Any, Any]) -> None:
        rows[::64] *= 100

    actshuffle.shuffle(source_store(tmp_path / "src.zarr", lengthen), tmp_path / "s.zarr", seed=1, memory="64MB")
    actshuffle.stats(tmp_path / "s.zarr")
    main(["fit", str(tmp_path / "s.zarr"), "--out", str(tmp_path / "run"), *FAST])
    told = capsys.readouterr().out
    assert "of 6,000 rows of 'acts' have over 10 times the median norm" in told
    assert "(median row " in told
    line = read_log(tmp_path / "run")[-1]
    assert line["eval_fvu_median"] > 2 * line["eval_fvu"]
    assert len(line["eval_fvu_by_norm"]) == 10
    assert main(["report", str(tmp_path / "run")]) == 0
    assert "FVU by norm, held-out rows" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize("recorded", [False, True])
def test_rows_of_several_axes_are_flattened(recorded: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = Planted.make(2048, D, 24).rows.numpy()
    for name, shape in (("heads", (4, 4)), ("flat", (D,))):
        group = zarr.create_group(tmp_path / f"{name}.src")
        group.create_array("acts", shape=(2048, *shape), chunks=(500, *shape), dtype="float32")[:] = rows.reshape(
            -1, *shape
        )
        actshuffle.shuffle(tmp_path / f"{name}.src", tmp_path / f"{name}.zarr", seed=1, memory="64MB")
        if recorded:
            actshuffle.stats(tmp_path / f"{name}.zarr")
        assert main(["fit", str(tmp_path / f"{name}.zarr"), *FAST, "--steps", "6"]) == 0
        assert ("shape (4, 4); training sees each as 16 numbers" in capsys.readouterr().out) == (name == "heads")
    a, b = (checkpoint.find(tmp_path / f"{name}.sae") for name in ("heads", "flat"))
    for name in a.files[0].specs:
        assert torch.equal(a.read(name), b.read(name)), name
    assert main(["export", str(tmp_path / "heads.sae"), str(tmp_path / "out"), "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["row_shape"] == [4, 4]
    assert "rows of shape (4, 4) were flattened" in err


def test_an_unshuffled_store_is_refused_unless_asked_for(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, out = source_store(tmp_path / "plain.zarr"), tmp_path / "run"
    more = ["--incomplete", "true"]
    told = refusal(plain, capsys, *more)
    assert "is not shuffled" in told
    assert (
        f"give --buffer-rows {ROWS - ROWS // 20} (say)" in told
    )  # no more than there are, and in the words of the command line
    assert "buffer_rows" not in told
    more += ["--buffer-rows", "0", "--out", str(out), "--heldout", str(store)]
    assert main(["fit", str(plain), *FAST, *more]) == 0
    found = read_log(out)[-1]
    assert found["document_entropy"] < 0.5  # 128 neighbouring rows are of four documents
    assert found["eval_rows"] == ROWS


def test_statistics_of_a_sample_are_those_of_the_rows(store: Path) -> None:
    rows = zarr.open_group(store)["acts"][:].astype(np.float64)  # type: ignore[index, union-attr]
    mean, variance = Store(store, Config()).statistics()
    np.testing.assert_allclose(mean, rows.mean(0), atol=1e-6)
    assert variance == pytest.approx(rows.var(0).sum(), rel=1e-6)

    actshuffle.stats(store)
    again, total = Store(store, Config()).statistics()
    np.testing.assert_allclose(again, mean, atol=1e-6)
    assert total == pytest.approx(variance, rel=1e-6)


def test_a_store_with_two_candidates_asks_which(tmp_path: Path) -> None:
    group = zarr.create_group(tmp_path / "two.zarr")
    for name in ("a", "b"):
        group.create_array(name, shape=(100, 4), chunks=(50, 4), dtype="float32")[:] = 1.0
    actshuffle.shuffle(tmp_path / "two.zarr", tmp_path / "s.zarr", seed=1, memory="64MB")
    with pytest.raises(DataError, match=r"2 arrays that could be activations \(a, b\)"):
        Store(tmp_path / "s.zarr", Config())
    assert Store(tmp_path / "s.zarr", Config(field="b")).field == "b"


# --- killed again and again


def killed_often(rank: int, store: Path, folder: Path, kills: int, seed: int, out: Path) -> None:
    """Fit in copies of this process, each killed amid a save, until `kills` saves have been cut short."""
    config = Config(
        steps=6 * kills,
        d_sae=64,
        k=4,
        batch_size=128,
        tile=128,
        checkpoint_every=1,
        log_every=1,
        eval_every=10**6,
        holdout=500,
    )

    def go(run: Path, settings: Config) -> None:
        mesh = Mesh.start("cpu")
        fit(Store(store, settings), {run: settings}, mesh)
        mesh.close()

    def begin() -> int:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                go(folder, config)
                code = 0
            finally:
                os._exit(code)
        return pid

    rng, at, done, cut, repeated, damaged = random.Random(seed), 0, 0, 0, 0, 0
    inside = folder / "checkpoints"
    while cut < kills:
        # The leftovers of the last save stay for the next one to clear, but must not be mistaken for its work.
        for left in inside.glob(".*step-*"):
            left.rename(left.with_name(f".{done}{left.name}"))
        pid, due = begin(), at + rng.randint(1, 2)
        names = (f".step-{due:08d}", f"step-{due:08d}")
        while not any((inside / name).exists() for name in names):
            assert os.waitpid(pid, os.WNOHANG) == (0, 0), "it ended by itself"
            time.sleep(0.0002)
        time.sleep(rng.uniform(0, 0.005))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        done += 1
        cut += any(inside.glob(".step-*")) or any(inside.glob(".gone-*"))  # in writing, in removing
        before = at
        try:
            if checkpoint.published(folder):  # at first there may be none
                last = checkpoint.find(folder)
                last.verify()
                at = last.state["step"]
            assert at >= due - 1
        except CheckpointError:
            damaged += 1
        repeated += at == before
    assert os.waitstatus_to_exitcode(os.waitpid(begin(), 0)[1]) == 0
    go(folder.with_name("whole"), config)
    told = {"kills": done, "while saving": cut, "nothing gained": repeated, "damaged": damaged}
    out.write_text(json.dumps(told))


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(4))
def test_a_run_killed_often_is_the_run_left_alone(seed: int, store: Path, tmp_path: Path) -> None:
    """Same weights, moments and cursor to the bit and same losses: no row was skipped, none was trained on twice."""
    kills = 25
    run_ranks(1, killed_often, store, tmp_path / "killed", kills, seed, tmp_path / "out")
    told = json.loads((tmp_path / "out").read_text())
    print(told)
    assert told["while saving"] == kills
    assert told["nothing gained"] > 0  # some died early enough to lose their step
    assert told["damaged"] == 0
    a, b = (checkpoint.find(tmp_path / name) for name in ("killed", "whole"))
    assert a.state["cursor"] == b.state["cursor"]
    for name in a.files[0].specs:
        assert torch.equal(a.read(name), b.read(name)), name
    losses = [[x["loss"] for x in read_log(tmp_path / name)] for name in ("killed", "whole")]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 6 * kills
