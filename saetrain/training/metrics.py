"""Every number a run reports, defined once.

These are functions of plain values or of one rank's share; those that take a mesh return the same on every rank.

fvu                  sum |x - x^|^2 / sum |x - mean x|^2; explained variance is 1 - fvu
fvu of a tenth       the same over a tenth of the held-out rows, by norm, about the mean of these rows
fvu of the median row   median over rows of |x - x^|^2 / |x - mean of its tenth|^2
heavy rows           rows with over 10 times the median norm, and their share of the squared norm
l0                   mean number of active latents per token
dead                 fraction of latents that have not fired in the last `dead_tokens` tokens of training
dense                fraction of latents that fired on over a tenth of the training tokens since the last evaluation
density histogram    latents by log10 of the fraction of these tokens they fired on, in half decades from 1e-7 to 1
eval_dead            fraction of latents that fired on no held-out row, of the model as it is evaluated
eval_dense, eval_density   as dense and density, on held-out rows
gradient norm        norm of each parameter's gradient over all ranks, before clipping
update norm          norm of Adam's step for each parameter over all ranks, before decoder rows are scaled to norm 1
decoder cosine       largest cosine of a decoder row with any other, over a sample of rows: mean and 95th percentile
encoder cosine       mean cosine between a latent's encoder and decoder rows; a transcoder has none
fvu of an array      the fvu over the columns of one of several arrays that are rebuilt
document entropy     -sum p log2 p over the documents of a batch, divided by log2 of its rows: 1 if all differ
tokens/s             tokens of the interval divided by its seconds, without evaluations and checkpoints; the members
                     of a sweep share the seconds
mfu                  tokens/s times `flops_per_token`, divided by the best speed of a large matrix product measured so
                     far; None where that is slower than training itself
loader wait          fraction of the interval's seconds spent waiting for a batch
"""

from __future__ import annotations

import math
import time
from typing import NamedTuple

import torch
from torch import Tensor

from saetrain.compute.kernels import ROWS, row_dots
from saetrain.compute.mesh import Mesh
from saetrain.model import Model
from saetrain.settings import Settings
from saetrain.variants.table import VARIANTS

DENSE = 0.1
EDGES = [x / 2 for x in range(-14, 1)]  # log10 of firing rates
COSINE_SAMPLE = 256
Z95 = 1.959964
TENTHS = 10  # groups of held-out rows by norm
HEAVY = 10.0  # times the median norm: from here on a row is heavy, as in `actshuffle stats`


class Interval(NamedTuple):
    value: float
    low: float
    high: float


def ratio_interval(top: Tensor, bottom: Tensor, groups: Tensor | None = None) -> Interval:
    """sum(top) / sum(bottom) with a 95 % interval, by the delta method; all arguments are [rows].

    Rows of one group (a document) are not independent: with `groups`, the sums over groups are the observations.  One
    observation has no interval, whose ends are NaN then.
    """
    top, bottom = top.double(), bottom.double()
    if groups is not None:
        _, at = torch.unique(groups, return_inverse=True)
        count = int(at.max()) + 1
        top = top.new_zeros(count).index_add_(0, at, top)
        bottom = bottom.new_zeros(count).index_add_(0, at, bottom)
    n = len(top)
    ratio = float(top.sum() / bottom.sum())
    if n < 2:
        return Interval(ratio, math.nan, math.nan)
    spread = float((top - ratio * bottom).square().sum()) * n / (n - 1)
    half = Z95 * math.sqrt(spread) / abs(float(bottom.sum()))
    return Interval(ratio, ratio - half, ratio + half)


def fvu(error_square: float, row_sum: Tensor, square: float, rows: int) -> float:
    """FVU from sums over rows: of |x - x^|^2, of x [d], of |x|^2."""
    return error_square / (square - float(row_sum.double().square().sum()) / rows)


