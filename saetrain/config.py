"""`Config`: settings checked against the table of variants, and `resolve`, which makes every choice left open."""

from __future__ import annotations

import ast
import inspect
import textwrap
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import Any, get_type_hints

from actshuffle.units import counted
from saetrain.errors import ConfigError
from saetrain.settings import Settings, split_names
from saetrain.variants.table import VARIANTS


@dataclass(frozen=True)
class Config(Settings):
    """The settings of a run; saetrain/settings.py describes each."""

    def __post_init__(self) -> None:
        if self.arch not in VARIANTS:
            raise ConfigError(f"--arch must be one of {', '.join(VARIANTS)}, got {self.arch!r}")
        super().__post_init__()

    @property
    def is_sparse(self) -> bool:
        """True if the variant activates k latents per token, exactly or on average."""
        return VARIANTS[self.arch].takes_k


def resolve(config: Config, d_in: int, rows: int, *, heldout: bool = False) -> Config:
    """The same settings with every choice made, from the width and the number of rows alone.

    With `heldout`, another store is evaluated on, so no row need be left out of training.
    """
    c, variant = config, VARIANTS[config.arch]
    holdout = c.holdout or (0 if heldout else min(rows // 20, 16_384))
    train_rows = rows - holdout
    power = 1 << max(train_rows // 2000, 1).bit_length() - 1
    batch = c.batch_size or min(max(power, 256), 4096, max(train_rows, 1))
    one_pass = train_rows // batch
    if one_pass < 1:
        raise ConfigError(f"{counted(rows, 'row')} less {holdout:,} held out do not fill one batch of {batch:,}")
    steps = c.steps or max(one_pass, min(2000, 20 * one_pass))
    width = d_in // max(len(split_names(c.field)), 1)  # of one of the arrays that go in
    d_sae = c.d_sae or 16 * width
    widths = variant.nested_widths(c.widths, d_sae)
    if variant.takes_k and c.k > d_sae:
        raise ConfigError(f"--k {c.k} is more than --d-sae {d_sae}")
    # Gao et al.'s rate is for long runs.  Shorter ones need more, as 1 / sqrt(steps): the theory of rates that
    # fall at the end says so (Defazio et al. 2023, arXiv 2310.07831), and so do our runs (docs/training.md).
    hurry = min(max((20_000 / steps) ** 0.5, 1.0), variant.most_hurry)
    return replace(
        c,
        d_sae=d_sae,
        widths=widths,
        holdout=holdout,
        batch_size=batch,
        steps=steps,
        sparsity=c.sparsity if c.sparsity >= 0 else variant.default_sparsity(d_in),
        sparsity_warmup=c.sparsity_warmup if c.sparsity_warmup >= 0 else variant.default_sparsity_warmup,
        aux_k=c.aux_k or max(width // 2, 1),
        dead_tokens=c.dead_tokens or max(min(10_000_000, steps * batch // 10), 20 * batch),
        threshold_rate=c.threshold_rate or min(max(0.01, 20 / steps), 1.0),
        order_seed=c.seed if c.order_seed < 0 else c.order_seed,
        lr=c.lr or min(2e-4 * (2**14 / d_sae) ** 0.5 * hurry, 0.016),
        eval_every=c.eval_every or max(steps // 10, 1),
        checkpoint_every=c.checkpoint_every or min(max(steps // 10, 1), 1000),
    )


@cache
def field_help() -> dict[str, str]:
    """The string under each field of `Settings`, by name."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(Settings))).body[0]
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for first, second in pairwise(tree.body):
        if isinstance(first, ast.AnnAssign) and isinstance(second, ast.Expr):
            text = " ".join(str(ast.literal_eval(second.value)).split())
            found[ast.unparse(first.target)] = text.replace("{variants}", ", ".join(VARIANTS))
    return found


def parse_field(name: str, text: str) -> Any:
    """A setting from its text on the command line."""
    kind = get_type_hints(Config)[name]
    try:
        if kind in (int, float):
            return _integer(text) if kind is int else kind(text)
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        if name == "widths":
            return tuple(int(part) for part in text.split(",") if part)
    except (ValueError, KeyError) as error:
        due = {int: "an integer", float: "a number", bool: "true or false"}.get(kind, "integers like 64,256")
        raise ConfigError(f"--{name.replace('_', '-')} must be {due}, got {text!r}") from error
    return text


def _integer(text: str) -> int:
    """An integer, also in the form 1e6; all digits of a long one count."""
    try:
        return int(text)
    except ValueError:
        if not float(text).is_integer():
            raise
        return int(float(text))
