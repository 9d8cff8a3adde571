"""Read the result of `saetrain features`: one latent at a time, or one array of all latents.

>>> features = open_features("acts.features")                         # doctest: +SKIP
>>> f = features[123]                                                 # doctest: +SKIP
>>> f.density, f.top(3), f.examples("interval 2"), f.histogram        # doctest: +SKIP
>>> features.array("stat/max")                                        # doctest: +SKIP

A latent is one small range read of each array, whatever their number; nothing is read before it is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actshuffle import Dataset, open_dataset
from actshuffle.errors import ActshuffleError, RequestError
from actshuffle.jobs import read_done
from actshuffle.units import counted
from saetrain.describing.slots import NO_OFFSET, NO_ROW, histogram_edges
from saetrain.errors import DataError
from saetrain.features.keeping import by_feature, by_row
from saetrain.reading.card import card
from saetrain.reading.norms import median_norm_of
from saetrain.reading.origin import Origin
from saetrain.reading.records import Codes, Companion, Example, Histogram, Interval, Neighbour, Token, marked
from saetrain.reading.weights import Logits, Promoter, logits_of, promoters_of

_NOTHING = np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32)


class Feature:
    """One latent.  Arrays are read when they are asked for, and kept."""

    def __init__(self, features: Features, index: int) -> None:
        self.features, self.index = features, index
        self._held: dict[str, NDArray[Any]] = {}

    def array(self, name: str) -> NDArray[Any]:
        """This latent's row of an array, by "group/name"; `Features.names` lists them."""
        if name not in self._held:
            group, _, inner = name.rpartition("/")
            self._held[name] = self.features.group(group).read(inner, self.index, self.index + 1)[0]
        return self._held[name]

    def _number(self, name: str) -> Any:
        return self.array(f"stat/{name}").item()

    # --- numbers

    @property
    def count(self) -> int:
        """Rows on which it is active."""
        return int(self._number("count"))

    @property
    def documents(self) -> int:
        return int(self._number("documents"))

    @property
    def density(self) -> Interval:
        """Share of the rows on which it is active, with an interval over documents."""
        return Interval(*(self._number(name) for name in ("density", "density_low", "density_high")))

    @property
    def mean(self) -> float:
        """Of its activations; NaN for a dead latent."""
        return float(self._number("sum") / self.count) if self.count else float("nan")

    @property
    def std(self) -> float:
        """Standard deviation of its activations."""
        if not self.count:
            return float("nan")
        return float(max(self._number("sum2") / self.count - self.mean**2, 0.0) ** 0.5)

    @property
    def max(self) -> float:
        return float(self._number("max"))

    @property
    def min(self) -> float:
        return float(self._number("min"))

    @property
    def is_dead(self) -> bool:
        return self.count == 0

    @property
    def loss_effect(self) -> Interval | None:
        """Its mean effect on the loss, in nats a row, to first order; None where the store had no gradients."""
        found = (self.array(f"loss/{name}").item() for name in ("effect", "low", "high"))
        return Interval(*found) if self.features.has("loss") else None

    # --- shapes

    @property
    def histogram(self) -> Histogram:
        counts = self.array("shape/histogram").astype(np.int64)
        edges = np.full(len(counts) + 1, np.nan, np.float32) if self.is_dead else histogram_edges(self.max)
        return Histogram(edges, counts)

    @property
    def quantiles(self) -> dict[float, float]:
        """Order statistics of its activations, by the share of them that is not larger."""
        found = self.array("shape/quantile").tolist()
        return dict(zip(self.features.facts["quantiles"], found, strict=True))

    @property
    def by_position(self) -> NDArray[np.int64]:
        """Active rows by octave of position: bin i counts positions 2^i - 1 to 2^(i+1) - 2 of a document."""
        return self.array("shape/position").astype(np.int64)

    @property
    def top_tokens(self) -> list[Token]:
        ids, counts, means = (self.array(f"token/{name}") for name in ("id", "count", "mean"))
        n = int((counts > 0).sum())
        texts = self.features.text([int(i) for i in ids[:n]]) or (None,) * n
        return [Token(int(ids[i]), texts[i], int(counts[i]), float(means[i])) for i in range(n)]

    @property
    def neighbours(self) -> list[Neighbour] | None:
        """The latents of most similar decoder rows; None where the run did not look for them."""
        if not self.features.has("near"):
            return None
        ids, cosines = self.array("near/id").tolist(), self.array("near/cosine").tolist()
        return [Neighbour(i, c) for i, c in zip(ids, cosines, strict=True) if i >= 0]

    def codes(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """All rows on which it is active, ascending, and its activations there, where the run kept codes."""
        features = self.features
        if not features.facts["keep_codes"]:
            raise RequestError(f"{features.path} keeps no codes: run `saetrain features --keep-codes`")
        number, place = divmod(self.index, features.facts["chunk"])
        counts = features.array("stat/count", self.index - place, self.index + 1)
        start, stop = int(counts[:-1].sum()), int(counts.sum())
        if start == stop:
            return np.zeros(0, np.int64), np.zeros(0, np.float32)
        data = features.group(by_feature(number))
        return data.read("row", start, stop), data.read("value", start, stop)

    @property
    def logits(self) -> Logits | None:
        """The tokens that it promotes and suppresses; None where the run had no model."""
        return logits_of(self)

    @property
    def together(self) -> list[Companion]:
        """Latents that are active with it, the strongest tie first."""
        ids = self.array("together/id")
        names = ("count", "expected", "pmi", "share", "low", "high")
        found = zip(ids.tolist(), *(self.array(f"together/{name}").tolist() for name in names), strict=True)
        return [Companion(g, c, e, pmi, Interval(s, low, high)) for g, c, e, pmi, s, low, high in found if g >= 0]

    # --- examples

    def top(self, count: int | None = None) -> list[Example]:
        """The rows of largest activation, one of each window, the largest first."""
        return self.examples("top", count)

    def examples(self, kind: str, count: int | None = None) -> list[Example]:
        """The examples of a kind, or the first ones; `Features.kinds` lists the kinds."""
        kinds = self.features.kinds
        if kind == "hard" and self.features.has("hard"):
            rows = self.array("hard/row")[:count]
            nothing = np.full((len(rows), 0), NO_OFFSET, np.int8), np.zeros((len(rows), 0), np.float32)
            return self._examples(kind, rows, np.zeros(len(rows), np.float32), *nothing)
        if kind not in kinds:
            raise RequestError(f"no examples of kind {kind!r}; there are {', '.join(kinds)}, and hard with neighbours")
        first, end = kinds[kind]
        end = end if count is None else min(first + count, end)
        names = ("example/row", "example/value", "context/offset", "context/value")
        return self._examples(kind, *(self.array(name)[first:end] for name in names))

    def _examples(self, kind: str, rows: NDArray[np.int64], *others: NDArray[Any]) -> list[Example]:
        there = rows != NO_ROW
        return marked(self.features.examples(kind, rows[there], *(array[there] for array in others)))

    def __repr__(self) -> str:
        if self.is_dead:
            return f"latent {self.index:,}: dead, active on none of {counted(self.features.rows, 'row')}"
        value, low, high = self.density
        lines = [
            f"latent {self.index:,}: active on {self.count:,} of {counted(self.features.rows, 'row')} "
            f"({value:.3g}, 95% {low:.3g} to {high:.3g}) in {counted(self.documents, 'document')}, max {self.max:.4g}"
        ]
        if (effect := self.loss_effect) is not None:
            lines.append(f"  loss {effect.value:+.3g} nats a row (95% {effect.low:+.3g} to {effect.high:+.3g})")
        return "\n".join([*lines, *(f"  {example}" for example in self.top(5))])

    def _repr_html_(self) -> str:
        return card(self)


class Features:
    """The latents of a finished run, by number."""

    def __init__(self, path: str, facts: dict[str, Any], store: str | None, storage_options: Any) -> None:
        self.path, self.facts = path, facts
        self.kinds: dict[str, tuple[int, int]] = {kind: (first, end) for kind, first, end in facts["kinds"]}
        self._options, self._origin = storage_options, Origin(store or facts["store"], facts, storage_options)
        self._groups: dict[str, Dataset | None] = {}

    @property
    def rows(self) -> int:
        """Rows of the store that were read."""
        return int(self.facts["rows"])

    def __len__(self) -> int:
        return int(self.facts["latents"])

    def __getitem__(self, index: int) -> Feature:
        if not -len(self) <= index < len(self):
            raise IndexError(f"latent {index} of {len(self):,}")
        return Feature(self, int(index) % len(self))

    def __iter__(self) -> Iterator[Feature]:
        return (Feature(self, index) for index in range(len(self)))

    def has(self, group: str) -> bool:
        """True if the run wrote a group of arrays."""
        if group not in self._groups:
            try:
                found = open_dataset(f"{self.path}/{group}", incomplete=True, storage_options=self._options)
            except ActshuffleError:
                self._groups[group] = None
            else:
                self._groups[group] = found
        return self._groups[group] is not None

    def group(self, name: str) -> Dataset:
        """The arrays of a group, one row a latent."""
        if not self.has(name):
            raise RequestError(f"{self.path} has no arrays {name!r}")
        found = self._groups[name]
        assert found is not None
        return found

    def array(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Latents [start, stop) of an array, by "group/name"."""
        group, _, inner = name.rpartition("/")
        return self.group(group).read(inner, start, len(self) if stop is None else stop)

    def codes(self, start: int, stop: int) -> Codes:
        """The active latents of rows [start, stop), where the run kept codes."""
        if not self.facts["keep_codes"]:
            raise RequestError(f"{self.path} keeps no codes: run `saetrain features --keep-codes`")
        if not 0 <= start <= stop <= self.rows:
            raise RequestError(f"rows {start:,} to {stop:,} of {self.rows:,}")
        size, parts = self.facts["block_rows"], []
        for block in range(start // size, -(-stop // size)):
            first = block * size
            lo, hi = max(start - first, 0), min(stop - first, size)
            counts = self.group(by_row(block, "rows")).read("count", 0, hi).astype(np.int64)
            a, b = int(counts[:lo].sum()), int(counts.sum())
            entries = self.group(by_row(block, "entries")) if a < b else None
            latent = entries.read("feature", a, b).astype(np.int64) if entries else np.zeros(0, np.int64)
            value = entries.read("value", a, b) if entries else np.zeros(0, np.float32)
            parts.append((counts[lo:], latent, value))
        counts, latent, value = (np.concatenate([p[i] for p in parts]) for i in range(3)) if parts else _NOTHING
        return Codes(counts, latent, value)

    def promoters(self, token: int) -> list[Promoter] | None:
        """The latents that raise a token's logit most; None where the run had no model."""
        return promoters_of(self, token)

    # --- text

    @property
    def store(self) -> Dataset | None:
        """The store of activations, if it can be opened and is the one that was read."""
        return self._origin.data

    @cached_property
    def median_norm(self) -> float | None:
        """The median norm of the rows that were described, from a sample of them; None where the store is gone."""
        return median_norm_of(self.store, self.facts["field"]) if self.store is not None else None

    def text(self, tokens: list[int], *, running: bool = False) -> tuple[str, ...] | None:
        """Pieces of text of tokens, each alone or as they follow; None where the store has no tokenizer."""
        return self._origin.text(tokens, running=running)

    def examples(
        self,
        kind: str,
        rows: NDArray[np.int64],
        values: NDArray[np.float32],
        offsets: NDArray[np.int8],
        activations: NDArray[np.float32],
    ) -> list[Example]:
        """The surroundings of rows, from the store where it is at hand."""
        return self._origin.examples(kind, rows, values, offsets, activations)

    def __repr__(self) -> str:
        latents = f"{counted(len(self), 'latent')}, {self.facts['alive']:,} of them alive"
        return f"{self.path}: {latents}, on {counted(self.rows, 'row')} of {self._origin.path}"


def open_features(
    path: str | Path, *, store: str | Path | None = None, storage_options: dict[str, Any] | None = None
) -> Features:
    """The finished result of `saetrain features` at a path or URL.

    ``store`` says where the store of activations is, if it has moved: examples take their tokens from there.  Without
    it everything but tokens and text is there all the same.

    Raises `DataError` where there is no result, its run has not finished, or ``store`` is not the one that was read.
    """
    done = read_done(path)
    if done is None or done["name"] != "features":
        raise DataError(
            f"{path} holds no finished result of `saetrain features`; if its run was stopped, the same command resumes"
        )
    found = Features(str(path), done["found"], None if store is None else str(store), storage_options)
    if store is not None and found.store is None:
        raise DataError(f"{path} describes the rows of {found.facts['store']}, and {store} is not that store")
    return found
