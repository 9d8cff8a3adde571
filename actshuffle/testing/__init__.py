"""Test helpers for code that builds on actshuffle: stores that fail on purpose, small stores, and an oracle.

`Faults` makes operations of this process fail on schedule (faults.py), `simulate` runs whole stories of
failures and recoveries from one seed (stories.py), `differences` compares an output with its source
(oracle.py).
"""

from actshuffle.testing.faults import (
    DEADLY,
    HONEST,
    KINDS,
    Faults,
    Killed,
    Operation,
    at,
    drawn,
    matching,
    open_objects,
)
from actshuffle.testing.oracle import differences, leftovers
from actshuffle.testing.stories import SimulationError, Story, plans, run, simulate, stores

__all__ = [
    "DEADLY",
    "HONEST",
    "KINDS",
    "Faults",
    "Killed",
    "Operation",
    "SimulationError",
    "Story",
    "at",
    "differences",
    "drawn",
    "leftovers",
    "matching",
    "open_objects",
    "plans",
    "run",
    "simulate",
    "stores",
]
