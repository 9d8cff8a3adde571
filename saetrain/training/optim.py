"""Adam on this rank's share, learning-rate schedule, gradient clipping, unit-norm decoder rows, and their average.

Everything here is local to a rank, except that each step sums the squared gradient norms over all ranks.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.optim.adam import adam

from saetrain.compute.kernels import sum_of_squares
from saetrain.model import WHOLE, Model
from saetrain.settings import Settings
from saetrain.training.average import PREFIX, Average


def ramps(config: Settings, step: int) -> tuple[float, float]:
    """(learning rate, factor of the sparsity term) for step 0, 1, ... of the run.

    The rate rises linearly over `lr_warmup` of the run, stays, and falls linearly to 0 over the last `lr_decay`.
    """
    c, total = config, config.steps
    up = (step + 1) / max(c.lr_warmup * total, 1)
    down = (total - step) / max(c.lr_decay * total, 1)
    ramp = (step + 1) / max(c.sparsity_warmup * total, 1)
    return c.lr * min(up, down, 1.0), min(ramp, 1.0)


class Optimizer:
    def __init__(self, model: Model) -> None:
        c = model.config
        self.model = model
        self.rate = c.lr  # of the last step
        self.steps = 0
        # Adam's moments, and the number of steps as a tensor, of each parameter that has had a gradient.
        self.state: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        self.average = Average(model, c.ema) if c.ema else None

    def apply(self, grads: dict[str, Tensor], lr: float) -> dict[str, float]:
        """Update the parameters once.  Returns each parameter's gradient norm over all ranks, before clipping.

        With `unit_rows` (Gao et al., section 2.3) the component of each decoder row's gradient along the row is
        removed, and rows are scaled back to norm 1 after the update.
        """
        model, params = self.model, self.model.params
        if model.unit_rows:
            model.project(grads["W_dec"])
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
        for name, param in self.model.params.items():
            if name not in self.state:
                count = torch.zeros((), dtype=torch.float32, device=param.device)
                self.state[name] = (torch.zeros_like(param), torch.zeros_like(param), count)
        firsts, seconds, counts = (list(column) for column in zip(*self.state.values(), strict=True))
        adam(
            [self.model.params[name] for name in self.state],
            [grads[name] for name in self.state],
            firsts,
            seconds,
            [],
            counts,
            fused=True,
            amsgrad=False,
            beta1=float(c.beta1),
            beta2=float(c.beta2),
            lr=lr,
            weight_decay=0.0,
            eps=c.eps,
            maximize=False,
        )

    def update_norms(self) -> dict[str, float]:
        """Norm of Adam's last step for each parameter, over all ranks, computed from its moments without a copy."""
        c, steps = self.model.config, {}
        for name, param in self.model.params.items():
            first, second, count = self.state[name]
            t = float(count)
            square = torch.zeros((), device=param.device, dtype=param.dtype)
            for m, v in zip(torch.split(first, 1024), torch.split(second, 1024), strict=True):
                scale = (v / (1 - c.beta2**t)).sqrt_().add_(c.eps)
                square += (m / (1 - c.beta1**t) / scale).square_().sum()
            steps[name] = square.sqrt() * self.rate
        return group_norms(self.model, steps)

    def finished(self) -> AbstractContextManager[None]:
        """Within, the model is as it is evaluated: with averaged weights if they are kept."""
        return nullcontext() if self.average is None else self.average.instead()

    # --- for checkpoints: the moments and the average by parameter, and the number of steps made

    def moments(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, (first, second, _) in self.state.items():
            found |= {f"adam_m.{name}": first, f"adam_v.{name}": second}
        if self.average is not None:
            found |= {PREFIX + name: held for name, held in self.average.held.items()}
        return found

    def restore(self, moments: dict[str, Tensor], steps: int) -> None:
        """Take over what `moments` gave after so many steps."""
        self.steps = steps
        for name, held in self.average.held.items() if self.average is not None else ():
            held.copy_(moments[PREFIX + name])
        for name, param in self.model.params.items():
            if f"adam_m.{name}" in moments:
                count = torch.tensor(float(steps), dtype=torch.float32, device=param.device)
                self.state[name] = (moments[f"adam_m.{name}"], moments[f"adam_v.{name}"], count)


def group_norms(model: Model, tensors: dict[str, Tensor]) -> dict[str, float]:
    """Norm over all ranks of each tensor, which has the shape of the parameter of its name; one message."""
    squares = torch.stack([sum_of_squares(t) for t in tensors.values()])
    everywhere = model.mesh.sum(squares, "tp")
    split = torch.tensor([name not in WHOLE for name in tensors], device=squares.device)
    return dict(zip(tensors, torch.where(split, everywhere, squares).sqrt().tolist(), strict=True))
