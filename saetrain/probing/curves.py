"""Steered text at several strengths, and what it cost: the curves that make a strength defensible.

For each strength, prompt and seed the model writes, steered; then the plain model reads that text:

    coherence   mean log-probability, in nats, of the written tokens under the plain model
    concept     mean activation of the turned features on the written tokens when the plain model reads them
    fires       share of texts in which a turned feature is active on at least one written token
    repeated    share of the 4-grams of written tokens that occurred before in the text
    moved       mean of |x' - x| / |x| over the edited rows

Means have 95 % intervals over texts (`metrics.ratio_interval`); the share has Wilson's (Wilson 1927).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from saetrain.errors import ConfigError
from saetrain.probing.causal import LanguageModel
from saetrain.probing.generation import Sampler, generate_many
from saetrain.probing.turning import Steering, Turn
from saetrain.sae import SAE
from saetrain.training.metrics import Z95, Interval, ratio_interval

NGRAM = 4
TOGETHER = 32  # texts of one prompt that are written together
MEASURES = ("coherence", "concept", "fires", "repeated", "moved")


@dataclass(frozen=True)
class Sample:
    """One text that was written, and its measures; those of an empty text are NaN."""

    strength: float | None  # None: plain
    prompt: int
    seed: int
    text: str
    tokens: int
    coherence: float
    concept: float
    largest: float
    repeated: float
    moved: float


@dataclass(frozen=True)
class Point:
    """All texts of one strength."""

    strength: float | None
    texts: int
    measures: dict[str, Interval]


@dataclass(frozen=True)
class Curves:
    """The result of `steer`: plain text first, then each strength in the order given."""

    samples: list[Sample]
    unit: str
    method: str

    @property
    def points(self) -> list[Point]:
        order = list(dict.fromkeys(sample.strength for sample in self.samples))
        return [_point([sample for sample in self.samples if sample.strength == at]) for at in order]

    def to_json(self) -> dict[str, Any]:
        points = [
            {"strength": p.strength, "texts": p.texts, **{name: value._asdict() for name, value in p.measures.items()}}
            for p in self.points
        ]
        samples = [asdict(sample) for sample in self.samples]
        return dict(_finite({"unit": self.unit, "method": self.method, "points": points, "samples": samples}))

    def table(self) -> str:
        """The points as lines of text."""
        lines = [f"{'strength':>10}  {'texts':>5}" + "".join(f"  {name:>20}" for name in MEASURES)]
        for p in self.points:
            name = "plain" if p.strength is None else f"{p.strength:g}"
            cells = (_cell(p.measures[key]) for key in MEASURES)
            lines.append(f"{name:>10}  {p.texts:>5}" + "".join(f"  {cell:>20}" for cell in cells))
        return "\n".join(lines)


def steer(
    sae: SAE,
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    strengths: Sequence[tuple[float, Sequence[Turn]]],
    *,
    tokens: int = 64,
    seeds: Sequence[int] = (0,),
    sampler: Sampler | None = None,
    generated_only: bool = False,
    limit: float = math.inf,
    unit: str = "activation",
    told: Callable[[Sample], None] | None = None,
) -> Curves:
    """Text after each of ``prompts`` (tokens), plain and at each of ``strengths``, with its measures.

    A strength is a number for the axis, in ``unit``, and the turns that it stands for.  ``seeds`` replace the
    sampler's; greedy text needs one only.  ``generated_only`` leaves the prompt as it is, and ``limit`` is the norm
    beyond which rows stay as they are.  ``told`` sees each sample as it is finished.
    """
    if not prompts or not strengths or not seeds:
        raise ConfigError("steering needs a prompt, a strength and a seed")
    model.check_width(sae.W_dec.shape[1])
    plans: list[tuple[float | None, Sequence[Turn]]] = [(None, ()), *strengths]
    features = [turn.feature for turn in strengths[0][1]]
    sampler = sampler or Sampler()
    samples = []
    for at, turns in plans:
        for number, prompt in enumerate(prompts):
            for some in (seeds[i : i + TOGETHER] for i in range(0, len(seeds), TOGETHER)):
                first = len(prompt) if generated_only else 1
                edit = Steering(sae, turns, first=first, limit=limit) if turns else None
                dice = [replace(sampler, seed=int(seed)) for seed in some]
                texts = generate_many(model, prompt, dice, edit=edit, tokens=tokens)
                # The last token that is written is not read; one that ends the text is not written.
                passes = [min(len(text) + 1, tokens) for text in texts]
                moved = edit.moved_by(passes) if edit else [0.0] * len(texts)
                for seed, written, share in zip(some, texts, moved, strict=True):
                    read = measure(sae, model, prompt, written, features)
                    text = model.text_of(written)
                    samples.append(Sample(at, number, int(seed), text, len(written), moved=share, **read))
                    if told:
                        told(samples[-1])
    return Curves(samples, unit, strengths[0][1][0].method)


@torch.no_grad()
def measure(
    sae: SAE, model: LanguageModel, prompt: Sequence[int], written: Sequence[int], features: Sequence[int]
) -> dict[str, float]:
    """Coherence, concept and repetition of tokens that were written after a prompt, read by the plain model."""
    if not written:
        return dict.fromkeys(("coherence", "concept", "largest", "repeated"), math.nan)
    held: list[Tensor] = []

    def keep(x: Tensor, _: int) -> Tensor:
        held.append(x)
        return x

    whole = torch.tensor([[*prompt, *written]])
    logits = model.run(whole, keep).logits[0, len(prompt) - 1 : -1]
    logp = logits.double().log_softmax(-1).gather(1, whole[0, len(prompt) :, None].to(logits.device))
    acts = sae.encode(held[0][0, len(prompt) :])[:, list(features)].double()
    return {
        "coherence": float(logp.mean()),
        "concept": float(acts.mean()),
        "largest": float(acts.max()),
        "repeated": repeated(written),
    }


def repeated(tokens: Sequence[int]) -> float:
    """The share of n-grams that occurred before; 0 for texts that are too short to have one."""
    grams = [tuple(tokens[at : at + NGRAM]) for at in range(len(tokens) - NGRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def wilson(hits: int, count: int) -> Interval:
    """A share with its 95 % interval (Wilson 1927)."""
    share, z = hits / count, Z95 * Z95 / count
    middle = (share + z / 2) / (1 + z)
    half = Z95 / (1 + z) * math.sqrt(share * (1 - share) / count + z / (4 * count))
    return Interval(share, max(middle - half, 0.0), min(middle + half, 1.0))


def _point(samples: Sequence[Sample]) -> Point:
    full = [sample for sample in samples if sample.tokens]
    none = Interval(math.nan, math.nan, math.nan)
    measures = {}
    for key in MEASURES:
        if not full:
            measures[key] = none
        elif key == "fires":
            measures[key] = wilson(sum(sample.largest > 0 for sample in full), len(full))
        else:
            values = torch.tensor([getattr(sample, key) for sample in full], dtype=torch.float64)
            measures[key] = ratio_interval(values, torch.ones_like(values))
    return Point(samples[0].strength, len(samples), measures)


def _cell(value: Interval) -> str:
    return (
        f"{value.value:.3f} ({value.low:.3f}, {value.high:.3f})" if math.isfinite(value.low) else f"{value.value:.3f}"
    )


def _finite(value: Any) -> Any:
    """JSON has no NaN: null stands for it."""
    if isinstance(value, dict):
        return {key: _finite(held) for key, held in value.items()}
    if isinstance(value, list):
        return [_finite(held) for held in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
