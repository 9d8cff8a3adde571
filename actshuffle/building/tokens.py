"""Text as tokens on disk, cut into windows and groups of windows (see activations.py)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actshuffle.errors import SourceError
from actshuffle.foreign.textfiles import documents
from actshuffle.progress import Progress
from actshuffle.storage.objects import Objects

PIECE = 1 << 22  # rows, windows or groups of one object
COLUMNS = {"token": "<i4", "document": "<i4", "position": "<i4"}
GROUP_TOKENS = 1 << 15  # windows are sorted by length within so many tokens


class Pieces:
    """A long array of numbers on disk, in objects of `PIECE` numbers."""

    def __init__(self, objects: Objects, name: str, dtype: str) -> None:
        self._objects, self._name, self.dtype = objects, f"_actshuffle/{name}", np.dtype(dtype)

    def put(self, number: int, values: NDArray[Any]) -> None:
        self._objects.put(f"{self._name}/{number}", values.astype(self.dtype).tobytes())

    def get(self, start: int, stop: int) -> NDArray[Any]:
        found = [self._piece(n) for n in range(start // PIECE, -(-stop // PIECE))]
        first = start // PIECE * PIECE
        return np.concatenate([*found, np.zeros(0, self.dtype)])[start - first : stop - first]

    def _piece(self, number: int) -> NDArray[Any]:
        data = self._objects.get(f"{self._name}/{number}")
        if data is None:
            raise SourceError(f"{self._name}/{number} is missing: tokens must be made again (--overwrite)")
        return np.frombuffer(data, self.dtype)


class _Growing:
    """A `Pieces` that is being written."""

    def __init__(self, pieces: Pieces) -> None:
        self._pieces, self._held, self._waiting, self._number = (pieces, [np.zeros(0, pieces.dtype)], 0, 0)
        self.count = 0

    def add(self, values: NDArray[Any]) -> None:
        self._held.append(values)
        self._waiting += len(values)
        self.count += len(values)
        if self._waiting >= PIECE:
            self._put(whole=True)

    def finish(self) -> None:
        self._put(whole=False)

    def _put(self, *, whole: bool) -> None:
        values = np.concatenate(self._held)
        while len(values) >= (PIECE if whole else 1):
            self._pieces.put(self._number, values[:PIECE])
            self._number, values = self._number + 1, values[PIECE:]
        self._held, self._waiting = [values], len(values)


class Cut:
    """Documents go in, one after the other; rows, windows and groups go to disk."""

    def __init__(
        self,
        objects: Objects,
        content: int,
        before: Sequence[int],
        after: Sequence[int],
        keep: bool,
        most_rows: int | None,
    ) -> None:
        self._content, self._most = content, most_rows
        self._before, self._after = np.array(before, np.int64), np.array(after, np.int64)
        self._keep, self._added = (keep, len(before) + len(after) if keep else 0)  # special rows of a window
        self._columns = {k: _Growing(Pieces(objects, k, dtype)) for k, dtype in COLUMNS.items()}
        self._windows, self._groups, self._group_rows = (
            _Growing(Pieces(objects, name, "<u8")) for name in ("windows", "groups", "group_rows")
        )
        self._in_group = GROUP_TOKENS  # so that the first window opens a group
        self.rows = self.documents = 0

    @property
    def full(self) -> bool:
        """Are there as many rows as were asked for?"""
        return self._most is not None and self.rows + self._added >= self._most

    @property
    def groups(self) -> int:
        return self._groups.count - 1

    def add(self, tokens: NDArray[np.int64]) -> None:
        """One document."""
        for start in range(0, len(tokens), self._content):
            if self.full:
                break
            self._add_window(tokens[start : start + self._content], start)
        self.documents += 1

    def finish(self) -> None:
        self._open_group()
        self._windows.add(np.array([self.rows]))
        for growing in (*self._columns.values(), self._windows, self._groups, self._group_rows):
            growing.finish()

    def _add_window(self, tokens: NDArray[np.int64], start: int) -> None:
        if self._most is not None:
            tokens = tokens[: self._most - self.rows - self._added]
        position = np.arange(start, start + len(tokens))
        if self._keep:
            tokens = np.concatenate([self._before, tokens, self._after])
            none = [np.full(len(ids), -1) for ids in (self._before, self._after)]
            position = np.concatenate([none[0], position, none[1]])
        if self._in_group >= GROUP_TOKENS:
            self._open_group()
        self._windows.add(np.array([self.rows]))
        self._columns["token"].add(tokens)
        self._columns["position"].add(position)
        self._columns["document"].add(np.full(len(tokens), self.documents))
        self.rows += len(tokens)
        self._in_group += len(tokens)

    def _open_group(self) -> None:
        self._groups.add(np.array([self._windows.count]))
        self._group_rows.add(np.array([self.rows]))
        self._in_group = 0


def special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after a text."""
    bare = tokenizer("one", add_special_tokens=False)["input_ids"]
    full = tokenizer("one")["input_ids"]
    for at in range(len(full) - len(bare) + 1):
        if full[at : at + len(bare)] == bare:
            return list(full[:at]), list(full[at + len(bare) :])
    raise SourceError(f"{type(tokenizer).__name__} changes a text's tokens when it adds special ones")


def tokenize(
    files: Sequence[Path], tokenizer: Any, cut: Cut, asked: Mapping[str, Any], progress: Progress
) -> list[dict[str, Any]]:
    """All documents, as tokens, into the cut; returns which file has which documents."""
    listing: list[dict[str, Any]] = []
    options: dict[str, Any] = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    if asked["tokens_per_document"]:
        options |= {"truncation": True, "max_length": asked["tokens_per_document"]}
    for file in files:
        first = cut.documents
        for texts in _batches(documents(file, asked["field"])):
            for ids in tokenizer(texts, **options)["input_ids"]:
                if cut.full:
                    break
                cut.add(np.array(ids, np.int64))
        listing.append({"file": str(file), "first": first, "count": cut.documents - first})
        progress.advance(0, True)
        if cut.full:
            break
    return listing


def _batches(texts: Iterator[str], count: int = 256, characters: int = 1 << 20) -> Iterator[list[str]]:
    held: list[str] = []
    for text in texts:
        held.append(text)
        if len(held) == count or sum(map(len, held)) > characters:
            yield held
            held = []
    if held:
        yield held
