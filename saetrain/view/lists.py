"""All latents at once: histograms, filters, orders, and the latents of a token.

Arrays of one number a latent are read once and kept (about 30 bytes a latent); wider ones are looked through in parts.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from saetrain.errors import ConfigError
from saetrain.reading.latents import Features

DENSE = 0.1  # of the rows: as in the metrics of a run
PART = 1 << 16  # latents looked at together
FOUND = 200  # latents that a search lists
KEPT_ORDERS = 8

Filter = tuple[str, float, float]  # a quantity from lists.QUANTITIES and its bounds, low <= x < high


class Quantity(NamedTuple):
    """A number of each latent that is drawn as a histogram: where it is, how its bins are cut."""

    title: str
    array: str
    log: bool
    per_unit: int  # bins in a unit, of log10 if `log`
    size: bool = False  # its size counts, not its sign


QUANTITIES = {
    "density": Quantity("Density (share of rows)", "stat/density", True, 4),
    "max": Quantity("Largest activation", "stat/max", True, 8),
    "documents": Quantity("Documents in which it is active", "stat/documents", True, 4),
    "effect": Quantity("Size of its mean effect on the loss (nats a row)", "loss/effect", True, 4, size=True),
    "cosine": Quantity("Cosine to the nearest decoder row", "near/cosine", False, 25),
}
ORDERS = ("index", *QUANTITIES)


class Lists:
    """The latents of a result, by what they have."""

    def __init__(self, features: Features) -> None:
        self.features = features
        self._values: dict[str, NDArray[np.float64]] = {}
        self._orders: OrderedDict[tuple[Any, ...], NDArray[np.int64]] = OrderedDict()

    @cached_property
    def alive(self) -> NDArray[np.bool_]:
        return np.asarray(self.features.array("stat/count") > 0)

    def has(self, name: str) -> bool:
        return self.features.has(QUANTITIES[name].array.partition("/")[0])

    def values(self, name: str) -> NDArray[np.float64]:
        """A quantity of all latents, float64 [latents]."""
        if name not in QUANTITIES or not self.has(name):
            raise ConfigError(f"no quantity {name!r} here; there are {', '.join(n for n in QUANTITIES if self.has(n))}")
        if name not in self._values:
            found = self.features.array(QUANTITIES[name].array)
            found = (found if found.ndim == 1 else found[:, 0]).astype(np.float64)
            self._values[name] = np.abs(found) if QUANTITIES[name].size else found
        return self._values[name]

    def overview(self) -> dict[str, Any]:
        """How many latents there are of which kind, and a histogram of each quantity over the live ones."""
        density = self.values("density")
        return {
            "latents": len(self.features),
            "alive": int(self.alive.sum()),
            "dense": int((density > DENSE).sum()),
            "histograms": [self._histogram(name) for name in QUANTITIES if self.has(name)],
        }

    def _histogram(self, name: str) -> dict[str, Any]:
        quantity = QUANTITIES[name]
        found = self.values(name)[self.alive]
        found = found[np.isfinite(found) & ((found > 0) | (not quantity.log))]
        if not len(found):
            return {"name": name, "title": quantity.title, "log": quantity.log, "edges": [], "counts": []}
        at = np.log10(found) if quantity.log else found
        low, high = (math.floor(float(v) * quantity.per_unit) for v in (at.min(), at.max()))
        edges = np.arange(low, high + 2) / quantity.per_unit
        edges = 10.0**edges if quantity.log else edges
        counts = np.histogram(found, np.append(edges[:-1], np.inf))[0]  # the last edge belongs to the last bin
        return {
            "name": name,
            "title": quantity.title,
            "log": quantity.log,
            "edges": edges.tolist(),
            "counts": counts.tolist(),
        }

    def choose(self, filters: list[Filter], order: str, *, falling: bool) -> NDArray[np.int64]:
        """The live latents that pass all filters, in an order: by index, or by a quantity, ties by index."""
        if order not in ORDERS:
            raise ConfigError(f"no order {order!r}; there are {', '.join(ORDERS)}")
        key = (tuple(filters), order, falling)
        if key not in self._orders:
            keep = self.alive.copy()
            for name, low, high in filters:
                keep &= (self.values(name) >= low) & (self.values(name) < high)
            chosen = np.flatnonzero(keep)
            if order != "index":
                value = self.values(order)[chosen]
                chosen = chosen[np.argsort(-value if falling else value, kind="stable")]
            elif falling:
                chosen = chosen[::-1]
            self._orders[key] = chosen
            while len(self._orders) > KEPT_ORDERS:
                self._orders.popitem(last=False)
        return self._orders[key]

    # --- tokens

    @cached_property
    def vocabulary(self) -> dict[str, list[int]]:
        """Ids of the tokens on which some latent is active, by their text without spaces around, in lower case."""
        return self._words("token/id")

    def by_token(self, text: str) -> list[tuple[int, float]]:
        """Latents that are often active on a token, with the share of their active rows that have it."""
        return self._matching("token/id", "token/count", self.vocabulary.get(text.strip().lower(), []), share=True)

    def by_promoted(self, text: str) -> list[tuple[int, float]]:
        """Latents whose decoder row raises the logit of a token most, with that logit."""
        if not self.features.has("logit"):
            return []
        return self._matching("logit/top_id", "logit/top", self._promoted.get(text.strip().lower(), []), share=False)

    @cached_property
    def _promoted(self) -> dict[str, list[int]]:
        return self._words("logit/top_id")

    def _words(self, name: str) -> dict[str, list[int]]:
        """The tokens in an array of ids, by their text without spaces around, in lower case."""
        ids = np.unique(np.concatenate([np.unique(part) for _, part in self._parts(name)]))
        ids = ids[ids >= 0]
        found: dict[str, list[int]] = {}
        for token, text in zip(ids.tolist(), self.features.text(ids.tolist()) or (), strict=False):
            found.setdefault(text.strip().lower(), []).append(token)
        return found

    def _matching(self, ids: str, weights: str, wanted: list[int], *, share: bool) -> list[tuple[int, float]]:
        if not wanted:
            return []
        best: list[tuple[float, int]] = []
        for start, part in self._parts(ids):
            row, column = np.nonzero(np.isin(part, wanted))
            if not len(row):
                continue
            weight = self.features.array(weights, start, start + len(part))[row, column].astype(np.float64)
            if share:
                weight /= self.features.array("stat/count", start, start + len(part))[row]
            best += zip((-weight).tolist(), (row + start).tolist(), strict=True)
            best = sorted(best)[: 4 * FOUND]
        seen: dict[int, float] = {}
        for negative, latent in best:
            seen.setdefault(latent, -negative)
        return list(seen.items())[:FOUND]

    def _parts(self, name: str) -> Iterator[tuple[int, NDArray[Any]]]:
        for start in range(0, len(self.features), PART):
            yield start, self.features.array(name, start, min(start + PART, len(self.features)))
