"""Small records that carry their own checksum: a torn, stale or altered one counts as absent.

::

    {"sha256": "...", "body": {"format": 1, "job": "...", ...}}

Tables of numbers are bytes instead, followed by a checksum of their name and the bytes, so that one of another place
or of another job is not taken for them.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from typing import Any

from actshuffle.arrays.names import FORMAT
from actshuffle.seals import checksum

_DAMAGED = (ValueError, KeyError, TypeError, RecursionError)  # errors of reading what is no record


def sealed(body: dict[str, Any]) -> bytes:
    """The bytes of a record, with its checksum."""
    text = json.dumps({"format": FORMAT, **body}, sort_keys=True)
    return f'{{"sha256": "{checksum(text)}", "body": {text}}}'.encode()


def unsealed(data: bytes | None) -> dict[str, Any] | None:
    """The content of a record, or None if it is absent, torn or altered."""
    with suppress(*_DAMAGED):
        document = json.loads(data or b"")
        body: dict[str, Any] = document["body"]
        if checksum(json.dumps(body, sort_keys=True)) == document["sha256"] and body["format"] == FORMAT:
            return body
    return None


CHECK_BYTES = 16  # size of a table's checksum


def marked(name: str, data: bytes) -> bytes:
    """The bytes of a table, followed by their checksum; ``name`` says which table of which job it is."""
    return data + _mark(name, data)


def unmarked(name: str, data: bytes) -> bytes | None:
    """The bytes of a table, or None if its checksum does not match."""
    body = data[:-CHECK_BYTES]
    return body if data[-CHECK_BYTES:] == _mark(name, body) else None


def _mark(name: str, data: bytes) -> bytes:
    return hashlib.sha256(f"{name} ".encode() + data).digest()[:CHECK_BYTES]


def format_of(data: bytes) -> Any:
    """The format that a record claims, if that much can be read."""
    with suppress(*_DAMAGED):
        return json.loads(data)["body"]["format"]
    return None
