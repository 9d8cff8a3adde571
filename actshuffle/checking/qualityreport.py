"""The report of `actshuffle.quality`: values, text, and a page for notebooks."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from actshuffle.html import page
from actshuffle.ordering.mixing import MixingReport, as_html
from actshuffle.units import counted


@dataclass(frozen=True)
class Measure:
    """One quantity of a batch, averaged over batches, against a uniform shuffle."""

    name: str
    found: float
    expected: float
    sd: float  # of the average
    p_value: float  # two-sided
    direction: str

    @property
    def sigmas(self) -> float:
        off = self.found - self.expected
        if not off:
            return 0.0
        return off / self.sd if self.sd else math.copysign(math.inf, off)


@dataclass(frozen=True)
class QualityReport:
    """How the batches of something compare with those of a uniform shuffle."""

    what: str
    rows: int
    batch_size: int
    batches: int  # that were scored
    grouping: str  # what "document" means here
    documents: int
    measures: tuple[Measure, ...]
    mixing: MixingReport | None
    provenance: str
    alpha: float
    notes: tuple[str, ...] = ()

    @property
    def rejected(self) -> tuple[Measure, ...]:
        return tuple(m for m in self.measures if m.p_value <= self.alpha / len(self.measures))

    @property
    def passed(self) -> bool:
        """Whether nothing tells these batches from those of a uniform shuffle."""
        return not self.rejected and (self.mixing is None or self.mixing.passed)

    @property
    def coverage(self) -> float:
        """Documents in a batch, as a share of what a uniform shuffle has; 1 is right, over 1 no better."""
        first = self.measures[0]
        return first.found / first.expected if first.expected else 1.0

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            **{k: v for k, v in vars(self).items() if k not in ("measures", "mixing")},
            "passed": self.passed,
            "coverage": self.coverage,
            "notes": list(self.notes),
            "measures": [asdict(m) | {"sigmas": m.sigmas if math.isfinite(m.sigmas) else None} for m in self.measures],
            "mixing": self.mixing and self.mixing.as_dict(),
        }

    def _rows(self) -> list[tuple[str, str, str, str, str]]:
        bad, rows = set(self.rejected), []
        for m in self.measures:
            values = f"{m.found:.5g}", f"{m.expected:.5g}", f"{m.sigmas:+.1f}"
            rows.append((m.name, *values, m.direction.upper() if m in bad else ""))
        return rows

    def verdict(self) -> str:
        if self.passed:
            return "pass: nothing tells these batches from those of a uniform shuffle"
        if self.measures[0] in self.rejected:
            share = f"{self.coverage:.1%}"
            return f"FAIL: a batch holds {share} of the documents that one of a uniform shuffle does"
        wrong = "; ".join(f"{m.name}: {m.direction}" for m in self.rejected)
        return f"FAIL: {wrong or 'the order is not that of a uniform shuffle'}"

    def __str__(self) -> str:
        lines = [
            f"{self.what}: {counted(self.rows, 'row')} in batches of {self.batch_size:,}; {self.batches:,} scored, "
            f"by {self.grouping} ({self.documents:,})",
            f"{'in a batch':34}{'found':>12}{'shuffle':>12}{'sigmas':>10}",
        ]
        lines += [f"{n:34}{f:>12}{e:>12}{s:>10}  {d}".rstrip() for n, f, e, s, d in self._rows()]
        if self.mixing is not None:
            lines += ["", f"the order, by {self.provenance}:", self.mixing.table(), ""]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join([*lines, self.verdict()])

    def _repr_html_(self) -> str:
        facts = {
            "of": self.what,
            "rows": f"{self.rows:,}",
            "batches": f"{self.batches:,} of {counted(self.batch_size, 'row')} scored",
            "by": f"{self.grouping} ({self.documents:,})",
            "verdict": self.verdict(),
        }
        header = ("in a batch", "found", "uniform shuffle", "sigmas", "")
        whole = page("Mixing quality", facts, header, self._rows(), verdict=self.passed)
        if self.mixing is None:
            return whole
        return whole + as_html(self.mixing, f"Order, by {self.provenance}")
