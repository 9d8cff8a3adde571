"""The sparse products of kernels.py for CUDA, in Triton.

One program computes one sum (a bag) or one dot product (an entry), over blocks of columns, in float32.  Each row is
read once, nothing is materialised, and no two programs write to the same place, so results repeat bit for bit.  A table
may be in bfloat16: sums have the type of their weights, dot products that of `up`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit  # type: ignore[untyped-decorator]
def _bag_sum(table, index, weight, offsets, out, d, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    bag = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < d
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    first = tl.load(offsets + bag)
    for entry in range(first, tl.load(offsets + bag + 1)):
        row = tl.load(table + tl.load(index + entry) * d + column, mask=inside, other=0.0)
        total += tl.load(weight + entry).to(tl.float32) * row.to(tl.float32)
    tl.store(out + bag * d + column, total, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _bag_dot(up, table, index, bag, out, d, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    entry = tl.program_id(0).to(tl.int64)
    left, right = up + tl.load(bag + entry) * d, table + tl.load(index + entry) * d
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, d, BLOCK):
        column = start + tl.arange(0, BLOCK)
        a = tl.load(left + column, mask=column < d, other=0.0).to(tl.float32)
        total += a * tl.load(right + column, mask=column < d, other=0.0).to(tl.float32)
    tl.store(out + entry, tl.sum(total))


def _device_of(table: Tensor) -> AbstractContextManager[None]:
    """Make the table's GPU the current one, on which Triton launches."""
    return torch.cuda.device_of(table)  # type: ignore[no-untyped-call]


def _block(d: int) -> int:
    return int(min(triton.next_power_of_2(d), 1024))


def bag_sum(table: Tensor, index: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    d, bags = table.shape[1], len(offsets) - 1
    out = torch.empty(bags, d, device=table.device, dtype=weight.dtype)
    if bags:
        block = _block(d)
        grid = (bags, triton.cdiv(d, block))
        with _device_of(table):
            _bag_sum[grid](table.contiguous(), index, weight, offsets, out, d, BLOCK=block)
    return out


def bag_dot(up: Tensor, table: Tensor, index: Tensor, bag: Tensor) -> Tensor:
    out = torch.empty(len(index), device=table.device, dtype=up.dtype)
    if len(index):
        d = table.shape[1]
        grid = (len(index),)
        with _device_of(table):
            _bag_dot[grid](up.contiguous(), table.contiguous(), index, bag, out, d, BLOCK=_block(d))
    return out
