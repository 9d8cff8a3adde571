"""One writer for each run: its folder is held as `actshuffle.jobs.hold` holds any destination."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from actshuffle.errors import DestinationInUseError
from actshuffle.jobs import hold
from saetrain.compute.mesh import Mesh
from saetrain.errors import ConfigError


@contextmanager
def locked(runs: Iterable[Path], mesh: Mesh) -> Iterator[Callable[[], None]]:
    """Hold the folders; the first rank does so for all.  Refuses a folder that another living process holds.

    Yields a function that refuses to go on if another writer has claimed one since, which can happen only where the
    file system has no locks.
    """
    with ExitStack() as stack:
        trouble, ours = "", lambda: None
        if mesh.rank == 0:
            try:
                ours = stack.enter_context(hold(*runs)).check
            except DestinationInUseError as error:
                trouble = str(error)
        if mesh.any(bool(trouble)):
            raise ConfigError(trouble or "another rank found a run in use")
        yield ours
