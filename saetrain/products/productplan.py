"""The frozen plan of an interactions job: what is multiplied, how it is cut, and what that costs.

::

    B:         panel 0    panel 1   ...
    A: panel 0  task 0     task 1        One task per pair of panels: A's panel stays in memory, B's rows stream past.
       panel 1  task 2     ...           Each keeps the k best of its rows and of its columns, which `merge` tasks join:
                                         bytes on disk grow with the number of panels of the other side.

Of all this only the cut may change without changing a byte of the arrays: panels are multiples of tiles.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from actshuffle.units import counted
from saetrain.compute.devices import settled
from saetrain.errors import ConfigError
from saetrain.products.energy import GRAM_ROWS
from saetrain.products.matrices import Side, as_side
from saetrain.products.tiles import COLUMNS, ROWS, Kept, add_tile

LARGEST_PANEL = 65_536  # rows by default: a task takes minutes rather than hours
CHUNK_ROWS = 16_384  # rows of a chunk of the store, and of a merge
FIXED = 16 << 20  # bytes of a task whatever its size: buffers of objects, and what the allocator keeps
ENTRY = 12  # bytes of a kept entry: value float32, index int64


class Sizes(NamedTuple):
    """What a run costs: bytes, and operations of multiply-adds counted as two."""

    tasks: int
    memory: int  # of one task
    read: int
    scratch: int
    store: int
    operations: int


@dataclass(frozen=True)
class ProductPlan:
    """w = A M B^T, or A B^T without M (`through`); see the module's docstring.

    Attributes
    ----------
    k : entries kept of each row and column, among the largest and, with `smallest`, among the smallest.
    thresholds : entries whose size exceeds each are counted.
    drop_same : leave out entries whose row and column have the same number.
    panel : rows of A, and of B, in one task; a multiple of COLUMNS.
    chunk, gram_rows : rows of a chunk of the store and of a merge, and of one Gram matrix before they are added;
        multiples of COLUMNS.
    """

    a: Side
    b: Side
    through: Side | None
    k: int
    smallest: bool
    thresholds: tuple[float, ...]
    drop_same: bool
    panel: int
    device: str
    chunk: int = CHUNK_ROWS
    gram_rows: int = GRAM_ROWS

    def settings(self) -> dict[str, Any]:
        through = self.through.settings() if self.through else None
        return {
            "a": self.a.settings(),
            "b": self.b.settings(),
            "through": through,
            "k": self.k,
            "smallest": self.smallest,
            "thresholds": list(self.thresholds),
            "drop_same": self.drop_same,
            "panel": self.panel,
            "device": self.device,
            "chunk": self.chunk,
            "gram_rows": self.gram_rows,
        }

    @property
    def shape(self) -> tuple[int, int]:
        return self.a.rows, self.b.rows

    @property
    def panels(self) -> tuple[int, int]:
        return -(-self.a.rows // self.panel), -(-self.b.rows // self.panel)

    @property
    def chunks(self) -> tuple[int, int]:
        return -(-self.a.rows // self.chunk), -(-self.b.rows // self.chunk)

    @property
    def grams(self) -> tuple[int, int]:
        return -(-self.a.rows // self.gram_rows), -(-self.b.rows // self.gram_rows)

    def k_of(self, half: int) -> int:
        """Entries kept of a row (half 0) or of a column (half 1)."""
        return min(self.k, self.shape[1 - half] - self.drop_same)

    def sizes(self) -> Sizes:
        (n, m), (down, across), d = self.shape, self.panels, self.a.width
        tables, over = 1 + self.smallest, 8 * len(self.thresholds)
        row, column = (tables * self.k_of(half) * ENTRY + over for half in (0, 1))
        kept = min(self.panel, n) * row + min(self.panel, m) * column
        mapping = 0 if self.through is None else 4 * self.b.width * (d + COLUMNS)
        tile = 12 * COLUMNS * d + 24 * ROWS * COLUMNS + 2 * ENTRY * COLUMNS * (self.k + ROWS)
        # A row table is copied once on its way into an object.
        panel = 4 * min(self.panel, n) * d + 2 * kept + tile + mapping
        gram = 3 * 8 * d * d + 24 * COLUMNS * d + mapping
        merge = min(self.chunk, max(n, m)) * 6 * max(row, column) + 8 * d * d + 24 * COLUMNS * d + mapping
        memory = FIXED + max(panel, gram, merge) + self.a.resident + self.b.resident
        reads = 4 * (n * d + m * self.b.width)
        return Sizes(
            tasks=sum(self.grams) + 2 + down * across + sum(self.chunks),
            memory=memory,
            read=4 * (n * d * across + m * self.b.width * down) + 2 * reads,
            scratch=n * row * across + m * column * down + 8 * d * (d + 1) * (sum(self.grams) + 2),
            store=sum(size * (tables * self.k_of(half) * 8 + over + 24) for half, size in enumerate(self.shape)),
            operations=2 * n * m * d
            + 2 * (n + m) * d * d
            + (0 if self.through is None else 2 * m * d * self.b.width * down),
        )

    def seconds(self) -> float:
        """Time of one worker that only computes, from one tile timed on this machine."""
        d = self.a.width
        panel = torch.randn(4 * ROWS, d, device=self.device)
        tile = torch.randn(COLUMNS, d, device=self.device)
        rows, columns = (
            Kept.empty(size, self.k, self.smallest, len(self.thresholds), self.device) for size in (4 * ROWS, COLUMNS)
        )
        took = math.inf
        for number in range(4):  # the first fills the tables
            start = time.perf_counter()
            add_tile(rows, panel, 0, columns, tile, number * COLUMNS, 0, self.thresholds, False)
            float(rows.top.value[0, 0])  # waits for a GPU
            took = min(took, time.perf_counter() - start)
        return took * math.ceil(self.shape[0] / (4 * ROWS)) * math.ceil(self.shape[1] / COLUMNS)


def as_plan(settings: dict[str, Any]) -> ProductPlan:
    through = settings["through"]
    between = None if through is None else as_side(through)
    sides = {"a": as_side(settings["a"]), "b": as_side(settings["b"]), "through": between}
    return ProductPlan(**{**settings, **sides, "thresholds": tuple(settings["thresholds"])})


def make_plan(
    a: Side,
    b: Side,
    *,
    through: Side | None = None,
    k: int = 32,
    smallest: bool = True,
    thresholds: tuple[float, ...] = (),
    drop_same: bool = False,
    memory: int = 1 << 30,
    panel: int | None = None,
    device: str = "cpu",
) -> ProductPlan:
    """The plan with the largest panels that fit `memory` bytes, at most LARGEST_PANEL rows; or a refusal."""
    _check_shapes(a, b, through)
    if k < 1:
        raise ConfigError(f"k must be 1 or more, got {k}")
    if bad := [t for t in thresholds if not 0 < t < math.inf]:
        raise ConfigError(f"thresholds must be positive numbers, got {bad[0]}")
    if drop_same and (a.rows != b.rows or min(a.rows, b.rows) < 2):
        raise ConfigError(f"only a square product of 2 rows or more can drop its diagonal; this is {a.rows} x {b.rows}")
    device = settled(device)
    most = -(-max(a.rows, b.rows) // COLUMNS) * COLUMNS
    if panel is not None and (panel < 1 or panel % COLUMNS):
        raise ConfigError(f"panel must be a multiple of {COLUMNS} rows, got {panel}")

    def plan(rows: int) -> ProductPlan:
        return ProductPlan(a, b, through, k, smallest, tuple(thresholds), drop_same, min(rows, most), device)

    rows = panel or min(LARGEST_PANEL, most)
    while panel is None and rows > COLUMNS and plan(rows).sizes().memory > memory:
        rows = max(COLUMNS, rows // 2 // COLUMNS * COLUMNS)
    if (needed := plan(rows).sizes().memory) > memory:
        raise ConfigError(
            f"a task on panels of {counted(plan(rows).panel, 'row')} of width {a.width} with k {k} needs "
            f"{counted(needed, 'byte')}; "
            f"memory allows {memory:,}: give --memory {needed} or more, or a smaller "
            + ("--k" if plan(rows).panel == COLUMNS else "--panel")
        )
    return plan(rows)


def _check_shapes(a: Side, b: Side, through: Side | None) -> None:
    if max(a.rows, b.rows) >= 1 << 32:
        raise ConfigError(f"a side holds at most {(1 << 32) - 1} rows; these have {a.rows} and {b.rows}")
    if through is None and a.width != b.width:
        raise ConfigError(
            f"rows of {a.path} have width {a.width}, rows of {b.path} {b.width}; "
            f"a matrix [{a.width}, {b.width}] (--through) would join them"
        )
    if through is not None and (through.rows, through.width) != (a.width, b.width):
        raise ConfigError(
            f"{through.path} has shape [{through.rows}, {through.width}]; "
            f"between these sides it must be [{a.width}, {b.width}]"
        )
