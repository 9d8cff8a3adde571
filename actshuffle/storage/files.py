"""Byte objects as files under a directory: the fast path between disk and our buffers.

Large objects that must be durable are written with O_DIRECT: without a copy into the page cache, and without the
cost of its pages, which on virtual machines is several times that of the disk.  For reads see directio.py.  A put
writes under a temporary name, calls fsync, and renames.
"""

from __future__ import annotations

import errno
import itertools
import os
import resource
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

from actshuffle.errors import ActshuffleError, SourceError, StorageError, StorageFullError
from actshuffle.storage.directio import (
    DIRECT_BYTES,
    Extent,
    FileWriter,
    OpenFile,
    create,
    file_system,
    has_cached,
    read_full,
    row_reader,
)
from actshuffle.storage.mapping import MappedFiles, reserve
from actshuffle.storage.syscalls import allocate
from actshuffle.units import format_bytes

_ABSENT = (FileNotFoundError, NotADirectoryError)
_PARTIAL = ".actshuffle-partial"
AT_ONCE, LISTED = 8, 10_000  # threads that delete or flush, and the paths that are held in memory for them
OPEN_AHEAD = 4  # files that are open in advance for one prepared read; a process may have few open files
KEPT = 512  # files that stay open for further rows, if a process may have twice as many


class Writer(Protocol):
    def write(self, part: memoryview) -> None:
        """Append bytes; the caller may reuse the memory at once."""


