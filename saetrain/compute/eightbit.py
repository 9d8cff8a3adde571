"""Numbers in 8 bits: block-wise quantisation with the dynamic tree codebook.

Dettmers, Lewis, Shleifer, Zettlemoyer 2022, 8-bit Optimizers via Block-wise Quantization, arXiv 2110.02861, section 2.
A block of 256 consecutive numbers of a row is stored as a scale, its largest number by absolute value, and for each
number its ratio to the scale, as the nearest of 256 values between -1 and 1, or between 0 and 1.  The leading zeros of
a code say how many decades below 1 its value lies, and the bits after them where in that decade:

    decades below 1      0     1     2    ...    6
    values, signed      64    32    16    ...    1    of either sign, and 0 and 1
    values, unsigned   128    64    32    ...    2    and 0 and 1

so that large numbers of a block are off by 1% or so, and those a millionth as large still are not 0.

Blocks never cross rows: the bits do not depend on how rows are shared.  The largest number is kept to the bit, since
the scale has its sign; so numbers that are read and stored again, as those of latents that do not fire, do not drift.
No positive number is rounded to an unsigned 0, which would divide by nothing where it is a second moment (the
zero-point problem of Li, Chen, Zhu 2023, arXiv 2309.01507).
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 256  # numbers that share a scale
DECADES = 7


def codebook(signed: bool) -> Tensor:
    """The values of the codes 0 to 255, rising: float32 [256]."""
    found = [torch.tensor([0.0, 1.0], dtype=torch.float64)]
    for decade in range(DECADES):
        edges = torch.linspace(0.1, 1, 2 ** (DECADES - signed - decade) + 1, dtype=torch.float64)
        means = (edges[1:] + edges[:-1]) / 2 * 10.0**-decade
        found += [means, -means] if signed else [means]
    return torch.cat(found).sort().values.float()


def blocks_of(width: int) -> int:
    """Blocks of a row of so many numbers."""
    return -(-width // BLOCK)


class _Tables(NamedTuple):
    """For each value of the upper 16 bits of a float32: the code of the least number that has these bits, and the bound
    above which numbers that have them take the next code.  No two bounds have the same upper bits.
    """

    values: Tensor  # [256]
    code: Tensor  # uint8 [65536]
    bound: Tensor  # [65536]


@cache
def _tables(signed: bool, device: torch.device) -> _Tables:
    values = codebook(signed)
    middles = (values[1:].double() + values[:-1].double()).div(2).float()
    first = torch.arange(65536, dtype=torch.int64) << 16
    ends = torch.stack([first, first + 65535]).to(torch.int32).view(torch.float32).nan_to_num(0.0)
    code = torch.bucketize(ends.amin(0), middles)
    bound = F.pad(middles, (0, 1), value=torch.inf)[code]
    return _Tables(values.to(device), code.to(device, torch.uint8), bound.to(device))


def quantise(x: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Codes uint8 [rows, width] and scales [rows, blocks], in the type of `x`, of x [rows, width]."""
    rows, width = x.shape
    count, each = blocks_of(width), min(width, BLOCK)
    blocks = F.pad(x, (0, count * each - width)).view(rows, count, each)
    low, high = blocks.aminmax(dim=2)
    scales = torch.where(high >= low.neg(), high, low)
    ratios = (blocks / scales.masked_fill(scales == 0, 1)[:, :, None]).float().view(-1)
    tables = _tables(signed, x.device)
    upper = (ratios.view(torch.int32) >> 16).bitwise_and_(65535)
    codes = tables.code.index_select(0, upper)
    codes += ratios > tables.bound.index_select(0, upper)
    if not signed:
        codes = torch.maximum(codes, (blocks > 0).view(-1).to(torch.uint8))
    return codes.view(rows, count * each)[:, :width], scales


def dequantise(codes: Tensor, scales: Tensor, signed: bool) -> Tensor:
    """The numbers [rows, width] that `quantise` gave these codes and scales, in the type of the scales."""
    rows, width = codes.shape
    count, each = blocks_of(width), min(width, BLOCK)
    padded = F.pad(codes, (0, count * each - width)).view(-1)
    values = _tables(signed, codes.device).values.index_select(0, padded.int()).to(scales.dtype)
    return values.view(rows, count, each).mul_(scales[:, :, None]).view(rows, count * each)[:, :width]
