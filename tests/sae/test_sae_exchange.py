"""Export and import: our own reading of the formats, and SAELens and sparsify themselves where installed."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import saetrain
from saetrain import exchange
from saetrain.cli import main
from saetrain.errors import CheckpointError, ExchangeError
from saetrain.tensors import Spec, TensorFile, write
from saetrain.training import checkpoint
from saetrain.training.train import fit
from support.sae import ARCHS, MemorySource, Planted, one_rank, small

FORMATS = [("saelens", arch) for arch in ARCHS] + [("sparsify", "topk")]


def peer(name: str) -> Any:
    """A peer's package, or a skipped test."""
    pytest.importorskip(name)
    return importlib.import_module(name)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor, dict[str, torch.Tensor]]:
    """A run of each variant, raw rows far from zero, and what the sharded models make of them."""
    data, folder, out = Planted.make(2048, 16, 24), tmp_path_factory.mktemp("runs"), {}
    data.rows = data.rows * 7 + 3
    with one_rank() as mesh:
        for arch in ARCHS:
            source = MemorySource(data.rows, data.documents)
            fit(source, {folder / arch: small(arch, compute="float32", lr=1e-2)}, mesh)
            model = checkpoint.load(checkpoint.find(folder / arch), mesh).model
            x, _ = model.reconstruct(model.norm(data.rows[-100:]))
            out[arch] = x / model.norm.scale + model.norm.mean
    return folder, data.rows[-100:], out


@pytest.mark.parametrize("arch", ARCHS)
def test_folded_models_compute_what_sharded_ones_do(arch: str, trained: Any) -> None:
    folder, rows, expected = trained
    sae = saetrain.load(folder / arch)
    torch.testing.assert_close(sae(rows), expected[arch], rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(64))


@pytest.mark.parametrize(("format", "arch"), FORMATS)
def test_round_trip(format: str, arch: str, trained: Any, tmp_path: Path) -> None:
    folder, rows, expected = trained
    assert main(["export", str(folder / arch), str(tmp_path / "out"), "--format", format]) == 0
    read = saetrain.load(tmp_path / "out")
    torch.testing.assert_close(read(rows), expected[arch], rtol=1e-4, atol=1e-3)
    assert main(["import", str(tmp_path / "out"), str(tmp_path / "run")]) == 0
    again = saetrain.load(tmp_path / "run")
    torch.testing.assert_close(again(rows), expected[arch], rtol=1e-4, atol=1e-3)
    assert torch.equal(again.encode(rows) > 0, read.encode(rows) > 0)


