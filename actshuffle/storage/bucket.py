"""Objects in a bucket of S3, Google Cloud Storage or Azure, through obstore.

Ranges arrive in memory of the client's, a few MB each, and are copied once, to their place.  Objects that lie in one
piece in memory are sent from there.  Those that are written in order (`writer`) are sent in parts as they come, and are
given up as a whole if the writer fails.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from actshuffle.errors import RequestError, StorageError
from actshuffle.extras import need
from actshuffle.limits import STORE_NAMES, STORE_PART, STORE_WHOLE, part_bytes, uploads
from actshuffle.storage import buffers
from actshuffle.storage.bucketoptions import Settings, settings
from actshuffle.storage.files import Writer
from actshuffle.storage.place import Place
from actshuffle.storage.remote import RemoteObjects, event_loop, status_text, wait
from actshuffle.storage.requests import count, pages

UNDERWAY = 6 * STORE_PART  # bytes of the parts of one object that are on their way

_used_by = 0  # the process that has used obstore, whose threads do not survive a fork


def open_bucket(place: Place) -> BucketObjects:
    """The objects of a place in a bucket."""
    found = settings(place)
    stores = need("obstore.store", "remote")
    arguments: dict[str, Any] = {
        "config": found.config,
        "client_options": found.client,
        "retry_config": found.retry or None,
    }
    if found.credentials is not None:
        arguments["credential_provider"] = found.credentials
    try:
        store = getattr(stores, found.kind)(found.bucket, prefix=found.prefix or None, **arguments)
    except Exception as err:
        raise RequestError(f"cannot open {place}: {_clean(str(err), found)}") from None
    return BucketObjects(store, found, str(place))


def survives_here() -> bool:
    """False in a process that was forked from one that had used obstore: every call would wait for ever."""
    return _used_by in (0, os.getpid())


class BucketObjects(RemoteObjects):
    """Objects of one of obstore's stores."""

    copies = 0

    def __init__(self, store: Any, found: Settings, name: str) -> None:
        global _used_by
        super().__init__(name)
        _used_by = os.getpid()
        self._obstore, self.store, self._settings = need("obstore", "remote"), store, found

    def get(self, key: str) -> bytes | None:
        async def whole() -> bytes:
            answer = await self._obstore.get_async(self.store, key)
            return bytes(await answer.bytes_async())

        count("get")
        with self.typed(key):
            found: bytes | None = self._present(whole())
            return found

    async def fetch(self, key: str, start: int, stop: int) -> memoryview:
        return memoryview(await self._obstore.get_range_async(self.store, key, start=start, end=stop))

    def put(self, key: str, data: bytes | memoryview) -> None:
        nbytes = len(data)
        count("put", uploads(nbytes))
        with self.typed(key, nbytes):
            wait(self._put(key, np.frombuffer(data, np.uint8).data if nbytes else b"", nbytes))

    async def _put(self, key: str, data: Any, nbytes: int) -> None:
        await self._obstore.put_async(
            self.store,
            key,
            data,
            use_multipart=nbytes > STORE_WHOLE,
            chunk_size=part_bytes(nbytes),
            max_concurrency=max(1, min(4, UNDERWAY // part_bytes(nbytes))),
        )

    @contextmanager
    def writer(self, key: str, size: int) -> Iterator[Writer]:
        if size <= STORE_WHOLE:
            with self._whole(key, size) as whole:
                yield whole
            return
        count("put", uploads(size))
        parts = _Parts(size)
        upload = asyncio.run_coroutine_threadsafe(self._upload(key, parts, size), event_loop())
        try:
            yield parts
        except BaseException as err:
            parts.end(err)
            upload.exception()  # by then the store has been told to forget the parts
            raise
        with self.typed(key, size):
            parts.end(None)
            upload.result()

    async def _upload(self, key: str, parts: _Parts, size: int) -> None:
        try:
            await self._put(key, parts.stream(), size)
        finally:
            parts.stop()

    def size(self, key: str) -> int | None:
        async def head() -> int:
            return int((await self._obstore.head_async(self.store, key))["size"])

        count("head")
        with self.typed(key):
            found: int | None = self._present(head())
            return found

    def sizes(self, prefix: str) -> Iterator[tuple[str, int]]:
        with self.typed(prefix):
            yield from wait(self._listed(prefix))

    async def _listed(self, prefix: str) -> list[tuple[str, int]]:
        found = list[tuple[str, int]]()
        async for some in self._obstore.list(self.store, prefix.rstrip("/") or None, chunk_size=STORE_NAMES):
            found += ((one["path"], int(one["size"])) for one in some)
        count("list", pages(len(found)))
        return found

    def names(self, prefix: str) -> Sequence[str]:
        """The names of the objects and folders directly inside a folder, sorted."""
        folder = prefix.rstrip("/")

        async def inside() -> list[str]:
            found = await self._obstore.list_with_delimiter_async(self.store, folder or None)
            paths = [*found["common_prefixes"], *(one["path"] for one in found["objects"])]
            count("list", pages(len(paths)))
            return sorted({path.rstrip("/").rpartition("/")[2] for path in paths if path.rstrip("/") != folder})

        with self.typed(prefix):
            return wait(inside())

    def delete(self, key: str) -> None:
        with self.typed(key):
            wait(self._delete([key]))

    def delete_prefix(self, prefix: str) -> None:
        async def clear() -> None:
            keys = [key for key, _ in await self._listed(prefix)]
            while keys and not await self._delete(keys):
                keys = [key for key, _ in await self._listed(prefix)]

        with self.typed(prefix):
            wait(clear())

    async def _delete(self, keys: list[str]) -> bool:
        """Delete objects; False if one was gone already, after which some stores leave the rest."""
        count("delete", pages(len(keys)) if self._settings.kind == "S3Store" else len(keys))
        try:
            await self._obstore.delete_async(self.store, keys if len(keys) > 1 else keys[0])
        except FileNotFoundError as err:
            if _no_bucket(err):
                raise
            return False
        return True

    def _present(self, call: Coroutine[Any, Any, Any]) -> Any:
        """The call's result, or None if there is no such object in the bucket."""
        try:
            return wait(call)
        except FileNotFoundError as err:
            if _no_bucket(err):
                raise
            return None

    def explain(self, err: BaseException) -> str:
        return _clean(str(err), self._settings)

    @contextmanager
    def typed(self, key: str, size: int | None = None) -> Iterator[None]:
        if not survives_here():
            raise StorageError(
                f"{self.name} was opened before this process was forked, which its client does not survive: start "
                'processes with "spawn" or "forkserver", or open the store in each of them'
            )
        # Without the error itself: its text holds the server's whole answer, which may repeat credentials.
        try:
            yield
        except OSError as err:
            if err.errno is not None:
                with super().typed(key, size):
                    raise
            raise StorageError(f"{self.explain(err)}: {self.name}/{key}") from None
        except Exception as err:
            if type(err).__module__.startswith("obstore"):
                raise StorageError(f"{self.explain(err)}: {self.name}/{key}") from None
            with super().typed(key, size):
                raise


def _no_bucket(err: BaseException) -> bool:
    return any(code in str(err) for code in ("<Code>NoSuchBucket</Code>", "<Code>ContainerNotFound</Code>"))


def _clean(text: str, found: Settings) -> str:
    """What an error of obstore's says: the server's answer in one line, or how far it came; no secrets."""
    text, _, debug = text.partition("\n\nDebug source")
    if status := re.search(r"status code: (\d+)", text):
        code, message = (re.search(f"<{name}>([^<]*)</{name}>", text) for name in ("Code", "Message"))
        said = status_text(status[1], code[1] if code else "", message[1] if message else "")
    else:
        kind = re.search(r"kind: (\w+)", debug)
        said = " ".join(text.split()) + (f" ({kind[1]})" if kind else "")
        if "without LOCATION" in said:
            said += ': the bucket is in another region; give {"client_kwargs": {"region_name": ...}}'
    for secret in found.secrets:
        said = said.replace(secret, "...")
    return said


class _Parts:
    """Bytes on their way from a writer, on any thread, to an upload in the event loop; a few parts at a time."""

    def __init__(self, size: int) -> None:
        self._step, self._left = part_bytes(size), size
        self._held, self._at = np.empty(0, np.uint8), 0  # a part, and the bytes of it that are filled
        self._queue: asyncio.Queue[bytes | BaseException | None] = asyncio.Queue()
        self._room, self._over = asyncio.Semaphore(1), False

    def write(self, part: memoryview) -> None:
        part = part.cast("B")
        while part.nbytes:
            if self._at == len(self._held):  # new memory, since the client may send from the old for a while
                self._held, self._at = buffers.pages(min(self._step, self._left)), 0
            some = part[: len(self._held) - self._at]
            stop = self._at + some.nbytes
            self._held[self._at : stop] = some
            self._at, self._left, part = stop, self._left - some.nbytes, part[some.nbytes :]
            if stop == len(self._held):
                self._send(self._held.data)

    def end(self, failure: BaseException | None) -> None:
        """Send the rest, with zeros for what was never written, or give up."""
        if failure is None:
            while self._left > 0:
                self.write(memoryview(bytes(min(self._left, self._step))))
        self._send(failure)

    def _send(self, part: Any) -> None:
        asyncio.run_coroutine_threadsafe(self._put(part), event_loop()).result()

    async def _put(self, part: Any) -> None:
        if not self._over:
            await self._room.acquire()
            self._queue.put_nowait(part)

    async def stream(self) -> AsyncIterator[bytes]:
        while (part := await self._queue.get()) is not None:
            self._room.release()
            if isinstance(part, BaseException):
                raise InterruptedError(f"gave up: {type(part).__name__}")
            yield part

    def stop(self) -> None:
        """Nothing more is taken: the upload is over, or has failed."""
        self._over = True
        self._queue.put_nowait(None)  # ends a `stream` that nobody reads any more
        self._room.release()  # for the part that may be waiting
