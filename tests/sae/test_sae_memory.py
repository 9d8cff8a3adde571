"""The memory that `saetrain plan` predicts, against torch's count of allocated bytes, and its growth."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import zarr

import actshuffle
from saetrain import memory
from saetrain.cli import main
from saetrain.compute.mesh import Mesh
from saetrain.config import Config, resolve
from saetrain.memory import predict, together
from saetrain.norms import Norm
from saetrain.training import checkpoint
from saetrain.training.losses import step
from saetrain.training.optim import Optimizer
from saetrain.variants.table import VARIANTS
from support.sae import ARCHS, one_rank, run_ranks

D, WIDE = 128, 96  # of the input, and of a transcoder's output
SETTINGS: dict[str, Any] = {"d_sae": 4096, "k": 16, "steps": 100, "batch_size": 2048, "tile": 256, "holdout": 16}


def config(arch: str, **more: Any) -> Config:
    """Latents are dead from the first step, so that the plan's worst case happens."""
    settings = SETTINGS | {"dead_tokens": 10**9, "device": "cpu", "compute": "float32"} | more
    return resolve(Config(arch=arch, **settings), D, 10**6)


def measured(*members: Config, mesh: Mesh) -> int:
    """The most bytes of tensors at once in two steps, models and all, by torch's own count."""
    found = members[0]
    torch.set_num_threads(1)
    torch.manual_seed(0)  # ranks that share the parameters share the rows
    mine = found.batch_size // mesh.dp
    other = torch.randn(mine, WIDE) if found.output else None
    most = counted(partial(work, members, mesh, torch.randn(mine, D), other))
    rows = 4 * mine * (D + (WIDE if found.output else 0))  # made before the count began
    return most + rows


def work(members: tuple[Config, ...], mesh: Mesh, raw: torch.Tensor, other: torch.Tensor | None) -> None:
    norm, out = (Norm(torch.zeros(width, dtype=torch.float64), 1.0) for width in (D, WIDE))
    models = [VARIANTS[found.arch](found, norm, mesh, None if other is None else out) for found in members]
    for model in models:
        model.initialise(model.norm(raw[:64]), None if other is None else model.out_norm(other[:64]))
    optimizers = [Optimizer(model) for model in models]
    for _ in range(2):
        x, y = models[0].norm(raw), None if other is None else models[0].out_norm(other)
        for model, optimizer in zip(models, optimizers, strict=True):
            model.state["quiet"][: model.latents // 4] = 10**10
            optimizer.apply(step(model, x, 1.0, y).grads, 1e-3)
            optimizer.update_norms()


@pytest.mark.parametrize("arch", ARCHS)
def test_the_plan_is_within_a_tenth_of_the_peak(arch: str) -> None:
    with one_rank() as mesh:
        peak = measured(config(arch), mesh=mesh)
    assert predict(config(arch), D).peak == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize("more", [{}, {"d_sae": 16_384, "batch_size": 256}, {"d_sae": 1024, "batch_size": 64}])
@pytest.mark.parametrize("arch", ["topk", "relu"])
def test_of_moments_in_8_bits_too(arch: str, more: dict[str, int]) -> None:
    found = config(arch, moments="8bit", **more)
    with one_rank() as mesh:
        peak = measured(found, mesh=mesh)
    assert predict(found, D).peak == pytest.approx(peak, rel=0.1)
    assert predict(found, D).moments == pytest.approx(predict(config(arch, **more), D).moments / 4, rel=0.06)


def test_of_a_sweep_and_of_averages_too() -> None:
    members = [config("topk", ema=0.99, batch_size=512), config("topk", k=8, d_sae=2048, batch_size=512)]
    with one_rank() as mesh:
        peak = measured(*members, mesh=mesh)
    each = [predict(member, D) for member in members]
    assert together(each) == pytest.approx(peak, rel=0.1)
    assert each[0].average > 0.1 * peak  # without it the sum would be too small


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("arch", ["topk", "jumprelu"])
def test_of_transcoders_too(arch: str, skip: bool) -> None:
    found = config(arch, field="a", output="b", skip=skip)
    with one_rank() as mesh:
        peak = measured(found, mesh=mesh)
    assert predict(found, D, WIDE).peak == pytest.approx(peak, rel=0.1)


def test_tiles_of_the_topk_family_too(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = predict(config("topk"), D)
    monkeypatch.setattr("saetrain.variants.family.TILE_ELEMENTS", 1_000_000)
    tiled = predict(config("topk"), D)
    assert tiled.tile < 1000
    assert tiled.peak < whole.peak
    with one_rank() as mesh:
        peak = measured(config("topk"), mesh=mesh)
    assert tiled.peak == pytest.approx(peak, rel=0.1)


FEW = "few rows"
CONFIGS = {
    "topk": config("topk", d_sae=8192),
    "jumprelu": config("jumprelu", d_sae=8192),
    "8bit": config("relu", d_sae=8192, moments="8bit"),
    FEW: config("topk", d_sae=8192, batch_size=64),  # the step is a message between replicas
}


def session(rank: int, folder: Path, tp: int) -> None:
    mesh = Mesh.start("cpu", tp)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_to_all_single", "all_gather_single"):
            patch.setattr(dist, name, patient(getattr(dist, name)))
        here = {name: found for name, found in CONFIGS.items() if name != FEW or mesh.dp > 1}
        peaks = {name: min(measured(found, mesh=mesh) for _ in range(3)) for name, found in here.items()}
    (folder / f"{rank}.json").write_text(json.dumps(peaks))
    mesh.close()


def patient(collective: Callable[..., Any]) -> Callable[..., None]:
    """The same, but a thread of gloo's lets its tensors go first: torch's count sees only what this thread frees."""

    def call(*args: Any, **more: Any) -> None:
        work = collective(*args, async_op=True, **more)
        work.wait()
        time.sleep(0.005)

    return call


def counted(work: Callable[[], object]) -> int:
    """The most bytes of tensors at once beyond those that were there."""
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        work()
    events = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    return int(np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]).max())


