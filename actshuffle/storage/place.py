"""Where a store is: a local path or a URL with its options, and URLs that are safe to write down."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actshuffle.errors import RequestError


def as_place(path: str | Path, storage_options: dict[str, Any] | None = None) -> Place:
    """A user's path or URL; local ones absolute, since workers may run elsewhere in the tree."""
    try:
        options = json.dumps(storage_options or {}, sort_keys=True)
    except TypeError as err:
        raise RequestError(f"storage options must be plain JSON values: {err}") from err
    text = str(path)
    if "\0" in text or not text:
        raise RequestError(f"{text!r} is no path")
    if has_secret(text):
        raise RequestError(
            f"{public_url(text)} was given with a password or a signed query, which would end up in logs: "
            "give credentials by storage options"
        )
    return Place(text if "://" in text else str(Path(text).absolute()), options)


def local_path(place: Place) -> Path | None:
    """The directory of a local place, or None for a URL."""
    if place.url.startswith("file://"):
        return Path(place.url.removeprefix("file://"))
    return None if "://" in place.url else Path(place.url)


def public_url(url: str) -> str:
    """A URL without user, password or query, fit to be written down."""
    if "://" not in url:
        return url
    scheme, rest = url.split("://", 1)
    head, slash, tail = rest.partition("/")
    return f"{scheme}://{head.rsplit('@', 1)[-1]}{slash}{tail.split('?', 1)[0]}"


def has_secret(url: str) -> bool:
    """Does a URL carry a password, or a query, which may be a signature?"""
    scheme, mark, rest = url.partition("://")
    user = rest.partition("/")[0].rpartition("@")[0]
    return bool(mark) and scheme != "file" and (":" in user or "?" in rest)


@dataclass(frozen=True)
class Place:
    """Where a store is: a local path or a URL.  Options are credentials and the like; never written."""

    url: str
    options: str = dataclasses.field(default="{}", repr=False)  # JSON, as fsspec takes it

    def __str__(self) -> str:
        """Fit to be written down: in logs, messages and files."""
        return public_url(self.url)

    def __repr__(self) -> str:
        return f"Place({str(self)!r})"

    def child(self, name: str) -> Place:
        return Place(self.url.rstrip("/") + "/" + name, self.options)
