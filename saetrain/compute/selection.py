"""Exact top-k over latents that live on several ranks.

The order is the same everywhere: larger value first, then (batchtopk) earlier token, then lower latent index.  Only
positive pre-activations are ever active.  The chosen set is therefore a function of the values alone, not of the
number of ranks: all k winners of a token may sit on one rank, so each rank offers its own k best.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from saetrain.compute.kernels import Codes, Encoder
from saetrain.compute.mesh import Mesh

# (shift, width) of a positive float32's 31 bits, highest first.
DIGITS = ((20, 11), (10, 10), (0, 10))


def topk(encoder: Encoder, x: Tensor, k: int, mesh: Mesh) -> Codes:
    """This rank's part of each token's k largest positive pre-activations.

    Ranks exchange values only: 4 k (T - 1) bytes per token.  Lists arrive in order of rank, and so of latent index,
    and the sort is stable, which settles ties.
    """
    latents = encoder.weight.shape[0]
    value, latent = encoder.topk(x, k)
    short = k - value.shape[1]  # a rank with fewer than k latents pads its offers
    value = F.pad(value.where(value > 0, -torch.inf), (0, short), value=-torch.inf)
    latent = F.pad(latent, (0, short))
    offers = mesh.gather(value, "tp", "candidates").permute(1, 0, 2).reshape(len(x), -1)
    winners = torch.sort(offers, dim=1, stable=True, descending=True).indices[:, :k]
    won = torch.zeros_like(offers, dtype=torch.bool).scatter_(1, winners, True)
    mine = won[:, mesh.tp_index * k : (mesh.tp_index + 1) * k] & (value > 0)
    bag, at = mine.nonzero(as_tuple=True)
    return Codes(latent[bag, at], value[bag, at], bag, len(x), latents)


def batch_topk(encoder: Encoder, x: Tensor, total: int, mesh: Mesh, floor: float) -> tuple[Codes, Tensor]:
    """This rank's part of the `total` largest positive pre-activations of the whole batch, and the smallest value.

    `floor` is a guess below which no winner is expected (a fraction of the last threshold).  Candidates are first
    sought above it and, if these are too few, above ever less of it and at last above zero, where they may be half of
    all values: a wrong guess costs time but never changes the result.
    """
    codes = encoder.above(x, floor)
    for lower in (floor / 2, floor / 4, floor / 8, 0.0) if floor > 0 else ():
        if int(mesh.sum(_count(codes), "world", "candidates")) >= total:
            break
        codes = encoder.above(x, lower)
    cut, above = kth_largest(codes.value, total, mesh)
    keep = codes.value > cut
    ties = (codes.value == cut).nonzero().view(-1)
    # Place in the order of (token, latent) over the whole batch, for the ties alone.
    first_token, first_latent = mesh.dp_index * len(x), mesh.tp_index * codes.latents
    place = (codes.bag[ties] + first_token) * (codes.latents * mesh.tp)
    place += codes.latent[ties] + first_latent
    everywhere = mesh.gather_ragged(place, "world", "candidates").sort().values
    if len(everywhere) and total > above:
        last = everywhere[min(total - above, len(everywhere)) - 1]
        keep[ties[place <= last]] = True
    latent, value, bag = codes.latent[keep], codes.value[keep], codes.bag[keep]
    return Codes(latent, value, bag, codes.bags, codes.latents), cut


def kth_largest(values: Tensor, total: int, mesh: Mesh) -> tuple[Tensor, int]:
    """The `total`-th largest of the positive values of all ranks (the smallest, if there are fewer), and the number
    of larger ones.

    This is a radix select: three histograms of the bits of the floats, summed over ranks, 24 KB in all.
    """
    exact = values.dtype == torch.float32
    bits = (values if exact else values.float()).view(torch.int32).long()
    prefix, above, inside = 0, 0, torch.ones_like(bits, dtype=torch.bool)
    for shift, width in DIGITS:
        digit = (bits >> shift) & ((1 << width) - 1)
        mine = torch.bincount(digit[inside], minlength=1 << width)
        histogram = mesh.sum(mine, "world", "candidates")
        from_top = above + histogram.flip(0).cumsum(0)
        reached = (from_top >= total).nonzero()
        present = histogram.flip(0).nonzero()
        if not len(present):
            return values.new_zeros(()), 0
        at = int(reached[0]) if len(reached) else int(present[-1])
        above = int(from_top[at] - histogram.flip(0)[at])
        value = (1 << width) - 1 - at
        prefix |= value << shift
        inside &= digit == value
    found = torch.full((), prefix, dtype=torch.int32, device=values.device)
    cut = found.view(torch.float32).to(values.dtype)
    if not exact:  # finish among the few values that round to the same float32
        rest = mesh.gather_ragged(values[inside], "world", "candidates")
        rest = rest.sort(descending=True).values
        cut = rest[min(max(total - above, 1), len(rest)) - 1]
        above += int((rest > cut).sum())
    return cut, above


def _count(codes: Codes) -> Tensor:
    return torch.full((1,), len(codes.value), device=codes.value.device)
