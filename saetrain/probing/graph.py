"""An attribution graph of two layers: features at L, features at M above it, and logits.

With attention patterns and norm scales frozen (`frozen`), x the hidden state at L, y the one at M, f and h the
activations of the two dictionaries, and every edge a gradient times an activation:

    feature i at s in L  ->  feature j at t in M      f_i(s) <W_dec[i], d pre_j(t) / dx_s>,  pre_j(t) = <W_enc[j], y_t>
    feature j at t in M  ->  logit v                  h_j(t) <W_dec[j], d logit_v / dy_t>
    errors x - x^ and y - y^ are nodes too, with the same edges out

Logits are centred: logit_v minus the mean over the vocabulary.  y is the whole residual stream, so nothing of L reaches
a logit but through a node of M.  Features of M are kept by the size of their edges to the logits, weighted by
probability; features of L by the sum over kept targets of |edge| times the target's influence for a unit of its
pre-activation.  `kept` is the share of each layer's sum that is kept.  The JSON has the schema of the public front end
(Ameisen et al. 2025, "Circuit Tracing").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saetrain.errors import ConfigError
from saetrain.probing.attribution import Shard, active, decode
from saetrain.probing.causal import LanguageModel
from saetrain.probing.frozen import frozen
from saetrain.sae import SAE

# The front end's words for the kinds of nodes.
TYPES = {"feature": "cross layer transcoder", "error": "mlp reconstruction error", "logit": "logit"}


@dataclass(frozen=True)
class Node:
    kind: str  # "feature", "error" or "logit"
    layer: int  # of the hidden state; logits: one above the model's last
    index: int  # of the feature, or the token of a logit; errors: -1
    position: int
    value: float  # activation, or probability of a logit; errors: 0
    influence: float  # sum over logits of |path|, weighted by probability

    def id(self, layers: int) -> str:
        if self.kind == "logit":
            return f"{layers + 1}_{self.index}_{self.position}"
        return (
            f"0_{self.layer}_{self.position}" if self.kind == "error" else f"{self.layer}_{self.index}_{self.position}"
        )


@dataclass(frozen=True)
class Graph:
    model: str
    layers: int  # blocks of the model
    tokens: list[str]
    nodes: list[Node]
    links: list[tuple[int, int, float]]  # numbers of nodes: source, target, weight
    kept: dict[int, float]  # share of a layer's influence that its kept nodes hold

    def to_json(self, slug: str, words: dict[int, str]) -> dict[str, Any]:
        """The front end's schema; ``words`` are the texts of the logits' tokens."""
        nodes = []
        for node in self.nodes:
            about: dict[str, Any] = {
                "node_id": node.id(self.layers),
                "feature": node.index if node.kind != "error" else 0,
                "layer": str(node.layer if node.kind != "logit" else self.layers + 1),
                "ctx_idx": node.position,
                "feature_type": TYPES[node.kind],
                "jsNodeId": f"{node.layer}_{node.index}-0" if node.kind == "feature" else node.id(self.layers),
                "clerp": "",
                "influence": node.influence,
            }
            if node.kind == "logit":
                text = f'Output "{words[node.index]}" (p={node.value:.3f})'
                about |= {"token_prob": node.value, "is_target_logit": True, "clerp": text}
            elif node.kind == "feature":
                about["activation"] = node.value
            nodes.append(about)
        return {
            "metadata": {
                "slug": slug,
                "scan": self.model,
                "prompt_tokens": self.tokens,
                "prompt": "".join(self.tokens),
                "info": {"kept_influence": {str(layer): share for layer, share in self.kept.items()}},
            },
            "qParams": {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""},
            "nodes": nodes,
            "links": [
                {"source": self.nodes[a].id(self.layers), "target": self.nodes[b].id(self.layers), "weight": weight}
                for a, b, weight in self.links
            ],
        }


@dataclass(frozen=True)
class _Layer:
    """Active features of one layer with their decoder rows, and its errors; positions from 1 on."""

    sae: SAE
    x: Tensor  # [tokens, d]
    feature: Tensor
    row: Tensor
    activation: Tensor
    error: Tensor  # [tokens, d]

    def edges(self, g: Tensor) -> tuple[Tensor, Tensor]:
        """Edges [features] and of the errors [tokens] to a target with the gradient g [tokens, d]."""
        return self.activation * (self.sae.W_dec[self.feature] * g[self.row]).sum(1), (self.error * g).sum(1)


def trace(
    lower: SAE,
    upper: SAE,
    models: tuple[LanguageModel, LanguageModel],
    tokens: Sequence[int],
    *,
    logits: int = 5,
    nodes: int = 64,
) -> Graph:
    """The graph of one prompt; the two models are one model at two layers, the lower first.

    ``logits`` is the number of likeliest next tokens, ``nodes`` the most features that are kept in each layer.
    """
    low, high = models
    if low.model is not high.model or not low.layer < high.layer:
        raise ConfigError(f"a graph needs one model at two layers, the lower first; got {low.layer} and {high.layer}")
    if len(tokens) < 2 or logits < 1 or nodes < 1:
        raise ConfigError("a graph needs two tokens, a logit and a node in each layer")
    low.check_width(lower.d_in)
    high.check_width(upper.d_in)
    window = torch.tensor([list(tokens)])
    held: dict[int, Tensor] = {}

    def leaf(x: Tensor, _: int) -> Tensor:
        held[low.layer] = x.detach().requires_grad_()
        return held[low.layer]

    def look(y: Tensor, _: int) -> Tensor:
        held[high.layer] = y
        return y

    with torch.enable_grad(), frozen(low), low.editing(leaf):
        out = high.run(window, look).logits[0, -1]
        x, y = held[low.layer], held[high.layer]
        chances = out.detach().softmax(-1).topk(min(logits, len(out)))
        up, down = _layer(upper, y.detach()[0]), _layer(lower, x.detach()[0])
        centred = out - out.mean()
        to_logits = [_gradient(centred[token], y) for token in chances.indices]
        edges = [up.edges(g) for g in to_logits]
        weight = chances.values.to(up.activation)
        strength = sum(w * edge[0].abs() for w, edge in zip(weight, edges, strict=True))
        chosen, share = _largest(torch.as_tensor(strength), nodes)
        targets = [(upper.W_enc[up.feature[n]].to(y) @ y[0, up.row[n]]) for n in chosen]
        to_upper = [down.edges(_gradient(target, x)) for target in targets]
    size = torch.as_tensor(strength)[chosen] / up.activation[chosen]  # of one unit of the feature
    paths = sum(s * edge[0].abs() for s, edge in zip(size, to_upper, strict=True))
    below, below_share = _largest(torch.as_tensor(paths), nodes)
    made = [
        _nodes(down, low.layer, below, torch.as_tensor(paths)),
        _nodes(up, high.layer, chosen, torch.as_tensor(strength)),
    ]
    first_up = len(made[0]) + len(tokens) - 1
    first_logit = first_up + len(made[1]) + len(tokens) - 1
    found: list[Node] = []
    for group, layer in zip(made, (low.layer, high.layer), strict=True):
        found += group + [Node("error", layer, -1, at, 0.0, 0.0) for at in range(1, len(tokens))]
    last = len(tokens) - 1
    found += [
        Node("logit", len(low.blocks), int(t), last, float(p), float(p))
        for t, p in zip(chances.indices, chances.values, strict=True)
    ]
    links: list[tuple[int, int, float]] = []
    for at, (of_features, of_errors) in enumerate(to_upper):
        links += _links(of_features[below], of_errors[1:], 0, len(below), first_up + at)
    for at, (of_features, of_errors) in enumerate(edges):
        links += _links(of_features[chosen], of_errors[1:], first_up, len(chosen), first_logit + at)
    words = [low.text_of([token]) for token in tokens]
    return Graph(low.name, len(low.blocks), words, found, links, {low.layer: below_share, high.layer: share})


def _layer(sae: SAE, x: Tensor) -> _Layer:
    """The active features of rows x [tokens, d]; position 0, an attention sink, has none."""
    rows = x.to(sae.W_dec.dtype)
    entries = active([Shard(0, sae)], rows, torch.zeros_like(rows))
    keep = entries.row > 0
    entries = type(entries)(*(v[keep] for v in entries))
    error = rows - decode([Shard(0, sae)], entries, len(rows)) - sae.b_dec
    error[0] = 0
    return _Layer(sae, rows, entries.feature, entries.row, entries.activation, error)


def _gradient(scalar: Tensor, at: Tensor) -> Tensor:
    (g,) = torch.autograd.grad(scalar, at, retain_graph=True)
    return g[0].detach()


def _largest(strength: Tensor, count: int) -> tuple[Tensor, float]:
    order = strength.argsort(descending=True, stable=True)[:count]
    return order, float(strength[order].sum() / strength.sum().clamp_min(1e-300))


def _nodes(layer: _Layer, number: int, chosen: Tensor, strength: Tensor) -> list[Node]:
    columns = (layer.feature, layer.row, layer.activation, strength)
    return [
        Node("feature", number, int(i), int(at), float(f), float(s))
        for i, at, f, s in zip(*(column[chosen].tolist() for column in columns), strict=True)
    ]


def _links(features: Tensor, errors: Tensor, start: int, count: int, target: int) -> list[tuple[int, int, float]]:
    weights = [*features.tolist(), *errors.tolist()]
    return [(start + at, target, weight) for at, weight in enumerate(weights[: count + len(errors)]) if weight]
