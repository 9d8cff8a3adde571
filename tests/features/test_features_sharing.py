"""Exports equal what dense activations say, have exactly the keys of each format, and load in the peers themselves."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import actshuffle
import saetrain
from actshuffle.errors import DestinationExistsError
from actshuffle.executors import Threads
from actshuffle.testing import Faults, Killed, matching
from saetrain.cli import main
from saetrain.errors import DataError, ExchangeError
from saetrain.sharing.export import export_features
from saetrain.sharing.naming import Names
from support.features import LATENTS, TINY, content, dense, dictionary, store
from support.lenses import model

ROWS, LENGTH = 300, 16
NAMES = Names("tiny", 3, "res-40", "a", dataset="words", creator="me")

# The keys that each format has, from the peers' code.
DASHBOARD = """feature_index neuron_alignment_indices neuron_alignment_values neuron_alignment_l1
    correlated_neurons_indices correlated_neurons_l1 correlated_neurons_pearson correlated_features_indices
    correlated_features_l1
    correlated_features_pearson neg_str neg_values pos_str pos_values frac_nonzero freq_hist_data_bar_values
    freq_hist_data_bar_heights logits_hist_data_bar_heights logits_hist_data_bar_values n_prompts_total
    n_tokens_in_prompt dataset decoder_weights_dist vector activations"""
GROUP = "bin_min bin_max bin_contains tokens values qualifying_token_index"
TABLES = {
    "release.jsonl": """name description creatorName creatorId visibility isNewUi featured descriptionShort urls
        creatorEmail creatorNameShort defaultSourceSetName defaultSourceId defaultUmapSourceIds""",
    "model.jsonl": """id instruct creatorId displayNameShort displayName tlensId dimension visibility
        defaultSourceSetName defaultSourceId inferenceEnabled layers neuronsPerLayer owner website""",
    "sourceset.jsonl": """modelId name creatorId hasDashboards visibility description type creatorName urls creatorEmail
        releaseName defaultOfModelId defaultRange defaultShowBreaks showDfa showCorrelated showHeadAttribution
        showUmap""",
    "source.jsonl": """id modelId setName creatorId hasDashboards inferenceEnabled inferenceHosts saelensConfig
        saelensRelease saelensSaeId hfRepoId hfFolderId visibility defaultOfModelId hasUmap hasUmapLogSparsity
        hasUmapClusters num_prompts num_tokens_in_prompt dataset notes""",
    "features": """modelId layer index creatorId maxActApprox hasVector vector vectorLabel vectorDefaultSteerStrength
        hookName topkCosSimIndices topkCosSimValues neuron_alignment_indices neuron_alignment_values
        neuron_alignment_l1 correlated_neurons_indices correlated_neurons_pearson correlated_neurons_l1
        correlated_features_indices correlated_features_pearson correlated_features_l1 neg_str neg_values pos_str
        pos_values frac_nonzero freq_hist_data_bar_heights freq_hist_data_bar_values logits_hist_data_bar_heights
        logits_hist_data_bar_values decoder_weights_dist sourceSetName""",
    "activations": """id tokens index layer modelId maxValue maxValueTokenIndex minValue values creatorId dataSource
        dataIndex dfaValues dfaTargetIndex dfaMaxValue lossValues logitContributions binMin binMax binContains
        qualifyingTokenIndex zIndices zValues""",
}
PAGE = """index transcoder_id examples_quantiles top_logits bottom_logits act_min act_max quantile_values histogram
    activation_frequency"""


@pytest.fixture(scope="module")
def acts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return store(tmp_path_factory.mktemp("store") / "acts.zarr", ROWS)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, acts: Path) -> dict[str, Any]:
    """A result with codes and logits, one without, and the dense activations."""
    folder = tmp_path_factory.mktemp("built")
    where, causal = dictionary(folder / "sae", "topk"), model(folder / "model", "llama")
    common = {"fsync": False, "seed": 7, **TINY}
    saetrain.build_features(where, acts, folder / "kept", model=causal, keep_codes=True, **common)
    saetrain.build_features(where, acts, folder / "plain", **common)
    rows = actshuffle.open_dataset(acts).read("x", 0, ROWS)
    return {"kept": folder / "kept", "plain": folder / "plain", "dense": dense(where, rows), "sae": where}


def export(built: dict[str, Any], to: Path, format: str, which: str = "kept", **how: Any) -> Path:
    export_features(built[which], to, format, NAMES, **{"batch": 16, "length": LENGTH, "fsync": False} | how)
    return to


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def unpacked(folder: Path) -> list[dict[str, Any]]:
    paths = sorted(folder.glob("*.gz"), key=lambda path: int(path.name.split("-")[1].split(".")[0]))
    return [json.loads(line) for path in paths for line in gzip.decompress(path.read_bytes()).splitlines()]


# --- SAEDashboard -------------------------------------------------------------------------------


def test_dashboards(built, acts, tmp_path):
    out = export(built, tmp_path / "out", "saedashboard")
    batches = [read(out / f"batch-{i}.json") for i in range(3)]
    files = {"skipped_indexes.json", "run_settings.json", "done.json"} | {f"batch-{i}.json" for i in range(3)}
    assert {path.name for path in out.iterdir()} == files
    about = {name: value for name, value in batches[0].items() if name != "features"}
    assert about == {"model_id": "tiny", "layer": 3, "sae_set": "res-40", "sae_id_suffix": "a"}
    features = [f for batch in batches for f in batch["features"]]
    assert all(set(f) == set(DASHBOARD.split()) for f in features)
    dense, dead = built["dense"], read(out / "skipped_indexes.json")["skipped_indexes"]
    assert dead == np.flatnonzero((dense > 0).sum(0) == 0).tolist()
    assert [f["feature_index"] for f in features] == np.flatnonzero((dense > 0).sum(0)).tolist()
    tokens = actshuffle.open_dataset(acts).read("token", 0, ROWS)
    for f in features:
        column = dense[:, f["feature_index"]]
        active = column[column > 0]
        assert f["frac_nonzero"] == pytest.approx(len(active) / ROWS, rel=1e-3)
        edges = np.linspace(0, active.max(), 51)
        assert f["freq_hist_data_bar_heights"] == [
            int(((active > lo) & (active <= hi)).sum())
            for lo, hi in zip(edges[:-1], [*edges[1:-1], np.inf], strict=True)
        ]
        assert np.allclose(f["freq_hist_data_bar_values"], (edges[1:] + edges[:-1]) / 2, rtol=1e-3)
        assert f["pos_values"] == sorted(f["pos_values"], reverse=True)
        assert f["neg_values"] == sorted(f["neg_values"])
        assert sum(f["logits_hist_data_bar_heights"]) == 1500
        top = [a for a in f["activations"] if a["bin_min"] == -1]
        assert top[0]["values"][top[0]["qualifying_token_index"]] == pytest.approx(active.max(), rel=1e-3)
        for a in f["activations"]:
            assert set(a) == set(GROUP.split())
            assert len(a["tokens"]) == len(a["values"])
            value = a["values"][a["qualifying_token_index"]]
            if a["bin_min"] >= 0:
                share = ((active > a["bin_min"]) & (active <= a["bin_max"])).sum() / ROWS
                assert a["bin_contains"] == pytest.approx(share, abs=2 / ROWS)  # ends have four digits
                assert a["bin_min"] * 0.999 <= value <= a["bin_max"] * 1.001
    assert whole_windows(features, dense, tokens)


def whole_windows(features: list[dict[str, Any]], dense: np.ndarray, tokens: np.ndarray) -> bool:
    """True if every window is somewhere in the store, with its tokens and all its activations."""
    for f in features:
        column = dense[:, f["feature_index"]]
        for a in f["activations"]:
            n = len(a["tokens"])
            shown, values = np.array([int(t) for t in a["tokens"]]), np.array(a["values"])
            if not any(
                np.array_equal(tokens[at : at + n], shown) and np.allclose(column[at : at + n], values, rtol=1e-3)
                for at in range(ROWS - n + 1)
            ):
                return False
    return True


def test_control_windows_with_another_value_or_token(built, acts, tmp_path):
    out = export(built, tmp_path / "out", "saedashboard")
    tokens = actshuffle.open_dataset(acts).read("token", 0, ROWS)
    for name, change in (("values", lambda v: v + 1.0), ("tokens", lambda t: "99")):
        [first, *_] = read(out / "batch-0.json")["features"]
        shown = first["activations"][0]
        shown[name][0] = change(shown[name][0])
        assert not whole_windows([first], built["dense"], tokens)


def test_without_codes_totals_are_exact_and_bins_close(built, tmp_path):
    for batch in range(3):
        features = read(export(built, tmp_path / "out", "saedashboard", "plain") / f"batch-{batch}.json")["features"]
        for f in features:
            active = built["dense"][:, f["feature_index"]]
            active = np.sort(active[active > 0])
            counts = np.array(f["freq_hist_data_bar_heights"])
            assert counts.sum() == len(active)
            assert f["pos_str"] == f["logits_hist_data_bar_values"] == []
            due = np.searchsorted(active, np.linspace(0, active.max(), 51)[1:-1], side="right")
            assert np.abs(np.cumsum(counts)[:-1] - due).max() <= max(3, 0.2 * len(active))


# --- Neuronpedia --------------------------------------------------------------------------------


def test_bulk_tables(built, tmp_path):
    folder = export(built, tmp_path / "out", "neuronpedia") / "tiny/3-res-40__a"
    for name, keys in TABLES.items():
        if name.endswith("jsonl"):
            [row] = [json.loads(line) for line in (folder / name).read_text().splitlines()]
            assert set(row) == set(keys.split()), name
    neurons, activations = (unpacked(folder / name) for name in ("features", "activations"))
    assert [row["index"] for row in neurons] == [str(i) for i in range(LATENTS)]
    for rows, name in ((neurons, "features"), (activations, "activations")):
        assert {tuple(sorted(row)) for row in rows} == {tuple(sorted(TABLES[name].split()))}
    assert len({row["id"] for row in activations}) == len(activations)
    assert {len(row["id"]) for row in activations} == {25}
    dense, rows = built["dense"], saetrain.load(built["sae"]).W_dec.double().numpy()
    cosine = rows @ rows.T / np.outer(np.linalg.norm(rows, axis=1), np.linalg.norm(rows, axis=1))
    for row in neurons:
        index = int(row["index"])
        assert row["maxActApprox"] == pytest.approx(dense[:, index].max(), rel=1e-3)
        assert np.allclose(row["topkCosSimValues"], cosine[index][row["topkCosSimIndices"]], atol=1e-3)
        assert row["hookName"] == "blocks.3.hook_resid_post"
    for row in activations:
        assert row["values"][row["maxValueTokenIndex"]] == row["maxValue"] == max(row["values"])
        at = int(row["dataIndex"])
        assert row["values"][row["qualifyingTokenIndex"]] == pytest.approx(dense[at, int(row["index"])], rel=1e-3)


# --- Pages of attribution graphs ----------------------------------------------------------------


def test_graph_pages(built, tmp_path):
    folder, dense = export(built, tmp_path / "out", "graph") / "features/3-res-40__a", built["dense"]
    live = np.flatnonzero((dense > 0).sum(0))
    assert {path.name for path in folder.iterdir()} == {f"{index}.json" for index in live}
    repeated = 0
    for index in live:
        page, active = read(folder / f"{index}.json"), np.sort(dense[:, index][dense[:, index] > 0])
        assert set(page) == set(PAGE.split())
        assert page["index"] == index
        assert page["activation_frequency"] == pytest.approx(len(active) / ROWS, rel=1e-3)
        due = [active[max(int(np.ceil(p / 100 * len(active))) - 1, 0)] for p in range(100)]
        assert np.allclose(page["quantile_values"], due, rtol=1e-3)
        assert sum(page["histogram"]) == len(active)
        names = [group["quantile_name"] for group in page["examples_quantiles"]]
        assert names == ["Top Activations", *(f"Subsample Interval {i}" for i in range(3))]
        for example in (e for q in page["examples_quantiles"] for e in q["examples"]):
            assert set(example) == {"tokens", "tokens_acts_list", "train_token_ind", "is_repeated_datapoint"}
            repeated += example["is_repeated_datapoint"]
    assert repeated > 0  # an interval holds the top rows again


# --- delphi -------------------------------------------------------------------------------------


def dense_of(out: Path, hook: str = "blocks.3.hook_resid_post") -> tuple[np.ndarray, np.ndarray]:
    """Activations [rows, latents] and tokens [rows] of a cache, by the rule of delphi's loader."""
    from safetensors.numpy import load_file

    found = np.zeros((ROWS // LENGTH * LENGTH, LATENTS), np.float32)
    tokens = np.zeros(0)
    for path in (out / "latents" / hook).glob("*.safetensors"):
        first, last = map(int, path.stem.split("_"))
        held = load_file(path)
        sequence, position, latent = held["locations"].astype(np.int64).T
        assert latent.max(initial=0) <= last - first
        found[sequence * LENGTH + position, latent + first] = held["activations"]
        tokens = held["tokens"].reshape(-1)
    return found, tokens


def test_delphi_cache(built, acts, tmp_path):
    out = export(built, tmp_path / "out", "delphi")
    found, tokens = dense_of(out)
    assert np.allclose(found, built["dense"][: len(found)], rtol=1e-3)
    assert ((found > 0) == (built["dense"][: len(found)] > 0)).all()
    assert np.array_equal(tokens, actshuffle.open_dataset(acts).read("token", 0, len(tokens)))
    config = read(out / "latents/blocks.3.hook_resid_post/config.json")
    assert (config["ctx_len"], config["n_tokens"], config["model_name"]) == (LENGTH, len(tokens), "tiny")
    assert not np.allclose(found, np.roll(built["dense"], 1, axis=0)[: len(found)], rtol=1e-3)


# --- The job ------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["saedashboard", "neuronpedia", "graph", "delphi"])
def test_the_same_bytes_for_executors_and_kills(built, tmp_path, format):
    export(built, tmp_path / "due", format)
    export(built, tmp_path / "threads", format, executor=Threads(3))
    assert content(tmp_path / "threads") == content(tmp_path / "due")
    for pattern in ("put receipts/batch/1.json", "put done.json"):
        with pytest.raises(Killed), Faults(matching(pattern, "kill")):
            export(built, tmp_path / "out", format)
        export(built, tmp_path / "out", format)
        assert content(tmp_path / "out") == content(tmp_path / "due")
        shutil.rmtree(tmp_path / "out")


def test_what_a_format_cannot_have_is_refused(built, tmp_path):
    for format, which, more, text in (
        ("delphi", "plain", {}, "keeps no codes"),
        ("delphi", "kept", {"length": 301}, "sequences of 301 tokens"),
        ("other", "kept", {}, "formats are saedashboard"),
        ("graph", "kept", {"store": tmp_path / "none"}, "none is not that store"),
    ):
        with pytest.raises((ExchangeError, DataError), match=text):
            export(built, tmp_path / "out", format, which, **more)
    assert not (tmp_path / "out").exists()
    export(built, tmp_path / "out", "graph")
    with pytest.raises(DestinationExistsError, match="format was 'graph', now 'saedashboard'"):
        export(built, tmp_path / "out", "saedashboard")


def test_a_store_without_tokens_is_refused(built, tmp_path):
    bare = store(tmp_path / "acts.zarr", 60, token=False)
    saetrain.build_features(built["sae"], bare, tmp_path / "features", fsync=False, **TINY)
    with pytest.raises(ExchangeError, match="need the tokens of its store, and it has none"):
        export_features(tmp_path / "features", tmp_path / "out", "graph", NAMES)


def test_a_dictionary_that_is_gone(built, tmp_path):
    shutil.copytree(built["sae"], tmp_path / "sae")
    acts = store(tmp_path / "acts.zarr", 60)
    saetrain.build_features(tmp_path / "sae", acts, tmp_path / "features", fsync=False, **TINY)
    shutil.rmtree(tmp_path / "sae")
    export_features(tmp_path / "features", tmp_path / "out", "saedashboard", NAMES, fsync=False)
    [first, *_] = read(tmp_path / "out/batch-0.json")["features"]
    assert first["neuron_alignment_values"] == []


def test_the_command(built, tmp_path, capsys):
    words = ["export-features", str(built["kept"]), str(tmp_path / "out"), "--format", "graph", "--model-id", "tiny"]
    assert main([*words, "--layer", "3", "--set", "res-40", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tasks"] == 1
    assert (tmp_path / "out/features/3-res-40/0.json").exists()
    assert main([*words, "--layer", "-1", "--set", "x"]) == 2


# --- The peers themselves, where they are -------------------------------------------------------


def test_saedashboard_reads_the_batches(built, tmp_path):
    peer = pytest.importorskip("sae_dashboard.neuronpedia.neuronpedia_dashboard")
    out = export(built, tmp_path / "out", "saedashboard")
    for path in out.glob("batch-*.json"):
        held = read(path)
        found = peer.NeuronpediaDashboardBatch(**held)
        assert found.to_dict() == held
    with pytest.raises(TypeError):
        peer.NeuronpediaDashboardFeature(**held["features"][0] | {"other": 1})


def test_circuit_tracer_reads_the_pages(built, tmp_path):
    peer = pytest.importorskip("circuit_tracer.frontend.feature_models")
    for path in export(built, tmp_path / "out", "graph").glob("features/*/*.json"):
        held = read(path)
        assert peer.Model.model_validate(held, strict=True).model_dump() == held
    with pytest.raises(ValueError, match="act_max"):
        peer.Model.model_validate({k: v for k, v in held.items() if k != "act_max"})


def test_delphi_reads_the_cache(built, tmp_path):
    peer = pytest.importorskip("delphi.latents.loader")
    out = export(built, tmp_path / "out", "delphi")
    hook = "blocks.3.hook_resid_post"
    found = np.zeros((ROWS // LENGTH * LENGTH, LATENTS), np.float32)
    for path in (out / "latents" / hook).glob("*.safetensors"):
        buffer = peer.TensorBuffer(str(path), hook)
        assert buffer.tokens.shape == (ROWS // LENGTH, LENGTH)
        for data in buffer:
            at = data.activation_data.locations
            row, latent = at[:, 0] * LENGTH + at[:, 1], data.latent.latent_index
            assert torch.equal(at[:, 2], torch.full_like(at[:, 2], latent))
            found[row, latent] = data.activation_data.activations
    assert np.allclose(found, built["dense"][: len(found)], rtol=1e-3)
