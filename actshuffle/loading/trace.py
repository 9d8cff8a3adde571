"""Trace rows: from an output row to its token in its document, and back.

>>> for origin in came_from("shuffled.zarr", [0, 1]): print(origin)         # doctest: +SKIP
row 0: row 81,234 of activations.zarr, document 12 (zipfile.py), position 88, token 2005: "self._[[seek]](0"
>>> where_is("shuffled.zarr", [81_234])                                     # doctest: +SKIP
array([0])

No data is scanned: ``source_row`` gives the origin of a row with one small read, and its place in the
output follows from its key with a few (see ranks.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actshuffle.errors import ActshuffleError, FormatError, RequestError
from actshuffle.extras import need
from actshuffle.html import page
from actshuffle.loading.dataset import Dataset, open_dataset
from actshuffle.loading.documents import DOCUMENT
from actshuffle.loading.ranks import Ranks, key_of
from actshuffle.storage.place import Place, as_place, local_path
from actshuffle.units import counted, several, switches

Pieces = Callable[[Sequence[int | None]], tuple[str, ...]]  # from token ids to their text; "?" for None
# Usual names of these arrays; the first one present is used.
KEPT_TEXTS = 1 << 16  # of tokens and of pairs of them, some 15 MB
NAMES = {
    "token": ("token", "tokens", "token_id", "token_ids", "input_ids"),
    "document": DOCUMENT,
    "position": ("position", "positions", "pos"),
}


@dataclass(frozen=True)
class Origin:
    """Where one output row came from; None for what neither store knows.

    ``source`` and ``row_in_source`` say which store of several, and which row of it; for a single source
    that is ``source_row`` itself.  ``tokens`` are the ids around it in the same document, its own at
    ``tokens[at]``; ``text`` are their decoded pieces.
    """

    row: int
    source_row: int
    source: str
    row_in_source: int
    document: int | None = None
    document_name: str | None = None
    position: int | None = None
    token: int | None = None
    tokens: tuple[int | None, ...] = ()
    at: int = 0
    text: tuple[str, ...] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        parts = [f"row {self.row:,}: row {self.row_in_source:,} of {self.source}"]
        if self.document is not None:
            name = f" ({self.document_name})" if self.document_name else ""
            parts.append(f"document {self.document:,}{name}")
        if self.position is not None:
            parts.append(f"position {self.position:,}")
        if self.token is not None:
            parts.append(f"token {self.token}: {''.join(self._around())}")
        return ", ".join(parts)

    def _around(self, left: str = "[[", right: str = "]]") -> tuple[str, str, str]:
        """The tokens before, at and after the row on one line: their text in quotes, else their ids."""
        if self.text is None:
            shown = [f"{t} " for t in self.tokens]
            shown[self.at] = f"{left}{self.tokens[self.at]}{right} "
            return "".join(shown[: self.at]), shown[self.at], "".join(shown[self.at + 1 :]).rstrip()
        whole = "".join(self.text)
        quote = "'" if '"' in whole and "'" not in whole else '"'
        shown = [one_line(piece).replace(quote, f"\\{quote}") for piece in self.text]
        before, after = "".join(shown[: self.at]), "".join(shown[self.at + 1 :])
        return f"{quote}{before}", f"{left}{shown[self.at]}{right}", f"{after}{quote}"

    def _repr_html_(self) -> str:
        facts = {"row": f"{self.row:,}", "source": self.source, "row in source": f"{self.row_in_source:,}"}
        names = ("document", "document_name", "position", "token")
        facts |= {n.replace("_", " "): str(v) for n in names if (v := getattr(self, n)) is not None}
        if self.token is not None:
            facts["text" if self.text is not None else "tokens"] = "".join(self._around())
        return page("Origin", facts)


def one_line(text: str) -> str:
    """Text without what breaks a line or moves a cursor: such characters, and backslashes, as Python writes them."""
    return "".join(c if c.isprintable() and c != "\\" else ascii(c)[1:-1] for c in text)


def came_from(
    dst: str | Path | Dataset,
    rows: Iterable[int],
    context: int = 5,
    *,
    source: str | Path | None = None,
    decode: bool = True,
    storage_options: dict[str, Any] | None = None,
) -> list[Origin]:
    """The origin of each of some output rows, with ``context`` tokens on both sides.

    Neighbours are read from the source (``source`` if it has moved), or, where it is gone, from ``dst``,
    which has the same rows elsewhere.  ``decode`` turns tokens into text if the store names a tokenizer
    that is on this machine; nothing is downloaded.
    """
    switches(decode=decode)
    data = _shuffled(dst, storage_options)
    ranks = Ranks(data)
    wanted = _checked(rows, data.rows, f"rows of {data.path}")
    if context < 0:
        raise RequestError(f"context must be 0 or more, got {context}")
    numbers = ranks.source_rows(wanted)
    around = _Surroundings(data, ranks, source)
    pieces = decoder(data, running=True) if decode else None
    return [around.origin(int(row), int(number), context, pieces) for row, number in zip(wanted, numbers, strict=True)]


def where_is(
    dst: str | Path | Dataset, source_rows: Iterable[int], *, storage_options: dict[str, Any] | None = None
) -> NDArray[np.int64]:
    """The output row of each of some source rows, int64; -1 for one that is not there (a view, a sample)."""
    data = _shuffled(dst, storage_options)
    ranks = Ranks(data)
    wanted = _checked(source_rows, ranks.first + ranks.population, f"source rows of {data.path}")
    return np.array([_place(ranks, int(row)) for row in wanted], np.int64)


def _place(ranks: Ranks, row: int) -> int:
    at = ranks.rank(key_of(ranks.keys, row))
    if at < ranks.data.rows and ranks.source_rows(np.array([at]))[0] == row:
        return at
    if ranks.data.rows == ranks.population:
        raise FormatError(
            f"source row {row:,} is not at row {at:,} of {ranks.data.path}, where its key puts it: "
            "source_row is damaged; verify the store"
        )
    return -1


class _Surroundings:
    """The facts about source rows: from the source, where it can be read, else from the output."""

    def __init__(self, data: Dataset, ranks: Ranks, source: str | Path | None) -> None:
        self.data, self.ranks = data, ranks
        marker = data.root_marker or {}
        parts = marker.get("parts") or [{"source": marker["source"], "rows": ranks.population}]
        self._ends = np.cumsum([ranks.first + parts[0]["rows"], *(p["rows"] for p in parts[1:])])
        self._paths = [str(p["source"]) for p in parts]
        self._shifts: list[dict[str, int]] = [p.get("numbered_from", {}) for p in parts]
        self._options = json.loads(data.root.options)
        self._whole = None if source is None else self._opened(as_place(source, self._options))
        if source is not None and self._whole is None:
            raise RequestError(f"{source} cannot be read, or has fewer than {counted(self._ends[-1], 'row')}")
        self._parts: dict[int, Dataset | None] = {}
        self._places: dict[int, int] = {}

    def origin(self, row: int, number: int, context: int, pieces: Pieces | None) -> Origin:
        """Everything about one output row, whose source row is ``number``."""
        part = int(np.searchsorted(self._ends, number, side="right"))
        start = 0 if part == 0 else int(self._ends[part - 1])
        near = range(max(number - context, start), min(number + context + 1, int(self._ends[part])))
        at = number - near.start
        document, position = (self._values(kind, [number], part)[0] for kind in ("document", "position"))
        tokens = self._values("token", near, part)
        if document is not None:
            same = [found == document for found in self._values("document", near, part)]
            if position is not None and position >= 0:  # rows between them may have been left out of the source
                places = self._values("position", near, part)
                same = [
                    a and (p is None or p < 0 or p - position == i - at)
                    for i, (a, p) in enumerate(zip(same, places, strict=True))
                ]
            at = sum(same[:at])
            tokens = [token for token, inside in zip(tokens, same, strict=True) if inside]
        known = tokens[at] is not None
        return Origin(
            row=row,
            source_row=number,
            source=self._paths[part],
            row_in_source=number - start,
            document=document,
            document_name=document_name(self.data.attributes, document),
            position=position,
            token=tokens[at],
            tokens=tuple(tokens) if known else (),
            at=at if known else 0,
            text=pieces(tokens) if known and pieces is not None else None,
        )

    def _values(self, kind: str, numbers: Sequence[int], part: int) -> list[int | None]:
        """One thing about some source rows of a part; from the output if the source does not have it."""
        store = self._store(part)
        if store is not None and (name := _named(store, kind)) is not None:
            first = 0 if store is self._whole or part == 0 else int(self._ends[part - 1])
            shift = 0 if store is self._whole else self._shifts[part].get(name, 0)  # of documents, in the joint store
            return [int(x) + (shift if x >= 0 else 0) for x in store.take(name, np.array(numbers) - first)]
        if (name := _named(self.data, kind)) is None:
            return [None] * len(numbers)
        for number in numbers:
            if number not in self._places:
                self._places[number] = _place(self.ranks, number)
        places = [self._places[number] for number in numbers]
        return [None if at < 0 else int(self.data.read(name, at, at + 1)[0]) for at in places]

    def _store(self, part: int) -> Dataset | None:
        if self._whole is not None:
            return self._whole
        if part not in self._parts:
            place = Place(self._paths[part], self.data.root.options)
            rows = int(self._ends[part]) - (int(self._ends[part - 1]) if part else 0)
            # A name found in a remote store does not lead to local files, nor the other way round.
            same = (local_path(place) is None) == (local_path(self.data.root) is None)
            self._parts[part] = self._opened(place, rows) if same else None
        return self._parts[part]

    def _opened(self, place: Place, rows: int | None = None) -> Dataset | None:
        try:
            found = open_dataset(place.url, incomplete=True, storage_options=self._options)
        except ActshuffleError:
            return None
        expected = int(self._ends[-1]) if rows is None else rows
        return found if found.rows == expected else None


def document_name(attributes: Mapping[str, Any], document: int | None) -> str | None:
    """The name of a document by a store's attributes: ``documents`` lists names, or files and their counts."""
    listed = attributes.get("documents")
    if not isinstance(listed, list) or document is None or document < 0:
        return None
    if listed and isinstance(listed[0], dict):
        for entry in listed:
            if entry["first"] <= document < entry["first"] + entry["count"]:
                line = f":{document - entry['first'] + 1}" if entry["count"] > 1 else ""
                return f"{entry['file']}{line}"
        return None
    return str(listed[document]) if document < len(listed) else None


