"""Text as tokens on disk, cut into windows and groups of windows (see activations.py)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actshuffle.arraytypes import I64
from actshuffle.errors import RequestError, SourceError
from actshuffle.foreign.textfiles import documents
from actshuffle.progress import Progress
from actshuffle.storage.objects import Objects

PIECE = 1 << 22  # rows, windows or groups of one object
COLUMNS = {"token": "<i4", "document": "<i4", "position": "<i4", "window_position": "<i4"}
READ, KEPT = "read", "kept"  # all tokens that windows read, and which of them have a row; where rows are dropped
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


@dataclass(frozen=True)
class Frame:
    """The tokens that a window reads beside its text, and the rule for the tokens that get a row.

    A window reads ``lead``, ``before``, at most ``content`` tokens of text, and ``after``, as token ids.  ``lead`` is
    the user's prefix and never has rows; ``before`` and ``after`` are the tokenizer's and have some if ``keep`` is set.
    Of the others, tokens at the first ``skip_first`` places of the window and those in ``drop_tokens`` have none.
    """

    content: int
    lead: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    keep: bool
    skip_first: int
    drop_tokens: tuple[int, ...]

    @property
    def context(self) -> int:
        """The most tokens that a window reads."""
        return len(self.lead) + len(self.before) + self.content + len(self.after)

    @property
    def drops(self) -> bool:
        """True if text may lose rows, so that rows and tokens must be told apart."""
        return bool(self.skip_first or self.drop_tokens)

    def lost(self, tokens: I64, first: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Which tokens lose their rows by ``skip_first``, and which others by ``drop_tokens``.

        ``first`` is the place of tokens[0] in the window.
        """
        early = np.arange(first, first + len(tokens)) < self.skip_first
        return early, ~early & np.isin(tokens, self.drop_tokens)


class Cut:
    """Documents go in, one after the other; rows, windows and groups go to disk.

    ``dropped`` counts the tokens without a row, by the option that dropped them.
    """

    def __init__(self, objects: Objects, frame: Frame, most_rows: int | None) -> None:
        self._frame, self._most = frame, most_rows
        self._before, self._after = np.array(frame.before, np.int64), np.array(frame.after, np.int64)
        self._special = len(frame.before) + len(frame.after)
        self._added = self._special if frame.keep else 0  # special rows of a window
        self._columns = {k: _Growing(Pieces(objects, k, dtype)) for k, dtype in COLUMNS.items()}
        self._windows, self._groups, self._group_rows, self._kept = (
            _Growing(Pieces(objects, name, "<u8")) for name in ("windows", "groups", "group_rows", KEPT)
        )
        self._read = _Growing(Pieces(objects, READ, "<i4"))
        self._in_group = GROUP_TOKENS  # so that the first window opens a group
        self._tokens = self.rows = self.documents = 0
        self.dropped = {"prefix": 0, "special": 0, "skip_first": 0, "drop_tokens": 0}

    @property
    def full(self) -> bool:
        """Are there as many rows as were asked for?"""
        return self._most is not None and self.rows + self._added >= self._most

    @property
    def groups(self) -> int:
        return self._groups.count - 1

    def add(self, tokens: I64) -> None:
        """One document."""
        content = self._frame.content
        for start in range(0, len(tokens), content):
            if self.full:
                break
            self._add_window(tokens[start : start + content], start)
        self.documents += 1

    def finish(self) -> None:
        self._open_group()
        self._windows.add(np.array([self._tokens]))
        for growing in (*self._columns.values(), self._windows, self._groups, self._group_rows, self._kept, self._read):
            growing.finish()

    def _add_window(self, tokens: I64, start: int) -> None:
        frame = self._frame
        first = len(frame.lead) + len(frame.before)
        if self._most is not None:
            kept = np.flatnonzero(~np.logical_or(*frame.lost(tokens, first)))
            room = self._most - self.rows - self._added
            tokens = tokens[: kept[room]] if len(kept) > room else tokens
        position = np.arange(start, start + len(tokens))
        if frame.keep:
            first = len(frame.lead)
            tokens = np.concatenate([self._before, tokens, self._after])
            none = [np.full(len(ids), -1) for ids in (self._before, self._after)]
            position = np.concatenate([none[0], position, none[1]])
        early, named = frame.lost(tokens, first)
        rows = np.flatnonzero(~(early | named))
        counts = (len(frame.lead), self._special - self._added, int(early.sum()), int(named.sum()))
        for option, count in zip(self.dropped, counts, strict=True):
            self.dropped[option] += count
        if self._in_group >= GROUP_TOKENS:
            self._open_group()
        self._windows.add(np.array([self._tokens]))
        if frame.drops:
            self._read.add(tokens)
            self._kept.add(self._tokens + rows)
        self._columns["token"].add(tokens[rows])
        self._columns["position"].add(position[rows])
        self._columns["window_position"].add(first + rows)
        self._columns["document"].add(np.full(len(rows), self.documents))
        self.rows += len(rows)
        self._tokens += len(tokens)
        self._in_group += len(tokens)

    def _open_group(self) -> None:
        self._groups.add(np.array([self._windows.count]))
        self._group_rows.add(np.array([self.rows]))
        self._in_group = 0


def prefix_token(tokenizer: Any, prefix: str) -> int:
    """The id of a prefix: "bos", an id, or a token of the vocabulary as the tokenizer spells it."""
    name, vocabulary = type(tokenizer).__name__, tokenizer.get_vocab()
    if prefix == "bos":
        if tokenizer.bos_token_id is None:
            raise RequestError(f"{name} has no begin-of-text token: name another prefix, by its id or its spelling")
        return int(tokenizer.bos_token_id)
    if prefix.isdecimal():
        if int(prefix) not in vocabulary.values():
            raise RequestError(
                f"prefix {prefix} is no token of {name}, whose ids go up to {max(vocabulary.values()):,}"
            )
        return int(prefix)
    if prefix not in vocabulary:
        raise RequestError(f"prefix {prefix!r} is no token of {name}: give bos, an id, or a token as it spells it")
    return int(vocabulary[prefix])


def special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The tokens that the tokenizer puts before and after a text."""
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
