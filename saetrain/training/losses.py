"""Loss and gradients of each variant, written out.

No autograd: the gradients of a two-layer model fit on a page, and written out they show which are sparse, which
sums cross ranks, and what each costs.  tests/test_sae_gradients.py holds them against autograd on the plain
dense formulas.  B is the number of tokens over all replicas; e = x^ - x; sums run over tokens and latents.

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

The gradients, with up = d loss / d x^ and g = d loss / d pre:

    W_dec[i] = sum_b f_bi up_b      W_enc[i] = sum_b g_bi (x_b - [b_dec])      b_enc[i] = sum_b g_bi
    b_dec    = sum_b up_b - [W_enc^T b_enc's gradient]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from saetrain.compute.kernels import Codes, from_dense, sum_of_squares
from saetrain.compute.selection import batch_topk, segments, topk
from saetrain.model import Model

DENSE_ABOVE = 1 / 50  # share of active latents from which relu's dense products are the faster


@dataclass
class Step:
    """What one batch gives, over all ranks: `losses` are means over its tokens."""

    grads: dict[str, Tensor]  # of my share of the parameters
    residual: Tensor  # x^ - x, of this replica's tokens
    fired: Tensor  # tokens of the batch on which each of my latents fired
    losses: dict[str, float]
    active: float  # active latents a token


class _Part(NamedTuple):
    """What this rank alone can say."""

    grads: dict[str, Tensor]
    residual: Tensor
    fired: Tensor
    whole: dict[str, Tensor]  # loss terms summed over my tokens; all ranks of the replica hold them
    mine: dict[str, Tensor]  # loss terms summed over my tokens and my latents


def step(model: Model, x: Tensor, ramp: float = 1.0) -> Step:
    """Loss and gradients on this replica's normalised tokens; `ramp` scales the sparsity term.

    Also updates the firing statistics and the threshold, but not the parameters.
    """
    part = _sparse(model, x) if model.config.is_sparse else _dense(model, x, ramp)
    mesh, tokens, state = model.mesh, len(x) * model.mesh.dp, model.state
    grads, fired = part.grads, mesh.sum(part.fired, "dp", "gradients")
    if mesh.dp > 1:
        flat = mesh.sum(torch.cat([g.reshape(-1) for g in grads.values()]), "dp", "gradients")
        pieces = torch.split(flat, [g.numel() for g in grads.values()])
        grads = {n: piece.view_as(g) for (n, g), piece in zip(grads.items(), pieces, strict=True)}

    mine = mesh.sum(torch.stack([*part.mine.values(), part.fired.sum().to(x.dtype)]), "tp")
    means = mesh.sum(torch.cat([torch.stack(list(part.whole.values())), mine]), "dp") / tokens
    *terms, active = means.tolist()
    losses = dict(zip((*part.whole, *part.mine), terms, strict=True))

    state["quiet"] = (state["quiet"] + tokens).masked_fill(fired > 0, 0)
    state["fired"] += fired
    state["window"] += tokens
    return Step(grads, part.residual, fired, {"loss": sum(terms), **losses}, active)


def _sparse(model: Model, x: Tensor) -> _Part:
    c, mesh, p = model.config, model.mesh, model.params
    tokens, groups = len(x) * mesh.dp, len(c.widths)
    xc, encoder = model.centred(x), model.encoder()
    if c.arch == "topk":
        codes = topk(encoder, xc, c.k, mesh)
    else:
        state = model.state["threshold"]
        codes, cut = batch_topk(encoder, xc, c.k * tokens, mesh, 0.8 * float(state))
        state += (cut.to(state.dtype) - state) * (c.threshold_rate if float(state) else 1.0)
    fired = codes.count()
    codes = segments(codes, c.widths, model.lo)

    # In place where it can be: on the CPU a fresh page costs more than the sums made in it.
    errors = mesh.sum(codes.decode(p["W_dec"]), "tp", "reconstructions").view(groups, *x.shape)
    if groups > 1:
        errors = errors.cumsum(0)
    errors += p["b_dec"]
    errors -= x
    loss = {"reconstruction": sum_of_squares(errors) / (groups * model.d_in)}
    up = errors * (2 / (groups * model.d_in * tokens))
    if groups > 1:  # what reaches segment s is the sum over the nested dictionaries that hold it
        up = up.flip(0).cumsum(0).flip(0)
    residual, b_dec = errors[-1], up[0].sum(0)

    up = up.view(-1, model.d_in)
    auxiliary = _auxiliary(model, xc, residual) if c.aux_coef else None
    if auxiliary is not None:
        aux_codes, aux_up, loss["aux"] = auxiliary
        codes, up = codes.then(aux_codes), torch.cat([up, aux_up])

    g = codes.dots(up, p["W_dec"])
    b_enc = codes.sum_by_latent(g)
    grads = {
        "W_enc": codes.scatter(xc, codes.bag % len(x), g),
        "b_enc": b_enc,
        "W_dec": codes.scatter(up, codes.bag, codes.value),
        "b_dec": b_dec - mesh.sum(b_enc @ p["W_enc"], "tp"),
    }
    return _Part(grads, residual, fired, loss, {})


def _auxiliary(model: Model, xc: Tensor, residual: Tensor) -> tuple[Codes, Tensor, Tensor] | None:
    """Codes of the dead latents that rebuild the residual, the gradient that reaches them, and the loss."""
    c, mesh = model.config, model.mesh
    dead = (model.state["quiet"] >= c.dead_tokens).nonzero().view(-1)
    total = int(mesh.sum(torch.tensor([len(dead)], device=dead.device), "tp"))
    if not total:
        return None
    found = topk(model.encoder(dead), xc, min(c.aux_k, total), mesh)
    latent = dead[found.latent] if len(dead) else found.latent
    codes = Codes(latent, found.value, found.bag, found.bags, model.latents)
    rebuilt = mesh.sum(codes.decode(model.params["W_dec"]), "tp", "reconstructions")
    error = rebuilt + residual  # residual is x^ - x, so the target is its negative
    weight = c.aux_coef * min(total / c.aux_k, 1.0) / model.d_in
    return codes, error * (2 * weight / (len(xc) * mesh.dp)), sum_of_squares(error) * weight


def _dense(model: Model, x: Tensor, ramp: float) -> _Part:
    c, mesh, p = model.config, model.mesh, model.params
    tokens, jump = len(x) * mesh.dp, c.arch == "jumprelu"
    pre = torch.cat([tile() for tile in model.encoder().tiles(x)])
    threshold = p["log_threshold"].exp() if jump else x.new_zeros(())
    open_ = pre > threshold
    acts = pre * open_
    norms = p["W_dec"].norm(dim=1).clamp_min(1e-12)
    lam = c.sparsity * ramp / tokens
    thin = not jump and float(open_.count_nonzero()) < DENSE_ABOVE * open_.numel()
    codes = from_dense(acts) if thin else None
    out = codes.decode(p["W_dec"]) if codes else acts @ p["W_dec"]
    out = mesh.sum(out, "tp", "reconstructions")
    residual = out + p["b_dec"] - x
    up = residual * (2 / tokens)
    mine = {}
    if codes is not None:
        fired, g = codes.count(), codes.dots(up, p["W_dec"]) + lam * norms[codes.latent]
        mass = codes.sum_by_latent(codes.value)  # sum over tokens of f_i
        mine["sparsity"] = (mass @ norms) * lam * tokens
        grads = {
            "W_enc": codes.scatter(x, codes.bag, g),
            "b_enc": codes.sum_by_latent(g),
            "W_dec": codes.scatter(up, codes.bag, codes.value) + (lam * mass / norms)[:, None] * p["W_dec"],
        }
    else:
        fired, g = open_.sum(0), up @ p["W_dec"].T
        grads = {"W_dec": acts.T @ up}
        if jump:
            squashed = torch.tanh(acts * norms * c.tanh_scale)
            slope = (1 - squashed.square()) * (lam * c.tanh_scale)  # d penalty / d (f |W_dec|)
            short = (threshold - pre).relu()
            lam_p = c.preact_coef / tokens
            mine["sparsity"] = squashed.sum() * lam * tokens
            mine["preact"] = (short.sum(0) @ norms) * lam_p * tokens
            g += slope * norms
            near = (pre - threshold).abs() < c.bandwidth / 2
            grads["log_threshold"] = -(threshold / c.bandwidth) * (g * near).sum(0)
            grads["log_threshold"] += lam_p * norms * threshold * (short > 0).sum(0)
            by_norm = (slope * acts).sum(0) + lam_p * short.sum(0)
            g = g * open_ - (lam_p * norms) * (short > 0)
        else:
            mass = acts.sum(0)
            mine["sparsity"] = (mass @ norms) * lam * tokens
            by_norm = lam * mass
            g = (g + lam * norms) * open_
        grads["W_dec"] += (by_norm / norms)[:, None] * p["W_dec"]
        grads |= {"W_enc": g.T @ x, "b_enc": g.sum(0)}
    grads["b_dec"] = up.sum(0)
    return _Part(grads, residual, fired, {"reconstruction": sum_of_squares(residual)}, mine)
