"""How long a usual row of a store is: what strengths of steering are measured in."""

from __future__ import annotations

import numpy as np
import torch

from actshuffle import Dataset

SAMPLE_RUNS, SAMPLE_ROWS = 64, 32


def median_norm_of(store: Dataset, field: str) -> float | None:
    """The median norm of rows from all over a store: of 64 runs of 32 rows, evenly spread; None without finite rows."""
    each = min(SAMPLE_ROWS, store.rows)
    starts = np.unique(np.linspace(0, store.rows - each, SAMPLE_RUNS).astype(np.int64)).tolist()
    rows = np.concatenate([store.read(field, start, start + each) for start in starts])
    if store.fields[field].bfloat16:
        wide = torch.from_numpy(rows.view(np.int16)).view(torch.bfloat16).double().numpy()
    else:
        wide = rows.astype(np.float64)
    norms = np.linalg.norm(wide.reshape(len(wide), -1), axis=1)
    norms = norms[np.isfinite(norms)]
    return float(np.median(norms)) if len(norms) else None
