"""What a model loses when one of its hidden states goes through a dictionary.

With CE(.) the cross entropy of the next token, in nats, and x the hidden state:

    loss recovered = (CE(x := ablation) - CE(x := x^)) / (CE(x := ablation) - CE(x))
    KL recovered   = 1 - KL(p || p with x^) / KL(p || p with ablation)

where the ablation is zero or the layer's mean row.  All are ratios of sums over tokens.  Documents are the clusters of
the intervals (`metrics.ratio_interval`), since tokens of one document are not independent.  Only rows that a dictionary
can know are replaced: prefix, special tokens and heavy rows (attention sinks) stay as they are, in every variant of a
pass, and predictions that are made from them, and from the last token of a window, are not counted.

Stopping.  Documents come in a random order, so those read so far are always a uniform sample.  With `within`, the
half-widths are looked at after 16 documents and then after each 1.25 times as many, and the first time that all wanted
ones are small enough is the end.  A rule that stops when the estimated width is small stops a little too often where
the width is underestimated: the interval covers less than 95 % for few documents, and 95 % in the limit (Anscombe 1952;
Chow and Robbins 1965).  docs/probing.md has the measured coverage.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from actshuffle.units import counted
from saetrain.errors import ConfigError, DataError
from saetrain.probing.causal import Edit, LanguageModel
from saetrain.probing.corpus import Corpus, Document, Scale, measure_scale
from saetrain.sae import SAE
from saetrain.training.metrics import Interval, ratio_interval

VARIANTS = ("sae", "zero", "mean")  # what the hidden state is replaced by
ABLATIONS = VARIANTS[1:]
FIRST_LOOK, GROWTH = 16, 1.25  # documents before the first look, and their growth from look to look
POSITIONS = 512  # whose probabilities exist at once


@dataclass
class Fidelity:
    """The result of `evaluate`: sums of each document, and what follows from them."""

    sums: dict[str, list[float]]  # one number for each document
    fired: Tensor  # int64 [latents]: rows on which each latent was active
    scale: Scale
    layer: int
    available: int  # documents in the text
    stopped: str  # "within", "most" or "all": why no more documents were read
    names: list[str] = field(default_factory=list)

    @property
    def documents(self) -> int:
        return len(self.names)

    def ratio(self, top: str, bottom: str) -> Interval:
        """A ratio of sums with its 95 % interval, over documents."""
        return _ratio(self.sums, top, bottom)

    @property
    def recovered(self) -> dict[str, Interval]:
        """Loss recovered against each ablation."""
        return {name: _ratio(self.sums, *_RECOVERED[name]) for name in ABLATIONS}

    def total(self, name: str) -> float:
        return float(torch.tensor(self.sums[name], dtype=torch.float64).sum())

    def to_json(self) -> dict[str, Any]:
        """Everything, with the names that SAEBench's core evaluation uses under `saebench`."""
        ce = {name: _json(self.ratio(f"ce_{name}", "tokens")) for name in ("clean", *VARIANTS)}
        return {
            "layer": self.layer,
            "documents": self.documents,
            "documents_available": self.available,
            "stopped": self.stopped,
            "tokens": int(self.total("tokens")),
            "rows": int(self.total("rows")),
            "heavy_rows_left": int(self.total("heavy")),
            "median_norm": self.scale.median_norm,
            "ce": ce,
            "kl": {name: _json(self.ratio(f"kl_{name}", "tokens")) for name in VARIANTS},
            "loss_recovered": {name: _json(value) for name, value in self.recovered.items()},
            "kl_recovered": {name: _json(self.ratio(f"kl_recovered_{name}", f"kl_{name}")) for name in ABLATIONS},
            "fvu": _json(self.ratio("error", "spread")),
            "l0": _json(self.ratio("l0", "rows")),
            "saebench": self._saebench(),
        }

    def _saebench(self) -> dict[str, Any]:
        """SAEBench's names; its ablation is zero.  docs/probing.md says where a definition differs."""
        mean = {name: self.ratio(name, "rows").value for name in _ROW_SUMS}
        ce = {name: self.ratio(f"ce_{name}", "tokens").value for name in ("clean", "sae", "zero")}
        density = self.fired.double() / max(self.total("rows"), 1.0)
        over = {f"{share}_percent": density[density > share / 100] for share in (1, 10)}
        return {
            "model_behavior_preservation": {
                "kl_div_score": self.ratio("kl_recovered_zero", "kl_zero").value,
                "kl_div_with_ablation": self.ratio("kl_zero", "tokens").value,
                "kl_div_with_sae": self.ratio("kl_sae", "tokens").value,
            },
            "model_performance_preservation": {
                "ce_loss_score": self.recovered["zero"].value,
                "ce_loss_with_ablation": ce["zero"],
                "ce_loss_with_sae": ce["sae"],
                "ce_loss_without_sae": ce["clean"],
            },
            "reconstruction_quality": {
                "explained_variance": 1 - self.ratio("error", "spread").value,
                "explained_variance_legacy": 1 - mean["row_fvu"],
                "mse": mean["error"] / len(self.scale.mean),
                "cossim": mean["cosine"],
            },
            "shrinkage": {
                "l2_norm_in": mean["norm_in"],
                "l2_norm_out": mean["norm_out"],
                "l2_ratio": mean["norm_ratio"],
                "relative_reconstruction_bias": self.ratio("square_out", "dot").value,
            },
            "sparsity": {"l0": mean["l0"], "l1": mean["l1"]},
            "token_stats": {
                "total_tokens_eval_reconstruction": int(self.total("tokens")),
                "total_tokens_eval_sparsity_variance": int(self.total("rows")),
            },
            "misc_metrics": {
                **{f"freq_over_{name}": len(found) / len(density) for name, found in over.items()},
                **{
                    f"normalized_freq_over_{name}": float(found.sum() / density.sum().clamp_min(1e-300))
                    for name, found in over.items()
                },
                "frac_alive": float((self.fired > 0).double().mean()),
            },
        }


