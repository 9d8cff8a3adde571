"""Where the passes over a dataset begin, for every process that has a copy of it.

Workers of a data loader have copies, and living ones are not made again for the next pass.  So the start of the next
pass lies in a small file that all of them read, and that they move on when a pass is over::

    the dataset here     move      set_epoch, load_state_dict: the next pass begins there
    each worker          begin     the first worker of a pass decides where it begins, the others follow
    each worker          finish    the last worker of a pass moves the start to its end

A pass that was broken off moves nothing, so the next one begins where it began.
"""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

State = dict[str, Any]
KEPT = 16  # passes that may be under way at once: of several data loaders, or broken off


class PassName(NamedTuple):
    """One pass, by the workers that share it (a number that all of them know) and its number among theirs."""

    crew: int
    number: int


class Board:
    """The start of the next pass, and the passes under way, in a file that copies of this object share."""

    def __init__(self, start: State) -> None:
        self._first = start
        handle, path = tempfile.mkstemp(prefix="actshuffle-passes-")
        os.close(handle)
        self._path = Path(path)
        weakref.finalize(self, _remove, self._path, os.getpid())

    def move(self, start: State) -> None:
        """Begin the next pass with this state."""
        with self._changing() as board:
            board.update(start=start, turn=board["turn"] + 1, waiting=True)

    def waiting(self) -> State | None:
        """The state that `move` set and no pass has begun with yet."""
        with self._changing() as board:
            return board["start"] if board["waiting"] else None

    def begin(self, name: PassName, workers: int) -> State:
        """The state that a pass of so many workers begins with: the same for each of them."""
        with self._changing() as board:
            for known in board["passes"]:
                if known["crew"] == name.crew and known["number"] >= name.number:
                    return dict(known["start"])  # also for one that is late for a pass broken off since
            opened = {**name._asdict(), "start": board["start"], "turn": board["turn"], "left": workers}
            board.update(passes=[opened, *board["passes"][: KEPT - 1]], waiting=False)
            return dict(board["start"])

    def finish(self, name: PassName, end: State) -> None:
        """One worker has come to the end of a pass."""
        with self._changing() as board:
            for known in board["passes"]:
                if (known["crew"], known["number"]) == name:
                    known["left"] -= 1
                    if known["left"] == 0 and known["turn"] == board["turn"]:
                        board["start"] = end

    @contextmanager
    def _changing(self) -> Iterator[dict[str, Any]]:
        with self._path.open("a+") as file:  # made again for a copy that outlived the object it was made of
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            text = file.read()
            board = json.loads(text) if text else {"start": self._first, "turn": 0, "waiting": False, "passes": []}
            before = json.dumps(board)
            yield board
            if (after := json.dumps(board)) != before or not text:
                file.truncate(0)
                file.write(after)
                file.flush()


def _remove(path: Path, owner: int) -> None:
    if os.getpid() == owner:
        path.unlink(missing_ok=True)
