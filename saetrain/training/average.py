"""The moving average of the weights, which is evaluated and exported as the model.

After t steps with the weights w_1 ... w_t and the decay d it is

    sum over i of (1 - d) d^(t - i) w_i / (1 - d^t),

a weighted mean without a trace of the initial weights: the bias is corrected as in Adam.  (Gao et al. 2024, arXiv
2406.04093, appendix A, who use d = 0.999 throughout and find it to lower the sensitivity to the learning rate; the
average itself is Polyak and Juditsky's, 1992.)  Each rank averages its own share, in the type of the parameters.

Decoder rows of norm 1 have averages that are a little shorter, and stay so.  The running threshold of batchtopk is
averaged with the weights, since it is theirs; counts of firing are those of the trained weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from saetrain.model import Model

PREFIX = "ema."  # of its tensors in a checkpoint
THRESHOLD = "threshold"


class Average:
    def __init__(self, model: Model, decay: float) -> None:
        self.model, self.decay = model, float(decay)
        self.held = {name: torch.zeros_like(tensor) for name, tensor in self._trained().items()}

    def update(self, steps: int) -> None:
        """Add the weights after so many steps."""
        weight = (1 - self.decay) / (1 - self.decay**steps)
        trained = self._trained()
        for name, held in self.held.items():
            held.lerp_(trained[name], weight)

    @contextmanager
    def instead(self) -> Iterator[None]:
        """Within, the model has the averaged weights."""
        model, averaged = self.model, dict(self.held)
        params, state = model.params, model.state
        model.state = {**state, THRESHOLD: averaged.pop(THRESHOLD)}
        model.params = averaged
        try:
            yield
        finally:
            model.params, model.state = params, state

    def _trained(self) -> dict[str, Tensor]:
        return {**self.model.params, THRESHOLD: self.model.state[THRESHOLD]}