@pytest.mark.parametrize(("world", "tp"), [(2, 2), (4, 4), (2, 1), (4, 1), (4, 2)])
def test_of_each_rank(world: int, tp: int, tmp_path: Path) -> None:
    run_ranks(world, session, tmp_path, tp)
    for file in tmp_path.glob("*.json"):
        for name, peak in json.loads(file.read_text()).items():
            found = predict(CONFIGS[name], D, tp=tp, dp=world // tp)
            assert found.peak == pytest.approx(peak, rel=0.1), name
            alone = predict(CONFIGS[name], D, tp=tp)
            assert found.moments == pytest.approx(alone.moments * tp / world, rel=0.01)


def saving(rank: int, folder: Path, numbers: int) -> None:
    """The most bytes at once while a checkpoint is written by messages of so many numbers."""
    mesh, norm = Mesh.start("cpu", 1), Norm(torch.zeros(D, dtype=torch.float64), 1.0)
    model = VARIANTS["topk"](CONFIGS["topk"], norm, mesh)
    optimizer = Optimizer(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("saetrain.compute.mesh.MESSAGE", numbers)
        peak = counted(partial(checkpoint.save, folder / "run", model, optimizer, 1, {}))
    (folder / f"{rank}.json").write_text(str(peak))
    mesh.close()


@pytest.mark.parametrize(("numbers", "few"), [(2**14, True), (2**22, False)])
def test_a_checkpoint_brings_no_whole_tensor_together(numbers: int, few: bool, tmp_path: Path) -> None:
    """A message is 64 KB, and a moment of one matrix 4 MB; the control sends a replica's half of it at once."""
    run_ranks(2, saving, tmp_path, numbers)
    assert (max(int(file.read_text()) for file in tmp_path.glob("*.json")) < 1e6) is few


def test_it_is_linear_in_the_latents_of_a_rank() -> None:
    """Not counted are the rows of a batch, b_dec, and the tile of the topk family, of which the codes alone fall."""
    for arch in ARCHS:
        one, two, four = (predict(config(arch, d_sae=65_536), D, tp=tp) for tp in (1, 2, 4))
        counted = ("parameters", "moments", "gradients") + (() if VARIANTS[arch].takes_k else ("step",))
        sums = [sum(getattr(m, name) for name in counted) for m in (one, two, four)]
        assert sums[1] == pytest.approx(sums[0] / 2, rel=0.01)
        assert sums[2] == pytest.approx(sums[0] / 4, rel=0.01)
        assert sums[0] > 0.85 * one.peak


def test_a_large_batch_needs_no_matrix_of_its_tokens_and_latents() -> None:
    """The step at d = 4,096, n = 131,072, batch 32,768, where ReLU took 90 GB and JumpReLU 163 GB in all."""
    for arch in ("relu", "jumprelu", "gated"):
        large = {"d_sae": 131_072, "batch_size": 32_768, "tile": 1024, "compute": "float32", "device": "cpu"}
        found = predict(resolve(Config(arch=arch, **large), 4096, 10**8), 4096)
        assert found.step < 3e9 < 4 * 131_072 * 32_768
        assert found.peak < 25e9
        coded = predict(resolve(Config(arch=arch, moments="8bit", **large), 4096, 10**8), 4096)
        assert coded.peak <= 163e9 / 10


def test_control_a_matrix_of_batch_by_latents_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = config("jumprelu", tile=2048)  # one tile
    with one_rank() as mesh:
        peak = measured(whole, mesh=mesh)
    assert predict(whole, D).peak == pytest.approx(peak, rel=0.1)
    assert predict(config("jumprelu"), D).peak < 0.4 * peak
    monkeypatch.setattr(memory.VARIANTS["jumprelu"], "matrices", (1, 1))
    assert predict(whole, D).peak != pytest.approx(peak, rel=0.1)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    zarr.create_array(tmp_path / "rows", data=np.random.default_rng(0).random((2000, 16), np.float32), chunks=(500, 16))
    actshuffle.shuffle(tmp_path / "rows", tmp_path / "s.zarr", seed=1, memory="64MB")
    flags = ["--d-sae", "64", "--batch-size", "64", "--device", "cpu", "--tile", "32", "--arch", "jumprelu"]
    assert main(["plan", str(tmp_path / "s.zarr"), *flags, "--nproc", "4", "--tensor-parallel", "2", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    found = predict(Config.from_json(told["config"]), 16, tp=2, dp=2)
    assert told["rank"] == found.to_json()
    assert main(["plan", str(tmp_path / "s.zarr"), *flags]) == 0
    text = capsys.readouterr().out
    assert "a tile of 32 tokens in the step" in text
    assert "at most" in text
    for bad in (["--nproc", "3"], ["--nproc", "0"], ["--nproc", "4", "--tensor-parallel", "3"]):
        assert main(["plan", str(tmp_path / "s.zarr"), *flags, *bad]) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"rows", "s.zarr"}
