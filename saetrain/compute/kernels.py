"""The three products of a sparse code, touching active latents only, and an exact top-k.

A batch's active latents are `Codes`: entry e says that in bag b the latent `latent[e]` has the value `value[e]`,
one bag after the other.  A bag is a token, or for nested dictionaries a (segment, token) pair.

::

    decode    out[b]   = sum over entries e of bag b     value[e] table[latent[e]]        nnz d multiply-adds
    dots      out[e]   = <up[bag[e]], table[latent[e]]>                                   nnz d
    scatter   out[i]   = sum over entries e of latent i  weight[e] rows[row[e]]           nnz d

`decode` and `scatter` are the same weighted bag sum, over the entries in bag order and in latent order.  Neither
needs atomic adds, so results repeat bit for bit.  They run as torch's embedding_bag, which reads each row once and
writes each sum once (on 2 cores 30 times faster than index_select, multiply, index_add); on CUDA they run as the
Triton kernels of triton_kernels.py where Triton is installed, else as embedding_bag again.  Those kernels read rows of
bfloat16 where the encoder product is in it (`gathered`), half the bytes, and sum them in float32.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 1024  # of a matrix handled at a time, where a temporary of its size is to be avoided
IN_NUMPY = (torch.float32, torch.float64, torch.int16)  # types of values whose largest numpy finds
GROUPS = (32, 16, 8)  # sizes of the groups of latents whose maxima bound a top-k


@dataclass(frozen=True)
class Codes:
    """The active latents of a batch, and their values."""

    latent: Tensor  # int64 [nnz], row of this rank's share of the dictionary
    value: Tensor  # [nnz]
    bag: Tensor  # int64 [nnz], ascending
    bags: int
    latents: int  # of this rank

    @cached_property
    def offsets(self) -> Tensor:
        return _offsets(self.bag, self.bags)

    @cached_property
    def by_latent(self) -> tuple[Tensor, Tensor]:
        """The order of entries by latent (bags ascending within), and the offset of each latent's first."""
        latent, order = torch.sort(self.latent, stable=True)
        return order, _offsets(latent, self.latents)

    def decode(self, table: Tensor) -> Tensor:
        """[bags, d] from table [latents, d]."""
        return bag_sum(table, self.latent, self.value, self.offsets)

    def dots(self, up: Tensor, table: Tensor) -> Tensor:
        """[nnz] from up [bags, d] and table [latents, d]."""
        return bag_dot(up, table, self.latent, self.bag, self.offsets)

    def scatter(self, rows: Tensor, row: Tensor, weight: Tensor) -> Tensor:
        """[latents, d] from rows [m, d]; row and weight are [nnz]."""
        order, offsets = self.by_latent
        return bag_sum(rows, row[order], weight[order], offsets)

    def sum_by_latent(self, weight: Tensor) -> Tensor:
        """[latents]: sums of `weight`, one entry after the other."""
        order, offsets = self.by_latent
        return torch.segment_reduce(weight[order], "sum", offsets=offsets)

    def count(self) -> Tensor:
        """[latents]: bags in which each latent is active."""
        return self.by_latent[1].diff()

    def split(self, bags: int) -> list[Codes]:
        """Codes of so many bags each, the last of fewer."""
        if bags >= self.bags:
            return [self]
        firsts = list(range(0, self.bags, bags))
        *cuts, _ = self.offsets[[*firsts, self.bags]].tolist()
        parts = []
        for first, lo, hi in zip(firsts, cuts, [*cuts[1:], len(self.bag)], strict=True):
            count = min(bags, self.bags - first)
            parts.append(Codes(self.latent[lo:hi], self.value[lo:hi], self.bag[lo:hi] - first, count, self.latents))
        return parts

    def then(self, other: Codes) -> Codes:
        """Both, with the other's bags after mine."""
        return Codes(
            torch.cat([self.latent, other.latent]),
            torch.cat([self.value, other.value]),
            torch.cat([self.bag, other.bag + self.bags]),
            self.bags + other.bags,
            self.latents,
        )


def from_dense(acts: Tensor) -> Codes:
    """Codes of the positive entries of [tokens, latents]."""
    bag, latent = acts.nonzero(as_tuple=True)
    return Codes(latent, acts[bag, latent], bag, acts.shape[0], acts.shape[1])


def _offsets(sorted_ids: Tensor, count: int) -> Tensor:
    return F.pad(torch.bincount(sorted_ids, minlength=count).cumsum(0), (1, 0))


@cache
def _triton() -> Any:
    """The kernels for CUDA, or None where Triton is not installed; only a CUDA tensor needs its import."""
    try:
        from saetrain.compute import triton_kernels
    except ImportError:
        return None
    return triton_kernels


def _has_kernels(table: Tensor) -> bool:
    """True if the Triton kernels, whose sums are in float32, serve these rows."""
    return table.is_cuda and table.dtype != torch.float64 and _triton() is not None


