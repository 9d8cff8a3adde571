"""The frozen plan of a run: everything that decides the bytes of its results, and how its work is cut.

::

    rows      |--- block 0 ---|--- block 1 ---|- 2 -|     a block is whole tiles of rows
    latents   |------ shard 0 ------|-- shard 1 --|       a shard is whole tiles of latents, and whole granules
    latents   |-- chunk 0 --|-- chunk 1 --|-- 2 --|       a chunk is collated by one task; whole granules
    latents   |..|..|..|..|..|..|..|..|..|..|..|..|       a granule is the least that is read of an object of codes

A pre-activation's bits depend neither on shards nor on blocks: on a CPU it is an inner product of its own, and on a GPU
the encoder product is made of tiles at fixed places.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import Any

from actshuffle.jobs import FolderJob, FolderTask
from saetrain.describing.slots import Slots
from saetrain.features.layout import Column, columns
from saetrain.products.lens import Lens


@dataclass(frozen=True)
class Plan:
    """See the module; all are plain values, and travel in the job's settings."""

    dictionary: str  # path of a checkpoint or folder
    sae: str  # digest of its files
    store: str
    identity: str  # of the store
    field: str
    gradient: str | None  # array of the loss's gradients with respect to it, if the store has one
    token: str | None
    document: str | None
    rows: int
    d_in: int
    latents: int
    k: int  # 0 where thresholds decide
    shards: int
    block_rows: int
    tile_rows: int
    tile_latents: int
    granule: int
    chunk: int
    seed: int
    slots: tuple[int, ...]  # as `Slots`
    window: int  # rows of a document that give one top example
    before: int  # rows of a context before its example
    after: int
    pool: int  # rows among which quiet ones are looked for
    pair_rows: int  # rows of the sample for latents that are active together
    keep_codes: bool
    near: int  # neighbours of each latent; 0 looks for none, and so for no hard examples
    lens: Lens | None  # where logits come from

    @classmethod
    def of(cls, job: FolderJob) -> Plan:
        return cls.read(job.settings)

    @classmethod
    def read(cls, settings: Mapping[str, Any]) -> Plan:
        found = {f.name: settings[f.name] for f in fields(cls)}
        lens = None if found["lens"] is None else Lens(**found["lens"])
        return cls(**found | {"slots": tuple(found["slots"]), "lens": lens})

    def settings(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def kinds(self) -> Slots:
        return Slots(*self.slots)

    @property
    def columns(self) -> dict[str, Column]:
        return columns(self.kinds, self.rows, self.gradient is not None)

    # --- rows

    @property
    def blocks(self) -> int:
        return -(-self.rows // self.block_rows)

    def block(self, number: int) -> tuple[int, int]:
        start = number * self.block_rows
        return start, min(start + self.block_rows, self.rows)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row that an encode task reads, as float32."""
        return 4 * self.d_in * (1 if self.gradient is None else 2)

    # --- latents

    @property
    def chunks(self) -> int:
        return -(-self.latents // self.chunk)

    def chunk_range(self, number: int) -> tuple[int, int]:
        return number * self.chunk, min((number + 1) * self.chunk, self.latents)

    def shard_edges(self) -> list[int]:
        """Edges of the shards: as equal as whole units of tiles and granules allow."""
        unit = max(self.tile_latents, self.granule)
        units = -(-self.latents // unit)
        return [min(unit * (units * i // self.shards), self.latents) for i in range(self.shards)] + [self.latents]

    @property
    def selects(self) -> bool:
        """True if the latents of several shards compete for the k places of a token."""
        return self.k > 0 and self.shards > 1

    def code_objects(self, block: int) -> list[tuple[str, int, int]]:
        """Key and latents [lo, hi) of each object of codes of a block."""
        if self.selects:
            return [(f"work/codes/{block}-all.bin", 0, self.latents)]
        edges = pairwise(self.shard_edges())
        return [(f"work/codes/{block}-{number}.bin", lo, hi) for number, (lo, hi) in enumerate(edges)]

    def candidate_objects(self, block: int) -> list[tuple[str, int, int]]:
        edges = pairwise(self.shard_edges())
        return [(f"work/candidates/{block}-{number}.bin", lo, hi) for number, (lo, hi) in enumerate(edges)]

    def encode_task(self, task: FolderTask) -> tuple[int, int]:
        """Shard and block of a task: shard by shard, so that a worker loads few."""
        return divmod(task.number, self.blocks)
