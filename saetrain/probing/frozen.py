"""Attention patterns and norm scales held at their values, so that what is between two layers is nearly linear.

A pattern depends on its queries and keys alone, so these get no gradient: a hook detaches the outputs of the modules
that make them.  A norm y = x / scale(x) * w keeps its scale: a hook gives x times the ratio y / x, and the ratio gets
no gradient.  The values of a pass are the same as before; only gradients change.  Multilayer perceptrons are not frozen
but linearised where they are, as gradients do.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from saetrain.errors import ConfigError
from saetrain.probing.causal import LanguageModel

PATTERN = ("q_proj", "k_proj")  # modules that make queries and keys
NORM = "RMSNorm"  # how the class of a norm without a mean ends


@contextmanager
def frozen(model: LanguageModel) -> Iterator[None]:
    """Within, gradients pass through values and residuals only.

    Raises `ConfigError` for a model whose queries and keys come out of one module with the values, or whose norms are
    not RMSNorm.
    """
    for block in model.blocks:
        inside = list(block.named_modules())
        makers = sum(name.rsplit(".", 1)[-1] in PATTERN for name, _ in inside)
        if makers != len(PATTERN) or sum(_is_norm(module) for _, module in inside) < 2:
            raise ConfigError(
                f"cannot freeze {model.name}: a block needs {' and '.join(PATTERN)} and two {NORM}s, as in Llama"
            )
    hooks = []
    for name, module in model.model.named_modules():
        if name.rsplit(".", 1)[-1] in PATTERN:
            hooks.append(module.register_forward_hook(_detach))
        elif _is_norm(module):
            hooks.append(module.register_forward_hook(_keep_scale))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _is_norm(module: Any) -> bool:
    return type(module).__name__.endswith(NORM)


def _detach(_: Any, __: Any, output: Tensor) -> Tensor:
    return output.detach()


def _keep_scale(_: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    x = args[0]
    least = torch.finfo(x.dtype).tiny
    ratio = torch.where(x.abs() > least, output / x, torch.zeros_like(x)).detach()
    return x * ratio
