"""The same training on 1, 2 and 4 ranks: losses, gradients, parameters, chosen latents, traffic, memory."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from saetrain.compute.kernels import Encoder
from saetrain.compute.mesh import Mesh, _add_in_order
from saetrain.compute.selection import batch_topk, topk
from saetrain.config import Config, resolve
from saetrain.model import WHOLE, Model
from saetrain.training.losses import step
from saetrain.training.optim import Optimizer, ramps
from saetrain.variants.batchtopk import BatchTopK
from saetrain.variants.table import VARIANTS
from saetrain.variants.topk import TopK
from support.sae import ARCHS, Planted, norm_of, one_rank, run_ranks, small, whole_gradient

STEPS = 20
BATCH = 32
MISTAKES = {
    "too few candidates": "2 tp",
    "bias gradient not summed over latents": "2 tp",
    "gradients not summed over replicas": "2 dp",
}
LAYOUTS = {"2 tp": (2, 2), "4 tp": (4, 4), "2 x 2": (4, 2), "2 dp": (2, 1), "4 dp": (4, 1)}


def session(rank: int, folder: Path, layout: str, tensor_parallel: int) -> None:
    """All the work of one layout, in one set of processes."""
    mesh = Mesh.start("cpu", tensor_parallel)
    for arch in ARCHS:
        train(mesh, folder, layout, arch)
    for mistake, where in MISTAKES.items():
        if where == layout:
            with pytest.MonkeyPatch.context() as patch:
                breaking(mistake, mesh, patch)
                train(mesh, folder, mistake, "topk")
    ties(mesh, folder, layout)
    measure(mesh, folder, layout)
    if layout != "one":  # which runs in the process of all tests
        assert "torch._dynamo" not in sys.modules, "training imports torch's compiler, which takes seconds"
    mesh.close()


def train(mesh: Mesh, folder: Path, name: str, arch: str) -> None:
    """Train a variant for 20 steps; the results of each step go to a file of this rank."""
    data = Planted.make(2048, 16, 24)
    model = VARIANTS[arch](small(arch), norm_of(data.rows), mesh)
    model.initialise(model.norm(data.rows[:256]))
    optimizer, seen = Optimizer(model), []
    share = BATCH // mesh.dp
    for number in range(STEPS):
        if number == 5 and model.config.is_sparse:  # latents 0, 3, 6 ... count as dead from here
            ids = torch.arange(model.lo, model.hi)
            model.state["quiet"][ids % 3 == 0] = 10**6
        first = number * BATCH + mesh.dp_index * share
        x = model.norm(data.rows[first : first + share])
        active = chosen(model, x)
        lr, ramp = ramps(model.config, number)
        out = step(model, x, ramp)
        grads = {n: whole_gradient(g, model, n) for n, g in out.grads.items()}
        norms = optimizer.apply(out.grads, lr)
        seen.append(
            {
                "active": active,
                "grads": grads,
                "norms": norms,
                "losses": out.losses,
                "params": {n: p.clone() for n, p in model.params.items()},
                "updates": optimizer.update_norms(),
                "count": out.active,
                "state": {n: s.clone() for n, s in model.state.items()},
            }
        )
    torch.save((mesh.dp_index, mesh.tp_index, seen), folder / f"{name}-{arch}-{mesh.rank}.pt")


def chosen(model: Model, x: Tensor) -> Tensor:
    """(token of the batch, latent) pairs that training picks for this batch, of this rank."""
    c, mesh = model.config, model.mesh
    if c.arch == "topk":
        codes = topk(model.encoder(), model.centred(x), c.k, mesh)
    elif c.is_sparse:
        codes, _ = batch_topk(model.encoder(), model.centred(x), c.k * BATCH, mesh, 0.0)
    else:
        codes = model.codes(x)
    return torch.stack([codes.bag + mesh.dp_index * len(x), codes.latent + model.lo], 1)


def breaking(what: str, mesh: Mesh, patch: pytest.MonkeyPatch) -> None:
    """Mistakes seen in other trainers, for the negative controls."""
    plain, whole = mesh.sum, Encoder.topk
    if what == "too few candidates":
        patch.setattr(Encoder, "topk", lambda self, x, k: whole(self, x, max(k // mesh.tp, 1)))
    elif what == "bias gradient not summed over latents":
        patch.setattr(mesh, "sum", lambda x, over, what="other": x if x.shape == (16,) else plain(x, over, what))
    elif what == "gradients not summed over replicas":
        patch.setattr(mesh, "sum", lambda x, over, what="other": x if what == "gradients" else plain(x, over, what))
        patch.setattr(mesh, "sum_own", lambda x, what: x[mesh.own(len(x))])


def read(folder: Path, name: str, arch: str) -> list[dict[str, Any]]:
    """The steps of a run, its ranks' shares put together."""
    ranks = [torch.load(path) for path in sorted(folder.glob(f"{name}-{arch}-*.pt"))]
    first_replica = [seen for dp, _, seen in sorted(ranks, key=lambda r: r[:2]) if dp == 0]
    steps = []
    for number in range(STEPS):
        parts = [seen[number] for seen in first_replica]
        joined = dict(parts[0])
        for group in ("grads", "params"):
            joined[group] = {
                n: torch.cat([part[group][n] for part in parts]) if n not in WHOLE else parts[0][group][n]
                for n in parts[0][group]
            }
        joined["quiet"] = torch.cat([part["state"]["quiet"] for part in parts])
        joined["threshold"] = parts[0]["state"]["threshold"]
        pairs = torch.cat([seen[number]["active"] for _, _, seen in ranks])
        joined["active"] = sorted(map(tuple, pairs.tolist()))
        steps.append(joined)
        for _, _, seen in ranks:  # what is whole on every rank is the same bits on every rank
            assert torch.equal(seen[number]["params"]["b_dec"], parts[0]["params"]["b_dec"])
            assert seen[number]["losses"] == parts[0]["losses"]
    return steps


