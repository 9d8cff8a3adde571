"""Adam on this rank's share, learning-rate schedule, gradient clipping, unit-norm decoder rows, and their average.

Replicas have the same parameters and share the moments (ZeRO-1: Rajbhandari, Rasley, Ruwase, He 2020, arXiv 1910.02054,
section 5.1): each has the gradients and the moments of its own rows (`Mesh.own`), updates these rows, and sends them to
the others.  What is not split by latent, b_dec and W_skip, each updates for itself.  Beside that, each step sums the
squared gradient norms over all ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.optim.adam import adam

from saetrain.compute.eightbit import dequantise, quantise
from saetrain.compute.kernels import ROWS, sum_of_squares
from saetrain.model import WHOLE, Model
from saetrain.settings import Settings
from saetrain.training.average import PREFIX, Average

FULL = ("adam_m", "adam_v")  # names of moments in a checkpoint
CODED = ("adam_m_codes", "adam_m_scales", "adam_v_codes", "adam_v_scales")


def ramps(config: Settings, step: int) -> tuple[float, float]:
    """(learning rate, factor of the sparsity term) for step 0, 1, ... of the run.

    The rate rises linearly over `lr_warmup` of the run, stays, and falls linearly to 0 over the last `lr_decay`.
    """
    c, total = config, config.steps
    up = (step + 1) / max(c.lr_warmup * total, 1)
    down = (total - step) / max(c.lr_decay * total, 1)
    ramp = (step + 1) / max(c.sparsity_warmup * total, 1)
    return c.lr * min(up, down, 1.0), min(ramp, 1.0)


class Full:
    """Adam's moments of rows of a parameter, in the type of the parameter."""

    def __init__(self, rows: Tensor) -> None:
        self.held = {kind: torch.zeros_like(rows) for kind in FULL}

    def updated(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Blocks of rows, and their two moments, to be changed in place."""
        first, second = self.held.values()
        yield slice(0, len(first)), first, second

    def blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The two moments, a block of rows after the other."""
        first, second = self.held.values()
        yield from zip(torch.split(first, ROWS), torch.split(second, ROWS), strict=True)


class Coded:
    """Adam's moments of rows of a matrix, in 8 bits a number; a block of rows at a time is there in full."""

    def __init__(self, rows: Tensor) -> None:
        none = [quantise(rows.new_zeros(1, rows.shape[1]), signed) for signed in (True, False)]
        parts = [part.expand(len(rows), -1).contiguous() for both in none for part in both]
        self.held = dict(zip(CODED, parts, strict=True))

    def updated(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield each block of rows with its two moments; the caller changes these in place before it takes the next."""
        parts = list(self.held.values())
        for at in range(0, len(parts[0]), ROWS):
            rows = slice(at, at + ROWS)
            first, second = self._read(rows)
            yield rows, first, second
            for held, new in zip(parts, (*quantise(first, True), *quantise(second, False)), strict=True):
                held[rows] = new

    def blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The two moments, a block of rows after the other."""
        for at in range(0, len(self.held[CODED[0]]), ROWS):
            yield self._read(slice(at, at + ROWS))

    def _read(self, rows: slice) -> tuple[Tensor, Tensor]:
        codes, scales, codes_v, scales_v = (held[rows] for held in self.held.values())
        return dequantise(codes, scales, True), dequantise(codes_v, scales_v, False)


class Optimizer:
    def __init__(self, model: Model) -> None:
        c = model.config
        self.model = model
        self.rate = c.lr  # of the last step
        self.steps = 0
        self.own = model.mesh.own(model.latents)
        self.pairs = {  # Adam's moments of my rows of each parameter
            name: Coded(rows) if c.moments == "8bit" and rows.dim() == 2 else Full(rows)
            for name, rows in self._owned().items()
        }
        self.average = Average(model, c.ema) if c.ema else None

    def _owned(self) -> dict[str, Tensor]:
        """The rows of the parameters that this replica updates."""
        return {name: param if name in WHOLE else param[self.own] for name, param in self.model.params.items()}

    def apply(self, grads: dict[str, Tensor], lr: float) -> dict[str, float]:
        """Update the parameters once, by gradients of my rows, which are overwritten.

        Returns each parameter's gradient norm over all ranks, before clipping.

        With `unit_rows` (Gao et al., section 2.3) the component of each decoder row's gradient along the row is
        removed, and rows are scaled back to norm 1 after the update.
        """
        model, params = self.model, self.model.params
        if model.unit_rows:
            model.project(grads["W_dec"], self.own)
        norms = group_norms(model, grads)
        total = sum(n * n for n in norms.values()) ** 0.5
        clip = model.config.clip
        shrink = clip / total if clip and total > clip else 1.0
        if shrink != 1.0:
            for grad in grads.values():
                grad.mul_(shrink)
        self._step(grads, lr)
        if model.unit_rows:
            params["W_dec"] /= model.row_norms()[:, None]
        self.steps += 1
        if self.average is not None:
            self.average.update(self.steps)
        return norms | {"all": total}

    def _step(self, grads: dict[str, Tensor], lr: float) -> None:
        """One step of Adam, by its function: the class imports torch's compiler, which takes seconds."""
        c, self.rate = self.model.config, lr
        for name, param in self._owned().items():
            for rows, first, second in self.pairs[name].updated():
                adam(
                    [param[rows]],
                    [grads[name][rows]],
                    [first],
                    [second],
                    [],
                    [torch.full((), float(self.steps), dtype=torch.float32, device=param.device)],
                    fused=True,
                    amsgrad=False,
                    beta1=float(c.beta1),
                    beta2=float(c.beta2),
                    lr=lr,
                    weight_decay=0.0,
                    eps=c.eps,
                    maximize=False,
                )
            if name not in WHOLE:
                self.model.mesh.spread_own(self.model.params[name], "parameters")

    def update_norms(self) -> dict[str, float]:
        """Norm of Adam's last step for each parameter, over all ranks, computed from its moments without a copy."""
        c, t, steps = self.model.config, self.steps, {}
        for name, param in self.model.params.items():
            square = torch.zeros((), device=param.device, dtype=param.dtype)
            for m, v in self.pairs[name].blocks():
                scale = (v / (1 - c.beta2**t)).sqrt_().add_(c.eps)
                square += (m / (1 - c.beta1**t) / scale).square_().sum()
            steps[name] = square.sqrt() * self.rate
        return group_norms(self.model, steps)

    def finished(self) -> AbstractContextManager[None]:
        """Within, the model is as it is evaluated: with averaged weights if they are kept."""
        return nullcontext() if self.average is None else self.average.instead()

    def kept(self) -> dict[str, Tensor]:
        """The tensors of a checkpoint beside the parameters, by name: the moments of my rows, and the average."""
        found = {f"{kind}.{name}": held for name, pair in self.pairs.items() for kind, held in pair.held.items()}
        if self.average is not None:
            found |= {PREFIX + name: held for name, held in self.average.held.items()}
        return found


def group_norms(model: Model, tensors: dict[str, Tensor]) -> dict[str, float]:
    """Norm over all ranks of each tensor, which is of my rows of the parameter of its name."""
    squares = torch.stack([sum_of_squares(t) for t in tensors.values()])
    everywhere = model.mesh.sum(model.mesh.sum(squares, "tp"), "dp")
    split = torch.tensor([name not in WHOLE for name in tensors], device=squares.device)
    return dict(zip(tensors, torch.where(split, everywhere, squares).sqrt().tolist(), strict=True))