def tenths(norms: Tensor) -> Tensor:
    """[rows]: the tenth, 0 for the shortest to 9, of each row by its norm; rows that are equally long go in order."""
    place = torch.empty(len(norms), dtype=torch.int64, device=norms.device)
    place[torch.sort(norms, stable=True).indices] = torch.arange(len(norms), device=norms.device)
    return place * TENTHS // len(norms)


def by_norm(errors: Tensor, spreads: Tensor, norms: Tensor, tenth: Tensor) -> dict[str, float | list[float]]:
    """FVU of the median row and of each tenth, and the heavy rows; all arguments are [rows].

    `errors` are |x - x^|^2, `spreads` |x - mean of the row's tenth|^2, `norms` those of the raw rows.
    """
    top, bottom = (
        torch.zeros(TENTHS, device=v.device, dtype=v.dtype).index_add_(0, tenth, v) for v in (errors, spreads)
    )
    least = torch.finfo(spreads.dtype).tiny
    heavy = norms > HEAVY * norms.median()
    square = norms.square()
    return {
        "eval_fvu_median": float((errors / spreads.clamp_min(least)).median()),
        "eval_fvu_by_norm": (top / bottom.clamp_min(least)).tolist() if len(norms) >= TENTHS else [],
        "eval_heavy_rows": int(heavy.sum()),
        "eval_heavy_share": float(square[heavy].sum() / square.sum().clamp_min(least)),
    }


def batch_fvu(x: Tensor, residual: Tensor, mesh: Mesh) -> float:
    sums = torch.zeros(x.shape[1] + 2, device=x.device, dtype=torch.float64)
    for rows, missed in zip(torch.split(x, ROWS), torch.split(residual, ROWS), strict=True):  # no copy in float64
        wide = rows.double()
        sums += torch.cat([wide.sum(0), wide.square().sum()[None], missed.double().square().sum()[None]])
    sums = mesh.sum(sums, "dp")
    return fvu(float(sums[-1]), sums[:-2], float(sums[-2]), len(x) * mesh.dp)


def dead(quiet: Tensor, dead_tokens: int) -> Tensor:
    """[latents]: True where a latent has been quiet for so many tokens."""
    return quiet >= dead_tokens


def rates(fired: Tensor, window: int) -> Tensor:
    """[latents]: fraction of the window's tokens on which each latent fired."""
    return fired.double() / max(window, 1)


def density_histogram(rate: Tensor) -> Tensor:
    """Numbers of latents that never fired, that fired at a rate below 1e-7, and by half decades up to 1."""
    bins = torch.bucketize(rate.clamp_min(1e-300).log10(), torch.tensor(EDGES, dtype=rate.dtype, device=rate.device))
    # A rate of 1 belongs to the last half decade.
    bins = bins.clamp(max=len(EDGES) - 1) + 1
    return torch.bincount(bins.masked_fill(rate == 0, 0), minlength=len(EDGES) + 1)


def latent_summary(model: Model) -> dict[str, float | list[int]]:
    """dead, dense and the density histogram of the current window, over all latents of all ranks."""
    state, mesh, c = model.state, model.mesh, model.config
    rate = rates(state["fired"], int(state["window"]))
    counts = torch.cat(
        [torch.stack([dead(state["quiet"], c.dead_tokens).sum(), (rate > DENSE).sum()]), density_histogram(rate)]
    )
    counts = mesh.sum(counts, "tp")
    return {"dead": int(counts[0]) / c.d_sae, "dense": int(counts[1]) / c.d_sae, "density": counts[2:].tolist()}


def heldout_summary(model: Model, fired: Tensor, rows: int) -> dict[str, float | list[float]]:
    """eval_dead, eval_dense and eval_density from the held-out rows on which my latents fired, over all latents."""
    rate, n = rates(fired, rows), model.config.d_sae
    counts = torch.cat([torch.stack([(fired == 0).sum(), (rate > DENSE).sum()]), density_histogram(rate)])
    counts = model.mesh.sum(counts, "tp")
    return {"eval_dead": int(counts[0]) / n, "eval_dense": int(counts[1]) / n, "eval_density": counts[2:].tolist()}


