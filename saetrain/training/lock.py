"""One writer for each run, in a folder that all ranks see; and one request, which all ranks were given.

The folder is held as `actshuffle.jobs.hold` holds any destination.  Ranks of several machines write their shares of a
checkpoint to it and read those of others, so machines whose disks are not shared cannot train one run.  Each machine
may have a copy of the store.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from actshuffle.errors import DestinationInUseError, words_of
from actshuffle.jobs import hold
from saetrain.compute.mesh import Mesh
from saetrain.config import Config
from saetrain.data import Source, target_of
from saetrain.errors import ConfigError


@contextmanager
def locked(runs: Collection[Path], mesh: Mesh) -> Iterator[Callable[[], None]]:
    """Hold the folders; the first rank does so for all.  Refuses a folder that another living process holds,
    and one that a rank does not see.

    Yields a function that refuses to go on if another writer has claimed one since, which can happen only where the
    file system has no locks.
    """
    with ExitStack() as stack:
        trouble, ours = "", lambda: None
        if mesh.rank == 0:
            try:
                ours = stack.enter_context(hold(*runs)).check
            except DestinationInUseError as error:
                trouble = words_of(error)
        if mesh.any(bool(trouble)):
            raise ConfigError(trouble or "another rank found a run in use")
        _meet(runs, mesh)
        yield ours


def _meet(runs: Collection[Path], mesh: Mesh) -> None:
    """Refuse, on every rank, a folder that some rank does not see: the first leaves a file beside it for the others."""
    if mesh.world == 1:
        return
    mine = torch.tensor([secrets.randbits(62)], device=mesh.device)
    name = f"ranks-{int(mesh.gather(mine, 'world')[0]):x}"
    files = {run: run.with_name(f".{run.name}.{name}") for run in runs}
    if mesh.rank == 0:
        for file in files.values():
            file.touch()  # its folder is there: the lock lies in it
    mesh.any(False)  # waits for the first rank
    unseen = torch.tensor([not file.exists() for file in files.values()], device=mesh.device)
    every = mesh.gather(unseen, "world").nonzero().tolist()
    if mesh.rank == 0:
        for file in files.values():
            file.unlink()
    if every:
        rank, number = every[0]
        raise ConfigError(
            f"rank {rank} does not see {list(files)[number]} as rank 0 has it: all ranks write to one folder, so "
            "machines need an --out on a disk that they share"
        )


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
