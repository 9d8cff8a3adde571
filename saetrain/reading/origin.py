"""The store that a result describes: the tokens, text and documents around the rows that it names."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actshuffle import Dataset, decoder, document_name, open_dataset
from actshuffle.errors import ActshuffleError
from saetrain.describing.slots import NO_OFFSET
from saetrain.reading.records import Example

POSITIONS = ("position", "positions", "pos")


class Origin:
    """The store of activations at a path, which may be gone; `facts` are those of the result."""

    def __init__(self, path: str, facts: dict[str, Any], storage_options: Any) -> None:
        self.path, self.facts, self._options = path, facts, storage_options

    @cached_property
    def data(self) -> Dataset | None:
        """The store, if it can be opened and is the one that was read."""
        try:
            found = open_dataset(self.path, incomplete=True, storage_options=self._options)
        except ActshuffleError:
            return None
        return found if found.identity == self.facts["identity"] else None

    @cached_property
    def _decoders(self) -> tuple[Any, Any]:
        return (decoder(self.data), decoder(self.data, running=True)) if self.data is not None else (None, None)

    def text(self, tokens: list[int], *, running: bool = False) -> tuple[str, ...] | None:
        """Pieces of text of tokens, each alone or as they follow; None where the store has no tokenizer."""
        pieces = self._decoders[running]
        return pieces(tokens) if pieces is not None else None

    def examples(
        self,
        kind: str,
        rows: NDArray[np.int64],
        values: NDArray[np.float32],
        offsets: NDArray[np.int8],
        activations: NDArray[np.float32],
    ) -> list[Example]:
        """Rows [n] with their surroundings, of which only the numbers are known where the store is gone.

        `values` are [n], `offsets` and `activations` [n, kept].  All rows take one read of each column of the store.
        """
        data, facts = self.data, self.facts
        low, high = np.maximum(rows - facts["before"], 0), np.minimum(rows + facts["after"] + 1, facts["rows"])
        documents: list[int | None] = [None] * len(rows)
        if data is not None and facts["document"] is not None:
            for i, around in enumerate(_ranges(data, facts["document"], low, high)):
                at = int(rows[i] - low[i])
                documents[i] = int(around[at])
                other = np.flatnonzero(around != around[at])
                place = int(np.searchsorted(other, at))
                high[i] = low[i] + other[place] if place < len(other) else high[i]
                low[i] += other[place - 1] + 1 if place else 0
        tokens: list[tuple[int, ...]] = [()] * len(rows)
        if data is not None and facts["token"] is not None:
            tokens = [tuple(found.tolist()) for found in _ranges(data, facts["token"], low, high)]
        positions: list[int | None] = [None] * len(rows)
        if data is not None and (field := next((n for n in POSITIONS if n in data.fields), None)) is not None:
            positions = data.take(field, rows).tolist()
        found = []
        for i, row in enumerate(rows.tolist()):
            at = row - int(low[i])
            shown = np.zeros(int(high[i] - low[i]), np.float32)
            held = offsets[i] != NO_OFFSET
            to = at + offsets[i][held].astype(np.int64)
            inside = (to >= 0) & (to < len(shown))
            shown[to[inside]] = activations[i][held][inside]
            shown[at] = values[i]
            name = document_name(data.attributes, documents[i]) if data is not None else None
            text = self.text(list(tokens[i]), running=True) if tokens[i] else None
            value = float(values[i])
            found.append(Example(kind, row, value, documents[i], name, positions[i], tokens[i], text, at, shown))
        return found


def _ranges(data: Dataset, field: str, low: NDArray[np.int64], high: NDArray[np.int64]) -> Iterator[NDArray[Any]]:
    """Rows [low, high) of a column, range by range."""
    ends = np.cumsum(high - low)
    out = np.empty(int(ends[-1]) if len(ends) else 0, data.fields[field].dtype)
    data.read_ranges(field, list(zip(low.tolist(), high.tolist(), strict=True)), out.view(np.uint8))
    for end, size in zip(ends.tolist(), (high - low).tolist(), strict=True):
        yield out[end - size : end]