def decoder(store: Dataset, *, running: bool = False) -> Pieces | None:
    """A function from token ids to their decoded pieces, by the tokenizer that a store's attributes name.

    With ``running``, the tokens follow each other in a text, and each piece is what the token adds to the one before
    it: many tokenizers write the blank between two words nowhere else.

    None where the store names none, or where it or transformers is not on this machine; nothing is downloaded.
    """
    switches(running=running)
    found = _decoder(json.dumps(store.attributes.get("tokenizer")))
    if found is None:
        return None
    return found.running if running else found.each


class _Decoder:
    """Decodes tokens one by one.

    A page shows hundreds at once, most of them again and again: texts are kept, and those of a fast tokenizer come from
    the library below transformers, which takes a tenth of the time to give the same.
    """

    def __init__(self, tokenizer: Any) -> None:
        fast = getattr(tokenizer, "backend_tokenizer", None)
        decode: Any = tokenizer.decode if fast is None else fast.decode
        plain = {"clean_up_tokenization_spaces": False} if fast is None else {"skip_special_tokens": False}
        self._text = lru_cache(maxsize=KEPT_TEXTS)(lambda *tokens: str(decode(list(tokens), **plain)))

    def each(self, tokens: Sequence[int | None]) -> tuple[str, ...]:
        return tuple("?" if t is None else self._text(t) for t in tokens)

    def running(self, tokens: Sequence[int | None]) -> tuple[str, ...]:
        before: int | None = None
        found = []
        for token in tokens:
            piece = "?" if token is None else self._text(token)
            if before is not None and token is not None:
                alone, both = self._text(before), self._text(before, token)
                piece = both[len(alone) :] if both.startswith(alone) else piece
            found.append(piece)
            before = token
        return tuple(found)


