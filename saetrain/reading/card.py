"""A latent as a card in a notebook: self-contained HTML, with every text escaped."""

from __future__ import annotations

from html import escape
from typing import Any

from actshuffle.units import counted

SHOWN = 8  # examples


def card(feature: Any) -> str:
    """Numbers, histogram, tokens and the top examples of a `saetrain.reading.latents.Feature`."""
    if feature.is_dead:
        return f"<div><b>latent {feature.index:,}</b>: dead on {counted(feature.features.rows, 'row')}</div>"
    value, low, high = feature.density
    facts = (
        f"active on {counted(feature.count, 'row')} ({value:.3g}, 95% {low:.3g} to {high:.3g}) in "
        f"{counted(feature.documents, 'document')}; mean {feature.mean:.4g}, max {feature.max:.4g}"
    )
    tokens = " ".join(
        f"<code>{escape(token.text if token.text is not None else str(token.id))}</code>&nbsp;{token.times:,}"
        for token in feature.top_tokens[:SHOWN]
    )
    lines = "".join(f"<div>{_example(example, feature.max)}</div>" for example in feature.top(SHOWN))
    return (
        f"<div style='font-family:sans-serif'><b>latent {feature.index:,}</b>: {facts}"
        f"{_bars(feature.histogram.counts)}<div>{tokens}</div>{lines}</div>"
    )


def _bars(counts: Any) -> str:
    most, width = max(int(counts.max()), 1), 4
    heights = [(i * width, 40 * int(n) / most) for i, n in enumerate(counts) if n]
    bars = "".join(
        f"<rect x='{x}' y='{40 - height:.1f}' width='{width - 1}' height='{height:.1f}'/>" for x, height in heights
    )
    return f"<div><svg width='{width * len(counts)}' height='40' fill='#c60'>{bars}</svg></div>"


def _example(example: Any, most: float) -> str:
    pieces = example.text or tuple(f" {token}" for token in example.tokens)
    shown = "".join(
        f"<span style='background:rgba(255,140,0,{min(float(a) / most, 1):.2f})'>{escape(piece)}</span>"
        for piece, a in zip(pieces, example.activations, strict=bool(pieces))
    )
    return f"<small>{example.value:.4g}</small> {shown}"