_RECOVERED = {name: (f"recovered_{name}", f"lost_{name}") for name in ABLATIONS}
_ROW_SUMS = ("error", "row_fvu", "cosine", "norm_in", "norm_out", "norm_ratio", "square_out", "l0", "l1")


def evaluate(
    sae: SAE,
    model: LanguageModel,
    corpus: Corpus,
    *,
    within: float = 0.0,
    most: int = 0,
    drop_norm: float = 10.0,
    scale: Scale | None = None,
) -> Fidelity:
    """Cross entropy and KL of ``model`` with its layer as it is, through ``sae``, and ablated.

    ``within`` stops as soon as the 95 % interval of the loss recovered, against both ablations, has at most this
    half-width; ``most`` after so many documents (0: all).  Rows beyond ``drop_norm`` times the median norm stay as they
    are (0: none).  ``scale`` replaces the pilot that measures the mean row and the median norm.

    Raises `DataError` where the widths do not fit, or the text has fewer than two usable documents.
    """
    if within < 0 or most < 0 or most == 1:
        raise ConfigError(f"a half-width is 0 (none) or more, and documents 0 (all), 2 or more; got {within}, {most}")
    model.check_width(sae.W_dec.shape[1])
    scale = scale or measure_scale(corpus, drop_norm)
    sums: dict[str, list[float]] = defaultdict(list)
    fired = torch.zeros(len(sae.W_dec), dtype=torch.int64)
    names: list[str] = []
    looks, stopped = _looks(), "all"
    look = next(looks)
    for document in corpus:
        if most and len(names) == most:
            stopped = "most"
            break
        found = document_sums(sae, model, document, scale, fired)
        if not found["tokens"]:
            continue  # all its rows are heavy
        names.append(document.name)
        for name, value in found.items():
            sums[name].append(value)
        if within and len(names) >= look:
            look = next(looks)
            if all(_half(_ratio(sums, *_RECOVERED[name])) <= within for name in ABLATIONS):
                stopped = "within"
                break
    if len(names) < 2:
        raise DataError(f"{len(names)} usable documents in the text: an interval needs two or more")
    return Fidelity(dict(sums), fired, scale, model.layer, len(corpus.texts), stopped, names)


def _looks() -> Iterator[int]:
    """Numbers of documents after which the half-widths are looked at."""
    at = float(FIRST_LOOK)
    while True:
        yield int(at)
        at *= GROWTH


