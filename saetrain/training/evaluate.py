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

    def evaluate(self, model: Model) -> dict[str, float]:
        """FVU and L0 with 95 % intervals, over documents where the store has them, else over rows."""
        mesh, source = self.mesh, self.source
        if self.stop == self.start:
            return {}
        total = torch.zeros(source.d_in, device=mesh.device, dtype=torch.float64)
        for number, part in enumerate(self._parts(source.field)):
            check_finite(part, source.name, source.field, self.start + number * EVAL_ROWS)
            total += model.norm(part).double().sum(0)
        mean = mesh.sum(total, "dp") / ((self.stop - self.start) * mesh.dp)
        errors, spreads, active = [], [], []
        for part in self._parts(source.field):
            x = model.norm(part)
            out, count = model.reconstruct(x)
            errors.append((out - x).double().square().sum(1))
            spreads.append((x.double() - mean).square().sum(1))
            active.append(count)
        top, bottom = (mesh.gather(torch.cat(v), "dp").view(-1) for v in (errors, spreads))
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
        }
