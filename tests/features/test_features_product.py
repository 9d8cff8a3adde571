"""Neighbours and logits of every latent against dense numpy in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import saetrain
from actshuffle.executors import Threads
from actshuffle.testing import Faults, Killed, matching
from saetrain.errors import DataError
from saetrain.products.lens import BINS, REACH, open_lens
from support.features import TINY, WIDTH, content, dictionary, store
from support.lenses import VOCABULARY, model


def truth(where: Path, folder: Path, *, centre: bool, plus: float = 0.0) -> np.ndarray:
    """Logits [latents, vocabulary], float64."""
    rows = saetrain.load(where).W_dec.double().numpy()
    held = np.load(folder / "truth.npz")
    if centre:
        rows = rows - rows.mean(1, keepdims=True)
    logits = (rows * (held["gain"].astype(np.float64) + plus)) @ held["head"].astype(np.float64).T
    return logits - logits.mean(1, keepdims=True)


@pytest.fixture(scope="module")
def acts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return store(tmp_path_factory.mktemp("store") / "acts.zarr", 60)


def build(where: Path, acts: Path, out: Path, **settings: Any) -> Any:
    saetrain.build_features(where, acts, out, **{"fsync": False, **TINY, **settings})
    return saetrain.open_features(out)


def faults(features: Any, logits: np.ndarray) -> list[str]:
    """Where the arrays differ from the dense logits."""
    wrong = []
    for name, sign in (("top", -1), ("bottom", 1)):
        ids, values = features.array(f"logit/{name}_id"), features.array(f"logit/{name}")
        if not np.allclose(np.take_along_axis(logits, ids, 1), values, atol=1e-5):
            wrong.append(f"{name} values")
        if not np.allclose(sign * np.sort(sign * logits, axis=1)[:, :10], values, atol=1e-5):
            wrong.append(f"{name} order")
    std = logits.std(1)
    if not np.allclose(features.array("logit/std"), std, rtol=1e-5):
        wrong.append("std")
    counts = features.array("logit/histogram").astype(int)
    for row, due in enumerate(logits):
        edges = np.linspace(-REACH * std[row], REACH * std[row], BINS + 1)
        edges[[0, -1]] = -np.inf, np.inf
        if abs(counts[row] - np.histogram(due, edges)[0]).sum() > 2 or counts[row].sum() != VOCABULARY:
            wrong.append("histogram")  # one logit may lie on an edge
    index = features.group("logit_index")
    ids, values = index.read("id", 0, VOCABULARY), index.read("value", 0, VOCABULARY)
    if not np.allclose(np.take_along_axis(logits.T, ids, 1), values, atol=1e-5):
        wrong.append("index values")
    if not np.allclose(-np.sort(-logits.T, axis=1)[:, :16], values, atol=1e-5):
        wrong.append("index order")
    return wrong


@pytest.mark.parametrize(
    ("family", "kind", "tied", "centre", "plus"),
    [
        ("llama", "", False, False, 0.0),
        ("llama", "gemma2", True, False, 1.0),
        ("gpt2", "", True, True, 0.0),
        ("neox", "", False, True, 0.0),
    ],
)
def test_logits_equal_the_dense_product(tmp_path, acts, family, kind, tied, centre, plus):
    folder, where = model(tmp_path / "model", family, tied=tied, kind=kind), dictionary(tmp_path / "sae", "topk")
    features = build(where, acts, tmp_path / "out", model=folder)
    logits = truth(where, folder, centre=centre, plus=plus)
    assert faults(features, logits) == []
    assert len(faults(features, truth(where, folder, centre=not centre, plus=plus))) > 4
    assert len(faults(features, truth(where, folder, centre=centre, plus=1 - plus))) > 4
    found = features[8].logits
    assert found.top[0].id == logits[8].argmax()
    assert found.bottom[0].value == pytest.approx(logits[8].min(), abs=1e-5)
    assert (len(found.edges), found.counts.sum()) == (BINS + 1, VOCABULARY)
    assert features.promoters(77)[0].latent == logits[:, 77].argmax()


def test_neighbours_equal_the_dense_cosines(tmp_path, acts):
    where = dictionary(tmp_path / "sae", "standard")
    features = build(where, acts, tmp_path / "out")
    rows = saetrain.load(where).W_dec.double().numpy()
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    cosine = rows @ rows.T
    np.fill_diagonal(cosine, -2)
    ids, found = features.array("near/id"), features.array("near/cosine")
    assert np.allclose(found, -np.sort(-cosine, axis=1)[:, :16], atol=1e-6)
    assert np.allclose(np.take_along_axis(cosine, ids, 1), found, atol=1e-6)
    assert features[9].neighbours[0] == (8, pytest.approx(1.0))  # two latents are equal, and each is not its own
    assert features[8].neighbours[0].latent == 9
    assert features[0].logits is None
    assert features.promoters(3) is None


def test_few_latents_have_few_neighbours(tmp_path, acts):
    features = build(dictionary(tmp_path / "sae", "standard", latents=6), acts, tmp_path / "out")
    assert [len(f.neighbours) for f in features] == [5] * 6
    assert np.isnan(features.array("near/cosine")[:, 5:]).all()


def test_the_same_bytes_for_shards_executors_and_kills(tmp_path, acts):
    folder, where = model(tmp_path / "model", "llama"), dictionary(tmp_path / "sae", "topk")
    build(where, acts, tmp_path / "one", model=folder)
    build(where, acts, tmp_path / "two", model=folder, shards=3, executor=Threads(3))
    assert len([name for name in content(tmp_path / "one") if name.startswith("log")]) > 8
    assert content(tmp_path / "two") == content(tmp_path / "one")
    for number, pattern in enumerate(("put near/id/c/1*", "put scratch/promote/*", "put logit_index/id/c/*")):
        out = tmp_path / f"killed{number}"
        with pytest.raises(Killed), Faults(matching(pattern, "kill")):
            build(where, acts, out, model=folder)
        build(where, acts, out, model=folder)
        assert content(out) == content(tmp_path / "one")


def test_models_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(DataError, match="not the folder of a model"):
        open_lens(tmp_path, WIDTH)
    folder = model(tmp_path / "model", "llama")
    with pytest.raises(DataError, match=r"lm_head.weight has shape \[1500, 12\], and rows have width 13"):
        open_lens(folder, 13)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(DataError, match=r"no unembedding that is known here.*Llama.*it has none"):
        open_lens(folder, WIDTH)


def test_another_model_is_another_job(tmp_path, acts):
    where = dictionary(tmp_path / "sae", "topk")
    build(where, acts, tmp_path / "out", model=model(tmp_path / "model", "llama"))
    with pytest.raises(Exception, match="lens was"):
        build(where, acts, tmp_path / "out", model=model(tmp_path / "other", "gpt2"))


def test_a_model_of_transformers(tmp_path):
    """The file of a model that transformers saved, and its own final norm and head."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=200, n_embd=WIDTH, n_layer=1, n_head=2, n_positions=8)
    torch.manual_seed(0)
    causal = transformers.GPT2LMHeadModel(config)
    causal.transformer.ln_f.weight.data.uniform_(0.5, 2)
    causal.save_pretrained(tmp_path / "gpt2")
    lens = open_lens(tmp_path / "gpt2", WIDTH)
    rows = torch.randn(5, WIDTH)
    found = lens.directions(rows) @ lens.tile(0).T
    norm = causal.transformer.ln_f
    spread = (rows - rows.mean(1, keepdim=True)).pow(2).mean(1, keepdim=True).add(norm.eps).sqrt()
    due = causal.lm_head(norm(rows) * spread - norm.bias * (spread - 1) - norm.bias)
    assert torch.allclose(found, due, atol=1e-5)
