"""Edges of an attribution graph: exact where the model between the layers is linear, and in the public schema."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from saetrain.cli import main
from saetrain.errors import ConfigError
from saetrain.probing.causal import LanguageModel
from saetrain.probing.frozen import frozen
from saetrain.probing.graph import Graph, trace
from support.causal import dictionary, saved, tiny

TOKENS = [3, 9, 17, 4, 33, 20]


def pair(dtype: torch.dtype = torch.float64, perceptrons: bool = True) -> tuple[LanguageModel, LanguageModel]:
    low = tiny(1, dtype=dtype)
    if not perceptrons:
        for block in low.blocks:
            block.mlp.down_proj.weight.data.zero_()
    return low, LanguageModel(low.model, low.tokenizer, 2, low.name)


def traced(models: tuple[LanguageModel, LanguageModel], nodes: int = 10**6) -> Graph:
    lower, upper = (dictionary("relu", dtype=torch.float64, seed=seed) for seed in (3, 4))
    return trace(lower, upper, models, TOKENS, logits=3, nodes=nodes)


def test_freezing_changes_no_value_and_makes_attention_linear() -> None:
    low, high = pair(perceptrons=False)
    window = torch.tensor([TOKENS])
    x = low.hidden(window)

    def above(rows: torch.Tensor) -> torch.Tensor:
        held: list[torch.Tensor] = []
        with low.editing(lambda _, __: rows):
            high.run(window, lambda y, _: held.append(y) or y)  # type: ignore[func-returns-value]
        return held[0]

    plain = above(x)
    with frozen(low):
        leaf = x.clone().requires_grad_()
        y = above(leaf)
        assert torch.allclose(y.detach(), plain, rtol=1e-5, atol=1e-5)
        (g,) = torch.autograd.grad(y[0, 4, 7], leaf)
        assert float((g * x).sum()) == pytest.approx(float(plain[0, 4, 7]), rel=1e-4)  # no constant is left
    leaf = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(above(leaf)[0, 4, 7], leaf)  # negative control: patterns and scales move
    assert abs(float((g * x).sum()) / float(plain[0, 4, 7]) - 1) > 1e-2
    with pytest.raises(ConfigError, match="as in Llama"), frozen(tiny(1, "gpt2")):
        pass


def test_edges_into_a_feature_sum_to_its_preactivation() -> None:
    models = pair(perceptrons=False)
    found = traced(models)
    lower, upper = (dictionary("relu", dtype=torch.float64, seed=seed) for seed in (3, 4))
    x, y = (model.hidden(torch.tensor([TOKENS]))[0] for model in models)
    into: dict[int, float] = {}
    for source, target, weight in found.links:
        into[target] = into.get(target, 0.0) + (weight if found.nodes[source].layer == 1 else 0.0)
    checked = 0
    for number, node in enumerate(found.nodes):
        if node.kind != "feature" or node.layer != 2:
            continue
        with frozen(models[0]):  # what the bias and the first position add, by the same gradient
            leaf = x[None].clone().requires_grad_()
            held: list[torch.Tensor] = []
            with models[0].editing(lambda _, __, leaf=leaf: leaf):
                models[1].run(torch.tensor([TOKENS]), lambda y, _, held=held: held.append(y) or y)
            pre = held[0][0, node.position] @ upper.W_enc[node.index]
            (g,) = torch.autograd.grad(pre, leaf)
        others = float((g[0, 0] * x[0]).sum() + (g[0, 1:] @ lower.b_dec).sum())
        assert into[number] + others == pytest.approx(
            float(y[node.position] @ upper.W_enc[node.index]), rel=1e-3, abs=1e-3
        )
        assert node.value == pytest.approx(float(upper.encode(y)[node.position, node.index]))
        checked += 1
    assert checked > 50
    assert found.kept == pytest.approx({1: 1.0, 2: 1.0})


def test_edges_into_logits_equal_their_definition() -> None:
    models = pair()
    found = traced(models)
    upper = dictionary("relu", dtype=torch.float64, seed=4)
    y = models[1].hidden(torch.tensor([TOKENS])).requires_grad_()
    with frozen(models[1]):
        logits = models[1].run(torch.tensor([TOKENS]), lambda _, __: y).logits[0, -1]
        assert [n.index for n in found.nodes if n.kind == "logit"] == logits.topk(3).indices.tolist()
        weights = {(a, b): w for a, b, w in found.links}
        acts = upper.encode(y[0].detach())
        for b, logit in enumerate(found.nodes):
            if logit.kind == "logit":
                (g,) = torch.autograd.grad(logits[logit.index] - logits.mean(), y, retain_graph=True)
                for a, node in enumerate(found.nodes):
                    if node.kind == "feature" and node.layer == 2:
                        t, j = node.position, node.index
                        assert weights[a, b] == pytest.approx(float(acts[t, j] * (upper.W_dec[j] @ g[0, t])), abs=1e-9)


def test_a_smaller_graph_keeps_the_strongest_and_says_what_it_left() -> None:
    models = pair()
    whole, part = traced(models), traced(models, nodes=6)
    for layer in (1, 2):
        kept = [n for n in part.nodes if n.kind == "feature" and n.layer == layer]
        assert len(kept) == 6
        assert 0 < part.kept[layer] < 1
    strongest = sorted((n.influence for n in whole.nodes if n.kind == "feature" and n.layer == 2), reverse=True)
    assert [n.influence for n in part.nodes if n.kind == "feature" and n.layer == 2] == pytest.approx(strongest[:6])
    with pytest.raises(ConfigError, match="the lower first"):
        trace(dictionary(), dictionary(), models[::-1], TOKENS)


def test_the_command_writes_the_public_schema(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, seed in (("low", 3), ("high", 4)):
        dictionary("jumprelu", seed=seed).save(tmp_path / name)
    arguments = ["graph", tmp_path / "low", tmp_path / "high", "--model", saved(tmp_path / "model"), "--layer", 1]
    arguments += ["--upper-layer", 2, "--device", "cpu", "--prompt", "w1 w7 w15", "--out", tmp_path / "graph.json"]
    assert main([*map(str, arguments), "--nodes", "9", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["nodes"] > 9
    told = json.loads((tmp_path / "graph.json").read_text())
    assert {"slug", "scan", "prompt_tokens", "prompt"} <= set(told["metadata"])
    assert set(told) == {"metadata", "qParams", "nodes", "links"}
    required = {"node_id", "feature", "layer", "ctx_idx", "feature_type", "jsNodeId", "clerp"}
    ids = [node["node_id"] for node in told["nodes"]]
    assert len(set(ids)) == len(ids)
    for node in told["nodes"]:
        assert required <= set(node)
        assert node["feature_type"] in ("cross layer transcoder", "mlp reconstruction error", "logit")
    for link in told["links"]:
        assert {link["source"], link["target"]} <= set(ids)
    logit = next(node for node in told["nodes"] if node["feature_type"] == "logit")
    assert logit["node_id"] == f"4_{logit['feature']}_2"
    assert logit["clerp"].startswith('Output "w')
    assert main([*map(str, arguments[:-2]), "--out", str(tmp_path / "graph.json"), "--upper-layer", "1", "--json"]) == 2
