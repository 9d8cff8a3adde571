"""Documents in random order, cut into windows as `actshuffle collect` cuts them, and the scale of a layer on them.

::

    a window    prefix | special | tokens of the document ... | special
                ^^^^^^^^^^^^^^^^ not edited and not counted    ^ neither

The order of documents, and the windows that are taken of a long one, follow from the seed alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from actshuffle import read_texts
from actshuffle.units import counted
from saetrain.errors import ConfigError, DataError
from saetrain.probing.causal import LanguageModel

CONTEXT = 128  # tokens of a window by default, special ones included, as in `actshuffle collect`
BATCH_TOKENS = 1024  # of one pass: the logits of so many tokens exist at once
PILOT_ROWS = 4096  # from which the mean row and the median norm of a layer are computed


@dataclass(frozen=True)
class Cutting:
    """How documents become windows.

    ``context`` is tokens of a window; 0 means 128, or less if the model takes less.  ``prefix`` is a token that goes
    before every window: "bos", an id, or a token as the tokenizer spells it; "" is none.  Of a document, at most
    ``per_document`` windows are taken, a uniform sample without replacement; 0 takes all.
    """

    context: int = 0
    prefix: str = ""
    per_document: int = 0
    seed: int = 0


class Batch(NamedTuple):
    """Windows of equal length: tokens int64 [windows, length], of which [lo, hi) are the document's."""

    tokens: Tensor
    lo: int
    hi: int


@dataclass
class Document:
    number: int  # in the order of the files
    name: str
    batches: list[Batch]


@dataclass
class Corpus:
    """The documents of some texts, in a random order; those without a whole pair of tokens are left out."""

    model: LanguageModel
    texts: Sequence[tuple[str, str]]
    cutting: Cutting = field(default_factory=Cutting)

    def __post_init__(self) -> None:
        if not self.texts:
            raise DataError("no documents in the text")
        before, self.after = self.model.special_tokens()
        self.before = [*([self.model.token(self.cutting.prefix)] if self.cutting.prefix else []), *before]
        context = self.cutting.context or min(CONTEXT, self.model.longest)
        self.content = context - len(self.before) - len(self.after)
        if self.content < 2 or context > self.model.longest:
            raise ConfigError(
                f"a window of {counted(context, 'token')}, {len(self.before) + len(self.after)} of them prefix or "
                f"special: two others are needed, and {self.model.name} takes {self.model.longest:,} at most"
            )
        if self.cutting.per_document < 0:
            raise ConfigError(f"windows of a document must be 0 (all) or more, got {self.cutting.per_document}")
        self.order = np.random.default_rng([self.cutting.seed, 1]).permutation(len(self.texts))

    @classmethod
    def read(cls, model: LanguageModel, paths: Sequence[str | Path], cutting: Cutting, name: str = "text") -> Corpus:
        """From files and folders of text; ``name`` is the field that holds it in JSON and tables."""
        return cls(model, list(read_texts(paths, field=name)), cutting)

    def __iter__(self) -> Iterator[Document]:
        for number in self.order:
            document = self.document(int(number))
            if document.batches:
                yield document

    def document(self, number: int) -> Document:
        """One document by its place in the files."""
        name, text = self.texts[number]
        tokens = self.model.tokens_of(text)
        windows = [tokens[at : at + self.content] for at in range(0, len(tokens), self.content)]
        windows = [window for window in windows if len(window) > 1]
        most = self.cutting.per_document
        if most and len(windows) > most:
            dice = np.random.default_rng([self.cutting.seed, 2, number])
            windows = [windows[at] for at in sorted(dice.choice(len(windows), most, replace=False))]
        return Document(number, name, list(self._batches(windows)))

    def _batches(self, windows: list[list[int]]) -> Iterator[Batch]:
        for length in sorted({len(window) for window in windows}, reverse=True):
            alike = [[*self.before, *window, *self.after] for window in windows if len(window) == length]
            count = max(1, BATCH_TOKENS // len(alike[0]))
            for at in range(0, len(alike), count):
                lo = len(self.before)
                yield Batch(torch.tensor(alike[at : at + count]), lo, lo + length)


@dataclass(frozen=True)
class Scale:
    """The size of a layer's rows: what strengths and filters are measured in."""

    mean: Tensor  # [d], float64, of the rows that are not heavy
    median_norm: float
    rows: int  # that were looked at
    drop_norm: float = 0.0  # rows beyond this multiple of the median norm are heavy; 0: none are

    @property
    def limit(self) -> float:
        return self.drop_norm * self.median_norm if self.drop_norm else float("inf")

    def usual(self, x: Tensor) -> Tensor:
        """[..., 1]: True for rows that are not heavy."""
        norms: Tensor = torch.linalg.vector_norm(x.float(), dim=-1, keepdim=True)
        return norms <= self.limit


def measure_scale(corpus: Corpus, drop_norm: float, rows: int = PILOT_ROWS) -> Scale:
    """From the first documents of the order, until there are so many rows."""
    if drop_norm < 0 or 0 < drop_norm <= 1:
        raise ConfigError(f"rows are dropped beyond a multiple above 1 of the median norm (0: none), got {drop_norm}")
    held: list[Tensor] = []
    count = 0
    for document in corpus:
        for batch in document.batches:
            x = corpus.model.hidden(batch.tokens)[:, batch.lo : batch.hi].reshape(-1, corpus.model.width)
            held.append(x.double().cpu())
            count += len(x)
        if count >= rows:
            break
    if not held:
        raise DataError("no document of the text has two tokens")
    x = torch.cat(held)
    norms = x.norm(dim=1)
    median = float(norms.median())
    usual = x[norms <= drop_norm * median] if drop_norm else x
    return Scale(usual.mean(0), median, len(x), drop_norm)