def gathered(rows: Tensor, compute: torch.dtype) -> Tensor:
    """Rows as sparse products are to read them: in the type of the encoder product where that is narrower."""
    return rows.to(compute) if compute.itemsize < rows.dtype.itemsize and _has_kernels(rows) else rows


def bag_sum(table: Tensor, index: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    if _has_kernels(table):
        return cast(Tensor, _triton().bag_sum(table, index, weight, offsets))
    weight = weight.to(table.dtype)
    return F.embedding_bag(index, table, offsets, mode="sum", per_sample_weights=weight, include_last_offset=True)


def bag_dot(up: Tensor, table: Tensor, index: Tensor, bag: Tensor, offsets: Tensor) -> Tensor:
    if _has_kernels(table):
        return cast(Tensor, _triton().bag_dot(up, table, index, bag))
    if not len(index):
        return up.new_empty(0)
    dots = torch.ops.aten._embedding_bag_per_sample_weights_backward
    return cast(Tensor, dots(up.contiguous(), table, index, offsets, bag, 0))


def row_dots(a: Tensor, b: Tensor) -> Tensor:
    """[rows]: the product of each row of a [rows, d] with that of b, without a third matrix."""
    return torch.cat([(u * v).sum(1) for u, v in zip(torch.split(a, ROWS), torch.split(b, ROWS), strict=True)])


def unmasked(mask: Tensor, buffer: Tensor) -> Tensor:
    """[columns]: entries of a mask [rows, columns] that are false.  `buffer`, of its shape, is overwritten.

    A sum of the mask itself would make a copy of it in int64.
    """
    return buffer.fill_(1).masked_fill_(mask, 0).sum(0).long()


def sum_of_squares(x: Tensor) -> Tensor:
    """One pass, without temporaries."""
    flat = x.reshape(-1)
    return flat.dot(flat)


# --- top-k


def exact_topk(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and columns of the k largest of each row, largest first, equal ones in order of column.

    Few values reach the bound of `candidates`.  Only these are sorted, stably, so that ties go to the lowest columns;
    torch.topk breaks ties arbitrarily.  A NaN is not below any bound, and comes first.
    """
    k = min(k, pre.shape[1])
    if not k:
        return pre[:, :0], pre[:, :0].long()
    row, column, value = candidates(pre, k)
    counts = torch.bincount(row, minlength=len(pre))
    starts = counts.cumsum(0) - counts
    found = pre.new_full((len(pre), int(counts.max())), -torch.inf)
    found[row, torch.arange(len(row), device=row.device) - starts[row]] = value
    best, at = torch.sort(found, dim=1, stable=True, descending=True)
    return best[:, :k], column[starts[:, None] + at[:, :k]]


def true_places(mask: Tensor) -> Tensor:
    """Where a mask is true, as places of the flattened mask; on a CPU numpy is several times faster here."""
    if mask.device.type != "cpu":
        return mask.flatten().nonzero().view(-1)
    return torch.from_numpy(np.flatnonzero(mask.numpy()))


def candidates(
    pre: Tensor, k: int, least: Callable[[Tensor], Tensor] = lambda bound: bound
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, columns and values [n] among which are the k largest of each row; row by row, columns ascending.

    The k-th largest of the maxima of groups of columns is a bound that at least k values of the row reach, and seldom
    many more; it is looked for in the groups whose maxima reach it.  Where values are not exact, `least` makes another
    bound [rows] of it.
    """
    rows, n = pre.shape
    group = _group(n, k)
    groups = pre.reshape(-1, group)
    highest = groups.amax(1).view(rows, n // group)
    bound = least(kth_largest(highest, k))
    reached = true_places((highest < bound[:, None]).logical_not_())
    held = groups.index_select(0, reached)
    row, column, inside = _inside(held, bound, reached, n)
    return row, column, held.view(-1).index_select(0, inside)


def maxima(values: Tensor, k: int) -> Tensor:
    """[rows, groups]: the largest of each group of columns, at least 4 k groups if there are as many columns.

    The columns of a group lie far apart, so that processors compare neighbours of several groups at once.
    """
    group = _group(values.shape[1], 2 * k)
    return values.view(len(values), group, values.shape[1] // group).amax(1)


def _group(columns: int, k: int) -> int:
    return next((g for g in GROUPS if columns % g == 0 and columns // g >= 2 * k), 1)


def _inside(held: Tensor, bound: Tensor, reached: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows and columns of values that reach their row's bound, and their places in the flattened `held`.

    `held` [groups, group] holds the groups `reached`, counted over all rows of n columns.
    """
    group, groups = held.shape[1], n // held.shape[1]  # in a row
    if held.device.type == "cpu" and held.dtype in IN_NUMPY:
        # numpy's divisions and gathers of whole numbers take a fraction of torch's time.
        every, limits = reached.numpy(), bound.numpy()
        place = np.flatnonzero(~(held.detach().numpy() < limits[every // groups, None]))
        which = every[place // group]
        rows = which // groups
        columns = (which - rows * groups) * group + place % group
        return torch.from_numpy(rows), torch.from_numpy(columns), torch.from_numpy(place)
    limit = bound[torch.div(reached, groups, rounding_mode="floor"), None]
    inside = true_places((held < limit).logical_not_())
    found = reached[torch.div(inside, group, rounding_mode="floor")]
    row = torch.div(found, groups, rounding_mode="floor")
    return row, (found - row * groups) * group + inside % group, inside


def kth_largest(values: Tensor, k: int) -> Tensor:
    """The k-th largest of each row, where a NaN is larger than all numbers."""
    values = values.detach()
    if values.device.type != "cpu" or values.dtype not in IN_NUMPY:
        return values.topk(k, sorted=False).values.amin(1)
    return torch.from_numpy(np.partition(values.numpy(), -k, axis=1)[:, -k])


# --- the encoder product, and the decoder's rows


class Decoder:
    """Decoder rows for the sparse products of a step that gathers some number of them, twice."""

    def __init__(self, weight: Tensor, compute: torch.dtype, entries: float) -> None:
        self.weight, self.compute, self.entries = weight, compute, entries

    @cached_property
    def rows(self) -> Tensor:
        """[latents, d_out], in the type in which they are gathered; a copy, if any, is made when first asked for."""
        return gathered(self.weight, self.compute) if pays(len(self.weight), self.entries) else self.weight


def pays(latents: int, entries: float) -> bool:
    """True if a narrow copy of decoder rows saves bytes: 6 a number of a row to make, 2 a number gathered, twice."""
    return 4 * entries > 6 * latents


class Encoder:
    """x W^T + b a tile of tokens at a time, so that only `tile` rows of pre-activations exist at once.

    `compute` is the precision of the product; the bias is added afterwards, in float32.  On CUDA an inner dimension
    that is not a multiple of 16 is padded, since tensor cores otherwise fall back to slow paths.
    """

    def __init__(self, weight: Tensor, bias: Tensor, compute: torch.dtype, tile: int) -> None:
        self.pad = -weight.shape[1] % 16 if weight.is_cuda else 0
        self.weight = F.pad(weight.to(compute), (0, self.pad)) if self.pad else weight.to(compute)
        self.bias, self.tile, self.compute = bias, max(tile, 1), compute

    def product(self, x: Tensor) -> Tensor:
        """Pre-activations [tokens, latents]."""
        if self.compute == self.bias.dtype and not self.pad:
            return torch.addmm(self.bias, x, self.weight.T)
        x = F.pad(x.to(self.compute), (0, self.pad)) if self.pad else x.to(self.compute)
        return (x @ self.weight.T).to(self.bias.dtype).add_(self.bias)

    def tiles(self, x: Tensor) -> list[Callable[[], Tensor]]:
        return [partial(self.product, part) for part in torch.split(x, self.tile)]

    def topk(self, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Values and latents [tokens, k] of each token's k largest pre-activations."""
        found = [exact_topk(pre(), k) for pre in self.tiles(x)]
        return torch.cat([v for v, _ in found]), torch.cat([c for _, c in found])

    def above(self, x: Tensor, floor: Tensor | float) -> Codes:
        """Codes of all pre-activations above `floor` (one number, or [latents])."""
        bags, latents, values = [], [], []
        for number, pre in enumerate(self.tiles(x)):
            found = pre()
            bag, latent = (found > floor).nonzero(as_tuple=True)
            bags.append(bag + number * self.tile)
            latents.append(latent)
            values.append(found[bag, latent])
        latent, value, bag = torch.cat(latents), torch.cat(values), torch.cat(bags)
        return Codes(latent, value, bag, x.shape[0], self.weight.shape[0])


def tile_sizes(tokens: int, latents: int, cuda: bool) -> list[int]:
    """The tile sizes to choose from."""
    sizes = [size for size in (128, 256, 512, 1024, 2048, 4096, 8192) if size < tokens] + [tokens]
    limit = 2**28 if cuda else 2**25  # elements of pre-activations at once
    return [size for size in sizes if size * latents <= limit] or sizes[:1]


def choose_tile(weight: Tensor, bias: Tensor, compute: torch.dtype, k: int, tokens: int) -> int:
    """The fastest of a few tile sizes for this shape on this machine; each is timed three times."""
    best = (float("inf"), 1)
    x = torch.randn(tokens, weight.shape[1], device=weight.device, dtype=bias.dtype)
    for size in tile_sizes(tokens, weight.shape[0], weight.is_cuda):
        encoder = Encoder(weight, bias, compute, size)
        encoder.topk(x, k)  # warm-up
        for _ in range(3):
            started = time.perf_counter()
            encoder.topk(x, k)
            if weight.is_cuda:
                torch.cuda.synchronize()
            best = min(best, (time.perf_counter() - started, size))
    return best[1]
