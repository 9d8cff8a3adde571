"""Files of other formats as a virtual source: its rows are items of their columns, or parts of items."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from actshuffle.arrays import readers, virtual
from actshuffle.arrays.metadata import metadata_of
from actshuffle.arraytypes import U8, U64
from actshuffle.errors import FormatError, SourceError
from actshuffle.foreign.formats import FORMATS
from actshuffle.foreign.table import FileColumn, FilePart, dtype_name
from actshuffle.seals import seal
from actshuffle.storage.objects import open_objects
from actshuffle.storage.place import Place, local_path


@dataclass(frozen=True)
class Mapped:
    """The array of one column, and how its rows come from the column's items.

    ``rule``: "rows" (an item is a row), "tokens" (an item is a sequence of rows), "repeated" (an item
    is given to all rows of its sequence), "document" and "position" (made up, there is no column).
    """

    array: str
    column: str
    rule: str
    dtype: str
    shape: tuple[int, ...]  # of a row
    files: int

    def __str__(self) -> str:
        told = {
            "rows": "one row per item",
            "tokens": "one row per token of each sequence",
            "repeated": "repeated over the tokens of its sequence",
            "document": "number of the sequence",
            "position": "place in the sequence",
        }
        shape = "x".join(map(str, self.shape)) or "scalar"
        origin = f"{self.column!r}, {self.files} file{'s' * (self.files != 1)}" if self.column else "(new)"
        return f"{self.array}: {shape} {dtype_name(self.dtype)} from {origin}: {told[self.rule]}"


def write_files(
    source: Place,
    kind: str,
    options: dict[str, Any],
    files: Sequence[Path],
    found: Mapping[str, FileColumn],
    mapping: Sequence[Mapped],
    sequence: int,
    decoded: int,
    attributes: dict[str, Any],
) -> int:
    """The files as a virtual source; returns its rows."""
    items = next(iter(found[m.column].items for m in mapping if m.column))
    rows = items * sequence
    if rows == 0:
        raise SourceError(f"no rows in {files[0]}" + " and the others" * (len(files) > 1))
    # A third of what decoding takes is the chunk that the plan takes to be decoded (see metadata.source_buffer).
    widest = max(FileColumn("", m.dtype, m.shape, ()).item_bytes for m in mapping)
    chunk, codec = max(1, -(-decoded // (3 * max(1, widest)))), "crc32c" if decoded else "none"
    texts = {m.array: metadata_of(m.array, m.dtype, m.shape, rows, chunk, codec) for m in mapping}
    settings = {
        "kind": kind,
        "options": options,
        "sequence": sequence,
        "files": [[str(f.absolute()), f.stat().st_size, f.stat().st_mtime_ns] for f in files],
        "arrays": {
            m.array: {"rule": m.rule, "parts": [list(p) for p in found[m.column].parts] if m.column else []}
            for m in mapping
        },
    }
    if (virtual.describe(source) or {}).get("settings") != settings:
        open_objects(source).delete_prefix("")
    marker = {"kind": "collection", "source": str(files[0].parent.absolute())}
    virtual.write(source, "files", settings, texts, attributes, kind="copy", stage="import", marker=marker)
    return rows


class Files:
    """Reads rows out of files of another format."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._table = FORMATS[settings["kind"]].reader(settings["options"])
        self._files, self._sequence = settings["files"], int(settings["sequence"])
        self._last: dict[str, tuple[FilePart, int, U8]] = {}
        self._rules = {name: entry["rule"] for name, entry in settings["arrays"].items()}
        self._parts = {name: [FilePart(*part) for part in entry["parts"]] for name, entry in settings["arrays"].items()}

    def read(self, name: str, start: int, out: U8) -> None:
        rule, tokens = self._rules[name], self._sequence
        if rule in ("rows", "tokens"):
            self._items(name, start, out, tokens if rule == "tokens" else 1)
            return
        rows = np.arange(start, start + len(out))
        if rule == "document":
            out[:] = (rows // tokens).astype("<u8")[:, None].view(np.uint8)
        elif rule == "position":
            out[:] = (rows % tokens).astype("<u4")[:, None].view(np.uint8)
        else:  # repeated
            first, stop = start // tokens, -(-(start + len(out)) // tokens)
            items = np.empty((stop - first, out.shape[1]), np.uint8)
            self._items(name, first, items, 1)
            np.take(items, rows // tokens - first, axis=0, out=out, mode="clip")

    def _items(self, name: str, start: int, out: U8, tokens: int) -> None:
        """Rows from ``start`` on, of items that hold ``tokens`` rows each."""
        stop, begin = start + len(out), 0
        for part in self._parts[name]:
            end = begin + part.items * tokens
            a, b = max(start, begin), min(stop, end)
            if a < b:
                self._piece(part, a - begin, out[a - start : b - start], tokens)
            begin = end

    def _piece(self, part: FilePart, start: int, out: U8, tokens: int) -> None:
        if tokens == 1 or isinstance(part.at, int):
            self._table.read(part, start, out)  # bytes lie in rows as well as in items
        else:
            at, stop = start, start + len(out)
            while at < stop:
                item, skipped = divmod(at, tokens)
                whole = (stop - at) // tokens if not skipped else 0
                if whole:  # straight to where their rows belong
                    rows = out[at - start : at - start + whole * tokens]
                    self._table.read(part, item, rows.reshape(whole, -1))
                    at += whole * tokens
                    continue
                one = self._one(part, item, tokens * out.shape[1])
                rows = one.reshape(tokens, -1)[skipped : skipped + stop - at]
                out[at - start : at - start + len(rows)] = rows
                at += len(rows)
        if part.swap > 1:
            out.reshape(-1).view(f"u{part.swap}").byteswap(inplace=True)

    def _one(self, part: FilePart, item: int, nbytes: int) -> U8:
        """One item, kept because the next rows that are read often begin in the middle of it."""
        if self._last.get(str(part.at), (None, 0, None))[:2] != (part, item):
            one = np.empty((1, nbytes), np.uint8)
            self._table.read(part, item, one)
            self._last[str(part.at)] = part, item, one
        return self._last[str(part.at)][2]

    def numbers(self, start: int, stop: int) -> U64:
        return np.arange(start, stop, dtype=np.uint64)

    def inventory(self, names: Sequence[str]) -> readers.Backing:
        for path, size, changed in self._files:
            found = Path(path).stat() if Path(path).exists() else None
            if found is None or (found.st_size, found.st_mtime_ns) != (size, changed):
                raise SourceError(f"{path} has changed or gone since it was looked at; run again")
        return readers.Backing(seal([self._files, self._rules, list(names)]), {})


@readers.reader("files")
def open_files(place: Place, settings: dict[str, Any]) -> Files:
    if local_path(place) is None:
        raise FormatError(f"{place} is remote, and does not lead to files here")
    return Files(settings)