class LocalObjects:
    """Files under a directory.  Reads and writes go straight between the file and the caller's memory."""

    is_local, copies = True, 0

    def __init__(self, root: Path, fsync: bool = True, direct: bool = False) -> None:
        self.root, self.fsync = root, fsync
        self._direct, self._read_rows = direct, row_reader(direct=direct)
        self._inside: set[str] = set()  # folders that are known to be no links out of the root
        self._folders: dict[str, str] = {}  # paths of folders in which a file was read, by key
        self._kept: dict[str, OpenFile] = {}  # files that `read_rows` keeps open, as long as these objects live

    def _path(self, key: str, *, follow: bool = True) -> Path:
        """The path of a key that `_check` passes."""
        self._check(key, follow=follow)
        return self.root / key

    def _check(self, key: str, *, follow: bool = True) -> None:
        """Refuse a key that leads out of the root, by a link of others too.  Paths would take several times as long."""
        parts = key.split("/")
        if key.startswith("/") or ".." in parts or "\0" in key:
            raise StorageError(f"key {key!r} leaves {self.root}")
        above = ("/".join(parts[:n]) for n in range(1, len(parts)))
        folders = [folder for folder in above if folder not in self._inside]
        with typed(self.root, key):
            for inner in [*folders, key] if key and follow else folders:
                self._refuse_escape(f"{self.root}/{inner}")
        self._inside.update(folders)

    def _refuse_escape(self, path: str) -> None:
        with suppress(*_ABSENT):
            if stat.S_ISLNK(os.lstat(path).st_mode):
                home, goal = os.path.realpath(self.root), os.path.realpath(path)
                if goal != home and not goal.startswith(home.rstrip("/") + "/"):
                    raise SourceError(f"{path} is a link out of {self.root}, and is not followed")

    def get(self, key: str) -> bytes | None:
        with typed(self.root, key), suppress(*_ABSENT, IsADirectoryError):
            fd = _open_file(self._path(key))
            with os.fdopen(fd, "rb") as file:
                return file.read()
        return None

    def put(self, key: str, data: bytes | memoryview) -> None:
        with self.writer(key, len(data)) as out:
            out.write(memoryview(data))

    @contextmanager
    def writer(self, key: str, size: int) -> Iterator[Writer]:
        """Write an object of ``size`` bytes in order; it appears when the block ends without error."""
        path = self._path(key)
        # A random name, since workers in containers may share both process ids and this folder.
        partial = path.with_name(f"{path.name}.{secrets.token_hex(8)}{_PARTIAL}")
        with typed(self.root, key, size):
            path.parent.mkdir(parents=True, exist_ok=True)
            fd, direct = create(partial, direct=self.fsync and size >= DIRECT_BYTES)
            try:
                if size >= DIRECT_BYTES and not direct and file_system(os.fstat(fd).st_dev) == "ext4":
                    allocate(fd, size)
                writer = FileWriter(fd, direct)
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

    def _open(self, key: str) -> int:
        """Open a key's file.  In a folder that was checked, one that is no link needs no check, a third of the time."""
        folder, _, name = key.rpartition("/")
        known = self._folders.get(folder)
        if known is not None and name != ".." and "\0" not in name:
            try:
                return _open_file(f"{known}/{name}", os.O_NOFOLLOW)
            except OSError as err:
                if err.errno != errno.ELOOP:
                    raise
        self._check(key)
        fd = _open_file(f"{self.root}/{key}")
        self._folders[folder] = f"{self.root}/{folder}"
        return fd

    def read(self, extents: Sequence[Extent]) -> None:
        for key, group in itertools.groupby(extents, key=lambda e: e.key):
            self._read(key, group, None)

    def reading(self, extents: Sequence[Extent]) -> Callable[[], None]:
        """Prepare `read` as a call for later, with the first files open already."""
        groups = ((key, [*group]) for key, group in itertools.groupby(extents, key=lambda e: e.key))
        ready = [
            (key, group, self._ahead(key) if number < OPEN_AHEAD else None)
            for number, (key, group) in enumerate(groups)
        ]

        def read() -> None:
            for key, group, file in ready:
                self._read(key, group, file)

        return read

    def read_rows(self, key: str, width: int, offsets: Sequence[int], out: memoryview, goals: Sequence[int]) -> None:
        """Read ``width`` bytes at each offset of a file to the goals in ``out``.

        The first files stay open: opening one takes as long as reading ten rows, and each is read again and again.
        """
        with typed(self.root, key):
            file = self._kept.get(key)
            if file is None:
                file = OpenFile(self._open(key), direct=self._direct)
                if len(self._kept) < min(KEPT, _most_files() // 2):
                    self._kept[key] = file
            self._read_rows(file.fd, width, offsets, out, goals)

    def mapped(self, keys: Sequence[str], nbytes: int, slot: int) -> MappedFiles | None:
        """The first ``nbytes`` of each file, ``slot`` apart in one array; None where the system refuses."""
        found = reserve(len(keys), slot)
        for number, key in enumerate(keys if found else ()):
            with typed(self.root, key):
                file = OpenFile(self._open(key))
                if found and not found.add(number * slot, file.fd, nbytes, self.root / key):
                    return None
        return found

    def _ahead(self, key: str) -> OpenFile | None:
        with suppress(OSError, ActshuffleError):  # the read itself will report it
            return OpenFile(self._open(key))
        return None

    def _read(self, key: str, extents: Iterable[Extent], file: OpenFile | None) -> None:
        with typed(self.root, key):
            file = file or OpenFile(self._open(key))
            try:
                for extent in extents:
                    read_full(file.fd, extent)
            finally:
                file.close()

    def is_cached(self, key: str, *offsets: int) -> bool:
        """True if the page cache holds some bytes of a file."""
        file = self._ahead(key)
        return file is not None and all(has_cached(file.fd, offset) for offset in offsets)

    def size(self, key: str) -> int | None:
        with typed(self.root, key), suppress(*_ABSENT):
            return self._path(key).stat().st_size
        return None

    def list(self, prefix: str) -> Iterator[str]:
        return (key for key, _ in self._listed(prefix))

    def sizes(self, prefix: str) -> Iterator[tuple[str, int]]:
        """The key and size of every object under a folder."""
        for key, entry in self._listed(prefix):
            with typed(self.root, key), suppress(*_ABSENT):
                # A link leads to a file inside the root, or is refused.
                size = self.size(key) if entry.is_symlink() else entry.stat(follow_symlinks=False).st_size
                if size is not None:
                    yield key, size

    def _listed(self, prefix: str) -> Iterator[tuple[str, os.DirEntry[str]]]:
        """The files under a folder by key, but those of linked folders and of folders that cannot be read."""
        self._check(prefix)
        folders = ["".join(f"{part}/" for part in prefix.split("/") if part not in ("", "."))]
        while folders:
            above = folders.pop()
            with suppress(OSError), os.scandir(f"{self.root}/{above}") as entries:
                for entry in entries:
                    if _is_folder(entry):
                        if not entry.is_symlink():
                            folders.append(f"{above}{entry.name}/")
                    elif not entry.name.endswith(_PARTIAL):
                        yield above + entry.name, entry

    def names(self, prefix: str) -> Sequence[str]:
        """The names of the files and folders directly inside a folder, sorted."""
        with typed(self.root, prefix), suppress(*_ABSENT):
            return sorted(p.name for p in self._path(prefix).iterdir())
        return []

    def delete(self, key: str) -> None:
        with typed(self.root, key):
            self._path(key, follow=False).unlink(missing_ok=True)

    def delete_prefix(self, prefix: str) -> None:
        """Delete a whole folder, half-written files included.

        A task that was given up may still be writing into it: the files it adds meanwhile are deleted too.
        """
        with typed(self.root, prefix):
            path = self._path(prefix, follow=False)
            for attempt in range(10):
                try:
                    if prefix and path.is_symlink():
                        path.unlink()
                    elif path.is_dir():
                        files = (f"{folder}/{name}" for folder, _, names in os.walk(path) for name in names)
                        while some := list(itertools.islice(files, LISTED)):  # a spill has millions
                            _in_shares(_unlink, some)
                        shutil.rmtree(path)
                    return
                except OSError as err:
                    if err.errno not in (errno.ENOENT, errno.ENOTEMPTY) or attempt == 9:
                        raise

    def settle(self, prefixes: Sequence[str]) -> None:
        """Remove the partial files of killed writers, and make the renames under some folders durable."""
        folders = []
        for prefix in prefixes:
            for folder, _, names in os.walk(self._path(prefix)):
                folders.append(folder)
                _unlink([f"{folder}/{name}" for name in names if name.endswith(_PARTIAL)])
        if self.fsync:
            _in_shares(_flush, folders)

    def free_bytes(self) -> int | None:
        existing = next(p for p in (self.root, *self.root.absolute().parents) if p.exists())
        return shutil.disk_usage(existing).free


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """False for links in circles, and for others that lead nowhere."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _in_shares(do: Callable[[list[str]], None], paths: list[str]) -> None:
    """Do a share of the paths on each of some threads: each path waits for a disk or a file server."""
    with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="actshuffle-paths") as pool:
        for done in [pool.submit(do, paths[i::AT_ONCE]) for i in range(min(AT_ONCE, len(paths)))]:
            done.result()


def _unlink(paths: list[str]) -> None:
    for path in paths:
        Path(path).unlink(missing_ok=True)


def _flush(folders: list[str]) -> None:
    for folder in folders:
        file = OpenFile(os.open(folder, os.O_RDONLY))  # closed also if it cannot be flushed
        os.fsync(file.fd)


def _open_file(path: str | Path, flags: int = 0) -> int:
    """Open a file for reading; refuse pipes and devices, which could block for ever."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | flags)
    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode):
        return fd
    os.close(fd)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    raise SourceError(f"{path} is not a file, but a pipe or a device")


def _most_files() -> int:
    """The number of files that this process may have open."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return KEPT * 2 if most == resource.RLIM_INFINITY else most


@contextmanager
def typed(where: object, key: str, size: int | None = None) -> Iterator[None]:
    """Turn errors of the operating system into `StorageError`, with place, key and size."""
    try:
        yield
    except OSError as err:
        place = f"{where}/{key}"
        if err.errno in (errno.ENOSPC, errno.EDQUOT):
            need = "" if size is None else f" while writing {format_bytes(size)}"
            raise StorageFullError(
                f"no space left{need}: {place}; free some, or give --scratch on a larger disk, and run again to resume"
            ) from err
        raise StorageError(f"{err.strerror or err}: {place}") from err
