"""One writer for each place: a lock that ends with its process, or a claim that shows when another writes.

::

    out.zarr.actshuffle-lock                        a local place: a file that the writer holds with flock
    s3://b/out.zarr.actshuffle-claims/writer.json   elsewhere: the claim of the writer; of a part, ID.json

The kernel gives a file's lock back when the process that holds it ends, however that happens, so a dead writer
blocks nobody.  On NFS, Linux passes the lock on to the server, and it holds among hosts.

Object stores, and file systems without locks, know no living process.  There a writer that comes later puts its
own claim, removes the others, and goes on, unless one belongs to a process that is seen alive on the same host.  A
writer looks for its claim between stages, every few seconds of work, and before it publishes; one whose claim is
gone stops.  Of several writers thus the last to come publishes.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from actshuffle.errors import ActshuffleError, DestinationInUseError, StorageError
from actshuffle.storage.files import typed
from actshuffle.storage.objects import Objects, open_objects
from actshuffle.storage.place import Place, as_place, local_path

log = logging.getLogger("actshuffle")
SUFFIX, CLAIMS = ".actshuffle-lock", ".actshuffle-claims"
ALONE = "writer.json"  # the claim of a writer that shares with none: the last one to write it holds it
LOOK_SECONDS = 10.0  # of work between two looks at the claims
_CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF)


class Locks:
    """The places that this process writes, until the end of a ``with`` block."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._held: dict[str, Callable[[], None]] = {}  # how to see that a place is still ours, by its URL
        self._looked = time.monotonic()

    def __enter__(self) -> Locks:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Give the places back.  An error that comes of another writer's work gives way to one that says so."""
        with self._stack:
            if isinstance(error, ActshuffleError):
                with suppress(StorageError):
                    self.check()

    def take(self, place: Place, *, shared: str = "") -> None:
        """Lock a place, and what lies beside it under its name (``out.zarr.grown``), unless this is done already.

        ``shared`` names a job, whose parts several processes do.

        Raises
        ------
        DestinationInUseError : another process writes there; the message names it.
        """
        if not any(f"{place.url}.".startswith(f"{held}.") for held in self._held):
            self._held[place.url] = self._stack.enter_context(_lock(place, shared))

    def check(self) -> None:
        """Refuse to go on if another process has claimed one of the places since."""
        for is_ours in self._held.values():
            is_ours()
        self._looked = time.monotonic()

    def look(self) -> None:
        """`check`, if the last one is some time ago."""
        if time.monotonic() - self._looked > LOOK_SECONDS:
            self.check()


@contextmanager
def hold(*folders: str | Path) -> Iterator[Locks]:
    """Keep every other writer out of folders or stores within a ``with`` block.

    Raises
    ------
    DestinationInUseError : another process writes there; the message names it.
    """
    with Locks() as locks:
        for folder in folders:
            locks.take(as_place(folder))
        yield locks


def _lock(place: Place, shared: str) -> AbstractContextManager[Callable[[], None]]:
    path = local_path(place)
    return _claimed(place, shared) if path is None else _file_lock(place, path, shared)


def _nothing() -> None:
    """The kernel keeps a file's lock; there is nothing to look at."""


# --- Local places -------------------------------------------------------------------------------


@contextmanager
def _file_lock(place: Place, home: Path, shared: str) -> Iterator[Callable[[], None]]:
    home = Path(os.path.realpath(home))  # one lock for all links to a place
    path = home.with_name(home.name + SUFFIX)
    with _folders(path.parent):
        me = _me(shared)
        with typed(path.parent, path.name):
            fd = _locked(place, path, home, me)
        if fd is None:
            with _claimed(place, shared) as is_ours:
                yield is_ours
            return
        owner = os.getpid()
        try:
            yield _nothing
        finally:
            if os.getpid() == owner:  # not in a child that was forked meanwhile
                _withdraw(fd, me)
                with suppress(OSError):
                    if shared:  # the last one removes the file
                        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()
                fcntl.flock(fd, fcntl.LOCK_UN)  # such a child has the same lock
            os.close(fd)


def _locked(place: Place, path: Path, home: Path, me: dict[str, Any]) -> int | None:
    """The descriptor of the lock's file, locked; None where the file system has no locks."""
    while True:
        fd, found = _opened(path, home)
        with ExitStack() as stack:
            stack.callback(os.close, fd)
            try:
                _hold(fd, me)
                there = _is_there(fd, found)  # else its holder has removed it since it was opened
            except BlockingIOError as err:
                raise _in_use(place, _holders(fd)) from err
            except OSError as err:
                if err.errno not in _NO_LOCKS:
                    raise
                if found == path:
                    path.unlink(missing_ok=True)
                return None
            if there and me["shared"] and (others := [h for h in _holders(fd) if h["shared"] != me["shared"]]):
                _withdraw(fd, me)
                raise _in_use(place, others)
            if there:
                stack.pop_all()
                return fd


