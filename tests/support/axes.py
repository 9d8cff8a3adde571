"""Combinations of parameters: half of them always, all of them in the soak."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import pytest


def halved(*axes: Iterable[Any]) -> list[Any]:
    """All combinations of the values of some axes, the half whose positions have an odd sum for the soak only.

    What runs always holds, whichever axis is left out (one of two or more values), every combination of the others:
    each value of two axes, and each pair of values of three.
    """
    return [
        pytest.param(
            *(value for _, value in combination), marks=[pytest.mark.soak] * (sum(n for n, _ in combination) % 2)
        )
        for combination in itertools.product(*(list(enumerate(axis)) for axis in axes))
    ]
