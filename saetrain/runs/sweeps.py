"""The members of a sweep: lists of values for some settings become a run for each combination of them.

All members read the same batches, so settings that decide what is read, or when all save, have one value.  Where the
seeds differ, later epochs have the order of the first seed: a member is the run that its own config.json starts alone,
to the bit.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from saetrain.config import Config
from saetrain.errors import ConfigError
from saetrain.training.members import SHARED

SWEPT = tuple(field.name for field in fields(Config) if field.name not in SHARED)  # in which members may differ


def combinations(base: Mapping[str, Any], lists: Mapping[str, Sequence[tuple[str, Any]]]) -> dict[str, Config]:
    """Name and settings of each member: `base` for all, and the product of the lists of values, each with its text."""
    if not lists:
        raise ConfigError("a sweep needs a list, as in --k 16,32")
    if alone := [name for name in lists if name not in SWEPT]:
        flag = f"--{alone[0].replace('_', '-')}"
        raise ConfigError(f"{flag} has one value for all runs of a sweep, which read the same batches together")
    shared = dict(base)
    if "seed" in lists:
        shared.setdefault("order_seed", lists["seed"][0][1])
    found: dict[str, Config] = {}
    for choice in itertools.product(*lists.values()):
        name = "-".join(f"{n}={_safe(text)}" for n, (text, _) in zip(lists, choice, strict=True))
        if name in found:
            raise ConfigError(f"the list of a sweep gives {name} twice")
        found[name] = Config(**{**shared, **{n: value for n, (_, value) in zip(lists, choice, strict=True)}})
    return found


def with_texts(lists: Mapping[str, Sequence[Any]]) -> dict[str, list[tuple[str, Any]]]:
    """The values of a sweep, each with its text."""
    for name, values in lists.items():
        if isinstance(values, str) or not isinstance(values, Sequence) or not values:
            raise ConfigError(f"a sweep over {name} needs a list of values, got {values!r}")
    found = {n: [tuple(v) if isinstance(v, list) else v for v in values] for n, values in lists.items()}
    return {n: [(str(value).strip("()"), value) for value in values] for n, values in found.items()}


def _safe(text: str) -> str:
    """The text as a part of the name of a folder."""
    return re.sub(r"[^\w.,+-]+", "_", text).strip("_")
