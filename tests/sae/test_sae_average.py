"""The average of the weights against a plain sum in float64; it is what is evaluated, loaded, and planned for.

tests/sae/test_sae_checkpoint.py resumes runs that have one, to the bit, and on other numbers of ranks.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import saetrain
from saetrain.training import checkpoint
from saetrain.training.optim import Optimizer
from saetrain.training.train import fit
from support.sae import MemorySource, Planted, one_rank, small

DECAY, STEPS = 0.9, 20


@pytest.fixture(scope="module")
def planted() -> Planted:
    return Planted.make(2048, 16, 24)


@pytest.mark.parametrize(("arch", "compute", "close"), [("batchtopk", "float64", 1e-12), ("relu", "float32", 1e-6)])
def test_it_is_the_weighted_mean_of_all_weights(
    arch: str, compute: str, close: float, planted: Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, torch.Tensor]] = []
    apply = Optimizer.apply

    def kept(self: Optimizer, grads: dict[str, torch.Tensor], lr: float) -> dict[str, float]:
        found = apply(self, grads, lr)
        model = self.model
        seen.append(
            {n: t.double().clone() for n, t in (model.params | {"threshold": model.state["threshold"]}).items()}
        )
        return found

    monkeypatch.setattr(Optimizer, "apply", kept)
    with one_rank() as mesh:
        source = MemorySource(planted.rows, planted.documents)
        config = small(arch, compute=compute, ema=DECAY)
        line = fit(source, {tmp_path: config}, mesh)[tmp_path]
    found = checkpoint.find(tmp_path)
    weights = [(1 - DECAY) * DECAY ** (STEPS - i) / (1 - DECAY**STEPS) for i in range(1, STEPS + 1)]
    assert sum(weights) == pytest.approx(1)
    for name, last in seen[-1].items():
        due = sum(w * step[name] for w, step in zip(weights, seen, strict=True))
        torch.testing.assert_close(found.read(f"ema.{name}").double(), due, rtol=close, atol=close)
        assert torch.equal(found.read(name).double(), last)
        assert arch == "relu" or not torch.allclose(last, due, rtol=1e-3)  # the average and the last weights differ

    rows = planted.rows[-64:]  # held out
    sae = saetrain.load(tmp_path)
    assert fvu(sae, rows) == pytest.approx(line["eval_fvu"], rel=1e-3)
    monkeypatch.setattr(checkpoint.Checkpoint, "weight", checkpoint.Checkpoint.read)  # the control: the last weights
    assert fvu(saetrain.load(tmp_path), rows) != pytest.approx(line["eval_fvu"], rel=1e-3)


def fvu(sae: saetrain.SAE, rows: torch.Tensor) -> float:
    x = rows.to(sae.W_dec.dtype)
    return float((sae(x) - x).square().sum() / (x - x.mean(0)).square().sum())
