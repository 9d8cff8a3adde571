"""Objects in a store that is reached by requests: everything that does not depend on the client.

A client provides a few coroutines (`RemoteObjects`).  They run in one event loop on its own thread, since clients are
bound to the loop that first used them, and tasks run on any thread.
"""

from __future__ import annotations

import asyncio
import errno
import os
import re
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache, partial
from typing import Any, TypeVar

from actshuffle.errors import ActshuffleError, StorageError
from actshuffle.limits import STORE_PIECE, STORE_REQUESTS
from actshuffle.storage.buffers import roomy_heap
from actshuffle.storage.directio import Extent, pieces
from actshuffle.storage.files import Writer, typed
from actshuffle.storage.requests import count

T = TypeVar("T")


class RemoteObjects:
    """The operations of `Objects` that are the same for all clients; subclasses add those that are not."""

    is_local = False

    def __init__(self, name: str) -> None:
        self.name = name
        roomy_heap()

    # --- Of the client ------------------------------------------------------------------------

    async def fetch(self, key: str, start: int, stop: int) -> memoryview:
        """A range of an object's bytes, or fewer where the object ends; raises FileNotFoundError."""
        raise NotImplementedError

    def put(self, key: str, data: bytes | memoryview) -> None:
        raise NotImplementedError

    def sizes(self, prefix: str) -> Iterator[tuple[str, int]]:
        """The key and size of every object under a folder; size -1 where the store lists no sizes."""
        raise NotImplementedError

    def explain(self, err: BaseException) -> str:
        """The message of an error of the client's, without secrets."""
        return explained(err)

    # --- Of all -------------------------------------------------------------------------------

    def writer(self, key: str, size: int) -> AbstractContextManager[Writer]:
        return self._whole(key, size)

    @contextmanager
    def _whole(self, key: str, size: int) -> Iterator[Writer]:
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
                stop = extent.offset + sum(len(v) for v in extent.views)
                async with gate:
                    data = await self.fetch(extent.key, extent.offset, stop)
                if len(data) != stop - extent.offset:
                    raise OSError(errno.EIO, f"object ends after {extent.offset + len(data)} bytes")
                at = 0
                for view in extent.views:
                    view[:] = data[at : at + len(view)]
                    at += len(view)

            parts = [p for extent in extents for p in pieces(extent, STORE_PIECE)]
            count("get", len(parts))
            running = [asyncio.ensure_future(one(part)) for part in parts]
            try:
                await asyncio.gather(*running)
            finally:  # after an error no request may write into memory that others may use by then
                for task in running:
                    task.cancel()
                await asyncio.gather(*running, return_exceptions=True)

        with self.typed(extents[0].key if extents else ""):
            wait(all_of_them())

    def mapped(self, keys: Sequence[str], nbytes: int, slot: int) -> None:
        """None: no object is a file of this machine."""

    def is_cached(self, key: str, *offsets: int) -> bool:
        """False: every read is a request."""
        return False

    def list(self, prefix: str) -> Iterator[str]:
        return (key for key, _ in self.sizes(prefix))

    def settle(self, prefixes: Sequence[str]) -> None:
        """Nothing to do: puts are atomic and durable."""

    def free_bytes(self) -> int | None:
        return None

    @contextmanager
    def typed(self, key: str, size: int | None = None) -> Iterator[None]:
        """Turn any error of a client library (no credentials, no bucket, no route) into a `StorageError`."""
        try:
            with typed(self.name, key, size):
                yield
        except ActshuffleError as err:
            if isinstance(err.__cause__, OSError) and (said := http_error(err.__cause__)):
                raise type(err)(f"{said}: {self.name}/{key}") from err.__cause__
            raise
        except Exception as err:
            raise StorageError(f"{self.explain(err)}: {self.name}/{key}") from err


def explained(err: BaseException) -> str:
    """The answer of the server, if the error is one, else the error's kind and text."""
    return http_error(err) or f"{type(err).__name__}: {err}"


def http_error(err: BaseException | None) -> str:
    """The HTTP status, code and message of the server's answer that caused an error of botocore; "" if none did."""
    while err is not None:
        answer = getattr(err, "response", None)
        if isinstance(answer, dict):
            said = answer.get("Error") or {}
            status = (answer.get("ResponseMetadata") or {}).get("HTTPStatusCode", "")
            return status_text(str(status), str(said.get("Code", "")), str(said.get("Message", "")))
        err = err.__cause__ or err.__context__
    return ""


_CHUNKED = (
    "the server wants to know the length of what it gets, which s3fs does not say over https unless it is given "
    '{"config_kwargs": {"request_checksum_calculation": "when_required"}}; obstore says it'
)


def status_text(status: str, code: str, message: str) -> str:
    """A server's answer in one line; codes that only repeat the status are left out."""
    code = "" if re.fullmatch(r"\d*", code) else f" {code}"
    if status == "411":
        message = f"{message}: {_CHUNKED}".removeprefix(": ")
    return f"HTTP {status}{code}" + (f": {message.rstrip('.')}" if message else "")


class _MemoryWriter:
    def __init__(self, size: int) -> None:
        self.data = bytearray(size)
        self._at = 0

    def write(self, part: memoryview) -> None:
        self.data[self._at : self._at + part.nbytes] = part.cast("B")
        self._at += part.nbytes


@lru_cache(maxsize=1)
def event_loop() -> asyncio.AbstractEventLoop:
    """The event loop of all calls to object stores."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="actshuffle-io", daemon=True).start()
    return loop


def wait(what: Coroutine[Any, Any, T] | Awaitable[T]) -> T:
    """Run a store's coroutine to its end, from any thread; returns its result."""

    async def call() -> T:
        return await what

    future = asyncio.run_coroutine_threadsafe(call(), event_loop())
    try:
        return future.result()
    except BaseException:
        future.cancel()  # after Ctrl-C nobody waits for it
        raise


os.register_at_fork(after_in_child=event_loop.cache_clear)  # the thread stays behind in the parent
