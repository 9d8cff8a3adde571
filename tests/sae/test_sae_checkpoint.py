"""Runs resume, and survive a death at every moment of a save."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from saetrain.compute.mesh import Mesh
from saetrain.config import Config
from saetrain.errors import CheckpointError, ConfigError
from saetrain.model import Model
from saetrain.tensors import Spec, TensorFile, write
from saetrain.training import checkpoint
from saetrain.training.log import read_log
from saetrain.training.losses import step
from saetrain.training.optim import Optimizer
from saetrain.training.train import fit
from support.sae import ARCHS, MemoryCursor, MemorySource, Planted, one_rank, run_ranks, small, small_model


class Stopping(MemorySource):
    """A source that asks its process to stop when it hands out batch number `after`."""

    def __init__(self, data: Planted, after: int = -1) -> None:
        super().__init__(data.rows, data.documents)
        self.after = after

    def batches(self, rows: int, config: Config, mesh: Mesh) -> MemoryCursor:
        outer = self

        class Cursor(MemoryCursor):
            def __iter__(self) -> Any:
                for batch in super().__iter__():
                    if self.step == outer.after:
                        os.kill(os.getpid(), signal.SIGTERM)
                    yield batch

        return Cursor(self, rows, config, mesh)


def data() -> Planted:
    return Planted.make(2048, 16, 24)


def config(arch: str = "topk", **more: Any) -> Config:
    settings = {"log_every": 1, "checkpoint_every": 7, "eval_every": 5, "compute": "float32", "ema": 0.9}
    return small(arch, **(settings | more))


def train(folder: Path, arch: str, mesh: Mesh, after: int = -1, **more: Any) -> tuple[dict[str, Any], Stopping]:
    source = Stopping(data(), after)
    return fit(source, {folder: config(arch, **more)}, mesh)[folder], source


def contents(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the latest checkpoint, whole."""
    found = checkpoint.find(folder)
    found.verify()
    return {name: found.read(name) for name in found.files[0].specs}


UNTIMED = ("tokens_per_s", "mfu", "loader_wait", "seconds", "time")


def lines(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in UNTIMED} for line in read_log(folder)]


@pytest.mark.parametrize(("arch", "moments"), [*((arch, "full") for arch in ARCHS), ("topk", "8bit"), ("relu", "8bit")])
def test_a_stopped_run_goes_on_bitwise(arch: str, moments: str, tmp_path: Path) -> None:
    with one_rank() as mesh:
        _, whole = train(tmp_path / "whole", arch, mesh, moments=moments)
        last, first = train(tmp_path / "parts", arch, mesh, after=9, moments=moments)
        assert last["stopped"]
        assert last["step"] == 9
        before = read_log(tmp_path / "parts")
        last, second = train(tmp_path / "parts", arch, mesh, moments=moments)
        assert not last["stopped"]
    seconds = [line["seconds"] for line in read_log(tmp_path / "parts")]
    assert seconds[: len(before)] == [line["seconds"] for line in before]
    assert seconds == sorted(seconds), "they go on from those before the stop"
    assert all(line["time"].endswith("Z") for line in before)
    a, b = contents(tmp_path / "whole"), contents(tmp_path / "parts")
    assert set(a) == set(b)
    for name, value in a.items():
        assert torch.equal(value, b[name]), name
    assert lines(tmp_path / "whole") == lines(tmp_path / "parts")
    rows = [tuple(r) for s in (first, second) for r in s.seen]
    assert rows == [tuple(r) for r in whole.seen]  # no batch twice, none left out
    kinds = {name: value.dtype for name, value in b.items() if name.startswith("adam_")}
    if moments == "full":
        assert {*kinds.values()} == {torch.float32}
    else:
        assert {n for n, t in kinds.items() if t == torch.uint8} == {
            f"adam_{moment}_codes.{name}" for moment in "mv" for name in ("W_enc", "W_dec")
        }
        assert "adam_m.W_enc" not in kinds
    checkpoint.find(tmp_path / "parts").check_names()


def test_comparison_notices_one_lost_batch(tmp_path: Path) -> None:
    with one_rank() as mesh:
        train(tmp_path / "whole", "topk", mesh)
        train(tmp_path / "parts", "topk", mesh, after=9)
        state = checkpoint.find(tmp_path / "parts").folder / "state.json"
        state.write_text(state.read_text().replace('"step": 9\n', '"step": 10\n'))  # the cursor's
        train(tmp_path / "parts", "topk", mesh)
    assert not torch.equal(contents(tmp_path / "whole")["W_enc"], contents(tmp_path / "parts")["W_enc"])


