"""What a user asks of a run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from actshuffle.arrays.names import RUN_KEY
from actshuffle.errors import FormatError
from actshuffle.planning.planner import Levels


@dataclass(frozen=True)
class Request:
    """What a user asks of a run.  None means: as a half-done run recorded it, else the default."""

    seed: int | None = None
    levels: Levels | None = None
    memory: int | None = None
    block_bytes: int | None = None
    run_bytes: int | None = None
    chunk_rows: int | None = None
    chunks_per_shard: int | None = None
    codec: str | None = None
    fields: tuple[str, ...] | None = None
    source_row: bool | None = None
    fill_missing: bool | None = None
    scratch: str | None = None
    tasks_wanted: int | None = None
    tasks_per_worker: int | None = None  # that share the memory
    spill_memory: int | None = None
    gather: bool | None = None
    key_bits: tuple[int, int] | None = None  # for tests: see keys.Keys

    def given(self) -> dict[str, Any]:
        values = {k: v for k, v in dataclasses.asdict(self).items() if v is not None}
        result: dict[str, Any] = json.loads(json.dumps(values))  # tuples as they come back from disk
        return result


_TEXTS, _SWITCHES = ("codec", "scratch"), ("source_row", "fill_missing", "gather")
_KINDS: dict[str, Callable[[Any], bool]] = {
    **{f.name: lambda x: type(x) is int and x >= 0 for f in dataclasses.fields(Request)},
    **{name: lambda x: isinstance(x, str) for name in _TEXTS},
    **{name: lambda x: isinstance(x, bool) for name in _SWITCHES},
    "levels": lambda x: x == "auto" or (type(x) is int and x > 0),
    "fields": lambda x: isinstance(x, list) and all(isinstance(name, str) for name in x),
    "key_bits": lambda x: isinstance(x, list) and len(x) == 2 and set(x) <= {*range(65)},
}


def _checked_request(recorded: Any) -> dict[str, Any]:
    """The arguments that a file says a run was given."""
    if not isinstance(recorded, dict) or "seed" not in recorded:
        raise FormatError(f"{RUN_KEY} is damaged: it names no seed; --overwrite starts again")
    for name, value in recorded.items():
        if name not in _KINDS or not _KINDS[name](value):
            raise FormatError(
                f"{RUN_KEY} is damaged: {name[:40]} cannot be {str(value)[:40]!r}; --overwrite starts again"
            )
    return recorded
