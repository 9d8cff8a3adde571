"""The place of a store, a local path or a URL with its options, and URLs that are safe to write down."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from actshuffle.errors import RequestError

CLIENT = "client"  # the storage option that forces a client: "obstore" or "fsspec"
_FILE_URL = re.compile(r"file://(localhost)?/[^?#]*")


def as_place(path: str | Path, storage_options: dict[str, Any] | None = None) -> Place:
    """The place of a user's path or URL; paths become absolute, since workers may run in other folders."""
    if not isinstance(path, str | os.PathLike):
        raise RequestError(f"a store is given by a path or a URL, got {type(path).__name__}: {repr(path)[:60]}")
    if not isinstance(storage_options, Mapping | None):
        raise RequestError(f"storage options must be a dict, got {type(storage_options).__name__}")
    try:
        options = json.dumps(storage_options or {}, sort_keys=True)
    except TypeError as err:
        raise RequestError(f"storage options must be plain JSON values: {err}") from err
    text = str(path)
    if "\0" in text or not text:
        raise RequestError(f"{text!r} is no path")
    if text.startswith("file://") and not _FILE_URL.fullmatch(text):
        raise RequestError(f"{text!r} is no file URL: write file:///absolute/path, with %3F for ? and %23 for #")
    if has_secret(text):
        raise RequestError(
            f"{public_url(text)} was given with a password or a signed query, which would end up in logs: "
            "give credentials by storage options"
        )
    return Place(text if "://" in text else str(Path(text).absolute()), options)


def local_path(place: Place) -> Path | None:
    """The directory of a local place (a path or a ``file://`` URL), or None for any other URL."""
    if place.url.startswith("file://"):
        return Path(unquote(urlsplit(place.url).path))
    return None if "://" in place.url else Path(place.url)


def public_url(url: str) -> str:
    """A URL without user, password and query, safe to write down."""
    if "://" not in url:
        return url
    scheme, rest = url.split("://", 1)
    head, slash, tail = rest.partition("/")
    return f"{scheme}://{head.rsplit('@', 1)[-1]}{slash}{tail.split('?', 1)[0]}"


def has_secret(url: str) -> bool:
    """True if a URL carries a password, or a query, which may be a signature."""
    scheme, mark, rest = url.partition("://")
    user = rest.partition("/")[0].rpartition("@")[0]
    return bool(mark) and scheme != "file" and (":" in user or "?" in rest)


@dataclass(frozen=True)
class Place:
    """The place of a store: a local path or a URL.  Options hold credentials and the like; they are never written."""

    url: str
    options: str = dataclasses.field(default="{}", repr=False)  # JSON, as fsspec takes it

    def __str__(self) -> str:
        """The URL as it may appear in logs, messages and files."""
        return public_url(self.url)

    def __repr__(self) -> str:
        return f"Place({str(self)!r})"

    def beside(self, suffix: str) -> Place:
        """The place next to this one that has its name and a suffix."""
        return Place(self.url.rstrip("/") + suffix, self.options)

    def child(self, name: str) -> Place:
        return Place(self.url.rstrip("/") + "/" + name, self.options)