def resume(rank: int, folder: Path, tensor_parallel: int) -> None:
    mesh = Mesh.start("cpu", tensor_parallel)
    fit(Stopping(data()), {folder: config("batchtopk", tensor_parallel=tensor_parallel)}, mesh)
    mesh.close()


@pytest.mark.parametrize(("world", "tensor_parallel"), [(2, 2), (2, 1)])
def test_resume_on_other_numbers_of_ranks(world: int, tensor_parallel: int, tmp_path: Path) -> None:
    """There and back: 9 steps on one rank, to the end on two, loaded again on one."""
    with one_rank() as mesh:
        train(tmp_path / "whole", "batchtopk", mesh)
        train(tmp_path / "parts", "batchtopk", mesh, after=9)
    run_ranks(world, resume, tmp_path / "parts", tensor_parallel)
    a, b = contents(tmp_path / "whole"), contents(tmp_path / "parts")
    assert len(checkpoint.find(tmp_path / "parts").files) == tensor_parallel
    for name, value in a.items():
        torch.testing.assert_close(b[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    with one_rank() as mesh:
        loaded = checkpoint.load_latest([tmp_path / "parts"], mesh, print)
        assert loaded is not None
        assert torch.equal(loaded[0].model.params["W_enc"], b["W_enc"])


def save_again(rank: int, folder: Path, to: Path, tensor_parallel: int) -> None:
    mesh = Mesh.start("cpu", tensor_parallel)
    found = checkpoint.load(checkpoint.find(folder), mesh)
    checkpoint.save(to, found.model, found.optimizer, found.state["step"], found.state["cursor"])
    mesh.close()


@pytest.mark.parametrize("moments", ["full", "8bit"])
@pytest.mark.parametrize(("world", "tensor_parallel"), [(2, 2), (2, 1), (4, 2)])
def test_other_numbers_of_ranks_have_the_same_bits(
    world: int, tensor_parallel: int, moments: str, tmp_path: Path
) -> None:
    with one_rank() as mesh:
        train(tmp_path / "one", "relu", mesh, after=9, moments=moments)
    run_ranks(world, save_again, tmp_path / "one", tmp_path / "more", tensor_parallel)
    run_ranks(1, save_again, tmp_path / "more", tmp_path / "back", 1)
    one, more, back = (contents(tmp_path / name) for name in ("one", "more", "back"))
    assert set(one) == set(more) == set(back)
    for name, value in one.items():
        assert torch.equal(value, more[name]), name
        assert torch.equal(value, back[name]), name
    assert len(checkpoint.find(tmp_path / "more").files) == tensor_parallel


def test_other_settings_are_refused_and_named(tmp_path: Path) -> None:
    with one_rank() as mesh:
        train(tmp_path, "topk", mesh, after=3)
        with pytest.raises(ConfigError, match=r"lr 0.003 / 0.001"):
            train(tmp_path, "topk", mesh, lr=1e-3)
        train(tmp_path, "topk", mesh, log_every=4)  # what may change


# --- damage


def test_a_damaged_checkpoint_is_passed_over_and_said(tmp_path: Path) -> None:
    with one_rank() as mesh:
        train(tmp_path, "topk", mesh)
        newest, older = checkpoint.published(tmp_path)
        shard = newest / "shard-0-of-1.safetensors"
        raw = bytearray(shard.read_bytes())
        raw[-5] ^= 1
        shard.write_bytes(raw)
        said: list[str] = []
        loaded = checkpoint.load_latest([tmp_path], mesh, said.append)
        assert loaded is not None
        assert loaded[0].state["step"] == int(older.name[-8:])
        assert "damaged" in said[0]
        with pytest.raises(CheckpointError, match="damaged"):
            contents(tmp_path)


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_cut_files_are_refused(size: int, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write(path, {"a": Spec(torch.float32, (4, 4))}, [("a", torch.ones(4, 4))], {})
    assert torch.equal(TensorFile(path).read("a", 1, 3), torch.ones(2, 4))
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        TensorFile(path)


def test_blocks_must_fit_what_was_announced(tmp_path: Path) -> None:
    specs = {"a": Spec(torch.float32, (4,)), "none": Spec(torch.float32, (0, 3)), "b": Spec(torch.int64, (2,))}
    good = [("a", torch.ones(1)), ("a", torch.ones(3)), ("b", torch.ones(2, dtype=torch.int64))]
    write(tmp_path / "x", specs, good, {})
    assert TensorFile(tmp_path / "x").read("none").shape == (0, 3)
    bad = [good[:2], good[1:], [*good, good[0]], [good[2], *good[:2]], [("a", torch.ones(5)), good[2]]]
    for blocks in bad:
        with pytest.raises(ValueError, match=r"due|announced"):
            write(tmp_path / "y", specs, blocks, {})


# --- dying


def saving(mesh: Mesh, folder: Path) -> tuple[Model, Optimizer]:
    rows = data().rows
    model = small_model("topk", mesh, rows, keep=1)
    optimizer = Optimizer(model)
    optimizer.apply(step(model, model.norm(rows[:32])).grads, 1e-3)
    checkpoint.save(folder, model, optimizer, 1, {"at": 1})
    return model, optimizer


def careless_save(run: Path, model: Model, optimizer: Optimizer, number: int, cursor: dict[str, Any]) -> None:
    """A wrong save for the negative control: it writes in place, the state first."""
    target = checkpoint.step_folder(run, number)
    target.mkdir(parents=True)
    held = checkpoint._held(model, optimizer, True)
    specs = {n: Spec(t.dtype, tuple(t.shape)) for n, t in held.items()}
    shutil.copy(checkpoint.published(run)[-1] / "state.json", target / "state.json")
    write(target / "shard-0-of-1.safetensors", specs, held.items(), {})


def dies(work: Callable[[], object], at: int) -> bool:
    """Do `work` in a copy of this process that dies before its `at`-th look at the file system."""
    pid = os.fork()
    if pid == 0:
        seen = 0

        def hook(event: str, args: Any) -> None:
            nonlocal seen
            if event in ("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.scandir", "os.unlink"):
                seen += 1
                if seen == at:
                    os._exit(9)

        sys.addaudithook(hook)
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9


def assert_resumes(folder: Path, mesh: Mesh, least: int) -> int:
    """The latest checkpoint loads, is whole, and is not older than `least`; returns its step."""
    found = checkpoint.find(folder)
    found.verify()
    loaded = checkpoint.load(found, mesh)
    assert loaded.state["step"] >= least
    assert loaded.state["cursor"] == {"at": loaded.state["step"]}
    return int(loaded.state["step"])


def every_point(rank: int, folder: Path, out: Path, careless: bool) -> None:
    mesh = Mesh.start("cpu")
    model, optimizer = saving(mesh, folder)
    save = careless_save if careless else checkpoint.save
    points, failures, steps = 0, 0, set()
    while True:
        points += 1
        died = dies(lambda: save(folder, model, optimizer, 2, {"at": 2}), points)
        try:
            steps.add(assert_resumes(folder, mesh, 1))
        except (CheckpointError, AssertionError):
            failures += 1
        if not died or points > 300:
            break
        shutil.rmtree(checkpoint.step_folder(folder, 2), ignore_errors=True)
        if not checkpoint.published(folder):
            checkpoint.save(folder, model, optimizer, 1, {"at": 1})
    out.write_text(f"{points} {failures} {sorted(steps)}")
    mesh.close()


def test_death_at_every_point_of_a_save(tmp_path: Path) -> None:
    run_ranks(1, every_point, tmp_path / "run", tmp_path / "out", False)
    points, failures, steps = (tmp_path / "out").read_text().split(" ", 2)
    assert int(points) > 10
    assert failures == "0"
    assert steps == "[1, 2]"


def test_a_careless_save_is_found_out(tmp_path: Path) -> None:
    run_ranks(1, every_point, tmp_path / "run", tmp_path / "out", True)
    assert int((tmp_path / "out").read_text().split()[1]) > 0


def a_hundred_kills(rank: int, folder: Path, out: Path) -> None:
    mesh = Mesh.start("cpu")
    model, optimizer = saving(mesh, folder)
    rng, at, advanced, longest = random.Random(0), 1, 0, 0.03
    for _ in range(100):
        pid = os.fork()
        if pid == 0:
            try:
                for number in range(at + 1, at + 10_000):
                    checkpoint.save(folder, model, optimizer, number, {"at": number})
            finally:
                os._exit(1)
        time.sleep(rng.uniform(0.001, longest))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        now = assert_resumes(folder, mesh, at)
        advanced += now > at
        longest = max(0.03, longest * (0.8 if now > at else 1.2))  # a busy machine needs longer for a save
        at = now
    out.write_text(f"{at} {advanced}")
    mesh.close()


def test_a_hundred_kills_during_saves(tmp_path: Path) -> None:
    run_ranks(1, a_hundred_kills, tmp_path / "run", tmp_path / "out")
    at, advanced = map(int, (tmp_path / "out").read_text().split())
    assert at > 20  # saves did happen between the kills
    assert advanced > 10
