"""Evaluation on held-out rows, with confidence intervals."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from saetrain.compute.mesh import Mesh
from saetrain.data import Source, check_finite
from saetrain.model import Model
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
        if self.stop == self.start:
            return {}
        total, norms = torch.zeros(source.d_in, device=mesh.device, dtype=torch.float64), []
        for number, part in enumerate(self._parts(source.field)):
            check_finite(part, source.name, source.field, self.start + number * EVAL_ROWS)
            total += model.norm(part).double().sum(0)
            norms.append(part.double().norm(dim=1))
        everyone = mesh.gather(torch.cat(norms), "dp").view(-1)
        mean = mesh.sum(total, "dp") / ((self.stop - self.start) * mesh.dp)
        tenths = metrics.tenths(everyone)
        places = tenths.view(mesh.dp, -1)[mesh.dp_index]
        mine = [places[at : at + EVAL_ROWS] for at in range(0, len(places), EVAL_ROWS)]
        sums = torch.zeros(metrics.TENTHS, source.d_in, device=mesh.device, dtype=torch.float64)
        for part, tenth in zip(self._parts(source.field), mine, strict=True):
            sums.index_add_(0, tenth, model.norm(part).double())
        means = mesh.sum(sums, "dp") / tenths.bincount(minlength=metrics.TENTHS).clamp_min(1)[:, None]
        errors, spreads, active, own = [], [], [], []
        fired = torch.zeros(model.latents, dtype=torch.int64, device=mesh.device)
        for part, tenth in zip(self._parts(source.field), mine, strict=True):
            x = model.norm(part)
            own.append((x.double() - means[tenth]).square().sum(1))
            codes = model.codes(x)
            fired += codes.count()
            out, count = model.decoded(codes)
            errors.append((out - x).double().square().sum(1))
            spreads.append((x.double() - mean).square().sum(1))
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
            "eval_fvu": f.value,
            "eval_fvu_low": f.low,
            "eval_fvu_high": f.high,
            "eval_l0": l0.value,
            "eval_l0_low": l0.low,
            "eval_l0_high": l0.high,
            "eval_rows": len(top),
            **metrics.heldout_summary(model, mesh.sum(fired, "dp"), len(top)),
            **metrics.by_norm(top, around, everyone, tenths),
        }
