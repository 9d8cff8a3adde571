"""Evaluation on held-out rows, with confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import repeat

import torch
from torch import Tensor

from saetrain.compute.mesh import Mesh
from saetrain.data import Source, check_finite, target_of
from saetrain.model import Model
from saetrain.settings import split_names
from saetrain.training import metrics

EVAL_ROWS = 2048  # rows per evaluation batch


class Heldout:
    """Rows that are not trained on, and the evaluation of a model on them."""

    def __init__(self, source: Source, rows: int, mesh: Mesh) -> None:
        self.source, self.mesh = source, mesh
        each = rows // mesh.dp  # every replica evaluates a part; the remainder is dropped
        self.start = source.rows - rows + mesh.dp_index * each
        self.stop = self.start + each

    def _parts(self, field: str) -> Iterator[Tensor]:
        for at in range(self.start, self.stop, EVAL_ROWS):
            yield self.source.read(field, at, min(at + EVAL_ROWS, self.stop)).to(self.mesh.device)

    def evaluate(self, model: Model) -> dict[str, float | list[float]]:
        """FVU and L0 with 95 % intervals, over documents where the store has them, else over rows.

        Also the FVU by decile of the norm, since a few long rows may rule the sums, and how often latents fired.
        """
        mesh, source = self.mesh, self.source
        target, norm = target_of(source) or source.field, model.out_norm
        if self.stop == self.start:
            return {}
        total, norms = torch.zeros(model.d_out, device=mesh.device, dtype=torch.float64), []
        for number, part in enumerate(self._parts(target)):
            check_finite(part, source.name, target, self.start + number * EVAL_ROWS)
            total += norm(part).double().sum(0)
            norms.append(part.double().norm(dim=1))
        everyone = mesh.gather(torch.cat(norms), "dp").view(-1)
        mean = mesh.sum(total, "dp") / ((self.stop - self.start) * mesh.dp)
        tenths = metrics.tenths(everyone)
        places = tenths.view(mesh.dp, -1)[mesh.dp_index]
        mine = [places[at : at + EVAL_ROWS] for at in range(0, len(places), EVAL_ROWS)]
        sums = torch.zeros(metrics.TENTHS, model.d_out, device=mesh.device, dtype=torch.float64)
        for part, tenth in zip(self._parts(target), mine, strict=True):
            sums.index_add_(0, tenth, norm(part).double())
        means = mesh.sum(sums, "dp") / tenths.bincount(minlength=metrics.TENTHS).clamp_min(1)[:, None]
        errors, spreads, active, own = [], [], [], []
        by_array = torch.zeros(2, len(model.parts), device=mesh.device, dtype=torch.float64)
        fired = torch.zeros(model.latents, dtype=torch.int64, device=mesh.device)
        wanted = self._parts(target) if model.transcodes else repeat(None)
        for part, other, tenth in zip(self._parts(source.field), wanted, mine, strict=False):
            x = model.norm(part)
            y = x if other is None else norm(other)
            own.append((y.double() - means[tenth]).square().sum(1))
            codes = model.codes(x)
            fired += codes.count()
            out, count = model.decoded(codes, x)
            both = [(out - y).double().square(), (y.double() - mean).square()]
            errors.append(both[0].sum(1))
            spreads.append(both[1].sum(1))
            by_array += torch.stack([torch.stack([a.sum() for a in torch.split(b, model.parts, 1)]) for b in both])
            active.append(count)
        top, bottom = (mesh.gather(torch.cat(v), "dp").view(-1) for v in (errors, spreads))
        around = mesh.gather(torch.cat(own), "dp").view(-1)
        count = mesh.gather(torch.cat(active), "dp").view(-1).double()
        groups = None
        if source.document_field:
            groups = mesh.gather(torch.cat(list(self._parts(source.document_field))), "dp").view(-1)
        f = metrics.ratio_interval(top, bottom, groups)
        l0 = metrics.ratio_interval(count, torch.ones_like(count), groups)
        return {
            **_with_ends("eval_fvu", f),
            **_with_ends("eval_l0", l0),
            "eval_rows": len(top),
            **_by_array(target, mesh.sum(by_array, "dp")),
            **metrics.heldout_summary(model, mesh.sum(fired, "dp"), len(top)),
            **metrics.by_norm(top, around, everyone, tenths),
        }


def _with_ends(name: str, found: metrics.Interval) -> dict[str, float]:
    """A figure with the ends of its interval; alone where all rows are of one document, which gives none."""
    ends = {f"{name}_low": found.low, f"{name}_high": found.high}
    return {name: found.value, **{key: end for key, end in ends.items() if math.isfinite(end)}}


def _by_array(target: str, sums: Tensor) -> dict[str, float]:
    """The FVU of each array, where several are rebuilt, from sums [2, arrays] of squared errors and spreads."""
    names = split_names(target)
    return {f"eval_fvu.{n}": float(sums[0, i] / sums[1, i]) for i, n in enumerate(names)} if len(names) > 1 else {}
