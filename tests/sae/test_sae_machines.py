"""Ranks of two machines: two node groups of torchrun, each in a folder of its own, with what they share beside them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import zarr

import actshuffle
from saetrain.cli import main
from saetrain.compute.mesh import Mesh
from saetrain.config import Config
from saetrain.data import Store
from saetrain.errors import ConfigError
from saetrain.training.train import fit
from support.ports import free_ports
from support.sae import Planted, run_ranks

ROOT = Path(__file__).parents[2]
SMALL = {"d_sae": 32, "k": 4, "batch_size": 64, "tile": 64, "steps": 6, "checkpoint_every": 3, "device": "cpu"}
FLAGS = [text for name, value in SMALL.items() for text in (f"--{name.replace('_', '-')}", str(value))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two stores of the same rows in different order, and a copy of the first, as machines have them."""
    folder = tmp_path_factory.mktemp("machines")
    zarr.create_array(folder / "rows.zarr", data=Planted.make(1024, 16, 24).rows.numpy(), chunks=(500, 16))
    for name, seed in (("a", 1), ("other", 2)):
        actshuffle.shuffle(folder / "rows.zarr", folder / name / "shuffled.zarr", seed=seed, memory="64MB")
    shutil.copytree(folder / "a", folder / "b")
    return folder


def files(run: Path) -> dict[str, bytes]:
    """The checkpoints of a run, whole."""
    return {str(p.relative_to(run)): p.read_bytes() for p in run.glob("checkpoints/**/*") if p.is_file()}


def one_group(rank: int, folder: Path) -> None:
    """Two ranks of one machine: `shared/one`, and every refusal."""
    os.chdir(folder / "a")
    mesh = Mesh.start("cpu")
    settings = Config(**SMALL)  # type: ignore[arg-type]
    fit(Store("shuffled.zarr", settings), {folder / "shared" / "one": settings}, mesh)
    for what, place, seed, out in (
        ("other settings", "a", rank, folder / "shared" / "no"),
        ("another store", ("a", "other")[rank], 0, folder / "shared" / "no"),
        ("does not see", "ab"[rank], 0, Path("run")),
    ):
        os.chdir(folder / place)
        asked = Config(**SMALL, seed=seed)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=rf"^rank 1 .*{what}"):
            fit(Store("shuffled.zarr", asked), {out: asked}, mesh)
    mesh.close()


def test_two_machines_train_what_one_does(folder: Path) -> None:
    """Each reads its own copy of the store; the checkpoints have the same bytes, and the run can go on on one."""
    run_ranks(2, one_group, folder)
    whole = folder / "shared" / "one"
    assert not (folder / "shared" / "no").exists()
    assert not [p for place in "ab" for p in (folder / place).iterdir() if p.name != "shuffled.zarr"]

    group = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    group += ["--master-addr", "127.0.0.1", "--master-port", str(free_ports(1)[0])]
    fit_both = ["-m", "saetrain", "fit", "shuffled.zarr", "--out", str(folder / "shared" / "two"), "--no-report"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [*group, "--node-rank", str(number), *fit_both, *FLAGS],
            cwd=folder / place,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number, place in enumerate("ab")
    ]
    try:
        told = [group.communicate(timeout=600)[0] for group in started]
    finally:
        for process in started:
            process.kill()
    assert [group.returncode for group in started] == [0, 0], "\n".join(told)
    assert "6/6" in told[0]
    assert "6/6" not in told[1], "the first rank speaks for all"
    assert files(whole) == files(folder / "shared" / "two")
    assert len(files(whole)) == 2 * 3
    assert not list((folder / "shared").glob(".*ranks-*"))
    assert sorted(p.name for p in (folder / "b").iterdir()) == ["shuffled.zarr"]

    assert main(["resume", str(folder / "shared" / "two"), "--steps", "8", "--no-report"]) == 0
