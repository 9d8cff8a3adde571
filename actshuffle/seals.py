"""SHA-256 digests as hexadecimal text: the identity of values, and checksums of files."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def checksum(data: bytes | str, digits: int = 64) -> str:
    """The leading hexadecimal digits of the SHA-256 digest of some bytes, or of text in UTF-8."""
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()[:digits]


def seal(value: Any, digits: int = 32) -> str:
    """The checksum of plain values as JSON with sorted keys: equal values have one seal, whatever their order."""
    return checksum(json.dumps(value, sort_keys=True, default=str), digits)
