"""Whether all ranks were asked for the same run: the same settings, and the same rows.

Ranks of several machines are started by several commands, and each machine may have a copy of the store.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

import torch

from saetrain.compute.mesh import Mesh
from saetrain.config import Config
from saetrain.data import Source, target_of
from saetrain.errors import ConfigError


def agree(mesh: Mesh, configs: Iterable[Config], sources: Iterable[Source]) -> None:
    """Refuse, on every rank, settings or rows that are not those of the first rank."""
    told = {
        "other settings": [config.to_json() | {"device": ""} for config in configs],
        "another store": [
            [getattr(s, "identity", s.name), s.rows, s.field, target_of(s), s.document_field] for s in sources
        ],
    }
    for what, value in told.items():
        digest = hashlib.sha256(json.dumps(value).encode()).digest()
        every = mesh.gather(torch.tensor(list(digest), dtype=torch.uint8, device=mesh.device), "world")
        if len(others := (every != every[0]).any(1).nonzero()):
            raise ConfigError(f"rank {int(others[0])} was given {what} than rank 0: give all ranks the same command")
