"""`open_interactions`: a finished store of `saetrain interactions`, row by row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from actshuffle.jobs import read_done
from saetrain.errors import DataError
from saetrain.products.layout import FORMAT, HALVES


@dataclass(frozen=True)
class Line:
    """A row of the product, or a column: what is kept of it, and what is known of the rest.

    Attributes
    ----------
    number : of the row or column.
    top_index, top_value : the largest entries, largest first.
    bottom_index, bottom_value : the smallest, smallest first; empty if the store does not keep them.
    energy, sum : over all entries, float64.
    kept : share of the energy that the kept entries hold.
    over : how many entries exceed each threshold in absolute value.
    length : the number of entries.
    """

    number: int
    top_index: np.ndarray
    top_value: np.ndarray
    bottom_index: np.ndarray
    bottom_value: np.ndarray
    energy: float
    sum: float
    kept: float
    over: Mapping[float, int]
    length: int

    @property
    def rest(self) -> tuple[int, float, float]:
        """Of the entries that are not kept: their number, mean, and standard deviation."""
        index = np.concatenate([self.top_index, self.bottom_index])
        value = np.concatenate([self.top_value, self.bottom_value]).astype(np.float64)
        _, first = np.unique(index, return_index=True)
        left = self.length - len(first)
        if not left:
            return 0, 0.0, 0.0
        mean = (self.sum - float(value[first].sum())) / left
        energy = max(self.energy - float(np.square(value[first]).sum()), 0.0) / left
        return left, mean, float(np.sqrt(max(energy - mean**2, 0.0)))


class Lines:
    """The rows, or the columns, of a product: `lines[7]` is a `Line`; `arrays` has the Zarr arrays by name."""

    def __init__(self, group: Any, about: dict[str, Any], name: str, length: int) -> None:
        self.name, self._about, self._length = name, about, length
        self.arrays = {path: member for path, member in group.members(max_depth=None) if isinstance(member, zarr.Array)}

    def __len__(self) -> int:
        return int(self.arrays["energy"].shape[0])

    def __getitem__(self, number: int) -> Line:
        if not -len(self) <= number < len(self):
            raise IndexError(f"{self.name} {number} of {len(self)}")
        number %= len(self)
        found = {name: self._read(name, number) for name in self.arrays}
        empty = np.zeros(0)
        thresholds = self._about["thresholds"]
        return Line(
            number,
            found["top/index"],
            found["top/value"],
            found.get("bottom/index", empty.astype(np.uint32)),
            found.get("bottom/value", empty.astype(np.float32)),
            float(found["energy"]),
            float(found["sum"]),
            float(found["kept"]),
            dict(zip(thresholds, map(int, found.get("over", ())), strict=True)),
            self._length,
        )

    def _read(self, name: str, number: int) -> np.ndarray:
        array = self.arrays[name]
        try:
            rows = np.asarray(array[number])
        except ValueError as error:  # of the checksum
            raise DataError(f"{array.store_path}: the chunk with {self.name} {number} is damaged: {error}") from error
        missing = np.isnan(rows) if rows.dtype.kind == "f" else rows == array.fill_value
        if missing.any():
            raise DataError(f"{array.store_path}: the chunk with {self.name} {number} is missing")
        return rows


class Interactions:
    """A product w = A M B^T of two dictionaries: `rows[i]` and `columns[j]` are its lines.

    `about` says what was multiplied: the paths and digests of `a`, `b` and `through`, `product`, `k`, `thresholds`.
    """

    def __init__(self, path: str | Path) -> None:
        done = read_done(path)
        if done is None or done["name"] != "interactions":
            raise DataError(f"{path} is not a finished store of interactions; the command that made it resumes it")
        group = zarr.open_group(str(path), mode="r")
        self.path = Path(path)
        self.about: dict[str, Any] = dict(group.attrs["saetrain_interactions"])  # type: ignore[arg-type]
        if self.about["format"] != FORMAT:
            raise DataError(f"{path} has format {self.about['format']}; this version reads {FORMAT}")
        self.kept: dict[str, float] = done["found"]["kept"]
        length = {"rows": done["found"]["columns"], "columns": done["found"]["rows"]}
        self.rows, self.columns = (
            Lines(group[name], self.about, name, length[name] - self.about["drop_same"]) for name in HALVES
        )

    def __repr__(self) -> str:
        a, b = (f"{self.about[side]['part']} of {self.about[side]['path']}" for side in "ab")
        shares = " and ".join(f"{self.kept[name]:.1%} of the {name}' energy" for name in HALVES)
        return f"<Interactions {len(self.rows)} x {len(self.columns)}: {a} with {b}; {self.about['k']} kept: {shares}>"


def open_interactions(path: str | Path) -> Interactions:
    """Open a finished store of `interactions`.

    >>> w = open_interactions("out")                            # doctest: +SKIP
    >>> w.rows[5].top_index, w.rows[5].kept                     # doctest: +SKIP
    """
    return Interactions(path)
