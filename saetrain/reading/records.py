"""The answers of a latent, as plain tuples."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

AROUND = 8  # tokens on either side that make two examples the same


class Interval(NamedTuple):
    """A value and the ends of its 95% interval; the ends are NaN where none can be given."""

    value: float
    low: float
    high: float


class Histogram(NamedTuple):
    """Bin i holds the activations with edges[i] <= activation < edges[i + 1]; the first also all smaller ones."""

    edges: NDArray[np.float32]  # [bins + 1]
    counts: NDArray[np.int64]  # [bins]


class Token(NamedTuple):
    """A token on which a latent is active."""

    id: int
    text: str | None
    times: int  # rows with this token on which it is active
    mean: float  # of its activations there


class Neighbour(NamedTuple):
    latent: int
    cosine: float


class Example(NamedTuple):
    """A row of the store, with the rows around it in its document; `at` is its place among them.

    `activations` are this latent's own there; beside the example itself, only the largest are kept, others are 0.
    `is_repeated` says that an earlier example of the same kind has the same tokens `around` it.
    """

    kind: str
    row: int
    value: float
    document: int | None
    document_name: str | None
    position: int | None
    tokens: tuple[int, ...]
    text: tuple[str, ...] | None
    at: int
    activations: NDArray[np.float32]  # [rows around]
    is_repeated: bool = False

    @property
    def around(self) -> tuple[int, ...]:
        """The tokens from `AROUND` before to as many after it, without the last, in its document."""
        return self.tokens[max(self.at - AROUND, 0) : self.at + AROUND]

    def __repr__(self) -> str:
        shown = self.text or tuple(f" {token}" for token in self.tokens)
        words = [f"[[{piece}]]" if i == self.at else piece for i, piece in enumerate(shown)]
        where = f" of {self.document_name or self.document}" if self.document is not None else ""
        return f"{self.value:.4g} at row {self.row:,}{where}: {''.join(words)}"


def marked(examples: Iterable[Example]) -> list[Example]:
    """The examples of a kind, with those that repeat the surroundings of an earlier one."""
    found: list[Example] = []
    for example in examples:
        seen = {other.around for other in found}
        found.append(example._replace(is_repeated=bool(example.tokens) and example.around in seen))
    return found


class Companion(NamedTuple):
    """A latent that is active on more of another's rows than chance gives, on the sample of rows."""

    latent: int
    times: int  # rows with both
    expected: float  # what chance would give
    pmi: float  # log2(count / expected)
    share: Interval  # of the rows of the other


class Codes(NamedTuple):
    """Active latents of some rows, row by row, latents ascending within each."""

    counts: NDArray[np.int64]  # [rows]
    latent: NDArray[np.int64]  # [n]
    value: NDArray[np.float32]  # [n]
