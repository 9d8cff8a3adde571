"""Arrays of many tasks, added up by further tasks in a tree, so that nobody reads more than a few of them.

::

    folder/0/0 .. 31    folder/0/32 .. 63       the arrays: int64, one object each
    folder/1/0          folder/1/1              sums of FAN of them
    folder/2/0                                  the total

An object that is there holds what its task would write again, so whoever begins anew goes on with those.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from actshuffle.arraytypes import I64
from actshuffle.errors import FormatError
from actshuffle.executors import Executor
from actshuffle.jobs.records import marked, unmarked
from actshuffle.limits import FAN
from actshuffle.storage.objects import Objects, open_objects
from actshuffle.storage.place import Place


@dataclass(frozen=True)
class Sums:
    """The arrays of ``count`` tasks in a folder of a place, and their sums; ``owner`` is the identity of the job."""

    place: Place
    folder: str
    owner: str
    count: int

    def read(self, name: str) -> I64 | None:
        """An array, or None if it is absent or damaged."""
        data = self._objects.get(f"{self.folder}/{name}")
        body = None if data is None else unmarked(self._name(name), data)
        return None if body is None else np.frombuffer(body, "<i8")

    def write(self, name: str, array: I64) -> None:
        self._objects.put(f"{self.folder}/{name}", marked(self._name(name), array.astype("<i8").tobytes()))

    def rounds(self) -> list[int]:
        """The number of sums of each round, down to one."""
        found, count = list[int](), self.count
        while not found or count > 1:
            count = -(-count // FAN)
            found.append(count)
        return found

    def total(self) -> I64 | None:
        """The sum of all arrays, or None if it was not made yet."""
        return self.read(f"{len(self.rounds())}/0")

    def add_up(self, executor: Executor) -> I64:
        """Make the sum of all arrays, and remove these."""
        for number, count in enumerate(self.rounds(), 1):
            for _ in executor.map(add, ((self, number, at) for at in range(count))):
                pass
        total = self.total()
        assert total is not None
        self._objects.delete_prefix(f"{self.folder}/0")
        return total

    @property
    def _objects(self) -> Objects:
        return open_objects(self.place, fsync=False)

    def _name(self, name: str) -> str:
        return f"{self.owner} {self.folder}/{name}"


def add(sums: Sums, number: int, at: int) -> None:
    """Make one sum of a round, unless it is there."""
    if sums.read(f"{number}/{at}") is not None:
        return
    before = sums.count if number == 1 else sums.rounds()[number - 2]
    total: I64 | None = None
    for part in range(at * FAN, min((at + 1) * FAN, before)):
        found = sums.read(f"{number - 1}/{part}")
        if found is None:
            raise FormatError(f"{sums.folder}/{number - 1}/{part} in {sums.place} is gone or damaged; run again")
        total = found.copy() if total is None else np.add(total, found, out=total)
    assert total is not None
    sums.write(f"{number}/{at}", total)
