"""The notebook display of plans, datasets and reports: a heading, facts, a table.

Plain values go in, one self-contained fragment comes out: no scripts, no fonts, colours that suit light and
dark pages.  All text is escaped, since names and paths come from stores that others made.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from html import escape

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
    """Render a fragment: ``facts`` as name and value, ``rows`` under ``header``; ``verdict`` colours the title.

    ``extra`` is trusted HTML (an image), placed between the two.
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


def image(png: bytes, alt: str) -> str:
    """Render a PNG as an inline image."""
    data = b64encode(png).decode()
    return f'<img alt="{escape(alt)}" style="max-width:100%" src="data:image/png;base64,{data}">'


def _table(rows: Sequence[Sequence[str]], header: Sequence[str] = ()) -> str:
    """Render a table whose cells are HTML already."""
    text = ['<table style="border-collapse:collapse;margin:4px 0">']
    if header:
        cells = "".join(f'<th style="{_CELL};{_RULE}">{h}</th>' for h in header)
        text.append(f"<thead><tr>{cells}</tr></thead>")
    text.append("<tbody>")
    for row in rows:
        cells = "".join(f'<td style="{_CELL}">{cell}</td>' for cell in row)
        text.append(f"<tr>{cells}</tr>")
    return "".join([*text, "</tbody></table>"])
