"""A plan bound to its places: everything that a task needs, and the identity that its receipts carry."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any

from actshuffle.arrays.field import Field
from actshuffle.arrays.marker import is_list
from actshuffle.arrays.names import PACKS, RECEIPTS
from actshuffle.ordering.keys import Keys
from actshuffle.planning.tree import LATER, Plan, Task
from actshuffle.seals import seal
from actshuffle.storage.objects import Objects, open_objects
from actshuffle.storage.place import Place, public_url

FACTS = ("marker", "sums", "stage", "behind")


class Kind(StrEnum):
    """The kinds of job.  All but a shuffle consist of leaves only: one level, and no spill.

    A *shuffle* splits rows into buckets, level by level, and sorts leaves by key.  In a *gather* each leaf
    picks its rows from the source.  In a *merge* a leaf's rows come from sorted stores in any order and
    are sorted by key.  In a *copy* they keep the order of the source.
    """

    SHUFFLE = "shuffle"
    GATHER = "gather"
    MERGE = "merge"
    COPY = "copy"

    @property
    def ranked(self) -> bool:
        """True if the rank of its key assigns a row to its leaf, which requires the boundaries."""
        return self in (Kind.SHUFFLE, Kind.GATHER)

    @property
    def gathers(self) -> bool:
        """True if a leaf picks its rows from the whole source; its receipt then carries a digest of their keys."""
        return self is Kind.GATHER

    @property
    def sorts(self) -> bool:
        """True if a leaf orders its rows by key."""
        return self is not Kind.COPY


@dataclass(frozen=True)
class Facts:
    """The entries that a virtual source adds to a job.

    Attributes
    ----------
    marker : entries of the completion marker.
    sums : the expected digest of each array, by name; None if no digest is known beforehand.
    stage : the name of the stage in the progress display.
    behind : the places that the source reads from; a job must not write to them.
    """

    marker: dict[str, Any]
    sums: dict[str, str] | None
    stage: str | None
    behind: tuple[str, ...]

    @staticmethod
    def text(found: dict[str, Any]) -> str:
        """JSON text of the facts among the entries of a source's description, as run.json holds it."""
        return json.dumps({name: found[name] for name in FACTS if name in found}, sort_keys=True)

    @classmethod
    def read(cls, text: str) -> Facts:
        found = json.loads(text)
        return cls(found.get("marker", {}), found.get("sums"), found.get("stage"), tuple(found.get("behind", ())))


@dataclass(frozen=True)
class Job:
    """A plan bound to its places: everything that a task needs."""

    plan: Plan
    keys: Keys
    source: Place
    destination: Place
    scratch: Place
    fields: tuple[Field, ...]
    source_row: Field | None  # provenance: the source row of each output row
    attributes: str  # JSON text of the output group's attributes
    source_identity: str  # digest of the source's metadata and object sizes
    request: str  # JSON text of the settled arguments, for a run that resumes
    fill_missing: bool = False  # absent source chunks read as fill values, at the user's request
    fsync: bool = True
    kind: Kind = Kind.SHUFFLE
    key_rows: tuple[int, int] | None = None  # ranks are counted among these rows' keys; None: all rows
    facts: str = "{}"  # JSON text of `Facts`

    def to_json(self) -> dict[str, Any]:
        """The job as plain JSON values, without the options of its places, which may hold secrets."""
        document = dataclasses.asdict(self)
        for place in ("source", "destination", "scratch"):
            document[place] = public_url(document[place]["url"])
        if not self.plan.staged:  # records of version 0.1.0 do not have it
            del document["plan"]["staged"]
        if not self.plan.apart:
            del document["plan"]["apart"]
        if self.plan.model.block_copies == 2 * self.plan.model.remote:  # as it was in all earlier versions
            del document["plan"]["model"]["block_copies"]
        return document

    @cached_property
    def identity(self) -> str:
        """Digest of everything that decides the reads and writes of tasks; receipts carry it."""
        document = self.to_json()
        del document["fsync"]
        for name in [k for k in LATER if document["plan"][k] == LATER[k]]:
            del document["plan"][name]
        return seal(document)

    @cached_property
    def known(self) -> Facts:
        """The facts that a virtual source adds to the job."""
        return Facts.read(self.facts)

    @property
    def is_plain(self) -> bool:
        """True if the source holds its own rows; a virtual one adds facts."""
        return self.facts == "{}"

    @property
    def outputs(self) -> tuple[Field, ...]:
        """All arrays of the output."""
        return self.fields if self.source_row is None else (*self.fields, self.source_row)

    def output_objects(self, field: Field, leaves: range) -> range:
        """Numbers of the output objects of a field that some leaves, one after the other, hold."""
        if not leaves:
            return range(0)
        start, _ = self.plan.bucket_ranks(self.plan.levels - 1, leaves[0])
        _, stop = self.plan.bucket_ranks(self.plan.levels - 1, leaves[-1])
        return range(start // field.object_rows, -(-stop // field.object_rows))

    @property
    def at_destination(self) -> Objects:
        return open_objects(self.destination, fsync=self.fsync)

    @property
    def at_scratch(self) -> Objects:
        return open_objects(self.scratch, fsync=self.fsync)

    @property
    def is_local(self) -> bool:
        """True if receipts lie on local disk, where one look costs next to nothing."""
        return self.at_scratch.is_local and self.at_destination.is_local

    def receipt(self, task: Task) -> tuple[Objects, str]:
        if task.kind == "leaf":
            return self.at_destination, f"{RECEIPTS}/{task.number}.json"
        if task.kind == "pack" and task.level == self.plan.levels:
            return self.at_destination, f"{PACKS}/{task.number}.json"
        folder = {"split": "receipts", "pack": "packs", "index": "index"}[task.kind]
        return self.at_scratch, f"level{task.level}/{folder}/{task.number}.json"

    def accepts(self, task: Task, body: dict[str, Any]) -> bool:
        plan = self.plan
        if task.kind in ("pack", "index"):
            return True
        if task.kind == "split":
            block = plan.block(task.level, task.number)
            children = len(plan.children(task.level - 1, block.parent))
            rows, sums = body.get("rows"), body.get("sums")
            return (
                is_list(rows, children, lambda x: type(x) is int and x >= 0)
                and sum(rows) == block.stop - block.start  # type: ignore[arg-type]
                and is_list(sums, 1 + len(self.fields), lambda x: is_hex(x, 32 * children))
            )
        start, stop = plan.bucket_ranks(plan.levels - 1, task.number)
        if self.kind.gathers and not is_hex(body.get("keys"), 32):
            return False
        digests = body.get("digests")
        if not isinstance(digests, dict) or digests.keys() != {f.name for f in self.fields}:
            return False
        return all(
            is_list(digests[f.name], -(-(stop - start) // f.object_rows), lambda x: is_hex(x, 32)) for f in self.fields
        )


def is_hex(found: Any, length: int) -> bool:
    return isinstance(found, str) and re.fullmatch(f"[0-9a-f]{{{length}}}", found) is not None
