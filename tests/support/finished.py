"""Small finished stores, for the tests of datasets, loaders, statistics and quality."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from actshuffle.arrays.names import MARKER_KEY
from actshuffle.arrays.small import group_metadata
from actshuffle.storage.objects import open_objects
from actshuffle.storage.place import as_place
from support.runs import run
from support.stores import group

N = 150


def fields(n: int, width: int = 6) -> dict[str, np.ndarray]:
    """Activations, token ids and documents of 7 tokens, in document order."""
    rng = np.random.default_rng(3)
    return {
        "data": rng.standard_normal((n, width)).astype("<f2"),
        "token": rng.integers(0, 99, n, np.uint32),
        "document": np.arange(n) // 7,
    }


def shuffled(path: Path, n: int = N, **request: Any) -> Path:
    """A finished, shuffled store."""
    src = path.with_suffix(".src")
    group(src, fields(n))
    run(src, path, **request)
    return path


def collection(path: Path, n: int = N, **settings: Any) -> Path:
    """A finished store in the order in which it was made."""
    arrays = fields(n)
    group(path, arrays, **settings)
    finish(path, n, list(arrays))
    return path


def finish(path: Path, n: int, names: list[str]) -> None:
    """The completion marker of a collection."""
    body = {"format": 1, "kind": "collection", "rows": n, "fields": {name: {} for name in names}}
    open_objects(as_place(path)).put(MARKER_KEY, group_metadata({"actshuffle": body}))
