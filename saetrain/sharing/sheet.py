"""One latent as plain values, which the formats arrange: histograms in equal bins, examples with their windows.

A result keeps exact counts in bins of a quarter octave, and the largest activations around an example.  Where the run
kept codes (`--keep-codes`), everything here is exact; else the counts of a bin are spread evenly over its width, and
activations around an example that are not kept are 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

BINS = 50


def short(value: float) -> float:
    """Four significant digits, as a plain number; 0 for one that is none."""
    return float(f"{value:.4g}") if np.isfinite(value) else 0.0


def shorts(values: Any) -> list[float]:
    return [short(float(value)) for value in values]


class Shown(NamedTuple):
    """An example with its window: `values` are the latent's activations there, `at` is the example's place."""

    row: int
    tokens: list[str]
    values: list[float]
    at: int
    value: float
    document: int | None
    around: tuple[int, ...]  # tokens by which examples are the same


@dataclass
class Sheet:
    """A live or dead `saetrain.reading.latents.Feature`, and of the whole result the names that a page shows."""

    feature: Any

    @cached_property
    def codes(self) -> tuple[NDArray[np.int64], NDArray[np.float32]] | None:
        """Rows and activations, if they were kept."""
        found = self.feature
        return found.codes() if found.features.facts["keep_codes"] else None

    @cached_property
    def bars(self) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Edges [BINS + 1] from 0 to the maximum, and counts [BINS] of activations between them, the upper edge in."""
        found = self.feature
        edges = np.linspace(0, found.max, BINS + 1)
        return edges, np.diff(np.rint(np.array([self.below(edge) for edge in edges])).astype(np.int64))

    def below(self, edge: float) -> float:
        """Number of activations up to an edge."""
        found = self.feature
        if edge >= found.max:
            return float(found.count)
        if self.codes is not None:
            return float((self.codes[1] <= edge).sum())
        edges, counts = (np.asarray(x, np.float64) for x in found.histogram)
        share = np.clip((edge - edges[:-1]) / np.maximum(edges[1:] - edges[:-1], 1e-300), 0, 1)
        return float((counts * share).sum())

    @cached_property
    def percentiles(self) -> list[float]:
        """The activations that 0, 1, ..., 99 percent of the active ones do not exceed."""
        found = self.feature
        if self.codes is not None:
            return shorts(np.quantile(self.codes[1], np.arange(100) / 100, method="inverted_cdf"))
        edges, counts = (np.asarray(x, np.float64) for x in found.histogram)
        share = np.concatenate([[0], np.cumsum(counts)]) / found.count
        return shorts(np.clip(np.interp(np.arange(100) / 100, share, edges), found.min, found.max))

    def examples(self, kind: str) -> list[Shown]:
        return [self._shown(example) for example in self.feature.examples(kind)]

    def _shown(self, example: Any) -> Shown:
        values, low = example.activations.copy(), example.row - example.at
        if self.codes is not None:
            rows, active = self.codes
            first, last = np.searchsorted(rows, [low, low + len(values)])
            values[rows[first:last] - low] = active[first:last]
        tokens = list(example.text) if example.text else [str(token) for token in example.tokens]
        return Shown(
            example.row, tokens, shorts(values), example.at, short(example.value), example.document, example.around
        )

    @property
    def intervals(self) -> list[tuple[str, float, float]]:
        """Kind, lower and upper end of each interval of equal width, the highest first."""
        kinds = [kind for kind in self.feature.features.kinds if kind.startswith("interval ")]
        width = self.feature.max / max(len(kinds), 1)
        return [(kind, i * width, (i + 1) * width) for i, kind in reversed([*enumerate(kinds)])]

    def logits(self, end: str) -> tuple[list[str], list[float]]:
        """Tokens at the "top" or "bottom", and their logits; empty where the run had no model."""
        found = self.feature.logits
        moved = getattr(found, end) if found is not None else []
        return [m.text if m.text is not None else str(m.id) for m in moved], shorts(m.value for m in moved)

    def logit_bars(self) -> tuple[list[float], list[int]]:
        """Centres and counts of the bins of logits."""
        found = self.feature.logits
        if found is None:
            return [], []
        return shorts((found.edges[1:] + found.edges[:-1]) / 2), found.counts.tolist()