def test_stripes_and_blocks_give_the_same_file(trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, *_ = trained
    exchange.export(folder / "jumprelu", tmp_path / "whole")
    monkeypatch.setattr("saetrain.exchange.STRIPE_BYTES", 3 * 64 * 4)
    monkeypatch.setattr("saetrain.sae.BLOCK", 10)
    exchange.export(folder / "jumprelu", tmp_path / "parts")
    a, b = (TensorFile(tmp_path / n / "sae_weights.safetensors") for n in ("whole", "parts"))
    assert a.specs == b.specs
    for name in a.specs:
        torch.testing.assert_close(a.read(name), b.read(name), rtol=1e-6, atol=1e-6)


def test_a_changed_weight_is_noticed(trained: Any, tmp_path: Path) -> None:
    folder, rows, expected = trained
    exchange.export(folder / "topk", tmp_path / "out")
    sae = saetrain.load(tmp_path / "out")
    sae.W_dec[:, 0] += 0.01
    with pytest.raises(AssertionError):
        torch.testing.assert_close(sae(rows), expected["topk"], rtol=1e-4, atol=1e-3)


def test_what_would_not_compute_identically_is_refused(trained: Any, tmp_path: Path) -> None:
    folder, *_ = trained
    with pytest.raises(ExchangeError, match="topk models only"):
        exchange.export(folder / "relu", tmp_path / "x", "sparsify")
    exchange.export(folder / "topk", tmp_path / "out")
    with pytest.raises(ExchangeError, match="not empty"):
        exchange.export(folder / "topk", tmp_path / "out")
    good = json.loads((tmp_path / "out" / "cfg.json").read_text())
    for change in (
        {"architecture": "gated"},
        {"normalize_activations": "layer_norm"},
        {"reshape_activations": "hook_z"},
    ):
        (tmp_path / "out" / "cfg.json").write_text(json.dumps(good | change))
        with pytest.raises(ExchangeError, match=next(iter(change))):
            saetrain.load(tmp_path / "out")
    (tmp_path / "out" / "cfg.json").write_text("{")
    with pytest.raises(ExchangeError, match="cannot be read"):
        saetrain.load(tmp_path / "out")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        saetrain.load(tmp_path)


def test_norms_that_saelens_keeps_apart_are_folded(tmp_path: Path) -> None:
    w, norm = torch.randn(8, 4), torch.arange(1.0, 9.0)
    unit = w / w.norm(dim=1, keepdim=True)
    tensors = {
        "W_enc": w.T.contiguous(),
        "b_enc": torch.zeros(8),
        "W_dec": unit * norm[:, None],
        "b_dec": torch.ones(4),
    }
    specs = {n: Spec(t.dtype, tuple(t.shape)) for n, t in tensors.items()}
    write(tmp_path / "sae_weights.safetensors", specs, tensors.items(), {})
    cfg = {"architecture": "topk", "k": 3, "d_in": 4, "d_sae": 8, "rescale_acts_by_decoder_norm": True}
    (tmp_path / "cfg.json").write_text(json.dumps(cfg))
    rows = torch.randn(20, 4)
    pre = (rows - 1) @ w.T * norm
    value, index = pre.topk(3)
    expected = torch.zeros_like(pre).scatter_(1, index, value.relu()) @ unit + 1
    torch.testing.assert_close(saetrain.load(tmp_path)(rows), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu"])
def test_an_import_keeps_its_data_type(architecture: str, dtype: torch.dtype, tmp_path: Path) -> None:
    w = torch.randn(8, 4).to(dtype)
    unit = (w / w.norm(dim=1, keepdim=True)).to(dtype)
    tensors = {"W_enc": w.T.contiguous(), "b_enc": torch.zeros(8).to(dtype), "W_dec": unit, "b_dec": w[0]}
    if architecture == "jumprelu":
        tensors["threshold"] = torch.ones(8).to(dtype)
    write(
        tmp_path / "sae_weights.safetensors",
        {n: Spec(t.dtype, tuple(t.shape)) for n, t in tensors.items()},
        tensors.items(),
        {},
    )
    cfg = {"architecture": architecture, "k": 3, "d_in": 4, "d_sae": 8, "apply_b_dec_to_input": False}
    (tmp_path / "cfg.json").write_text(json.dumps(cfg))
    exchange.bring(tmp_path, tmp_path / "run")
    found, theirs = saetrain.load(tmp_path / "run"), saetrain.load(tmp_path)
    assert found.W_enc.dtype == dtype
    rows = torch.randn(20, 4)
    torch.testing.assert_close(found.decode(found.encode(rows)), theirs(rows), rtol=0.1, atol=0.1)


# --- the peers themselves


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("arch", ARCHS)
def test_saelens_loads_ours(arch: str, trained: Any, tmp_path: Path) -> None:
    folder, rows, expected = trained
    exchange.export(folder / arch, tmp_path / "out")
    theirs = peer("sae_lens").SAE.load_from_disk(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(theirs(rows), expected[arch], rtol=1e-4, atol=1e-3)
        acts = saetrain.load(tmp_path / "out").encode(rows)
        torch.testing.assert_close(theirs.encode(rows), acts, rtol=1e-4, atol=1e-3)


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["StandardSAE", "TopKSAE", "JumpReLUSAE"])
@pytest.mark.parametrize("subtract", [True, False])
def test_we_load_what_saelens_saves(kind: str, subtract: bool, tmp_path: Path) -> None:
    lens = peer("sae_lens")
    more = {"k": 5} if kind == "TopKSAE" else {}
    config = getattr(lens, f"{kind}Config")(d_in=16, d_sae=64, apply_b_dec_to_input=subtract, **more)
    theirs = getattr(lens, kind)(config)
    for param in theirs.parameters():
        param.data = torch.randn_like(param)
    if kind == "JumpReLUSAE":
        theirs.threshold.data = torch.rand(64)
    theirs.save_model(tmp_path / "theirs")
    rows = torch.randn(50, 16)
    exchange.bring(tmp_path / "theirs", tmp_path / "run")
    with torch.no_grad():
        for ours in (saetrain.load(tmp_path / "theirs"), saetrain.load(tmp_path / "run")):
            torch.testing.assert_close(ours(rows), theirs(rows), rtol=1e-3, atol=1e-3)


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
def test_sparsify_loads_ours_and_we_load_theirs(trained: Any, tmp_path: Path) -> None:
    folder, rows, expected = trained
    coder = peer("sparsify").SparseCoder
    config = peer("sparsify").SparseCoderConfig
    exchange.export(folder / "topk", tmp_path / "ours", "sparsify")
    with torch.no_grad():
        loaded = coder.load_from_disk(tmp_path / "ours")
        top, index, _ = loaded.encode(rows)
        torch.testing.assert_close(loaded.decode(top, index), expected["topk"], rtol=1e-4, atol=1e-3)
        theirs = coder(16, config(num_latents=64, k=4))
        theirs.b_dec.data = torch.randn(16)
        theirs.encoder.bias.data = torch.randn(64)
        theirs.save_to_disk(tmp_path / "theirs")
        top, index, _ = theirs.encode(rows)
        torch.testing.assert_close(
            saetrain.load(tmp_path / "theirs")(rows), theirs.decode(top, index), rtol=1e-4, atol=1e-3
        )


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
def test_our_fvu_is_sparsifys(tmp_path: Path) -> None:
    from saetrain.training.metrics import batch_fvu

    coder, config = peer("sparsify").SparseCoder, peer("sparsify").SparseCoderConfig
    theirs, rows = coder(16, config(num_latents=64, k=4)), torch.randn(50, 16)
    with torch.no_grad(), one_rank() as mesh:
        out = theirs(rows)
        assert batch_fvu(rows, out.sae_out - rows, mesh) == pytest.approx(float(out.fvu), rel=1e-5)


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
def test_safetensors_itself_reads_and_writes_what_we_do(tmp_path: Path) -> None:
    theirs = importlib.import_module(f"{peer('safetensors').__name__}.torch")
    tensors = {"a": torch.randn(3, 5), "b": torch.arange(4), "c": torch.randn(2).bfloat16(), "empty": torch.zeros(0, 3)}
    specs = {n: Spec(t.dtype, tuple(t.shape)) for n, t in tensors.items()}
    write(tmp_path / "ours", specs, [(n, t) for n, t in tensors.items() if t.numel()], {"format": "pt"})
    theirs.save_file(tensors, tmp_path / "theirs")
    found, ours = theirs.load_file(tmp_path / "ours"), TensorFile(tmp_path / "theirs")
    for name, value in tensors.items():
        assert torch.equal(found[name], value)
        assert torch.equal(ours.read(name), value)
