"""Activations of a language model as a virtual source: rows are tokens, computed when they are read.

Tokens lie on disk, cut into *windows* of consecutive tokens of one document; consecutive windows form
*groups* of some thousand tokens.  Inside a group, windows of equal length run together, as many as a batch
takes, so nothing is ever padded::

    rows      |-- document 0 --------------------|-- document 1 ------|- doc. 2 -|
    windows   |-------|-------|-------|-------|--|-------|-------|----|-------|--|
    groups    |---------- group 0 ------------|------------- group 1 ------------|

Which windows share a batch follows from the text alone, so a row's value does not depend on how the work
was divided, or resumed.  (It does depend on machine, library versions, and number of threads.)

A window counts the tokens that it reads.  Where some of these have no row, `kept` lists those that have one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from actshuffle.arrays import readers
from actshuffle.arraytypes import I64, U8, U64
from actshuffle.building.models import model_of
from actshuffle.building.tokens import COLUMNS, KEPT, READ, Pieces
from actshuffle.progress import done_within
from actshuffle.seals import seal
from actshuffle.storage.objects import open_objects
from actshuffle.storage.place import Place

READER = "model"  # the name of this reader in virtual.json


@readers.reader(READER)
class Activations:
    """Reads tokens from disk, and activations out of the model, which runs when the first array is read."""

    def __init__(self, place: Place, settings: dict[str, Any]) -> None:
        objects = open_objects(place)
        self._settings = settings
        self._columns = {name: Pieces(objects, name, dtype) for name, dtype in COLUMNS.items()}
        self._drops = bool(settings.get("drops"))
        self._read = Pieces(objects, READ, "<i4") if self._drops else self._columns["token"]
        self._kept = Pieces(objects, KEPT, "<u8")
        self._windows = Pieces(objects, "windows", "<u8")
        count = int(settings["groups"]) + 1
        self._first_window = Pieces(objects, "groups", "<u8").get(0, count).astype(np.int64)
        self._first_row = Pieces(objects, "group_rows", "<u8").get(0, count).astype(np.int64)
        self._widths: dict[str, int] = settings["row_bytes"]
        self._range: tuple[int, int] = (0, 0)
        self._held: dict[str, U8] = {}

    def read(self, name: str, start: int, out: U8) -> None:
        stop = start + len(out)
        if name in self._columns:
            out[:] = self._columns[name].get(start, stop)[:, None].view(np.uint8)
            return
        if self._range != (start, stop) or name not in self._held:
            self._held = {other: np.empty((len(out), w), np.uint8) for other, w in self._widths.items()}
            self._range = start, stop
            self._compute(start, stop, {**self._held, name: out})
        else:
            out[:] = self._held[name]
        self._held.pop(name, None)

    def numbers(self, start: int, stop: int) -> U64:
        return np.arange(start, stop, dtype=np.uint64)

    def inventory(self, names: Sequence[str]) -> readers.Backing:
        return readers.Backing(seal([self._settings, list(names)]), {})

    def _compute(self, start: int, stop: int, out: Mapping[str, U8]) -> None:
        """Rows ``[start, stop)`` of all activations, by running every batch that has one of them."""
        settings = self._settings
        model = model_of(settings["run"])
        special = settings["special"] == "drop"  # kept ones are among the tokens already
        before = [*settings.get("lead", []), *(settings["prefix"] if special else [])]
        after = settings["suffix"] if special else []
        places = self._kept.get(start, stop).astype(np.int64) if self._drops else np.arange(start, stop)
        for windows in self._batches(start, stop, places, len(before) + len(after)):
            first, end = int(windows[0, 0]), int(windows[:, 1].max())
            tokens = self._read.get(first, end).astype(np.int64)
            rows = np.stack([tokens[a - first : b - first] for a, b in windows])
            ends = [np.tile(np.array(ids, np.int64), (len(rows), 1)) for ids in (before, after)]
            edges = np.searchsorted(places, windows)
            for name, found in model(np.concatenate([ends[0], rows, ends[1]], axis=1)).items():
                inner = found[:, len(before) : len(before) + rows.shape[1]]
                for (a, _), (low, high), values in zip(windows, edges, inner, strict=True):
                    out[name][low:high] = values[places[low:high] - a]
            done_within(int((edges[:, 1] - edges[:, 0]).sum()))

    def _batches(self, start: int, stop: int, places: I64, around: int) -> Iterator[I64]:
        """Token ranges of windows that run together, int64 ``(windows, 2)``: those that meet the rows.

        ``places`` are the tokens of rows ``[start, stop)``; each window reads ``around`` tokens beside its range.
        """
        most = int(self._settings["batch_tokens"])
        low = int(np.searchsorted(self._first_row, start, side="right")) - 1
        high = int(np.searchsorted(self._first_row, stop))
        for group in range(low, high):
            edges = self._windows.get(self._first_window[group], self._first_window[group + 1] + 1)
            ranges = np.stack([edges[:-1], edges[1:]], axis=1).astype(np.int64)
            lengths = ranges[:, 1] - ranges[:, 0]
            order = np.argsort(lengths, kind="stable")
            for alike in np.split(order, np.flatnonzero(np.diff(lengths[order])) + 1):
                count = max(1, most // int(lengths[alike[0]] + around))
                for at in range(0, len(alike), count):
                    batch = ranges[alike[at : at + count]]
                    if np.diff(np.searchsorted(places, batch)).any():
                        yield batch
