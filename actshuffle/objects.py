"""Byte objects under a root: the few operations the engine needs, on local disk or any Zarr store.

Keys are relative paths with "/".  A put is atomic: an object is there whole or not at all.  On local
disk that is a temporary name, fsync, rename; object stores give it by themselves.  Errors are typed:
a full disk is `StorageFullError` with the bytes that were asked for.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import json
import os
import shutil
import threading
from collections.abc import Awaitable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
from zarr.abc.store import RangeByteRequest, Store
from zarr.buffer import cpu
from zarr.storage import FsspecStore, LocalStore

from actshuffle.errors import RequestError, StorageError, StorageFullError
from actshuffle.types import Place
from actshuffle.units import format_bytes

_PARTIAL = ".actshuffle-partial"
_counter = itertools.count()
T = TypeVar("T")


class Extent(NamedTuple):
    """Read ``sum(len(v) for v in views)`` bytes at ``offset`` of object ``key``, scattered into views."""

    key: str
    offset: int
    views: Sequence[memoryview]


class Writer(Protocol):
    def write(self, part: memoryview) -> None:
        """Append bytes; the caller may reuse the memory at once."""


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


class LocalObjects:
    """Files under a directory.  Reads and writes go straight between the file and the caller's memory."""

    def __init__(self, root: Path, fsync: bool = True) -> None:
        self.root = root
        self.fsync = fsync

    def _path(self, key: str) -> Path:
        if key.startswith("/") or ".." in key.split("/"):
            raise StorageError(f"key {key!r} leaves {self.root}")
        return self.root / key

    def get(self, key: str) -> bytes | None:
        with _typed(self.root, key):
            try:
                return self._path(key).read_bytes()
            except (FileNotFoundError, NotADirectoryError):
                return None

    def put(self, key: str, data: bytes | memoryview) -> None:
        with self.writer(key, len(data)) as out:
            out.write(memoryview(data))

    @contextmanager
    def writer(self, key: str, size: int) -> Iterator[Writer]:
        """An object of ``size`` bytes, written in order; it appears when the block ends without error."""
        path = self._path(key)
        partial = path.with_name(f"{path.name}.{os.getpid()}-{next(_counter)}{_PARTIAL}")
        with _typed(self.root, key, size):
            path.parent.mkdir(parents=True, exist_ok=True)
            fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            try:
                writer = _FileWriter(fd)
                yield writer
                if writer.written < size:
                    os.ftruncate(fd, size)
                if self.fsync:
                    os.fsync(fd)
                partial.rename(path)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise
            finally:
                os.close(fd)

    def read(self, extents: Sequence[Extent]) -> None:
        for key, group in itertools.groupby(extents, key=lambda e: e.key):
            with _typed(self.root, key):
                fd = os.open(self._path(key), os.O_RDONLY)
                try:
                    for extent in group:
                        _read_full(fd, extent)
                finally:
                    os.close(fd)

    def size(self, key: str) -> int | None:
        try:
            return self._path(key).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def list(self, prefix: str) -> Iterator[str]:
        top = self._path(prefix)
        for folder, _, names in os.walk(top):
            for name in names:
                if not name.endswith(_PARTIAL):
                    yield str((Path(folder) / name).relative_to(self.root))

    def delete(self, key: str) -> None:
        with _typed(self.root, key):
            self._path(key).unlink(missing_ok=True)

    def delete_prefix(self, prefix: str) -> None:
        """Delete a whole folder, files that are half written among them."""
        with _typed(self.root, prefix):
            path = self._path(prefix)
            if path.is_dir():
                shutil.rmtree(path)

    def settle(self, prefixes: Sequence[str]) -> None:
        """Remove what killed writers left behind, and make the renames under some folders durable."""
        for prefix in prefixes:
            for folder, _, names in os.walk(self._path(prefix)):
                for name in names:
                    if name.endswith(_PARTIAL):
                        Path(folder, name).unlink(missing_ok=True)
                if self.fsync:
                    fd = os.open(folder, os.O_RDONLY)
                    os.fsync(fd)
                    os.close(fd)

    def free_bytes(self) -> int | None:
        existing = next(p for p in (self.root, *self.root.absolute().parents) if p.exists())
        return shutil.disk_usage(existing).free


class _FileWriter:
    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.written = 0

    def write(self, part: memoryview) -> None:
        part = part.cast("B") if part.format != "B" or part.ndim != 1 else part
        while len(part):
            done = os.write(self._fd, part)
            self.written += done
            part = part[done:]


class StoreObjects:
    """Objects of any Zarr store (fsspec, obstore), through its public asynchronous interface."""

    CONCURRENCY = 16  # range reads in flight

    def __init__(self, store: Store) -> None:
        self.store = store

    def get(self, key: str) -> bytes | None:
        with _typed(self.store, key):
            found = wait(self.store.get(key, cpu.buffer_prototype))
            return None if found is None else found.to_bytes()

    def put(self, key: str, data: bytes | memoryview) -> None:
        with _typed(self.store, key, len(data)):
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

            await asyncio.gather(*map(one, extents))

        with _typed(self.store, extents[0].key if extents else ""):
            wait(all_of_them())

    def size(self, key: str) -> int | None:
        try:
            return wait(self.store.getsize(key))
        except FileNotFoundError:
            return None

    def list(self, prefix: str) -> Iterator[str]:
        async def collect() -> list[str]:
            return [key async for key in self.store.list_prefix(prefix.rstrip("/") + "/")]

        with _typed(self.store, prefix):
            yield from wait(collect())

    def delete(self, key: str) -> None:
        with _typed(self.store, key):
            wait(self.store.delete(key))

    def delete_prefix(self, prefix: str) -> None:
        with _typed(self.store, prefix):
            wait(self.store.delete_dir(prefix))

    def settle(self, prefixes: Sequence[str]) -> None:
        """Nothing to do: puts are atomic and durable."""

    def free_bytes(self) -> int | None:
        return None


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


def _read_full(fd: int, extent: Extent) -> None:
    views, offset = [v for v in extent.views if len(v)], extent.offset
    while views:
        got = os.preadv(fd, views[:1024], offset)
        if got == 0:
            raise OSError(errno.EIO, f"file ends at byte {offset}, more was expected")
        offset += got
        while views and got >= len(views[0]):
            got -= len(views.pop(0))
        if got:
            views[0] = views[0][got:]


@contextmanager
def _typed(where: object, key: str, size: int | None = None) -> Iterator[None]:
    """Turn the operating system's errors into ours, with place, key and size."""
    try:
        yield
    except OSError as err:
        place = f"{where}/{key}"
        if err.errno in (errno.ENOSPC, errno.EDQUOT):
            need = "" if size is None else f" while writing {format_bytes(size)}"
            raise StorageFullError(
                f"no space left{need}: {place}; free some, or give --scratch on a larger disk, "
                "and run again to resume"
            ) from err
        raise StorageError(f"{err.strerror or err}: {place}") from err
