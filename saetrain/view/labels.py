"""What people call latents: one JSON file beside the result, which no run writes or removes.

{"format": 1, "labels": {"123": "the word nuclear"}}
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from saetrain.errors import ConfigError, DataError
from saetrain.writing import put

FORMAT = 1
LONGEST = 500  # characters of a label


class Labels:
    """The labels of a result.  `put` replaces the file in one step, so a crash leaves the old or the new one."""

    def __init__(self, path: Path) -> None:
        """Read the file, if it is there.  Raises `DataError` for one that is not ours, or can never be."""
        self.path, self._lock = path, threading.Lock()
        if not path.absolute().parent.is_dir():
            raise DataError(f"labels cannot be kept in {path}: there is no such folder")
        self._held = self._read()

    def get(self, latent: int) -> str:
        return self._held.get(latent, "")

    def all(self) -> dict[int, str]:
        return dict(self._held)

    def document(self) -> dict[str, object]:
        """What the file holds."""
        return {"format": FORMAT, "labels": {str(latent): self._held[latent] for latent in sorted(self._held)}}

    def put(self, latent: int, text: str) -> None:
        """Set one label, or remove it with an empty text.  Labels that others saved meanwhile are kept."""
        text = " ".join(text.split())
        if len(text) > LONGEST:
            raise ConfigError(f"a label has at most {LONGEST} characters, and this one {len(text)}")
        with self._lock, _alone(self.path.absolute().parent):
            held = self._read()
            held.pop(latent, None)
            if text:
                held[latent] = text
            before, self._held = self._held, held
            try:
                put(self.path, json.dumps(self.document(), ensure_ascii=False, indent=1))
            except BaseException:
                self._held = before
                raise

    def _read(self) -> dict[int, str]:
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            if found["format"] != FORMAT:
                raise DataError(f"{self.path} has format {found['format']}; this version reads {FORMAT}")
            return {int(latent): str(text) for latent, text in found["labels"].items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{self.path} holds no labels: {type(error).__name__}: {error}") from error


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait until no other page writes labels in a folder; where there are no locks, go on without one."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
