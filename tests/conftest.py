"""Fixtures: clusters that are started once and used by many tests."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

# By its plugin it would be imported when a session ends, by way of `ast.parse`, which fails in CPython 3.11
# if just then an error that nobody retrieved from asyncio (as of a store that died) is collected and logged.
import hypothesis  # noqa: F401
import pytest

from actshuffle.executors import Dask, local_cluster
from support.stores import SOURCES

# Tests need no network: a model that is not there is not asked for again and again.
os.environ["HF_HUB_OFFLINE"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests on a shared cluster come last: its workers take a fiftieth of a core each, even if they have no tasks."""
    items.sort(key=lambda item: "cluster" in getattr(item, "fixturenames", ()))


@pytest.fixture(scope="session")
def cluster() -> Iterator[Callable[[int], Dask]]:
    """``cluster(n)``: a running Dask cluster of n worker processes, the same one each time."""
    with ExitStack() as stack:
        running: dict[int, Dask] = {}

        def of(workers: int) -> Dask:
            if workers not in running:
                running[workers] = stack.enter_context(local_cluster(workers))
            return running[workers]

        yield of


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Path]:
    """``sources(kind, n)``: a store of n rows of one of `stores.SOURCES`, made once."""
    made: dict[tuple[str, int], Path] = {}

    def of(kind: str, n: int = 150) -> Path:
        if (kind, n) not in made:
            path = tmp_path_factory.mktemp("source") / f"{kind}.zarr"
            SOURCES[kind](path, n)
            made[kind, n] = path
        return made[kind, n]

    return of
