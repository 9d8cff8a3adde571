"""Files that are there whole or not at all, also where several processes write one name."""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path
from typing import Any


def put(path: Path, data: str | bytes) -> None:
    """Replace a file in one step, by a part of a name of its own; of several writers, the last one's file stays.

    What is no plain file, such as /dev/stdout, is written as it is.
    """
    data = data.encode() if isinstance(data, str) else data
    path = Path(os.path.realpath(path))  # a link stays one
    if path.exists() and not path.is_file():
        path.write_bytes(data)
        return
    part = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    try:
        with part.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def put_json(path: Path, value: Any) -> None:
    put(path, json.dumps(value, indent=1))
