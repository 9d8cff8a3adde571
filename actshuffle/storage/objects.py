"""Byte objects under a root: the few operations that the engine needs, on local disk or any Zarr store.

Keys are relative paths with "/".  A put is atomic: an object is there whole or not at all.  On local disk that takes
a temporary name, fsync and a rename; object stores guarantee it.  Errors are typed: a full disk raises
`StorageFullError` with the number of bytes requested.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, Protocol
from urllib.parse import urlsplit

from actshuffle.errors import RequestError
from actshuffle.storage.bucket import open_bucket, survives_here
from actshuffle.storage.bucketoptions import SCHEMES
from actshuffle.storage.directio import Extent
from actshuffle.storage.files import LocalObjects
from actshuffle.storage.fsspecstore import open_fsspec
from actshuffle.storage.mapping import MappedFiles
from actshuffle.storage.place import CLIENT, Place, local_path


class Objects(Protocol):
    """The operations on the objects of one place, and two facts about them.

    ``is_local``: objects are files of this machine, so that a read costs no request to a server.
    ``copies``: how often the bytes of an object are held in memory while it is put, beside the caller's own.
    """

    @property
    def is_local(self) -> bool: ...
    @property
    def copies(self) -> int: ...
    def is_cached(self, key: str, *offsets: int) -> bool: ...
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


def open_objects(place: Place, *, fsync: bool = True, direct: bool = False) -> Objects:
    """Open the objects at a place; a new backend is one more row here, chosen by the scheme of the URL.

    ``fsync`` makes files durable as they are written; ``direct`` reads single rows of them past the page cache.
    """
    path = local_path(place)
    objects: Objects = LocalObjects(path, fsync, direct) if path is not None else remote_objects(place)
    return objects if _wrap is None else _wrap(objects, place)


@lru_cache(maxsize=64)
def remote_objects(place: Place) -> Objects:
    """The objects of a URL, one client per place and process: a client holds connections and requests credentials.

    Buckets are reached by obstore where it is installed, and by fsspec where the options say so.
    """
    scheme, client = urlsplit(place.url).scheme, json.loads(place.options).get(CLIENT)
    if client not in (None, "obstore", "fsspec") or (client == "obstore" and scheme not in SCHEMES):
        raise RequestError(
            f'storage option "{CLIENT}" is "obstore" ({", ".join(sorted(SCHEMES))}) or "fsspec" (any URL), '
            f"got {client!r} for {place}"
        )
    if scheme in SCHEMES and client != "fsspec" and (client or find_spec("obstore")):
        if survives_here():
            return open_bucket(place)
        if client:
            raise RequestError(
                f"{place}: this process was forked from one that had used obstore, which does not survive that: start "
                f'processes with "spawn" or "forkserver", or give "{CLIENT}": "fsspec"'
            )
    return open_fsspec(place)


os.register_at_fork(after_in_child=remote_objects.cache_clear)  # connections stay behind in the parent

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
