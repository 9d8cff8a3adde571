"""Objects of any store that fsspec reaches, through zarr's store for it."""

from __future__ import annotations

import asyncio
import json
import os
import weakref
from collections.abc import Iterator, Sequence

import numpy as np
from zarr.abc.store import RangeByteRequest
from zarr.buffer import cpu
from zarr.storage import FsspecStore

from actshuffle.errors import RequestError
from actshuffle.limits import uploads
from actshuffle.storage.place import CLIENT, Place
from actshuffle.storage.remote import RemoteObjects, event_loop, wait
from actshuffle.storage.requests import count, pages


def open_fsspec(place: Place) -> FsspecObjects:
    """The objects of a place, through fsspec."""
    # A separate instance: fsspec shares instances, and one that another event loop has used fails here.
    options = {"skip_instance_cache": True, **json.loads(place.options)}
    if place.url.startswith(("s3://", "s3a://")):
        options.setdefault("max_concurrency", 1)  # with more, s3fs asks for the size of an object before each get
    options.pop(CLIENT, None)
    try:
        return FsspecObjects(FsspecStore.from_url(place.url, storage_options=options), str(place))
    except (ImportError, ValueError, TypeError) as err:
        raise RequestError(f"cannot open {place}: {err}") from err


class FsspecObjects(RemoteObjects):
    """Objects of a store of zarr's for fsspec, through its public asynchronous interface."""

    copies = 2  # zarr's and the client's

    def __init__(self, store: FsspecStore, name: str = "") -> None:
        super().__init__(name or str(store))
        self.store = store
        weakref.finalize(self, _hang_up, store, os.getpid()).atexit = False

    def get(self, key: str) -> bytes | None:
        count("get")
        with self.typed(key):
            found = wait(self.store.get(key, cpu.buffer_prototype))
            return None if found is None else found.to_bytes()

    async def fetch(self, key: str, start: int, stop: int) -> memoryview:
        found = await self.store.get(key, cpu.buffer_prototype, RangeByteRequest(start, stop))
        if found is None:
            raise FileNotFoundError(f"no such object: {key}")
        return memoryview(found.to_bytes())

    def put(self, key: str, data: bytes | memoryview) -> None:
        count("put", uploads(len(data)))
        with self.typed(key, len(data)):
            wait(self.store.set(key, cpu.Buffer.from_array_like(np.frombuffer(data, np.uint8))))

    def size(self, key: str) -> int | None:
        count("head")
        with self.typed(key):
            try:
                return wait(self.store.getsize(key))
            except FileNotFoundError:
                return None

    def sizes(self, prefix: str) -> Iterator[tuple[str, int]]:
        folder = prefix.rstrip("/") + "/" if prefix else ""

        async def collect() -> list[tuple[str, int]]:
            top = f"{self.store.path}/"
            self.store.fs.invalidate_cache()
            found = await self.store.fs._find(f"{top}{folder}".rstrip("/"), detail=True)
            count("list", pages(len(found)))
            sized = ((path.removeprefix(top), info.get("size")) for path, info in found.items())
            return [(key, -1 if size is None else int(size)) for key, size in sized]

        with self.typed(prefix):
            yield from wait(collect())

    def names(self, prefix: str) -> Sequence[str]:
        """The names of the objects and folders directly inside a folder, sorted."""

        async def collect() -> list[str]:
            return sorted([name async for name in self.store.list_dir(prefix)])

        count("list")
        with self.typed(prefix):
            return wait(collect())

    def delete(self, key: str) -> None:
        count("delete")
        with self.typed(key):
            wait(self.store.delete(key))

    def delete_prefix(self, prefix: str) -> None:
        count("list")
        count("delete")
        with self.typed(prefix):
            wait(self.store.delete_dir(prefix))


def _hang_up(store: FsspecStore, pid: int) -> None:
    """Close the connections of an unused client, which s3fs leaves open in foreign event loops."""
    client = getattr(store.fs, "_s3", None)
    if client is not None and pid == os.getpid():
        asyncio.run_coroutine_threadsafe(client.close(), event_loop())
