"""Byte objects under a root: the few operations the engine needs, on local disk or any Zarr store.

Keys are relative paths with "/".  A put is atomic: an object is there whole or not at all.  On local
disk that is a temporary name, fsync, rename; object stores give it by themselves.  Errors are typed:
a full disk is `StorageFullError` with the bytes that were asked for.
"""

from __future__ import annotations

import asyncio
import errno
import json
import threading
from collections.abc import Awaitable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from zarr.abc.store import RangeByteRequest, Store
from zarr.buffer import cpu
from zarr.storage import FsspecStore, LocalStore

from actshuffle.errors import RequestError
from actshuffle.files import Extent, LocalObjects, Writer, typed
from actshuffle.types import Place

T = TypeVar("T")


class Objects(Protocol):
    """What the engine asks of a place."""

    def get(self, key: str) -> bytes | None: ...
    def put(self, key: str, data: bytes | memoryview) -> None: ...
    def writer(self, key: str, size: int) -> Any: ...
    def read(self, extents: Sequence[Extent]) -> None: ...
    def size(self, key: str) -> int | None: ...
    def list(self, prefix: str) -> Iterator[str]: ...
    def delete(self, key: str) -> None: ...
    def delete_prefix(self, prefix: str) -> None: ...
    def settle(self, prefixes: Sequence[str]) -> None: ...
    def free_bytes(self) -> int | None: ...


def open_objects(place: Place, *, fsync: bool = True) -> Objects:
    """The objects at a place."""
    path = local_path(place)
    return LocalObjects(path, fsync) if path is not None else StoreObjects(open_store(place))


def as_place(path: str | Path, storage_options: dict[str, Any] | None = None) -> Place:
    """A user's path or URL; local ones absolute, since workers may run elsewhere in the tree."""
    try:
        options = json.dumps(storage_options or {}, sort_keys=True)
    except TypeError as err:
        raise RequestError(f"storage options must be plain JSON values: {err}") from err
    text = str(path)
    return Place(text if "://" in text else str(Path(text).absolute()), options)


def local_path(place: Place) -> Path | None:
    """The directory of a local place, or None for a URL."""
    if place.url.startswith("file://"):
        return Path(place.url.removeprefix("file://"))
    return None if "://" in place.url else Path(place.url)


def open_store(place: Place, *, read_only: bool = False) -> Store:
    """The place as a zarr store."""
    path = local_path(place)
    if path is not None:
        return LocalStore(path, read_only=read_only)
    try:
        return FsspecStore.from_url(
            place.url, storage_options=json.loads(place.options), read_only=read_only
        )
    except (ImportError, ValueError) as err:
        raise RequestError(f"cannot open {place.url}: {err}") from err


class StoreObjects:
    """Objects of any Zarr store (fsspec, obstore), through its public asynchronous interface."""

    CONCURRENCY = 16  # range reads in flight
    PIECE = 4 << 20  # of so many bytes at most; see memory.REQUESTS

    def __init__(self, store: Store) -> None:
        self.store = store

    def get(self, key: str) -> bytes | None:
        with typed(self.store, key):
            found = wait(self.store.get(key, cpu.buffer_prototype))
            return None if found is None else found.to_bytes()

    def put(self, key: str, data: bytes | memoryview) -> None:
        with typed(self.store, key, len(data)):
            wait(self.store.set(key, cpu.Buffer.from_array_like(np.frombuffer(data, np.uint8))))

    @contextmanager
    def writer(self, key: str, size: int) -> Iterator[Writer]:
        writer = _MemoryWriter(size)
        yield writer
        self.put(key, memoryview(writer.data))

    def read(self, extents: Sequence[Extent]) -> None:
        async def all_of_them() -> None:
            gate = asyncio.Semaphore(self.CONCURRENCY)

            async def one(extent: Extent) -> None:
                async with gate:
                    stop = extent.offset + sum(len(v) for v in extent.views)
                    found = await self.store.get(
                        extent.key, cpu.buffer_prototype, RangeByteRequest(extent.offset, stop)
                    )
                if found is None:
                    raise FileNotFoundError(errno.ENOENT, "no such object", extent.key)
                data, at = memoryview(found.to_bytes()), 0
                if len(data) != stop - extent.offset:
                    raise OSError(errno.EIO, f"object ends after {extent.offset + len(data)} bytes")
                for view in extent.views:
                    view[:] = data[at : at + len(view)]
                    at += len(view)

            await asyncio.gather(
                *(one(p) for extent in extents for p in _pieces(extent, self.PIECE))
            )

        with typed(self.store, extents[0].key if extents else ""):
            wait(all_of_them())

    def size(self, key: str) -> int | None:
        try:
            return wait(self.store.getsize(key))
        except FileNotFoundError:
            return None

    def list(self, prefix: str) -> Iterator[str]:
        async def collect() -> list[str]:
            return [key async for key in self.store.list_prefix(prefix.rstrip("/") + "/")]

        with typed(self.store, prefix):
            yield from wait(collect())

    def delete(self, key: str) -> None:
        with typed(self.store, key):
            wait(self.store.delete(key))

    def delete_prefix(self, prefix: str) -> None:
        with typed(self.store, prefix):
            wait(self.store.delete_dir(prefix))

    def settle(self, prefixes: Sequence[str]) -> None:
        """Nothing to do: puts are atomic and durable."""

    def free_bytes(self) -> int | None:
        return None


def _pieces(extent: Extent, size: int) -> Iterator[Extent]:
    """The same bytes in ranges of at most ``size``, each over as many views as it spans."""
    offset, views, held = extent.offset, [], 0
    for view in extent.views:
        while len(view):
            part = view[: size - held]
            views.append(part)
            held, view = held + len(part), view[len(part) :]
            if held == size:
                yield Extent(extent.key, offset, views)
                offset, views, held = offset + held, [], 0
    if held:
        yield Extent(extent.key, offset, views)


class _MemoryWriter:
    def __init__(self, size: int) -> None:
        self.data = bytearray(size)
        self._at = 0

    def write(self, part: memoryview) -> None:
        self.data[self._at : self._at + part.nbytes] = part.cast("B")
        self._at += part.nbytes


@lru_cache(maxsize=1)
def _loop() -> asyncio.AbstractEventLoop:
    """One event loop for this process's object store calls, on a thread of its own: store clients are
    bound to the loop that first used them, and tasks run on any thread."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="actshuffle-io", daemon=True).start()
    return loop


def wait(what: Coroutine[Any, Any, T] | Awaitable[T]) -> T:
    """Run a store's coroutine to its end, from any thread."""

    async def call() -> T:
        return await what

    return asyncio.run_coroutine_threadsafe(call(), _loop()).result()