def cosines(model: Model, sample: int = COSINE_SAMPLE) -> dict[str, float]:
    """Decoder and encoder cosines; ranks exchange `sample` decoder rows, never the whole dictionary."""
    mesh, w = model.mesh, model.params["W_dec"]
    norm = w.norm(dim=1).clamp_min(1e-12)
    each = min(sample // mesh.tp or 1, len(w))
    mine = torch.linspace(0, len(w) - 1, each, device=w.device).long()
    rows = mesh.gather(w[mine] / norm[mine, None], "tp").reshape(-1, w.shape[1])
    best = torch.full((len(rows),), -1.0, device=w.device, dtype=w.dtype)
    for start in range(0, len(w), 4096):
        product = rows @ w[start : start + 4096].T / norm[start : start + 4096]
        own = (mine >= start) & (mine < start + 4096)  # a row does not count as its own neighbour
        at = own.nonzero().view(-1)
        product[at + mesh.tp_index * each, mine[at] - start] = -1.0
        best = torch.maximum(best, product.amax(1))
    best = mesh.max(best, "tp")
    found = {}
    if not model.transcodes:  # encoder and decoder rows of a transcoder are of different spaces
        enc = model.params["W_enc"]
        both = row_dots(enc, w) / (enc.norm(dim=1).clamp_min(1e-12) * norm)
        found["encoder_cosine"] = float(mesh.sum(both.sum()[None], "tp")) / model.config.d_sae
    return {
        **found,
        "decoder_cosine_mean": float(best.mean()),
        "decoder_cosine_p95": float(best.quantile(0.95)),
        "decoder_norm": float(mesh.sum(model.row_norms().sum()[None], "tp")) / model.config.d_sae,
    }


def threshold_summary(model: Model) -> dict[str, float]:
    """Smallest, mean and largest threshold, if the variant has any."""
    thresholds = model.thresholds()
    if thresholds is None:
        return {}
    found = torch.as_tensor(thresholds, dtype=torch.float64).reshape(-1)
    mesh = model.mesh
    low, high = -mesh.max(-found.min()[None], "tp"), mesh.max(found.max()[None], "tp")
    mean = mesh.sum(found.mean()[None], "tp") / mesh.tp
    return {"threshold_min": float(low), "threshold": float(mean), "threshold_max": float(high)}


def document_entropy(documents: Tensor) -> float:
    """Entropy of the document ids [rows] of a batch: 1 if all rows are of different documents, 0 if all are of one."""
    if len(documents) < 2:
        return 1.0
    counts = torch.unique(documents, return_counts=True)[1].double()
    p = counts / counts.sum()
    return float(-(p * p.log2()).sum()) / math.log2(len(documents)) + 0.0


def flops_per_token(config: Settings, d_in: int, active: float, d_out: int = 0) -> float:
    """Floating-point operations of one training step per token, over all ranks.

    The encoder product is dense: 2 d n.  Decoding, the gradient of the values, and the two weight gradients touch
    active latents only: 8 d active.  A variant that computes densely multiplies all latents instead: 8 d n.  Three of
    these four are as wide as the output, `d_out` in a transcoder, and its skip map adds two products.
    """
    n, out = config.d_sae, d_out or d_in
    dense = VARIANTS[config.arch].computes_densely(active, n)
    skip = 4.0 * d_in * out if config.skip else 0.0
    return 2.0 * d_in * n + (2.0 * d_in + 6.0 * out) * (n if dense else active) + skip


def measure_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of the fastest of five square matrix products on this device.

    They are as large as that speed needs: with few threads, larger ones take a second and are no faster.
    """
    size = 8192 if device.type == "cuda" else 512 if torch.get_num_threads() <= 4 else 1024
    a = torch.ones(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2.0 * size**3 / best
