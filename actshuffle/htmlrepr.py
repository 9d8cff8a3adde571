"""How plans, datasets and reports show themselves in a notebook: a heading, facts, a table.

Plain values in, one self-contained fragment out: no scripts, no fonts, colours that suit light and
dark pages.  All text is escaped, since names and paths come from stores that others made.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

from actshuffle.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from actshuffle.mixing import MixingReport
    from actshuffle.types import Plan
    from actshuffle.verify import VerifyReport

_CELL = "padding:2px 12px 2px 0;text-align:left;vertical-align:top"
_RULE = "border-bottom:1px solid rgba(128,128,128,.4)"


def page(
    title: str,
    facts: Mapping[str, object],
    header: Sequence[str] = (),
    rows: Iterable[Sequence[object]] = (),
    *,
    verdict: bool | None = None,
    extra: str = "",
) -> str:
    """A fragment: ``facts`` as name and value, ``rows`` under ``header``; ``verdict`` colours the title.

    ``extra`` is HTML of our own (an image), put between the two.
    """
    colour = {None: "", True: "color:#1a7f37", False: "color:#cf222e"}[verdict]
    parts = [
        '<div style="font-family:sans-serif;font-size:13px;line-height:1.45;max-width:60em">',
        f'<div style="font-weight:600;font-size:14px;margin-bottom:4px;{colour}">{escape(title)}</div>',
    ]
    if facts:
        parts.append(_table([(f"<b>{escape(str(k))}</b>", escape(str(v))) for k, v in facts.items()]))
    parts.append(extra)
    body = [tuple(escape(str(cell)) for cell in row) for row in rows]
    if header and body:
        parts.append(_table(body, tuple(escape(h) for h in header)))
    return "".join([*parts, "</div>"])


def plan(made: Plan) -> str:
    """A plan: what it reads, writes and needs."""
    facts = {
        "data": f"{made.rows:,} rows x {format_bytes(made.row_bytes)} = {format_bytes(made.rows * made.row_bytes)}",
        "levels": made.levels,
        "blocks": f"M = {format_bytes(made.block_bytes)}, runs P >= {format_bytes(made.run_bytes)}",
        "leaves": f"{made.leaves:,} of {made.leaf_rows:,} rows",
        "memory": f"{format_bytes(made.memory)} per worker at most",
        "disk": f"scratch up to {format_bytes(made.scratch_bytes)}, with the output up to "
        f"{format_bytes(made.disk_bytes)}",
    }
    rows = []
    for level in range(1, made.levels + 1):
        read, written = made.level_bytes(level)
        work = "split" if level < made.levels else "sort"
        rows.append((level, work, f"{made.task_count(level):,}", format_bytes(read), format_bytes(written)))
    return page("Shuffle plan", facts, ("level", "work", "tasks", "reads", "writes"), rows)


def verify(report: VerifyReport) -> str:
    """The verdict on a shuffled store, and what is wrong with it."""
    verdict = "verified: dst is src in the order of its seed" if report.ok else "NOT verified"
    facts: dict[str, object] = {
        "rows": f"{report.checked:,} of {report.rows:,} looked at",
        "took": f"{format_bytes(report.nbytes)} in {format_seconds(report.seconds)}",
    }
    facts |= {f"note {i}": note for i, note in enumerate(report.notes, 1)}
    rows = [(p.kind, p.where, p.detail) for p in report.problems[:100]]
    whole = page(verdict, facts, ("problem", "where", "what"), rows, verdict=report.ok)
    return whole if report.mixing is None else whole + mixing(report.mixing)


def mixing(report: MixingReport, title: str = "Mixing") -> str:
    """The tests of one order, the worst first."""
    facts = {
        "rows": f"{report.rows:,}",
        "tests": f"{len(report.rejected)} of {len(report.tests)} reject at p <= {report.level:.2g}",
    }
    facts |= {name: f"not applicable: {why}" for name, why in report.skipped.items()}
    rows = []
    for t in sorted(report.tests, key=lambda t: t.p_value):
        flag = t.direction.upper() if t.rejects(report.level) else ""
        values = f"{t.statistic:.6g}", f"{t.expected:.6g}", f"{t.p_value:.2g}"
        rows.append((t.name, t.detail, *values, flag))
    header = ("test", "at", "observed", "expected", "p-value", "")
    return page(title, facts, header, rows, verdict=report.passed)


def image(png: bytes, alt: str) -> str:
    """An inline picture."""
    from base64 import b64encode

    data = b64encode(png).decode()
    return f'<img alt="{escape(alt)}" style="max-width:100%" src="data:image/png;base64,{data}">'


def _table(rows: Sequence[Sequence[str]], header: Sequence[str] = ()) -> str:
    """Cells are HTML already."""
    text = ['<table style="border-collapse:collapse;margin:4px 0">']
    if header:
        cells = "".join(f'<th style="{_CELL};{_RULE}">{h}</th>' for h in header)
        text.append(f"<thead><tr>{cells}</tr></thead>")
    text.append("<tbody>")
    for row in rows:
        cells = "".join(f'<td style="{_CELL}">{cell}</td>' for cell in row)
        text.append(f"<tr>{cells}</tr>")
    return "".join([*text, "</tbody></table>"])
