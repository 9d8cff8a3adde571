"""The effect of taking features away on the loss of a text, from a stratified sample of its windows.

Every window is run up to the layer, which says how active the features are in it.  Where they never fire, taking them
away changes nothing, so these windows have the effect 0 and are not sampled.  The others are sorted by their largest
activation and cut into strata of equal size; N_h windows are in stratum h, n_h of them are run to the end, plain and
with the features ablated (`turning`).  With the effects' means m_h and variances s_h^2 the text's total effect is

    sum over h of N_h m_h       variance  sum over h of N_h^2 (1 - n_h / N_h) s_h^2 / n_h

(Cochran, Sampling Techniques, 5.3 to 5.6); both are divided by the number of predictions in the text, which is known.
The statement is about this text: windows are drawn at random, the text is not.

A pilot of `PILOT` windows in each stratum gives first s_h.  The rest is allotted in proportion to N_h s_h (Neyman), in
rounds that at most double the sample, each with better s_h; a stratum that would get more than it has gives the rest to
the others.  The sample that a half-width needs is the smallest whose variance, so allotted, is small enough.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from actshuffle.units import counted
from saetrain.errors import ConfigError, DataError
from saetrain.probing.causal import LanguageModel
from saetrain.probing.corpus import Corpus, Scale, measure_scale
from saetrain.probing.fidelity import cross_entropy
from saetrain.probing.turning import Steering, Turn
from saetrain.sae import SAE
from saetrain.training.metrics import Z95, Interval

PILOT = 8
STRATA = 4


class Window(NamedTuple):
    tokens: list[int]
    lo: int  # of the document's tokens
    hi: int
    largest: float  # activation of the features in it


@dataclass
class Stratum:
    """Windows in the random order in which they are drawn, and the effects of those that were."""

    windows: Sequence[Any]
    low: float  # largest activation of its windows: from, to
    high: float
    effects: list[float] = field(default_factory=list)

    @property
    def mean(self) -> float:
        return float(np.mean(self.effects))

    @property
    def deviation(self) -> float:
        """Of the effects; 0 where one window or none was drawn of one."""
        return float(np.std(self.effects, ddof=1)) if len(self.effects) > 1 else 0.0


@dataclass
class Removal:
    """The estimate: nats by which the loss of a predicted token rises, on the mean over the text."""

    strata: list[Stratum]
    silent: int  # windows in which the features never fire
    tokens: int  # predictions in the text

    @property
    def effect(self) -> Interval:
        """With its 95 % interval."""
        value = sum(len(s.windows) * s.mean for s in self.strata) / self.tokens
        half = self.half_width([len(s.effects) for s in self.strata])
        return Interval(value, value - half, value + half)

    @property
    def drawn(self) -> int:
        return sum(len(s.effects) for s in self.strata)

    def half_width(self, counts: Sequence[int]) -> float:
        """Of the effect, if so many windows of each stratum were drawn, by the deviations seen so far."""
        parts = (
            len(s.windows) ** 2 * (1 - n / len(s.windows)) * s.deviation**2 / n
            for s, n in zip(self.strata, counts, strict=True)
        )
        return Z95 * math.sqrt(sum(parts)) / self.tokens

    def allot(self, sample: int) -> list[int]:
        """So many windows in proportion to N_h s_h; a stratum that would get more than it has gives the rest away."""
        counts, left, still = [0] * len(self.strata), float(sample), list(range(len(self.strata)))
        while still and left > 0:
            weights = [len(self.strata[h].windows) * self.strata[h].deviation for h in still]
            if not sum(weights):
                break
            shares = [left * weight / sum(weights) for weight in weights]
            full = [h for h, share in zip(still, shares, strict=True) if share >= len(self.strata[h].windows)]
            for h, share in zip(still, shares, strict=True):
                counts[h] = len(self.strata[h].windows) if h in full else math.ceil(share)
            if not full:
                break
            left -= sum(counts[h] for h in full)
            still = [h for h in still if h not in full]
        return [max(count, 1) for count in counts]

    def needed(self, within: float) -> int:
        """The windows that a half-width of ``within`` nats a token needs, by the deviations seen so far."""
        total = sum(len(s.windows) for s in self.strata)
        return bisect_left(range(1, total), True, key=lambda n: self.half_width(self.allot(n)) <= within) + 1

    def to_json(self) -> dict[str, Any]:
        return {
            "effect": self.effect._asdict(),
            "tokens": self.tokens,
            "windows": self.silent + sum(len(s.windows) for s in self.strata),
            "windows_silent": self.silent,
            "windows_run": self.drawn,
            "strata": [
                {
                    "activation": [s.low, s.high],
                    "windows": len(s.windows),
                    "run": len(s.effects),
                    "mean": s.mean,
                    "deviation": s.deviation,
                }
                for s in self.strata
            ],
            "windows_needed": {f"{share:g}": self.needed(share * abs(self.effect.value)) for share in (0.5, 0.2, 0.1)},
        }


def ablate(
    sae: SAE,
    model: LanguageModel,
    corpus: Corpus,
    features: Sequence[int],
    *,
    sample: int = 200,
    within: float = 0.0,
    documents: int = 0,
    drop_norm: float = 10.0,
    scale: Scale | None = None,
) -> Removal:
    """The effect of setting ``features`` to 0 at every usual position of a text.

    ``sample`` is the number of windows to run; with ``within``, nats a token, it is what the pilot says that this
    half-width needs.  ``documents`` limits the text to the first ones of the corpus's order (0: all).
    """
    if sample < 1 or not 0 <= within < math.inf or documents < 0:
        raise ConfigError(f"windows are 1 or more, a half-width 0 or more; got {sample}, {within}, {documents}")
    model.check_width(sae.d_in)
    turns = [Turn(feature, "ablate") for feature in features]
    Steering(sae, turns)  # refuses features that are absent, before any pass
    scale = scale or measure_scale(corpus, drop_norm)
    windows, tokens = _windows(sae, model, corpus, features, scale, documents)
    loud = [window for window in windows if window.largest > 0]
    if not loud:
        raise DataError(
            f"features {list(features)} never fire on the text ({counted(len(windows), 'window')}): nothing to ablate"
        )

    def effect(window: Window) -> float:
        return _effect(model, window, Steering(sae, turns, first=window.lo, limit=scale.limit))

    strata = stratify(loud, [window.largest for window in loud], corpus.cutting.seed)
    found = Removal(strata, len(windows) - len(loud), tokens)
    draw(found, effect, sample, within)
    return found


def stratify(windows: Sequence[Any], by: Sequence[float], seed: int) -> list[Stratum]:
    """Strata of equal size by ``by``, each in a random order; fewer where there are few windows."""
    order = np.argsort(np.asarray(by), kind="stable")
    dice = np.random.default_rng([seed, 4])
    strata = []
    for part in np.array_split(order, min(STRATA, max(len(order) // (2 * PILOT), 1))):
        mixed = dice.permutation(part)
        strata.append(Stratum([windows[i] for i in mixed], float(by[part[0]]), float(by[part[-1]])))
    return strata


def draw(found: Removal, effect: Callable[[Any], float], sample: int, within: float) -> None:
    """Run the pilot, then as many windows as are wanted, where they tell most."""
    for stratum in found.strata:
        _extend(stratum, effect, PILOT)
    before = 0
    while before < found.drawn:
        before = found.drawn
        goal = min(found.needed(within) if within else sample, 2 * before)
        for stratum, count in zip(found.strata, found.allot(goal), strict=True):
            _extend(stratum, effect, count)


def _extend(stratum: Stratum, effect: Callable[[Any], float], count: int) -> None:
    for window in stratum.windows[len(stratum.effects) : count]:
        stratum.effects.append(effect(window))


@torch.no_grad()
def _windows(
    sae: SAE, model: LanguageModel, corpus: Corpus, features: Sequence[int], scale: Scale, documents: int
) -> tuple[list[Window], int]:
    """All windows of the text with the features' largest activation in each, and the number of predictions."""
    found: list[Window] = []
    for number, document in enumerate(corpus):
        if documents and number == documents:
            break
        for batch in document.batches:
            x = model.hidden(batch.tokens)[:, batch.lo : batch.hi]
            acts = sae.encode(x)[..., list(features)].amax(-1)
            acts = torch.where(scale.usual(x)[..., 0], acts, torch.zeros_like(acts))
            for window, largest in zip(batch.tokens.tolist(), acts.amax(1).tolist(), strict=True):
                found.append(Window(window, batch.lo, batch.hi, largest))
    return found, sum(window.hi - window.lo - 1 for window in found)


@torch.no_grad()
def _effect(model: LanguageModel, window: Window, edit: Steering) -> float:
    """By how much the summed loss of a window rises with the edit."""
    tokens = torch.tensor([window.tokens[: window.hi]])
    target = tokens[0, window.lo + 1 :].to(model.device)
    plain, edited = (model.run(tokens, e).logits[0, window.lo : -1] for e in (None, edit))
    return float((cross_entropy(edited, target) - cross_entropy(plain, target)).sum())
