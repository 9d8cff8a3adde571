"""Products of two dictionaries on the page: what is kept of a row or column, and the latents that it stands for."""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saetrain.errors import ConfigError
from saetrain.products.layout import HALVES
from saetrain.products.reading import Interactions
from saetrain.reading.latents import Features

ORDERS = ("number", "kept", "energy", "sum")
TOKENS = 4  # by which a latent is named
PAGE = 100  # lines of one part of a list
BARS = 20  # of the histogram of kept shares


class Pairs:
    """One store of `saetrain interactions`, and the results that describe its rows' and its columns' latents.

    A result describes a side whose dictionary has the same path.  The first of ``described`` is the one whose page
    this is: its latents have pages of their own.
    """

    def __init__(self, product: Interactions, described: list[Features]) -> None:
        self.product = product
        self.halves = dict(zip(HALVES, (product.rows, product.columns), strict=True))
        paths = dict(zip(HALVES, (product.about[side]["path"] for side in "ab"), strict=True))
        self.named: dict[str, Features | None] = {
            half: next((f for f in described if _same(f.facts["dictionary"], path)), None)
            for half, path in paths.items()
        }
        self.here = [half for half in HALVES if described and self.named[half] is described[0]]
        self._order = lru_cache(maxsize=8)(self._sorted)
        self._values = lru_cache(maxsize=8)(self._read)

    def facts(self) -> dict[str, Any]:
        about = self.product.about
        return {
            "name": self.product.path.name,
            "product": about["product"],
            "k": about["k"],
            "thresholds": about["thresholds"],
            "through": about["through"]["path"] if "through" in about else None,
            "here": self.here,
            "halves": {
                half: {
                    "count": len(self.halves[half]),
                    "of": about[side]["path"],
                    "part": about[side]["part"],
                    "unit": about[side]["unit"],
                    "kept": _number(self.product.kept[half]),
                    "described": self.named[half] is not None,
                }
                for half, side in zip(HALVES, "ab", strict=True)
            },
        }

    def listing(self, half: str, order: str, start: int, *, falling: bool) -> dict[str, Any]:
        """A part of the lines in an order, and at the start the histogram of the share that is kept of their energy."""
        chosen = self._order(self._half(half), order, falling)
        some = chosen[start : start + PAGE].tolist()
        found: dict[str, Any] = {"total": len(chosen), "start": start, "items": [self.brief(half, i) for i in some]}
        if not start:
            counts, edges = np.histogram(self._values(half, "kept"), BARS, (0, 1))
            found["histogram"] = {"edges": edges.tolist(), "counts": counts.tolist()}
        return found

    def brief(self, half: str, number: int) -> dict[str, Any]:
        """One line of a list."""
        numbers = {name: _number(float(self._values(half, name)[number])) for name in ORDERS[1:]}
        return {**self._latent(half, number), **numbers}

    def line(self, half: str, number: int) -> dict[str, Any]:
        """All that is kept of a row or column, and what is known of the rest."""
        lines = self.halves[self._half(half)]
        if not 0 <= number < len(lines):
            raise ConfigError(f"no {half[:-1]} {number:,}: there are 0 to {len(lines) - 1:,}")
        found, other = lines[number], HALVES[1 - HALVES.index(half)]
        count, mean, std = found.rest
        return {
            **self._latent(half, number),
            "energy": _number(found.energy),
            "sum": _number(found.sum),
            "kept": _number(found.kept),
            "entries": found.length,
            "over": [[threshold, times] for threshold, times in found.over.items()],
            "rest": {"count": count, "mean": _number(mean), "std": _number(std)},
            "top": self._entries(other, found.top_index, found.top_value),
            "bottom": self._entries(other, found.bottom_index, found.bottom_value),
        }

    def _entries(self, half: str, index: NDArray[Any], value: NDArray[Any]) -> list[dict[str, Any]]:
        pairs = zip(index.tolist(), value.tolist(), strict=True)
        return [{**self._latent(half, i), "value": _number(v)} for i, v in pairs]

    def _latent(self, half: str, number: int) -> dict[str, Any]:
        """A latent with the tokens on which it is most often active, where a result describes it."""
        features = self.named[half]
        if features is None:
            return {"id": number, "tokens": []}
        ids = features[number].array("token/id")[:TOKENS]
        ids = ids[ids >= 0].tolist()
        return {"id": number, "tokens": list(features.text(ids) or map(str, ids))}

    def _half(self, half: str) -> str:
        if half not in self.halves:
            raise ConfigError(f"a product has {' and '.join(HALVES)}, not {half!r}")
        return half

    def _sorted(self, half: str, order: str, falling: bool) -> NDArray[np.int64]:
        if order not in ORDERS:
            raise ConfigError(f"no order {order!r}; there are {', '.join(ORDERS)}")
        count = len(self.halves[half])
        if order == "number":
            return np.arange(count)[:: -1 if falling else 1]
        value = self._values(half, order)
        return np.argsort(-value if falling else value, kind="stable")

    def _read(self, half: str, name: str) -> NDArray[np.float64]:
        return np.asarray(self.halves[half].arrays[name][:], np.float64)


def _same(one: str, other: str) -> bool:
    return Path(one).resolve() == Path(other).resolve()


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
