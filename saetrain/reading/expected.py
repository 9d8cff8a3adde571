"""From weights to data: how much of a latent's pre-activation others account for where it is active.

A weight w_ij says what one unit of latent j adds to latent i, and not whether both are ever active together.  The
expected attribution is E[f_j w_ij | i active], over the rows of one store on which both dictionaries were described.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from actshuffle.units import counted
from saetrain.errors import DataError
from saetrain.products.reading import Line


class Expected(NamedTuple):
    """Of the entries of a line, `top` and then `bottom`, the largest expected attribution first."""

    latent: NDArray[np.int64]  # j
    weight: NDArray[np.float32]  # w_ij
    together: NDArray[np.int64]  # rows on which i and j are active
    value: NDArray[np.float64]  # E[f_j w_ij | i active], 0 where they never are


def expected_attribution(line: Line, a: Any, b: Any) -> Expected:
    """The expected attribution of the kept entries of row i of a product; reads the codes of i and of each j.

    Parameters
    ----------
    line : row i of an `Interactions` whose rows are latents of `a`, and whose columns are latents of `b`.
    a, b : results of `saetrain features` with kept codes, on the same rows: for two layers, of one store.

    Raises
    ------
    DataError : the results are of other stores, or do not have these latents.
    """
    if a.facts["identity"] != b.facts["identity"]:
        raise DataError(f"{a.path} and {b.path} describe other stores, so that their rows are not the same tokens")
    if line.number >= len(a) or line.length > len(b):
        raise DataError(
            f"row {line.number} of {counted(line.length, 'entry', 'entries')} is none of "
            f"{counted(len(a), 'latent')} by {len(b):,}"
        )
    rows, _ = a[line.number].codes()
    index, first = np.unique(np.concatenate([line.top_index, line.bottom_index]), return_index=True)
    weight = np.concatenate([line.top_value, line.bottom_value])[first]
    together, value = np.zeros(len(index), np.int64), np.zeros(len(index))
    for place, j in enumerate(index):
        theirs, active = b[int(j)].codes()
        both = np.isin(theirs, rows, assume_unique=True)
        together[place] = both.sum()
        value[place] = float(active[both].astype(np.float64).sum()) * float(weight[place]) / max(len(rows), 1)
    order = np.argsort(-value, kind="stable")
    return Expected(index[order].astype(np.int64), weight[order], together[order], value[order])
