"""The lines that a run prints for people."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from actshuffle.units import counted
from saetrain.config import Config
from saetrain.data import HEAVY_SHARE, Source, target_of


def opening(source: Source, runs: Mapping[Path, Config], at: int) -> str:
    """The first line for people: what is trained on what."""
    config = next(iter(runs.values()))
    what = f"{config.arch} of {counted(config.d_sae, 'latent')}" if len(runs) == 1 else f"{len(runs)} autoencoders"
    left = (
        f"{counted(config.steps - at, 'step')}"
        if not at
        else f"{config.steps - at:,} of {counted(config.steps, 'step')}"
    )
    to = f" to {target}" if (target := target_of(source)) else ""
    return (
        f"training {what} on {counted(source.rows - config.holdout, 'row')} of {source.name} ({source.field}{to}, "
        f"{source.d_in:,} wide): {left} of {counted(config.batch_size, 'row')}"
    )


def brief(run: Path, line: dict[str, Any], steps: int, left: float) -> str:
    """One line for people; `left` is in seconds."""
    text = f"{run.name} {line['step']:,}/{steps:,}  loss {line['loss']:.4g}  l0 {line['l0']:.1f}"
    if "eval_fvu" not in line:
        text += f"  dead {line['dead']:.1%}"
    else:
        text += f"  dead {line['eval_dead']:.1%} (of {counted(line['eval_rows'], 'held-out row')})"
        text += f"  held-out fvu {line['eval_fvu']:.4f}"
        if "eval_fvu_high" in line:
            text += f" +- {line['eval_fvu_high'] - line['eval_fvu']:.4f}"
        else:
            text += " (of one document, which gives no interval)"
        if line["eval_heavy_share"] >= HEAVY_SHARE:
            text += f"  (median row {line['eval_fvu_median']:.4f}: {line['eval_heavy_rows']:,} of {line['eval_rows']:,}"
            text += f" rows hold {line['eval_heavy_share']:.1%} of the squared norm)"
    text += f"  {line['tokens_per_s']:,.0f} tokens/s" if "tokens_per_s" in line else ""
    if line["step"] < steps:
        text += f"  {left:.0f} s left" if left < 100 else f"  {left / 60:.0f} min left"
    return text
