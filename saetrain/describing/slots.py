"""What is kept of each latent: bins, quantiles, and which examples."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

NO_ROW = -1  # in `example/row`: a slot without an example
NO_OFFSET = 127  # in `context/offset`: an entry without a value
BIN_SHIFT = 21  # of a float32's bits: bins of a quarter octave
HISTOGRAM_BINS = 64
POSITION_BINS = 16  # one an octave, from the first row of a document on
TOP_TOKENS = 16
CONTEXT = 8  # values kept of each context
QUANTILES = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999, 0.9999)

Arrays = dict[str, NDArray[Any]]  # by "group/name", one row a latent


class Slots(NamedTuple):
    """How many examples of each kind there are."""

    top: int = 20
    intervals: int = 5
    each: int = 5  # of an interval
    random: int = 10
    quiet: int = 10

    def kinds(self) -> dict[str, tuple[int, int]]:
        """The slots [first, end) of each kind, by its name."""
        sizes = {"top": self.top}
        sizes |= {f"interval {i + 1}": self.each for i in range(self.intervals)}
        sizes |= {f"part {i + 1}": self.each for i in range(self.intervals)}
        sizes |= {"random": self.random, "quiet": self.quiet}
        ends = np.cumsum([*sizes.values()])
        return {name: (int(end) - size, int(end)) for (name, size), end in zip(sizes.items(), ends, strict=True)}

    @property
    def total(self) -> int:
        return self.top + 2 * self.intervals * self.each + self.random + self.quiet


def histogram_edges(maximum: float) -> NDArray[np.float32]:
    """The edges of a latent's histogram, float32 [bins + 1]: bin i holds edges[i] <= activation < edges[i + 1].

    The first bin also holds all that is smaller.
    """
    top = int(np.float32(maximum).view(np.uint32)) >> BIN_SHIFT
    return (np.maximum(np.arange(top - HISTOGRAM_BINS + 1, top + 2), 0) << BIN_SHIFT).astype(np.uint32).view(np.float32)