@torch.no_grad()
def document_sums(
    sae: SAE, model: LanguageModel, document: Document, scale: Scale, fired: Tensor | None = None
) -> dict[str, float]:
    """The sums over one document that `Fidelity` is made of; adds to ``fired`` [latents] if it is given."""
    sums: dict[str, float] = defaultdict(float)
    for batch in document.batches:
        held: list[Tensor] = []

        def keep(x: Tensor, _: int, held: list[Tensor] = held) -> Tensor:
            held.append(x)
            return x

        clean = model.run(batch.tokens, keep).logits
        x = held[0]
        usual = scale.usual(x)[..., 0]
        usual[:, : batch.lo] = usual[:, batch.hi :] = False
        rows = x[usual]
        acts = sae.encode(rows)
        out = sae.decode(acts)
        if fired is not None:
            fired += (acts > 0).sum(0).cpu()
        for name, value in _row_sums(rows, acts, out, scale).items():
            sums[name] += value
        sums["heavy"] += float((~usual[:, batch.lo : batch.hi]).sum())
        replacements = {"sae": out, "zero": torch.zeros_like(rows), "mean": scale.mean.to(rows).expand_as(rows)}
        counted = usual.clone()
        counted[:, batch.hi - 1] = False  # it predicts nothing of the document
        target = batch.tokens.to(x.device).roll(-1, 1)[counted]
        logits = clean[counted]
        sums["tokens"] += len(target)
        sums["ce_clean"] += float(cross_entropy(logits, target).sum())
        for name in VARIANTS:
            edited = model.run(batch.tokens, substitute(x, usual, replacements[name])).logits[counted]
            sums[f"ce_{name}"] += float(cross_entropy(edited, target).sum())
            sums[f"kl_{name}"] += float(divergence(logits, edited).sum())
    for name in ABLATIONS:
        sums[f"recovered_{name}"] = sums[f"ce_{name}"] - sums["ce_sae"]
        sums[f"lost_{name}"] = sums[f"ce_{name}"] - sums["ce_clean"]
        sums[f"kl_recovered_{name}"] = sums[f"kl_{name}"] - sums["kl_sae"]
    return dict(sums)


def substitute(x: Tensor, where: Tensor, rows: Tensor) -> Edit:
    """An edit that gives x with ``rows`` where the mask [windows, tokens] is set."""
    new = x.clone()
    new[where] = rows.to(x.dtype)
    return lambda _, __: new


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """[tokens], in nats, float64, from logits [tokens, vocabulary]."""
    loss = torch.nn.functional.cross_entropy
    parts = [loss(_wide(at), to, reduction="none").double() for at, to in _parts(logits, target)]
    return torch.cat(parts) if parts else target.double()


def divergence(clean: Tensor, edited: Tensor) -> Tensor:
    """KL(clean || edited) [tokens], in nats, float64."""
    found = []
    for one, other in _parts(clean, edited):
        p, q = _wide(one).log_softmax(-1), _wide(other).log_softmax(-1)
        found.append((p.exp() * (p - q)).sum(-1).double())
    return torch.cat(found) if found else clean.new_zeros(0).double()


def _parts(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(torch.split(tensor, POSITIONS) for tensor in tensors if len(tensor)), strict=True)


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _row_sums(rows: Tensor, acts: Tensor, out: Tensor, scale: Scale) -> dict[str, float]:
    x, y = rows.double(), out.double()
    error, spread = (x - y).square().sum(1), (x - scale.mean.to(x)).square().sum(1)
    norm_in, norm_out, dot = x.norm(dim=1), y.norm(dim=1), (x * y).sum(1)
    least = torch.finfo(torch.float64).tiny
    found = {
        "error": error,
        "spread": spread,
        "row_fvu": error / spread.clamp_min(least),
        "cosine": dot / (norm_in * norm_out).clamp_min(least),
        "norm_in": norm_in,
        "norm_out": norm_out,
        "norm_ratio": norm_out / norm_in.clamp_min(least),
        "square_out": norm_out.square(),
        "dot": dot,
        "l0": (acts > 0).sum(1),
        "l1": acts.sum(1),
    }
    return {"rows": float(len(x)), **{name: float(value.sum()) for name, value in found.items()}}


def _ratio(sums: Mapping[str, list[float]], top: str, bottom: str) -> Interval:
    return ratio_interval(*(torch.tensor(sums[name], dtype=torch.float64) for name in (top, bottom)))


def _half(interval: Interval) -> float:
    return (interval.high - interval.low) / 2


def _json(interval: Interval) -> dict[str, float]:
    return interval._asdict()


def scores(found: Mapping[str, Any]) -> str:
    """What `Fidelity.to_json` gives, as a small table."""

    def row(name: str, value: dict[str, float]) -> str:
        return f"{name:32}{value['value']:10.4f}   (95 %: {value['low']:.4f} to {value['high']:.4f})"

    lines = [
        *(row(f"cross entropy, {name}", value) for name, value in found["ce"].items()),
        *(row(f"KL, {name}", value) for name, value in found["kl"].items()),
        *(row(f"loss recovered, from {name}", value) for name, value in found["loss_recovered"].items()),
        *(row(f"KL recovered, from {name}", value) for name, value in found["kl_recovered"].items()),
        row("FVU", found["fvu"]),
        row("L0", found["l0"]),
        f"{counted(found['tokens'], 'prediction')} in {found['documents']:,} of "
        f"{counted(found['documents_available'], 'document')}; "
        f"{counted(found['heavy_rows_left'], 'heavy row')} left as they are",
    ]
    return "\n".join(lines)
