"""Virtual sources: folders that present arrays whose rows are stored elsewhere, and the readers that fetch them.

Several stores as one, rows chosen from a store, sorted stores that are merged, files of another format: to the
engine each is a source like any other.  On disk it is a folder that describes its arrays and names a reader::

    V/_actshuffle/virtual.json      the name and settings of the reader, and facts about the rows
    V/_actshuffle/arrays/NAME       zarr.json of each array, as a run sees it; no chunks

It has no ``zarr.json`` at its top, so that other programs do not take it for a store full of zeros.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from actshuffle.arrays.readers import Reader, known
from actshuffle.arrays.small import group_metadata
from actshuffle.errors import FormatError
from actshuffle.storage.objects import open_objects
from actshuffle.storage.place import Place

KEY = "_actshuffle/virtual.json"
ARRAYS = "_actshuffle/arrays"
FORMAT = 1


def describe(place: Place) -> dict[str, Any] | None:
    """The description of a virtual source, or None where there is none."""
    data = open_objects(place).get(KEY)
    return None if data is None else _parsed(data)


def write(
    place: Place,
    reader: str,
    settings: dict[str, Any],
    arrays: dict[str, str],
    attributes: dict[str, Any],
    **facts: Any,
) -> None:
    """Write a virtual source: array metadata (texts of ``zarr.json`` by name) first, description last.

    Facts are optional.  ``key_rows`` is the range ``[start, stop)`` of rows among which ranks are counted (default:
    its own rows), ``kind`` decides how a job treats it (`engine.job.Kind`), ``stage`` names the progress of the run,
    ``marker`` goes into the completion marker of the output, and ``sums`` are the conservation digests that its
    arrays must have.
    """
    objects = open_objects(place)
    for gone in set(array_names(place)) - set(arrays):  # another process may be writing the same
        objects.delete_prefix(f"{ARRAYS}/{gone}")
    for name, text in arrays.items():
        objects.put(f"{ARRAYS}/{name}/zarr.json", text.encode())
    objects.put(f"{ARRAYS}/zarr.json", group_metadata(attributes))
    body = {"format": FORMAT, "reader": reader, "settings": settings, **facts}
    objects.put(KEY, json.dumps(body, indent=2, sort_keys=True).encode())


def array_names(place: Place) -> list[str]:
    """The arrays that a virtual source presents."""
    prefix, suffix = f"{ARRAYS}/", "/zarr.json"
    keys = open_objects(place).list(ARRAYS)
    return sorted(k[len(prefix) : -len(suffix)] for k in keys if k.endswith(suffix) and k != ARRAYS + suffix)


def open_reader(place: Place) -> Reader | None:
    """The reader of a virtual source, or None if the place is none."""
    data = open_objects(place).get(KEY)
    return None if data is None else _reader(place, data)


def inventory(place: Place, names: Sequence[str]) -> tuple[str, dict[str, Any]] | None:
    """The identity of a virtual source, and its facts with those that its reader found; None if the place is none."""
    data = open_objects(place).get(KEY)
    if data is None:
        return None
    body = _parsed(data)
    _reader.cache_clear()  # the stores behind it may have changed since this process last looked
    found = _reader(place, data).inventory(names)
    marker = {**found.marker, **body.get("marker", {})}
    # It may stand for a source with another identity.
    identity = str(marker.get("source_identity", found.identity))
    return identity, {**body, "marker": marker, "behind": list(found.places)}


def is_whole(place: Place, rows: int) -> bool:
    """True if a virtual source stands for a plain one: all its rows, numbered from 0, to be shuffled."""
    data = open_objects(place).get(KEY)
    if data is None or rows == 0:
        return False
    body = _parsed(data)
    if body.get("kind", "shuffle") != "shuffle" or body.get("key_rows") is not None:
        return False
    found = _reader(place, data)  # whose numbers ascend
    return int(found.numbers(0, 1)[0]) == 0 and int(found.numbers(rows - 1, rows)[0]) == rows - 1


@lru_cache(maxsize=8)
def _reader(place: Place, data: bytes) -> Reader:
    body = _parsed(data)
    return known()[body["reader"]](place, body["settings"])


def _parsed(data: bytes) -> dict[str, Any]:
    try:
        body: dict[str, Any] = json.loads(data)
        if body["format"] != FORMAT or body["reader"] not in known():
            raise FormatError(
                f"{KEY} has format {body['format']}, reader {body['reader']!r}; this actshuffle reads "
                f"format {FORMAT} and knows {', '.join(sorted(known()))}"
            )
        if not isinstance(body["settings"], dict):
            raise TypeError("settings must be an object")
    except (ValueError, KeyError, TypeError) as err:
        raise FormatError(f"{KEY} is damaged: {err}") from err
    return body
