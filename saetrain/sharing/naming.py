"""What a result is called elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Names:
    """The model, its layer, the set of dictionaries, and the data; all plain values.

    Neuronpedia calls a dictionary by its source, LAYER-SET, or LAYER-SET__SUFFIX.
    """

    model: str
    layer: int
    set: str
    suffix: str = ""
    hook: str = "hook_resid_post"
    dataset: str = ""
    creator: str = ""

    @property
    def source(self) -> str:
        return f"{self.layer}-{self.set}" + (f"__{self.suffix}" if self.suffix else "")

    @property
    def hook_name(self) -> str:
        return f"blocks.{self.layer}.{self.hook}"


def window_of(facts: dict[str, Any]) -> int:
    """Tokens of an example with its surroundings."""
    return int(facts["before"]) + 1 + int(facts["after"])
