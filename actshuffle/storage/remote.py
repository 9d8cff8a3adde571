"""Objects of any Zarr store (fsspec, obstore), with the same operations as files on disk."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import threading
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any, TypeVar

import numpy as np
from zarr.abc.store import RangeByteRequest, Store
from zarr.buffer import cpu
from zarr.storage import FsspecStore, LocalStore

from actshuffle.errors import ActshuffleError, RequestError, StorageError
from actshuffle.limits import STORE_PIECE, STORE_REQUESTS
from actshuffle.storage.directio import Extent
from actshuffle.storage.files import Writer, typed
from actshuffle.storage.place import Place, local_path

T = TypeVar("T")


def open_store(place: Place, *, read_only: bool = False) -> Store:
    """Open a place as a zarr store."""
    path = local_path(place)
    if path is not None:
        return LocalStore(path, read_only=read_only)
    # A separate instance: fsspec shares instances, and one that another event loop has used fails here.
    options = {"skip_instance_cache": True, **json.loads(place.options)}
    try:
        return FsspecStore.from_url(place.url, storage_options=options, read_only=read_only)
    except (ImportError, ValueError, TypeError) as err:
        raise RequestError(f"cannot open {place}: {err}") from err


@lru_cache(maxsize=64)
def remote_objects(place: Place) -> StoreObjects:
    """The client of a place, one per process: a client holds connections and requests credentials."""
    return StoreObjects(open_store(place), str(place))


class StoreObjects:
    """Objects of any Zarr store (fsspec, obstore), through its public asynchronous interface."""

    is_local = False

    def __init__(self, store: Store, name: str = "") -> None:
        self.store, self.name = store, name or str(store)
        weakref.finalize(self, _hang_up, store, os.getpid()).atexit = False

    def get(self, key: str) -> bytes | None:
        with self._typed(key):
            found = wait(self.store.get(key, cpu.buffer_prototype))
            return None if found is None else found.to_bytes()

    def put(self, key: str, data: bytes | memoryview) -> None:
        with self._typed(key, len(data)):
            wait(self.store.set(key, cpu.Buffer.from_array_like(np.frombuffer(data, np.uint8))))

    @contextmanager
    def writer(self, key: str, size: int) -> Iterator[Writer]:
        writer = _MemoryWriter(size)
        yield writer
        self.put(key, memoryview(writer.data))

    def reading(self, extents: Sequence[Extent]) -> Callable[[], None]:
        """`read` as a call for later, without preparation."""
        return partial(self.read, extents)

    def read_rows(self, key: str, width: int, offsets: Sequence[int], out: memoryview, goals: Sequence[int]) -> None:
        """Read ``width`` bytes at each offset of an object to the goals in ``out``, with one request each."""
        self.read([Extent(key, at, [out[g : g + width]]) for at, g in zip(offsets, goals, strict=True)])

    def read(self, extents: Sequence[Extent]) -> None:
        async def all_of_them() -> None:
            gate = asyncio.Semaphore(STORE_REQUESTS)

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

            parts = [p for extent in extents for p in _pieces(extent, STORE_PIECE)]
            running = [asyncio.ensure_future(one(part)) for part in parts]
            try:
                await asyncio.gather(*running)
            finally:  # after an error no request may write into memory that others may use by then
                for task in running:
                    task.cancel()
                await asyncio.gather(*running, return_exceptions=True)

        with self._typed(extents[0].key if extents else ""):
            wait(all_of_them())

    def mapped(self, keys: Sequence[str], nbytes: int, slot: int) -> None:
        """None: no object is a file of this machine."""

    def is_cached(self, key: str, offset: int) -> bool:
        """False: every read is a request."""
        return False

    def size(self, key: str) -> int | None:
        with self._typed(key):
            try:
                return wait(self.store.getsize(key))
            except FileNotFoundError:
                return None

    def list(self, prefix: str) -> Iterator[str]:
        return (key for key, _ in self.sizes(prefix))

    def sizes(self, prefix: str) -> Iterator[tuple[str, int]]:
        """The key and size of every object under a folder; size -1 where the store lists no sizes."""
        folder = prefix.rstrip("/") + "/" if prefix else ""

        async def collect() -> list[tuple[str, int]]:
            if not isinstance(self.store, FsspecStore):
                return [(key, -1) async for key in self.store.list_prefix(folder)]
            top = f"{self.store.path}/"
            self.store.fs.invalidate_cache()
            found = await self.store.fs._find(f"{top}{folder}".rstrip("/"), detail=True)
            sized = ((path.removeprefix(top), info.get("size")) for path, info in found.items())
            return [(key, -1 if size is None else int(size)) for key, size in sized]

        with self._typed(prefix):
            yield from wait(collect())

    def names(self, prefix: str) -> Sequence[str]:
        """The names of the objects and folders directly inside a folder, sorted."""

        async def collect() -> list[str]:
            return sorted([name async for name in self.store.list_dir(prefix)])

        with self._typed(prefix):
            return wait(collect())

    def delete(self, key: str) -> None:
        with self._typed(key):
            wait(self.store.delete(key))

    def delete_prefix(self, prefix: str) -> None:
        with self._typed(prefix):
            wait(self.store.delete_dir(prefix))

    @contextmanager
    def _typed(self, key: str, size: int | None = None) -> Iterator[None]:
        """Turn any error of a client library (no credentials, no bucket, no route) into a `StorageError`."""
        try:
            with typed(self.name, key, size):
                yield
        except ActshuffleError:
            raise
        except Exception as err:
            raise StorageError(f"{type(err).__name__}: {err}: {self.name}/{key}") from err

    def settle(self, prefixes: Sequence[str]) -> None:
        """Nothing to do: puts are atomic and durable."""

    def free_bytes(self) -> int | None:
        return None


def _hang_up(store: Store, pid: int) -> None:
    """Close the connections of an unused client, which s3fs leaves open in foreign event loops."""
    client = getattr(getattr(store, "fs", None), "_s3", None)
    if client is not None and pid == os.getpid():
        asyncio.run_coroutine_threadsafe(client.close(), _loop())


def _pieces(extent: Extent, size: int) -> Iterator[Extent]:
    """Split an extent into extents of at most ``size`` bytes, each over as many views as it spans."""
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
    """The event loop of all calls to object stores, on its own thread: store clients are bound to the loop that
    first used them, and tasks run on any thread."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="actshuffle-io", daemon=True).start()
    return loop


def wait(what: Coroutine[Any, Any, T] | Awaitable[T]) -> T:
    """Run a store's coroutine to its end, from any thread; returns its result."""

    async def call() -> T:
        return await what

    future = asyncio.run_coroutine_threadsafe(call(), _loop())
    try:
        return future.result()
    except BaseException:
        future.cancel()  # after Ctrl-C nobody waits for it
        raise


def _forget() -> None:
    _loop.cache_clear()
    remote_objects.cache_clear()


os.register_at_fork(after_in_child=_forget)  # threads and connections stay behind in the parent
