"""The mean effect of each latent on the loss, from a store with gradients, against the dense definition."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import actshuffle
import saetrain
from saetrain import tensors
from saetrain.describing.streamed import describe_streamed
from saetrain.errors import DataError
from saetrain.features import collate as collating
from saetrain.features import pipeline
from saetrain.training.metrics import ratio_interval
from support.features import LATENTS, TINY, content, dense, dictionary, store
from support.finished import finish
from support.stores import group

ROWS = 300
KINDS = ("standard", "topk")


@pytest.fixture(scope="module")
def acts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return store(tmp_path_factory.mktemp("store") / "acts.zarr", ROWS, gradient=True)


def build(where: Path, acts: Path, out: Path, **settings: Any) -> Any:
    return saetrain.build_features(where, acts, out, **{"fsync": False, **TINY, **settings})


def due(where: Path, acts: Path, sign: float = 1.0) -> np.ndarray:
    """Effects [documents, latents] by the definition: activation times <decoder row, gradient>, summed over rows."""
    data = actshuffle.open_dataset(acts)
    x, gradient, document = (data.read(name, 0, ROWS) for name in ("x", "grad_x", "document"))
    decoder = tensors.TensorFile(where / "sae_weights.safetensors").read("W_dec").numpy().astype(np.float64)
    effect = sign * dense(where, x).astype(np.float64) * (gradient.astype(np.float64) @ decoder.T)
    return np.stack([effect[document == d].sum(axis=0) for d in np.unique(document)])


@pytest.mark.parametrize("kind", KINDS)
def test_effects_are_the_definition(tmp_path, acts, kind):
    where = dictionary(tmp_path / "d", kind)
    build(where, acts, tmp_path / "out")
    features, effect = saetrain.open_features(tmp_path / "out"), due(where, acts)
    found = np.array([features[i].loss_effect for i in range(LATENTS)])
    assert np.allclose(found[:, 0], effect.sum(axis=0) / ROWS, rtol=1e-4, atol=1e-8)
    assert abs(found[:, 0]).max() > 1e-3
    assert not np.allclose(found[:, 0], due(where, acts, -1).sum(axis=0) / ROWS, rtol=1e-4, atol=1e-8)  # control
    document = actshuffle.open_dataset(acts).read("document", 0, ROWS)
    sizes = np.unique(document, return_counts=True)[1].astype(np.float64)
    for latent in range(LATENTS):
        value, low, high = ratio_interval(*tensors_of(effect[:, latent], sizes))
        assert found[latent] == pytest.approx([value, low, high], rel=1e-3, abs=1e-8)
    assert found[3].tolist() == [0, 0, 0]  # a dead one
    assert "nats a row" in repr(features[5])


def tensors_of(*arrays: np.ndarray) -> list[Any]:
    import torch

    return [torch.from_numpy(array) for array in arrays]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("shards", "blocks", "most"), [(2, 3, 300), (5, 7, 48)])
def test_any_cut_gives_the_same_bytes(tmp_path, acts, monkeypatch, kind, shards, blocks, most):
    where = dictionary(tmp_path / "d", kind)
    build(where, acts, tmp_path / "due")
    portions = []

    def streamed(*args: Any) -> None:
        portions.append(1)
        describe_streamed(*args)

    monkeypatch.setattr(collating, "describe_streamed", streamed)
    monkeypatch.setattr(pipeline, "most_entries", lambda plan, memory: most)
    build(where, acts, tmp_path / "out", shards=shards, block_rows=-(-ROWS // blocks))
    assert content(tmp_path / "out") == content(tmp_path / "due")
    assert "loss/effect/c/0" in content(tmp_path / "out")
    assert bool(portions) == (most == 48)


def test_a_store_without_gradients_has_no_effects(tmp_path):
    plain = store(tmp_path / "plain.zarr", 100)
    build(dictionary(tmp_path / "d", "topk"), plain, tmp_path / "out")
    features = saetrain.open_features(tmp_path / "out")
    assert features[5].loss_effect is None
    assert features.facts["gradient"] is None


def test_a_gradient_with_nan_is_named(tmp_path):
    gradient = np.zeros((40, 12), "<f4")
    gradient[33, 4] = np.nan
    group(tmp_path / "nan.zarr", {"x": np.ones((40, 12), "<f4"), "grad_x": gradient})
    finish(tmp_path / "nan.zarr", 40, ["x", "grad_x"])
    with pytest.raises(DataError, match=r"'grad_x'.*row 33, column 4 is nan"):
        build(dictionary(tmp_path / "d", "topk"), tmp_path / "nan.zarr", tmp_path / "out", field="x")
