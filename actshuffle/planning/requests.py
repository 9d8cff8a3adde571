"""About how many requests to object stores a run of a plan sends, by the arithmetic of `actshuffle.planning.stages`."""

from __future__ import annotations

import math

from actshuffle.limits import STORE_PIECE
from actshuffle.planning.cost import Cluster
from actshuffle.planning.stages import stages
from actshuffle.planning.tree import Plan

AROUND = 25  # requests of each kind before the first task and after the last one: metadata, claim, records, marker


def requests(plan: Plan, *, source: bool, output: bool) -> dict[str, int]:
    """Requests by kind, "get" and "put"; listings and deletions, a thousand objects each, are left out.

    ``source`` and ``output`` say which of them are in object stores; the spill is beside the output.
    """
    gets = puts = 0.0
    for stage in stages(plan, Cluster()):  # on which everything lies in an object store
        of_source = stage.read / STORE_PIECE if stage.name == "level 1" else 0.0
        gets += (stage.gets - of_source) * output + math.ceil(of_source) * source
        puts += stage.puts * output
    around = {"get": AROUND * (source or output), "put": AROUND * output}
    return {"get": math.ceil(gets) + around["get"], "put": math.ceil(puts) + around["put"]}
