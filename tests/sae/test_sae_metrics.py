"""Every metric against numbers worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from saetrain.config import Config, resolve
from saetrain.model import Model
from saetrain.training import metrics
from saetrain.training.clock import Clock
from saetrain.training.heldout import Heldout
from saetrain.training.lines import brief
from saetrain.training.losses import step
from saetrain.training.optim import Optimizer, ramps
from support.sae import MemorySource, one_rank, small_model


def test_fvu() -> None:
    x = torch.tensor([[1.0, 0.0], [3.0, 0.0]])  # mean (2, 0): variance 1 + 1
    residual = torch.tensor([[0.5, 0.0], [0.0, 0.5]])  # 0.25 + 0.25
    assert metrics.fvu(0.5, x.sum(0), float(x.square().sum()), 2) == pytest.approx(0.25)
    with one_rank() as mesh:
        assert metrics.batch_fvu(x, residual, mesh) == pytest.approx(0.25)
        assert metrics.batch_fvu(x, x.mean(0) - x, mesh) == pytest.approx(1.0)  # the mean explains nothing


def test_fvu_by_norm() -> None:
    norms = torch.tensor([*range(1, 20), 400.0], dtype=torch.float64).flip(0)
    tenth = metrics.tenths(norms)
    assert tenth.tolist() == sorted([*range(10)] * 2, reverse=True)
    errors, spreads = torch.full((20,), 3.0, dtype=torch.float64), torch.full((20,), 4.0, dtype=torch.float64)
    errors[0] = errors[1] = 0  # the longest tenth is rebuilt without a fault
    found = metrics.by_norm(errors, spreads, norms, tenth)
    assert found["eval_fvu_median"] == 0.75
    assert found["eval_fvu_by_norm"] == [0.75] * 9 + [0.0]
    assert found["eval_heavy_rows"] == 1
    assert found["eval_heavy_share"] == pytest.approx(160_000 / (160_000 + sum(n * n for n in range(1, 20))))


def test_a_few_long_rows_do_not_hide_the_others() -> None:
    """One row in 64 is 100 times as long and rebuilt well; the total says 0.01, the others have an FVU near 1."""
    rows = torch.randn(2048, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    long = torch.arange(2048) % 64 == 0
    rows[long] = rows[long] * 100 + 500
    with one_rank() as mesh:
        model = small_model("topk", mesh, rows)
        seen, codes = [], model.codes
        model.codes = lambda x: (seen.append(x), codes(x))[1]  # type: ignore[method-assign, func-returns-value]
        model.decoded = lambda codes, x: (  # type: ignore[method-assign]
            seen[-1] * (seen[-1].norm(dim=1) > 10)[:, None],
            torch.ones(len(seen[-1])),
        )
        found = Heldout(MemorySource(rows, torch.arange(2048)), 2048, mesh).evaluate(model)
    assert found["eval_fvu"] < 0.02  # type: ignore[operator]
    assert found["eval_fvu_median"] > 0.9  # type: ignore[operator]
    assert all(value > 0.9 for value in found["eval_fvu_by_norm"][:9])  # type: ignore[index]
    assert found["eval_heavy_rows"] == 32
    assert found["eval_heavy_share"] > 0.98  # type: ignore[operator]


def test_ratio_interval() -> None:
    top, bottom = torch.tensor([1.0, 3.0]), torch.tensor([4.0, 4.0])
    # ratio 1/2; residuals -1 and 1, their squares 2, times n / (n - 1) = 4, root 2, over 8
    found = metrics.ratio_interval(top, bottom)
    assert found.value == 0.5
    assert found.high - 0.5 == pytest.approx(metrics.Z95 * 2 / 8)
    same = metrics.ratio_interval(top.repeat(3), bottom.repeat(3), torch.tensor([0, 1, 0, 1, 0, 1]))
    assert same == pytest.approx(found)  # three copies of a document are one observation
    assert metrics.ratio_interval(top.repeat(3), bottom.repeat(3)).high < found.high
    one = metrics.ratio_interval(top, bottom, torch.tensor([5, 5]))
    assert one.value == 0.5
    assert math.isnan(one.low)  # not an interval of no width
    assert math.isnan(one.high)
    below = metrics.ratio_interval(top, -bottom)  # a negative denominator turns the value, not the interval
    assert below == pytest.approx((-0.5, -found.high, -found.low))


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    rng, hits = torch.Generator().manual_seed(0), 0
    for _ in range(400):
        bottom = 1 + torch.rand(200, generator=rng)
        top = 0.3 * bottom + torch.randn(200, generator=rng) * 0.2
        found = metrics.ratio_interval(top, bottom)
        hits += found.low <= 0.3 <= found.high
    assert 0.92 <= hits / 400 <= 0.98


def test_density_histogram() -> None:
    rate = torch.tensor([0.0, 1e-8, 2e-7, 0.05, 0.5, 1.0], dtype=torch.float64)
    found = metrics.density_histogram(rate).tolist()
    assert len(found) == len(metrics.EDGES) + 1
    # never; below 1e-7; then half decades: 2e-7 in [-7, -6.5), 0.05 in [-1.5, -1), 0.5 and 1 in the last
    assert [i for i, n in enumerate(found) for _ in range(n)] == [0, 1, 2, 13, 15, 15]


def test_dead_dense_and_density_of_a_model() -> None:
    with one_rank() as mesh:
        model = small_model("topk", mesh, torch.randn(64, 16), dead_tokens=100)
        model.state["quiet"][:4] = 100
        model.state["quiet"][4] = 99
        model.state["window"] += 1000
        model.state["fired"][:3] = 101
        model.state["fired"][3] = 100
        found = metrics.latent_summary(model)
        assert found["dead"] == 4 / 64
        assert found["dense"] == 3 / 64
        assert sum(found["density"]) == 64  # type: ignore[arg-type]
        assert found["density"][0] == 60  # type: ignore[index]


def test_dead_and_dense_latents_of_held_out_rows_equal_a_plain_count() -> None:
    """They are of the model as it is, whatever the window of training has counted."""
    rows = torch.randn(300, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with one_rank() as mesh:
        model = small_model("topk", mesh, rows, k=2)
        model.state["fired"] += 7  # not these
        model.state["window"] += 7
        model.params["b_enc"][:20] -= 100
        model.params["b_enc"][40] += 100
        found = Heldout(MemorySource(rows, torch.arange(300)), 200, mesh).evaluate(model)
        x = model.norm(rows[100:])
        pre = (x - model.params["b_dec"]) @ model.params["W_enc"].T + model.params["b_enc"]
        fired = torch.zeros_like(pre).scatter(1, pre.topk(2).indices, 1.0) * (pre > 0)
    assert found["eval_dead"] == float((fired.sum(0) == 0).double().mean()) >= 20 / 64
    assert found["eval_dense"] == float((fired.double().mean(0) > 0.1).double().mean()) > 0
    assert sum(found["eval_density"]) == 64  # type: ignore[arg-type]
    assert found["eval_density"][0] == found["eval_dead"] * 64  # type: ignore[index,operator]


@pytest.mark.parametrize("documents", [1, 2])
def test_held_out_rows_of_one_document_have_no_interval(documents: int) -> None:
    with one_rank() as mesh:
        rows = torch.randn(64, 16, generator=torch.Generator().manual_seed(3))
        model = small_model("topk", mesh, rows)
        source = MemorySource(rows, torch.arange(64) * documents // 64)
        line = Heldout(source, 64, mesh).evaluate(model) | {"step": 5, "loss": 0.5, "l0": 4.0}
    ends = {name for name in line if name.endswith(("_low", "_high"))}
    of = ("eval_fvu", "eval_l0")
    assert ends == ({f"{name}_{end}" for name in of for end in ("low", "high")} if documents == 2 else set())
    assert ("(of one document, which gives no interval)" in brief(Path("run"), line, 5, 0.0)) == (documents == 1)
    assert ("+-" in brief(Path("run"), line, 5, 0.0)) == (documents == 2)


# --- Rates --------------------------------------------------------------------------------------


def clock_of(model: Model, monkeypatch: pytest.MonkeyPatch, speeds: list[float]) -> tuple[Clock, list[float]]:
    """A clock whose time is the last number of the list beside it, and whose machine has the given speeds in turn."""
    now = [0.0]
    monkeypatch.setattr("saetrain.training.clock.time.perf_counter", lambda: now[-1])
    measured = iter(speeds)
    monkeypatch.setattr(metrics, "measure_peak", lambda device, dtype: next(measured))
    cursor = MemorySource(torch.zeros(10, 16), torch.arange(10)).batches(10, model.config, model.mesh)
    return Clock(cursor, model.config, model.mesh), now


def test_members_of_a_sweep_have_the_same_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    with one_rank() as mesh:
        model = small_model("topk", mesh, torch.randn(64, 16))
        clock, now = clock_of(model, monkeypatch, [1e30])
        clock.restart(10)
        now.append(2.0)
        with clock.read(14):
            first = clock.rates(model, 2.0, again=False)
            now.append(50.0)  # an evaluation
            second = clock.rates(model, 2.0, again=False)
        assert first == second
        assert first["tokens_per_s"] == 4 * model.config.batch_size / 2.0
        now.append(51.0)
        with clock.read(15):  # no new interval: 3 s in all without the evaluation
            assert clock.rates(model, 2.0, again=False)["tokens_per_s"] == 5 * model.config.batch_size / 3.0


def test_mfu_is_of_the_best_speed_and_never_above_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with one_rank() as mesh:
        model = small_model("topk", mesh, torch.randn(64, 16))
        reached = metrics.flops_per_token(model.config, 16, 2.0) * model.config.batch_size  # by a step a second
        clock, now = clock_of(model, monkeypatch, [reached / 2, reached * 4, reached])
        clock.restart(0)
        now.append(1.0)
        with clock.read(1):
            assert clock.rates(model, 2.0, again=False)["mfu"] is None, "the machine was busy when it was measured"
            assert clock.rates(model, 2.0, again=True)["mfu"] == 0.25
            assert clock.rates(model, 2.0, again=True)["mfu"] == 0.25, "a slower measurement changes nothing"


def test_firing_counts_and_quiet_tokens() -> None:
    with one_rank() as mesh:
        rows = torch.randn(64, 16)
        model = small_model("topk", mesh, rows, k=2)
        for name in ("W_enc", "b_enc"):
            model.params[name].zero_()
        model.params["b_enc"][[3, 9]] = torch.tensor([2.0, 1.0], dtype=torch.float64)
        out = step(model, model.norm(rows[:32]))
        assert out.active == 2.0
        assert torch.equal(model.state["fired"].nonzero().view(-1), torch.tensor([3, 9]))
        assert model.state["fired"].sum() == 64
        assert model.state["quiet"].tolist() == [0 if i in (3, 9) else 32 for i in range(64)]


def test_document_entropy() -> None:
    assert metrics.document_entropy(torch.tensor([1, 2, 3, 4])) == pytest.approx(1.0)
    assert metrics.document_entropy(torch.tensor([7, 7, 7, 7])) == 0.0
    # two of one and two of another: 1 bit of 2; 1/2, 1/4, 1/4: 1.5 bits of 2
    assert metrics.document_entropy(torch.tensor([1, 1, 2, 2])) == pytest.approx(0.5)
    assert metrics.document_entropy(torch.tensor([1, 1, 2, 3])) == pytest.approx(0.75)


def test_decoder_cosines() -> None:
    with one_rank() as mesh:
        model = small_model("topk", mesh, torch.randn(64, 16))
        w = torch.eye(16, dtype=torch.float64).repeat(4, 1)
        w[16:] *= -1  # rows 16.. point the other way: largest cosine 1 with one of 32 others, 0 for the first 16
        model.params["W_dec"].copy_(w)
        model.params["W_enc"].copy_(torch.roll(w, 1, 1) * 0.6 + w * 0.8)
        found = metrics.cosines(model, sample=64)
        assert found["decoder_cosine_mean"] == pytest.approx(48 / 64)
        assert found["decoder_cosine_p95"] == pytest.approx(1.0)
        assert found["encoder_cosine"] == pytest.approx(0.8)
        assert found["decoder_norm"] == pytest.approx(1.0)


@pytest.mark.parametrize("beta1", [0.9, 0])
def test_gradient_and_update_norms(beta1: float) -> None:
    with one_rank() as mesh:
        rows = torch.randn(64, 16)
        model = small_model("relu", mesh, rows, clip=0.0, eps=1e-8, beta1=beta1)
        optimizer = Optimizer(model)
        for _ in range(3):
            before = {n: p.clone() for n, p in model.params.items()}
            grads = step(model, model.norm(rows[:32])).grads
            expected = {n: float(g.norm()) for n, g in grads.items()}
            norms = optimizer.apply(grads, 1e-3)
            updates = optimizer.update_norms()
            for name, value in expected.items():
                assert norms[name] == pytest.approx(value)
                moved = float((model.params[name] - before[name]).norm())
                assert updates[name] == pytest.approx(moved, rel=1e-6)
            assert norms["all"] == pytest.approx(math.sqrt(sum(v * v for v in expected.values())))


def test_clipping_scales_the_whole_gradient() -> None:
    with one_rank() as mesh:
        rows = torch.randn(64, 16)
        free, clipped = (small_model("relu", mesh, rows, clip=c) for c in (0.0, 1e-3))
        a, b = Optimizer(free), Optimizer(clipped)
        whole = a.apply(step(free, free.norm(rows[:32])).grads, 1e-3)["all"]
        assert b.apply(step(clipped, clipped.norm(rows[:32])).grads, 1e-3)["all"] == whole
        key, scale = "adam_m.W_enc", 1e-3 / whole
        torch.testing.assert_close(b.kept()[key], a.kept()[key] * scale)


def test_unit_rows_and_no_gradient_along_them() -> None:
    with one_rank() as mesh:
        rows = torch.randn(64, 16)
        model = small_model("topk", mesh, rows)
        grads = step(model, model.norm(rows[:32])).grads
        before = model.params["W_dec"].clone()
        Optimizer(model).apply(grads, 1e-2)
        assert (grads["W_dec"] * before).sum(1).abs().max() < 1e-12
        torch.testing.assert_close(model.params["W_dec"].norm(dim=1), torch.ones(64, dtype=torch.float64))


def test_schedule() -> None:
    c = resolve(Config(lr=1.0, lr_warmup=0.1, lr_decay=0.2, sparsity_warmup=0.5, steps=100), 16, 10**6)
    rates = [ramps(c, s)[0] for s in range(100)]
    assert rates[:3] == pytest.approx([0.1, 0.2, 0.3])
    assert rates[9:81] == [1.0] * 72
    assert rates[81:84] == pytest.approx([0.95, 0.9, 0.85])
    assert rates[99] == pytest.approx(0.05)
    assert [ramps(c, s)[1] for s in (0, 24, 49, 99)] == pytest.approx([0.02, 0.5, 1.0, 1.0])


def test_normalisation_makes_the_mean_squared_norm_d() -> None:
    from saetrain.norms import norm_from

    rows = torch.randn(1000, 8, dtype=torch.float64) * 3 + 50
    norm = norm_from(rows.mean(0).numpy(), float(rows.var(0, unbiased=False).sum()))
    x = norm(rows)
    assert float(x.square().sum(1).mean()) == pytest.approx(8)
    assert x.mean(0).abs().max() < 1e-12
    with pytest.raises(ValueError, match="do not vary"):
        norm_from(np.ones(8), 0.0)


def test_flops() -> None:
    topk = resolve(Config(d_sae=1000, k=10), 64, 10**6)
    assert metrics.flops_per_token(topk, 64, 10.0) == 2 * 64 * 1000 + 8 * 64 * 10
    relu = resolve(Config(arch="relu", d_sae=1000), 64, 10**6)
    assert metrics.flops_per_token(relu, 64, 500.0) == 10 * 64 * 1000
    assert metrics.measure_peak(torch.device("cpu"), torch.float32) > 1e8
