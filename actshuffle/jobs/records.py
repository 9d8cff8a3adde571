"""Small records that carry their own checksum: a torn, stale or altered one counts as absent.

::

    {"sha256": "...", "body": {"format": 1, "job": "...", ...}}
"""

from __future__ import annotations

import json
from typing import Any

from actshuffle.arrays.names import FORMAT
from actshuffle.seals import checksum


def sealed(body: dict[str, Any]) -> bytes:
    """The bytes of a record, with its checksum."""
    text = json.dumps({"format": FORMAT, **body}, sort_keys=True)
    return f'{{"sha256": "{checksum(text)}", "body": {text}}}'.encode()


def unsealed(data: bytes | None) -> dict[str, Any] | None:
    """The content of a record, or None if it is absent, torn or altered."""
    if data is None:
        return None
    try:
        document = json.loads(data)
        body: dict[str, Any] = document["body"]
        text = json.dumps(body, sort_keys=True)
        if checksum(text) != document["sha256"] or body["format"] != FORMAT:
            return None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return body


def format_of(data: bytes) -> Any:
    """The format that a record claims, if that much can be read."""
    try:
        return json.loads(data)["body"]["format"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
