"""Export and import: our own reading of the formats, and SAELens and sparsify themselves where installed."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import zarr

import saetrain
from saetrain.cli import main
from saetrain.config import Config
from saetrain.data import Store
from saetrain.errors import CheckpointError, ConfigError, ExchangeError
from saetrain.exchange import folders as exchange
from saetrain.exchange import modelcard
from saetrain.foreign import SAELENS_KEYS, SPARSIFY_KEYS
from saetrain.tensors import Spec, TensorFile, write
from saetrain.training import checkpoint, start
from saetrain.training.start import Start
from saetrain.training.train import fit
from saetrain.variants.table import VARIANTS
from support.sae import ARCHS, MemorySource, Planted, norm_of, one_rank, small

FORMATS = [("saelens", arch) for arch in ARCHS] + [("sparsify", "topk")]


def peer(name: str) -> Any:
    """A peer's package, or a skipped test."""
    pytest.importorskip(name)
    return importlib.import_module(name)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor, dict[str, torch.Tensor]]:
    """A run of each variant, raw rows far from zero, and the outputs of the sharded models on them."""
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


def test_an_export_names_model_and_hook_and_has_a_card(
    trained: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, *_ = trained
    shutil.copytree(folder / "topk", run := tmp_path / "run")
    assert main(["export", str(run), str(tmp_path / "bare")]) == 0
    assert "--model-id" in capsys.readouterr().err, "no model is known"
    assert "hook_name" not in json.loads((tmp_path / "bare" / "cfg.json").read_text())["metadata"]

    recorded = json.loads((run / "config.json").read_text())
    recorded["about"] |= {"input": "layer_10", "model": {"name": "gpt2", "layers": 12}, "prefix": "<s>"}
    (run / "config.json").write_text(json.dumps(recorded))
    assert main(["export", str(run), str(tmp_path / "out")]) == 0
    assert "of gpt2 at blocks.9.hook_resid_post" in capsys.readouterr().out
    metadata = json.loads((tmp_path / "out" / "cfg.json").read_text())["metadata"]
    assert (metadata["model_name"], metadata["hook_name"]) == ("gpt2", "blocks.9.hook_resid_post")
    assert metadata["prepend_bos"] is True
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: saelens\n")
    last = [line for line in saetrain.Run(run).lines if "eval_fvu" in line][-1]
    assert f"{last['eval_fvu']:.4f}" in card
    assert 'base_model: "gpt2"' in card

    given = ["--format", "sparsify", "--model-id", "org/model", "--hook-name", "layers.9", "--json"]
    assert main(["export", str(run), str(tmp_path / "given"), *given]) == 0
    names = {"model_name": "org/model", "hook_name": "layers.9", "prepend_bos": True}
    assert json.loads(capsys.readouterr().out)["names"] == names


def test_names_of_collected_arrays(tmp_path: Path) -> None:
    model = {"name": "gpt2", "layers": 12}
    assert modelcard.hooks("layer_0", model) == {"hook_name": "blocks.0.hook_resid_pre"}
    assert modelcard.hooks("layer_1", model) == {"hook_name": "blocks.0.hook_resid_post"}
    assert modelcard.hooks("layer_12", model) == {}, "it has the final norm"
    assert modelcard.hooks("h.3.mlp", model) == {"hook_name": "h.3.mlp", "hf_hook_name": "h.3.mlp"}
    assert modelcard.hooks("layer_3", {}) == {}, "an array of that name, of nobody knows where"
    group = zarr.create_group(tmp_path / "rows.zarr")
    group.create_array("layer_3", data=Planted.make(64, 16, 24).rows.numpy())
    settings = Config(incomplete=True)
    assert Store(tmp_path / "rows.zarr", settings).origin == {}
    group.attrs["model"] = {"name": "/models/gpt2", "layers": 12}
    group.attrs["row_filter"] = {"prefix": {"id": 1, "token": "<s>"}}
    assert Store(tmp_path / "rows.zarr", settings).origin == {"model": model, "prefix": "<s>"}


# --- weights to start from


def filled(name: Path, arch: str, rows: torch.Tensor, **more: Any) -> torch.Tensor:
    """What a model for rows of other statistics computes of raw rows, with the weights of a run or folder."""
    norm = norm_of(rows[:50] * 0.5 + torch.arange(rows.shape[1]))
    with one_rank() as mesh:
        model = VARIANTS[arch](small(arch, **more), norm, mesh)
        Start(str(name), exchange.weights_of(name)).fill(model, model.norm(rows))
        assert not model.unit_rows or torch.allclose(model.row_norms(), torch.ones(64, dtype=torch.float64))
        return model.reconstruct(model.norm(rows))[0] / model.norm.scale + model.norm.mean


@pytest.mark.parametrize(("format", "arch"), [("", arch) for arch in ARCHS] + FORMATS)
def test_weights_start_a_model_of_other_rows_as_the_same_function(
    format: str, arch: str, trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, rows, expected = trained
    name, taken = folder / arch, arch
    if format:
        name, taken = tmp_path / "out", VARIANTS[arch].activation
        exchange.export(folder / arch, name, format)
    found = filled(name, taken, rows)
    torch.testing.assert_close(found, expected[arch].double(), rtol=1e-4, atol=1e-3)
    unmoved = torch.ones(16, dtype=torch.float64), torch.zeros(16, dtype=torch.float64)
    monkeypatch.setattr(start, "_between", lambda old, new: unmoved)  # the control
    assert not torch.allclose(filled(name, taken, rows), expected[arch].double(), rtol=1e-2, atol=1e-1)


def test_weights_of_the_same_rows_are_taken_to_the_bit(trained: Any, tmp_path: Path) -> None:
    folder, rows, _ = trained
    theirs = checkpoint.find(folder / "gated")
    with one_rank() as mesh:
        model = VARIANTS["gated"](small("gated", compute="float32"), theirs.norms()[0], mesh)
        Start("gated", theirs).fill(model, model.norm(rows))
    assert all(torch.equal(tensor, theirs.read(name)) for name, tensor in model.params.items())


def test_kin_may_start_from_kin_and_others_are_refused(trained: Any) -> None:
    folder, rows, _ = trained
    start_of = filled(folder / "topk", "batchtopk", rows)  # its threshold is measured
    error = (start_of - rows).square().sum() / (rows - rows.mean(0)).square().sum()
    assert float(error) < 1
    for arch, more, words in (("relu", {}, "arch topk / relu"), ("topk", {"d_sae": 128}, "d_sae 64 / 128")):
        with pytest.raises(ConfigError, match=f"the weights of .*topk do not fit this run: {words}"):
            filled(folder / "topk", arch, rows, **more)
    with pytest.raises(ConfigError, match="widths of the input 16 / 15"):
        filled(folder / "topk", "topk", rows[:, :15])


def test_stripes_and_blocks_give_the_same_file(trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, *_ = trained
    exchange.export(folder / "jumprelu", tmp_path / "whole")
    monkeypatch.setattr("saetrain.exchange.folders.STRIPE_BYTES", 3 * 64 * 4)
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
        {"architecture": "temporal"},
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


def test_gated_of_saelens_is_read_as_the_jumprelu_that_it_is(tmp_path: Path) -> None:
    w, gate, mag, r = torch.randn(8, 4), torch.randn(8), torch.randn(8), torch.randn(8)
    tensors = {"W_enc": w.T.contiguous(), "b_gate": gate, "b_mag": mag, "r_mag": r, "W_dec": w, "b_dec": torch.ones(4)}
    specs = {n: Spec(t.dtype, tuple(t.shape)) for n, t in tensors.items()}
    write(tmp_path / "sae_weights.safetensors", specs, tensors.items(), {})
    (tmp_path / "cfg.json").write_text(json.dumps({"architecture": "gated", "d_in": 4, "d_sae": 8}))
    rows = torch.randn(200, 4)
    z = (rows - 1) @ w.T
    expected = (z + gate > 0) * (z * r.exp() + mag).relu()
    found = saetrain.load(tmp_path)
    torch.testing.assert_close(found.encode(rows), expected)
    assert 0.1 < float((expected > 0).float().mean()) < 0.9
    assert bool(((z + gate > 0) != (z * r.exp() + mag > 0)).any())  # the halves decide differently


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


# --- only what is known is read

WEIGHTS = {
    "saelens": {"W_enc": (4, 8), "b_enc": (8,), "W_dec": (8, 4), "b_dec": (4,)},
    "sparsify": {"encoder.weight": (8, 4), "encoder.bias": (8,), "W_dec": (8, 4), "b_dec": (4,)},
}
FILES = {"saelens": "sae_weights.safetensors", "sparsify": "sae.safetensors"}
KEYS = {"saelens": SAELENS_KEYS, "sparsify": SPARSIFY_KEYS}
TOPK: dict[str, dict[str, Any]] = {
    "saelens": {"architecture": "topk", "k": 3, "d_in": 4, "d_sae": 8},
    "sparsify": {"activation": "topk", "k": 3, "d_in": 4, "num_latents": 8},
}


def foreign(folder: Path, format: str, cfg: dict[str, Any], **tensors: torch.Tensor) -> Path:
    """A folder of 8 latents, 4 wide, with these settings and tensors in place of or beside the usual ones."""
    folder.mkdir(exist_ok=True)
    rng = torch.Generator().manual_seed(1)
    held = {n: torch.randn(shape, generator=rng) for n, shape in WEIGHTS[format].items()} | tensors
    specs = {n: Spec(t.dtype, tuple(t.shape)) for n, t in held.items()}
    write(folder / FILES[format], specs, held.items(), {})
    (folder / "cfg.json").write_text(json.dumps(cfg))
    return folder


@pytest.mark.parametrize(
    ("format", "change", "words"),
    [
        ("saelens", {"architecture": "standard", "activation_fn_str": "tanh-relu"}, "activation_fn_str 'tanh-relu'"),
        ("saelens", {"activation_fn": "tanh-relu"}, "activation_fn 'tanh-relu'"),
        ("saelens", {"activation_fn_str": "relu"}, "'topk' with activation_fn_str 'relu'"),
        ("saelens", {"activation_fn_str": "topk", "activation_fn": "relu"}, "is not supported"),
        ("saelens", {"architecture": "temporal"}, "architecture 'temporal'"),
        ("saelens", {"architecture": None}, "architecture None"),
        ("saelens", {"activation_fn_kwargs": {"k": 4}}, "contradicts topk with k 3"),
        ("saelens", {"activation_fn_kwargs": {"slope": 1}}, "activation_fn_kwargs"),
        ("saelens", {"normalize_activations": "expected_average_only_in"}, "normalize_activations"),
        ("saelens", {"normalize_activations": True}, "normalize_activations True"),
        ("saelens", {"reshape_activations": "hook_z"}, "reshape_activations"),
        ("saelens", {"finetuning_scaling_factor": True}, "finetuning_scaling_factor"),
        ("saelens", {"architecture": "standard", "rescale_acts_by_decoder_norm": True}, "for topk only"),
        ("saelens", {"apply_b_dec_to_input": "no"}, "apply_b_dec_to_input 'no'"),
        ("saelens", {"d_out": 4}, "'d_out'"),
        ("saelens", {"hardcoded_norm": 2.0}, "'hardcoded_norm'"),
        ("saelens", {"d_in": 5}, r"W_enc has shape \[4, 8\]"),
        ("saelens", {"d_sae": 9}, r"W_enc has shape \[4, 8\]"),
        ("saelens", {"k": 9}, "k is 9"),
        ("saelens", {"k": 2.5}, "k 2.5"),
        ("saelens", {"k": True}, "k True"),
        ("saelens", {"dtype": "int8"}, "dtype 'int8'"),
        ("sparsify", {"activation": "groupmax"}, "activation 'groupmax'"),
        ("sparsify", {"skip_connection": True}, "skip_connection"),
        ("sparsify", {"transcode": True}, "transcode"),
        ("sparsify", {"embed_skip": True}, "'embed_skip'"),
        ("sparsify", {"signed": True}, "signed"),
        ("sparsify", {"architecture": "jumprelu"}, "'architecture'"),
        ("sparsify", {"d_in": 8}, "encoder.weight has shape"),
        ("sparsify", {"num_latents": 7}, "encoder.weight has shape"),
        ("sparsify", {"k": 0}, "k 0"),
    ],
)
def test_a_setting_that_is_not_known_is_refused(
    format: str, change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    good = TOPK[format]
    saetrain.load(foreign(tmp_path / "good", format, good))
    with pytest.raises(ExchangeError, match=words):
        saetrain.load(foreign(tmp_path / "bad", format, good | change))
    assert main(["import", str(tmp_path / "bad"), str(tmp_path / "run")]) == 2
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("format", FILES)
def test_every_accepted_setting_leaves_the_function_as_it_is(format: str, tmp_path: Path) -> None:
    """Each value here is accepted; those of 'anything' are texts."""
    rows, good = torch.randn(20, 4), TOPK[format]
    due = saetrain.load(foreign(tmp_path, format, good))(rows)
    for name, accepted in KEYS[format].items():
        tried = ["text", None, False, True, 1, 0, "none", "topk", "cpu", "float32", {}]
        allowed = [value for value in tried if accepted.allows(value)]
        assert allowed or name == "architecture"
        for value in allowed:
            if name in ("d_in", "d_sae", "num_latents", "k", "apply_b_dec_to_input", "rescale_acts_by_decoder_norm"):
                continue  # these say what the function is, and have tests above and below
            assert torch.equal(saetrain.load(foreign(tmp_path, format, good | {name: value}))(rows), due), name


@pytest.mark.parametrize(
    ("format", "tensors", "words"),
    [
        ("saelens", {"threshold": torch.ones(8)}, "'threshold' is unknown"),
        ("saelens", {"r_mag": torch.ones(8)}, "'r_mag' is unknown"),
        ("saelens", {"scaling_factor": torch.full((8,), 2.0)}, "scaling_factor differs from 1"),
        ("saelens", {"b_dec": torch.zeros(5)}, r"b_dec has shape \[5\]"),
        ("saelens", {"b_enc": torch.zeros(8, dtype=torch.int64)}, "b_enc has type torch.int64"),
        ("saelens", {"b_enc": torch.zeros(8, dtype=torch.float64)}, "b_enc has type torch.float64"),
        ("saelens", {"W_dec": torch.full((8, 4), torch.nan)}, "W_dec holds numbers that are not finite"),
        ("sparsify", {"W_skip": torch.ones(4, 4)}, "'W_skip' is unknown"),
        ("sparsify", {"encoder.bias": torch.zeros(7)}, r"encoder.bias has shape \[7\]"),
    ],
)
def test_a_tensor_that_is_not_known_is_refused(
    format: str, tensors: dict[str, torch.Tensor], words: str, tmp_path: Path
) -> None:
    with pytest.raises(ExchangeError, match=words):
        saetrain.load(foreign(tmp_path, format, TOPK[format], **tensors))


def test_factors_of_one_are_accepted(tmp_path: Path) -> None:
    rows = torch.randn(20, 4)
    due = saetrain.load(foreign(tmp_path, "saelens", TOPK["saelens"]))(rows)
    found = saetrain.load(foreign(tmp_path, "saelens", TOPK["saelens"], scaling_factor=torch.ones(8)))
    assert torch.equal(found(rows), due)


def test_the_same_topk_before_version_6(tmp_path: Path) -> None:
    rows, old = torch.randn(20, 4), {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 3}}
    due = saetrain.load(foreign(tmp_path, "saelens", TOPK["saelens"]))(rows)
    for architecture in ({}, {"architecture": "standard"}, {"architecture": "topk"}):
        found = saetrain.load(foreign(tmp_path, "saelens", {"hook_point": "x", **architecture, **old}))
        assert torch.equal(found(rows), due)


def test_a_negative_threshold_lets_no_negative_activation_through(tmp_path: Path) -> None:
    cfg = {"architecture": "jumprelu", "d_in": 4, "d_sae": 8}
    found = saetrain.load(foreign(tmp_path / "x", "saelens", cfg, threshold=torch.full((8,), -0.5)))
    rows = torch.randn(200, 4)
    pre = (rows - found.b_dec) @ found.W_enc.T + found.b_enc
    assert torch.equal(found.encode(rows), pre.relu() * (pre > -0.5))
    exchange.bring(tmp_path / "x", tmp_path / "run")
    torch.testing.assert_close(saetrain.load(tmp_path / "run")(rows), found(rows))


def test_two_files_of_weights_are_refused(tmp_path: Path) -> None:
    foreign(tmp_path, "sparsify", {})
    foreign(tmp_path, "saelens", TOPK["saelens"])
    with pytest.raises(ExchangeError, match=r"holds sae_weights\.safetensors and sae\.safetensors of"):
        saetrain.load(tmp_path)
    (tmp_path / "cfg.json").write_text("[]")
    with pytest.raises(ExchangeError, match="holds list"):
        saetrain.load(tmp_path)


def test_an_export_refuses_tensors_that_are_not_of_the_variant(trained: Any, tmp_path: Path) -> None:
    shutil.copytree(trained[0] / "topk", tmp_path / "run")
    folder = checkpoint.published(tmp_path / "run")[0]
    state = json.loads((folder / "state.json").read_text())
    [name] = state["shards"]
    old = TensorFile(folder / name)
    held = {n: old.read(n) for n in old.specs} | {"W_skip": torch.ones(64, 16)}
    specs = {n: Spec(t.dtype, tuple(t.shape)) for n, t in held.items()}
    state["shards"][name] = write(folder / name, specs, held.items(), {})
    (folder / "state.json").write_text(json.dumps(state))
    for format in FILES:
        with pytest.raises(CheckpointError, match="W_skip, which topk has not"):
            exchange.export(tmp_path / "run", tmp_path / "out", format)
    assert not (tmp_path / "out").exists()


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
@pytest.mark.parametrize("kind", ["StandardSAE", "TopKSAE", "JumpReLUSAE", "GatedSAE"])
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