def _hold(fd: int, me: dict[str, Any]) -> None:
    """Lock a file and write down who does; whoever is alone replaces what the dead have written."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with suppress(OSError):  # a folder, or another user's file: locked, and not to be written
            os.truncate(fd, 0)
            os.write(fd, _line(me))
        if me["shared"]:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        if not me["shared"]:
            raise
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        with suppress(OSError):
            os.write(fd, _line(me))


def _withdraw(fd: int, me: dict[str, Any]) -> None:
    """Write down that a holder holds no more; others may share the file."""
    with suppress(OSError):
        os.write(fd, _line({**me, "ended": True}))


def _opened(path: Path, home: Path) -> tuple[int, Path]:
    flags = os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | flags, 0o666), path
    except OSError as err:
        if err.errno in _CLOSED:  # where no file can be made, the destination itself is locked
            for there in (path, home):
                with suppress(OSError):
                    return os.open(there, os.O_RDONLY | flags), there
        raise


def _is_there(fd: int, path: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(fd), path.lstat()) and os.fstat(fd).st_nlink > 0
    return False


def _holders(fd: int) -> list[dict[str, Any]]:
    """The holders that a lock's file names, but for those that are seen to be dead."""
    with suppress(OSError):
        found = [_read(line) for line in os.pread(fd, 1 << 16, 0).splitlines()]
        ended = {holder["id"] for holder in found if holder is not None and "ended" in holder}
        return [h for h in found if h is not None and h["id"] not in ended and not _is_dead(h)]
    return []


@contextmanager
def _folders(folder: Path) -> Iterator[None]:
    """A folder, made if it is not there, and removed at the end if nothing was written to it."""
    with typed(folder, ""):
        made = [p for p in (folder, *folder.parents) if not p.exists()]
        if made:
            log.warning("there was no folder %s; it is made now", made[-1])
        folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        with suppress(OSError):
            for path in made:
                path.rmdir()


# --- Places without locks -----------------------------------------------------------------------


@contextmanager
def _claimed(place: Place, shared: str) -> Iterator[Callable[[], None]]:
    if "/" not in place.url.split("://", 1)[-1].strip("/"):
        yield _nothing  # a whole bucket, which has nothing beside it
        return
    objects, me = open_objects(place.beside(CLAIMS)), _me(shared)
    key = f"{me['id']}.json" if shared else ALONE
    others = [(k, holder) for k, holder in _claims(objects) if not shared or holder["shared"] != shared]
    if living := [holder for _, holder in others if _is_alive(holder)]:
        raise _in_use(place, living)
    try:
        objects.put(key, _line(me))
        for other, _ in others:
            if other != key:
                objects.delete(other)
    except StorageError as err:
        log.warning("%s has no lock against a second writer: %s", place, err)
        yield _nothing
        return

    def is_ours() -> None:
        found = _read(objects.get(key))
        if found is None or found["id"] != me["id"]:
            raise DestinationInUseError(
                f"{place} is no longer this process's: {_told([h for _, h in _claims(objects)])} has claimed it since. "
                "This process stops and publishes nothing; when the other has ended, run the command that you want"
            )

    try:
        yield is_ours
    finally:
        with suppress(StorageError):
            found = _read(objects.get(key))
            if found is not None and found["id"] == me["id"]:
                objects.delete(key)
            if objects.is_local and not objects.names(""):
                objects.delete_prefix("")


def _claims(objects: Objects) -> list[tuple[str, dict[str, Any]]]:
    found = [(key, _read(objects.get(key))) for key in objects.names("")]
    return [(key, holder) for key, holder in found if holder is not None]


# --- Who ----------------------------------------------------------------------------------------


def _me(shared: str) -> dict[str, Any]:
    since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    who = {"host": os.uname().nodename, "process": os.getpid(), "born": _born(os.getpid()), "since": since}
    return {"id": secrets.token_hex(8), "shared": shared, **who}


def _born(process: int) -> int | None:
    """When a process started, in ticks since the machine did; None if there is none."""
    with suppress(OSError, ValueError, IndexError):
        return int(Path(f"/proc/{process}/stat").read_bytes().rpartition(b")")[2].split()[19])
    return None


def _is_alive(holder: dict[str, Any]) -> bool:
    """True if a holder is another process of this host, and runs."""
    here = holder["host"] == os.uname().nodename and holder["process"] != os.getpid()
    return here and holder["born"] is not None and _born(holder["process"]) == holder["born"]


def _is_dead(holder: dict[str, Any]) -> bool:
    """True if a holder was a process of this host, and is no more."""
    return bool(holder["host"] == os.uname().nodename) and _born(holder["process"]) != holder["born"]


def _line(holder: dict[str, Any]) -> bytes:
    return json.dumps(holder).encode() + b"\n"


def _read(data: bytes | None) -> dict[str, Any] | None:
    kinds = {"id": str, "shared": str, "host": str, "process": int, "born": int | None, "since": str}
    with suppress(ValueError, KeyError, TypeError, RecursionError):
        found = json.loads(data or b"")
        return found if all(isinstance(found[name], kind) for name, kind in kinds.items()) else None
    return None


def _told(holders: list[dict[str, Any]]) -> str:
    named = [f"process {h['process']} on {h['host']} (since {h['since']})" for h in holders[:1]]
    return named[0] if named else "another process"


def _in_use(place: Place, holders: list[dict[str, Any]]) -> DestinationInUseError:
    return DestinationInUseError(
        f"{place} is in use: {_told(holders)} is writing it. Wait until that process has ended, stop it, or choose "
        "another path; nothing was written"
    )
