"""What a result is called elsewhere."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from saetrain.errors import ConfigError


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

    def __post_init__(self) -> None:
        """Raises `ConfigError` for a name that cannot be part of a file's path."""
        for what, name in (("model", self.model), ("set", self.set), ("suffix", self.suffix)):
            if re.search(r"[/\\\0]", name) or name in (".", ".."):
                raise ConfigError(f"the name of the {what} becomes part of a path, and {name!r} cannot be one")

    @property
    def source(self) -> str:
        return f"{self.layer}-{self.set}" + (f"__{self.suffix}" if self.suffix else "")

    @property
    def hook_name(self) -> str:
        return f"blocks.{self.layer}.{self.hook}"


def window_of(facts: dict[str, Any]) -> int:
    """Tokens of an example with its surroundings."""
    return int(facts["before"]) + 1 + int(facts["after"])
