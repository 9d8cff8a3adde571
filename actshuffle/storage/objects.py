"""Byte objects under a root: the few operations that the engine needs, on local disk or any Zarr store.

Keys are relative paths with "/".  A put is atomic: an object is there whole or not at all.  On local disk that takes
a temporary name, fsync and a rename; object stores guarantee it.  Errors are typed: a full disk raises
`StorageFullError` with the number of bytes requested.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from actshuffle.storage.directio import Extent
from actshuffle.storage.files import LocalObjects
from actshuffle.storage.mapping import MappedFiles
from actshuffle.storage.place import Place, local_path
from actshuffle.storage.remote import remote_objects


class Objects(Protocol):
    """The operations on the objects of one place, and two facts by which callers choose how to read them.

    ``is_local``: objects are files of this machine, so that a read costs no request to a server.
    """

    @property
    def is_local(self) -> bool: ...
    def is_cached(self, key: str, offset: int) -> bool: ...
    def get(self, key: str) -> bytes | None: ...
    def put(self, key: str, data: bytes | memoryview) -> None: ...
    def writer(self, key: str, size: int) -> Any: ...
    def read(self, extents: Sequence[Extent]) -> None: ...
    def reading(self, extents: Sequence[Extent]) -> Callable[[], None]: ...
    def read_rows(
        self, key: str, width: int, offsets: Sequence[int], out: memoryview, goals: Sequence[int]
    ) -> None: ...
    def mapped(self, keys: Sequence[str], nbytes: int, slot: int) -> MappedFiles | None: ...
    def size(self, key: str) -> int | None: ...
    def list(self, prefix: str) -> Iterator[str]: ...
    def sizes(self, prefix: str) -> Iterator[tuple[str, int]]: ...
    def names(self, prefix: str) -> Sequence[str]: ...
    def delete(self, key: str) -> None: ...
    def delete_prefix(self, prefix: str) -> None: ...
    def settle(self, prefixes: Sequence[str]) -> None: ...
    def free_bytes(self) -> int | None: ...


def open_objects(place: Place, *, fsync: bool = True) -> Objects:
    """Open the objects at a place; a new backend is one more row here, chosen by the scheme of the URL."""
    path = local_path(place)
    objects: Objects = LocalObjects(path, fsync) if path is not None else remote_objects(place)
    return objects if _wrap is None else _wrap(objects, place)


Wrap = Callable[[Objects, Place], Objects]
_wrap: Wrap | None = None


@contextmanager
def wrapped(wrap: Wrap) -> Iterator[None]:
    """Make `open_objects` return ``wrap(objects, place)`` inside the block: the entry of `actshuffle.testing`."""
    global _wrap
    before, _wrap = _wrap, wrap
    try:
        yield
    finally:
        _wrap = before
