"""How long a usual row of a store is: what strengths of steering are measured in."""

from __future__ import annotations

import numpy as np
import torch

from actshuffle import Dataset
from saetrain.data import read_columns

SAMPLE_RUNS, SAMPLE_ROWS = 64, 32


def median_norm_of(store: Dataset, field: str) -> float | None:
    """The median norm of rows from all over a store: of 64 runs of 32 rows, evenly spread; None without finite rows."""
    each = min(SAMPLE_ROWS, store.rows)
    starts = np.unique(np.linspace(0, store.rows - each, SAMPLE_RUNS).astype(np.int64)).tolist()
    rows = torch.cat([read_columns(store, field, start, start + each, flat=True) for start in starts])
    norms = np.linalg.norm(rows.double().numpy(), axis=1)
    norms = norms[np.isfinite(norms)]
    return float(np.median(norms)) if len(norms) else None
