"""A plan bound to its places: everything a task needs to know, and the identity that its receipts carry."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from actshuffle.arrays.field import Field
from actshuffle.ordering.keys import Keys
from actshuffle.planning.tree import LATER, Plan
from actshuffle.storage.place import Place, public_url


@dataclass(frozen=True)
class Job:
    """A plan bound to its places: all that a task needs to know."""

    plan: Plan
    keys: Keys
    source: Place
    destination: Place
    scratch: Place
    fields: tuple[Field, ...]
    source_row: Field | None  # provenance: which source row each output row is
    attributes: str  # JSON text of the output group's attributes
    source_identity: str  # digest of the source's metadata and object sizes
    request: str  # JSON text of the settled arguments, for a run that resumes
    fill_missing: bool = False  # absent source chunks are fill values, because the user said so
    fsync: bool = True
    # "shuffle"; or, with leaves alone, "merge": a leaf's rows come in any order and are sorted by key;
    # "copy": they stay as they come; "gather": each leaf takes its own from the source.
    kind: str = "shuffle"
    key_rows: tuple[int, int] | None = None  # ranks are counted among these rows' keys; None: all rows
    facts: str = "{}"  # JSON text of what a virtual source adds to the marker, and of its digests

    def to_json(self) -> dict[str, Any]:
        """All but the places' options."""
        document = dataclasses.asdict(self)
        for place in ("source", "destination", "scratch"):
            document[place] = public_url(document[place]["url"])
        return document

    @cached_property
    def identity(self) -> str:
        """Digest of everything that decides what tasks read and write; receipts carry it."""
        document = self.to_json()
        del document["fsync"]
        for name in [k for k in LATER if document["plan"][k] == LATER[k]]:
            del document["plan"][name]
        text = json.dumps(document, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]
