"""Loss and gradients of each variant: the formulas of `variants/`, and the part of a step that all variants share.

No autograd: the gradients of a two-layer model fit on a page, and written out they show which are sparse, which
sums cross ranks, and how much each costs.  Tests compare them with autograd on the plain dense formulas.
B is the number of tokens over all replicas; e = x^ - x; sums run over tokens and latents.  For a transcoder, read y for
x in e, and d_out for d; for several arrays, |W_dec[i]| is the sum of the row's norms in the arrays.

topk, batchtopk   |e|^2 / (d B)  +  aux_coef * s * |e^ - (x - x^)|^2 / (d B)
    e^ rebuilds the residual (held constant) from the aux_k largest of the dead latents; s = min(dead / aux_k, 1).
    (Gao et al. 2024, section 2 and appendix A.2; Bussmann et al. 2024.)
matryoshka        the mean over nested dictionaries g of |e_g|^2 / (d B), the same aux term on the whole
    (Bussmann et al. 2025.)  With segment s = latents between two widths, x^_g = sum of segments up to g, so the
    gradient that reaches segment s is the sum of e_g over g >= s.
relu              |e|^2 / B  +  lambda sum_i f_i |W_dec[i]| / B                       (Anthropic, April 2024)
jumprelu          |e|^2 / B  +  lambda sum_i tanh(c f_i |W_dec[i]|) / B
                  +  preact_coef sum_i relu(exp(t_i) - pre_i) |W_dec[i]| / B         (Anthropic, January 2025)
    d f / d pre = [pre > exp(t)],  d f / d t = -exp(t) / w [|pre - exp(t)| < w / 2],  w = bandwidth.
gated             |e|^2 / B  +  lambda sum_i relu(gate_i) / B  +  |e_gate|^2 / B      (Rajamanoharan et al. 2024)
    e_gate = relu(gate) W_dec + b_dec - x, with W_dec and b_dec held constant; [gate > 0] has no gradient.

The gradients, with up = d loss / d x^ and g = d loss / d pre:

    W_dec[i] = sum_b f_bi up_b      W_enc[i] = sum_b g_bi (x_b - [b_dec])      b_enc[i] = sum_b g_bi
    b_dec    = sum_b up_b - [W_enc^T b_enc's gradient]      W_skip = sum_b up_b x_b^T
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saetrain.model import WHOLE, Model


@dataclass
class Step:
    """The result of one batch, over all ranks: `losses` are means over its tokens."""

    grads: dict[str, Tensor]  # of my share of the parameters; of those split by latent, my replica's rows (`Mesh.own`)
    residual: Tensor  # [tokens, d_out]: y^ - y, of this replica's tokens
    fired: Tensor  # [latents]: tokens of the batch on which each of my latents fired
    losses: dict[str, float]
    active: float  # active latents per token


def step(model: Model, x: Tensor, ramp: float = 1.0, y: Tensor | None = None) -> Step:
    """Loss and gradients on this replica's normalised tokens [tokens, d_in]; `ramp` scales the sparsity term.

    `y` [tokens, d_out] is what a transcoder rebuilds.

    Also updates the firing statistics and the threshold, but not the parameters.
    """
    with model.products():
        part = model.gradients(x, x if y is None else y, ramp)
    mesh, tokens, state = model.mesh, len(x) * model.mesh.dp, model.state
    fired = mesh.sum(part.fired["fired"], "dp", "gradients")
    grads = {
        name: mesh.sum(grad, "dp", "gradients") if name in WHOLE else mesh.sum_own(grad, "gradients")
        for name, grad in part.grads.items()
    }
    residual = part.residuals[0] if len(part.residuals) == 1 else torch.cat(part.residuals)

    mine = mesh.sum(torch.stack([*part.mine.values(), part.fired["fired"].sum().to(x.dtype)]), "tp")
    means = mesh.sum(torch.cat([torch.stack(list(part.whole.values())), mine]), "dp") / tokens
    *terms, active = means.tolist()
    losses = dict(zip((*part.whole, *part.mine), terms, strict=True))

    state["quiet"] = (state["quiet"] + tokens).masked_fill(fired > 0, 0)
    state["fired"] += fired
    state["window"] += tokens
    return Step(grads, residual, fired, {"loss": sum(terms), **losses}, active)