def assert_same(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> None:
    for number, (a, b) in enumerate(zip(one, other, strict=True)):
        assert a["active"] == b["active"], f"step {number}: other latents"
        assert torch.equal(a["quiet"], b["quiet"]), f"step {number}: quiet"
        for key in ("losses", "norms", "updates", "count", "threshold"):
            assert a[key] == pytest.approx(b[key], rel=1e-9), f"step {number}: {key}"
        for group in ("grads", "params"):
            assert set(a[group]) == set(b[group])
            for name, value in a[group].items():
                torch.testing.assert_close(
                    value, b[group][name], rtol=1e-8, atol=1e-11, msg=lambda m, n=name, s=number: f"step {s} {n}: {m}"
                )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder with the results of a layout; each layout runs once."""
    folder = tmp_path_factory.mktemp("ranks")
    session(0, folder, "one", 0)
    done = {"one"}

    def of(layout: str) -> Path:
        if layout not in done:
            world, tensor_parallel = LAYOUTS[layout]
            run_ranks(world, session, folder, layout, tensor_parallel)
            done.add(layout)
        return folder

    return of


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_trains_as_one_rank_does(layout: str, arch: str, run: Callable[[str], Path]) -> None:
    folder = run(layout)
    one = read(folder, "one", arch)
    assert_same(one, read(folder, layout, arch))
    if small(arch).is_sparse:
        assert all(s["losses"]["aux"] > 0 for s in one[5:])  # the comparison saw the aux loss


@pytest.mark.parametrize("mistake", MISTAKES)
def test_known_mistakes_are_noticed(mistake: str, run: Callable[[str], Path]) -> None:
    folder = run(MISTAKES[mistake])
    with pytest.raises(AssertionError):
        assert_same(read(folder, "one", "topk"), read(folder, mistake, "topk"))


def ties(mesh: Mesh, folder: Path, name: str) -> None:
    model = TopK(small("topk", k=5), norm_of(torch.randn(64, 16)), mesh)
    ids = torch.arange(model.lo, model.hi)
    model.params["W_enc"][:, 0] = (ids % 4).double()  # 16 latents share each value
    share = 8 // mesh.dp
    x = torch.zeros(share, 16, dtype=torch.float64)
    x[:, 0] = 1.0
    one = topk(model.encoder(), x, 5, mesh)
    many, _ = batch_topk(model.encoder(), x, 5 * 8 + 3, mesh, 0.0)
    found = [torch.stack([c.bag + mesh.dp_index * share, c.latent + model.lo], 1) for c in (one, many)]
    torch.save(found, folder / f"{name}-ties-{mesh.rank}.pt")


@pytest.mark.parametrize("layout", ["one", *LAYOUTS])
def test_ties_go_to_the_lowest_latents(layout: str, run: Callable[[str], Path]) -> None:
    parts = [torch.load(p) for p in run(layout).glob(f"{layout}-ties-*.pt")]
    one, many = (sorted(map(tuple, torch.cat([p[i] for p in parts]).tolist())) for i in (0, 1))
    assert one == [(token, 4 * i + 3) for token in range(8) for i in range(5)]
    assert many == [(token, 4 * i + 3) for token in range(8) for i in range(16)][:43]


D, N, K, TOKENS = 96, 2048, 8, 256


def measure(mesh: Mesh, folder: Path, name: str) -> None:
    rows = torch.randn(512, D, generator=torch.Generator().manual_seed(0))
    config = Config(d_sae=N, k=K, steps=4, batch_size=TOKENS, tile=64, holdout=1)
    model = TopK(resolve(config, D, 2000), norm_of(rows), mesh)
    model.initialise(rows)
    optimizer = Optimizer(model)
    mesh.sent.clear()
    share = TOKENS // mesh.dp
    optimizer.apply(step(model, model.norm(rows[mesh.dp_index * share :][:share])).grads, 1e-3)
    held = sum(p.numel() for p in (*model.params.values(), *optimizer.kept().values()))
    sent = dict(mesh.sent)
    mesh.sent.clear()
    for short in (model.params["b_dec"], model.state["fired"]):  # what every replica needs of the gradients
        mesh.sum(short, "dp", "gradients")
    torch.save((sent, held, mesh.sent["gradients"]), folder / f"{name}-measure-{mesh.rank}.pt")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_traffic_is_as_stated_and_memory_falls_with_the_ranks(layout: str, run: Callable[[str], Path]) -> None:
    folder, (world, tp) = run(layout), LAYOUTS[layout]
    dp, split = world // tp, 2 * N * D + N  # numbers of the parameters that are split by latent
    _, alone, _ = torch.load(folder / "one-measure-0.pt")
    assert alone == 3 * D + 3 * split  # parameters and two moments
    for rank in range(world):
        sent, held, summed = torch.load(folder / f"{layout}-measure-{rank}.pt")
        assert sent.get("candidates", 0) == 4 * K * (tp - 1) * TOKENS // dp
        assert sent.get("reconstructions", 0) == 8 * D * (tp - 1) // tp * TOKENS // dp
        assert sent.get("parameters", 0) == 4 * split // tp * (dp - 1) // dp
        assert sent.get("gradients", 0) == 4 * split // tp * (dp - 1) // dp + summed
        assert held == 3 * D + split // tp + 2 * split // tp // dp


def test_the_floor_of_batch_topk_never_changes_the_result() -> None:
    with one_rank() as mesh:
        data = Planted.make(512, 16, 24)
        model = BatchTopK(small("batchtopk"), norm_of(data.rows), mesh)
        model.initialise(model.norm(data.rows))
        x = model.norm(data.rows[:64])
        plain, cut = batch_topk(model.encoder(), x, 200, mesh, 0.0)
        for floor in (0.1, float(cut), float(cut) * 1.01, 100.0):
            again, other = batch_topk(model.encoder(), x, 200, mesh, floor)
            assert torch.equal(plain.bag, again.bag)
            assert torch.equal(plain.latent, again.latent)
            assert cut == other
        assert len(plain.value) == 200
        few, smallest = batch_topk(model.encoder(), x, 10**6, mesh, 0.0)  # more than there are
        assert smallest == few.value.min() > 0


def test_sums_are_made_in_order_of_rank() -> None:
    parts = torch.tensor([[1e8], [1.0], [-1e8], [1.0]])
    assert float(_add_in_order(parts)) == 1.0  # 1e8 + 1 is 1e8 in float32
