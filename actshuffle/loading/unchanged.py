"""Whether a store is still the one that was opened.

A reader that holds files open, or has planned its reads, does not notice by itself that somebody writes to the store
meanwhile.  So it takes a *stamp* when it begins, and compares::

    texts      the completion marker and the metadata of each array that is read
    objects    size and time of the last write of at most 1,024 objects, spread evenly over those that are read
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from actshuffle.arrays.names import MARKER_KEY
from actshuffle.errors import RequestError, SourceError
from actshuffle.loading.dataset import Dataset
from actshuffle.storage.objects import Objects, open_objects
from actshuffle.storage.place import local_path
from actshuffle.units import counted

LOOKED_AT, LOOKED_AT_REMOTE = 1024, 8  # objects in all
Stamp = dict[str, tuple[str | int, ...] | None]  # by key; None: not there


def stamp(dataset: Dataset, names: Iterable[str]) -> Stamp:
    """The stamp of some arrays of a store."""
    names, objects, folder = list(names), open_objects(dataset.root), local_path(dataset.root)
    found: Stamp = {}
    tops = [f"{path}/" if (path := dataset._stored[name].source) else "" for name in names]
    for key in (MARKER_KEY, *(top + document for top in tops for document in ("zarr.json", ".zarray"))):
        text = objects.get(key)
        found[key] = None if text is None else (hashlib.sha256(text).hexdigest(),)
    most = max(1, (LOOKED_AT_REMOTE if folder is None else LOOKED_AT) // max(1, len(names)))
    for name in names:
        size = dataset.fields[name].object_rows
        first, stop = dataset.start // size, -(-(dataset.start + dataset.rows) // size)
        for number in range(first, stop, -(-(stop - first) // most) or 1):
            key = dataset._stored[name].object_key.format(number)
            found[key] = _written(objects, key) if folder is None else _written_here(folder / key)
    return found


def _written(objects: Objects, key: str) -> tuple[int, ...] | None:
    size = objects.size(key)
    return None if size is None else (size,)


def _written_here(path: Path) -> tuple[int, ...] | None:
    with suppress(OSError):
        found = path.stat()
        return found.st_size, found.st_mtime_ns
    return None


class Watch:
    """The stores that a reader began with; `check` refuses to go on with any that is not as it was."""

    def __init__(self, read: Iterable[tuple[Dataset, str]]) -> None:
        """`read` holds each array that is read, as a store and a name."""
        self._read: dict[str, tuple[Dataset, set[str]]] = {}
        for dataset, name in read:
            self._read.setdefault(dataset.path, (dataset, set()))[1].add(name)
        self._before = {path: stamp(dataset, sorted(names)) for path, (dataset, names) in self._read.items()}

    def check(self) -> None:
        """Raise a `SourceError` that names a file which changed."""
        for path, (dataset, names) in self._read.items():
            before, now = self._before[path], stamp(dataset, sorted(names))
            changed = [key for key in before if now.get(key) != before[key]]
            if changed:
                how = "is gone" if now.get(changed[0]) is None else "was written"
                raise SourceError(
                    f"{path} changed while it was read: {changed[0]} {how} ({len(changed):,} of "
                    f"{counted(len(before), 'file')} looked at are not as they were), so what was "
                    "read since may mix old and new rows; open the store again"
                )


def watch(dataset: Dataset, fields: Iterable[str] | None = None) -> Watch:
    """Note how a store is now, so that `check` of the result raises a `SourceError` once it was written to.

    It compares the completion marker, the metadata of `fields` (all arrays unless given), and size and time of the last
    write of at most 1,024 of their objects (on an object store 8 objects and their sizes), spread evenly.  The loader
    does the same by itself at the end of each epoch.
    """
    names = list(dataset.fields if fields is None else fields)
    if unknown := [name for name in names if name not in dataset.fields]:
        raise RequestError(f"no array {unknown[0]!r} in {dataset.path}; it has {sorted(dataset.fields)}")
    return Watch((dataset, name) for name in names)
