"""The store that a result describes: the tokens, text and documents around the rows that it names."""

from __future__ import annotations

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

    def example(
        self, kind: str, row: int, value: float, offsets: NDArray[np.int8], activations: NDArray[np.float32]
    ) -> Example:
        """A row with its surroundings, of which only the numbers are known where the store is gone."""
        low, high = max(row - self.facts["before"], 0), min(row + self.facts["after"] + 1, self.facts["rows"])
        document, name, position = None, None, None
        tokens: tuple[int, ...] = ()
        data = self.data
        if data is not None and (field := self.facts["document"]) is not None:
            around = data.read(field, low, high)
            document = int(around[row - low])
            other = np.flatnonzero(around != around[row - low])
            before, after = other[other < row - low], other[other > row - low]
            low, high = low + int(max(before, default=-1)) + 1, low + int(min(after, default=high - low))
            name = document_name(data.attributes, document)
        if data is not None and (field := self.facts["token"]) is not None:
            tokens = tuple(int(token) for token in data.read(field, low, high))
        if data is not None and (found := next((n for n in POSITIONS if n in data.fields), None)) is not None:
            position = int(data.read(found, row, row + 1)[0])
        shown = np.zeros(high - low, np.float32)
        held = offsets != NO_OFFSET
        at = row - low + offsets[held].astype(np.int64)
        inside = (at >= 0) & (at < high - low)
        shown[at[inside]] = activations[held][inside]
        shown[row - low] = value
        text = self.text(list(tokens), running=True) if tokens else None
        return Example(kind, row, value, document, name, position, tokens, text, row - low, shown)