@lru_cache(maxsize=2)
def _decoder(recorded: str) -> _Decoder | None:
    """The tokenizer that a store names, if it and transformers are here; never from the network."""
    named = json.loads(recorded)
    name = named.get("name") if isinstance(named, dict) else named
    if not isinstance(name, str):
        return None
    try:
        auto = need("transformers", "collect").AutoTokenizer
        return _Decoder(auto.from_pretrained(name, local_files_only=True))
    except Exception:  # the text is optional
        return None


def _named(store: Dataset, kind: str) -> str | None:
    for name in NAMES[kind]:
        if name in store.fields:
            info = store.fields[name]
            return name if info.dtype.kind in "iu" and info.row_shape == () else None
    return None


def _shuffled(dst: str | Path | Dataset, storage_options: dict[str, Any] | None) -> Dataset:
    return dst if isinstance(dst, Dataset) else open_dataset(dst, storage_options=storage_options)


def _checked(rows: Iterable[int], count: int, what: str) -> NDArray[np.int64]:
    given = np.array(several("rows", rows, of="whole numbers")).reshape(-1)
    if len(given) and given.dtype.kind not in "iu":
        raise RequestError(f"rows must be whole numbers, got {given.dtype}")
    wanted = given.astype(np.int64)
    outside = wanted[(wanted < 0) | (wanted >= count)]
    if len(outside):
        raise RequestError(f"there is no row {outside[0]:,} among the {count:,} {what}")
    return wanted
