"""Read the completion marker: every reader of a finished store begins here, and needs no engine for it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from actshuffle._version import __version__
from actshuffle.arrays.names import FORMAT, MARKER_KEY, RUN_KEY, SOURCE_ROW, UNFILTERED
from actshuffle.arrays.small import group_metadata
from actshuffle.errors import FormatError
from actshuffle.seals import checksum, seal
from actshuffle.storage.objects import Objects, open_objects
from actshuffle.storage.place import Place


def is_list(found: Any, length: int, holds: Callable[[Any], bool]) -> bool:
    return isinstance(found, list) and len(found) == length and all(map(holds, found))


def altered_files(objects: Objects, marker: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Key and fault of each small file, the marker included, that is not as it was written."""
    body = {k: v for k, v in marker.items() if k != "sha256"}
    around = json.loads(group_metadata({"actshuffle": marker}))  # the part of the file that the checksum does not cover
    unsealed = is_sealed(marker) and marker.get("sha256") != seal(body, 64)
    if unsealed or json.loads(objects.get(MARKER_KEY) or "{}") != around:
        yield MARKER_KEY, "is not what was written"
    for key, check in body.get("files", {}).items():
        data = objects.get(key)
        if data is None:
            yield key, "is missing"
        elif checksum(data) != check and (fault := _fault_beside_copies(objects, data, check)):
            yield key, fault


def is_sealed(marker: dict[str, Any]) -> bool:
    """False for the marker of a view that an earlier version made; all others carry a checksum of themselves."""
    return marker["kind"] != "view" or "sha256" in marker or "files" in marker


def _fault_beside_copies(objects: Objects, data: bytes, check: str) -> str:
    """The fault of a group's altered ``zarr.json``, or "" if all that was done is to add the copies of the metadata
    below it (`zarr.consolidate_metadata`), and they agree with what they are copies of."""
    altered = "is not what was written"
    try:
        document = json.loads(data)
        copies = document.pop("consolidated_metadata")["metadata"]
        before = group_metadata(document.pop("attributes"))
        if document != {"zarr_format": 3, "node_type": "group"} or checksum(before) != check:
            return altered
        for name, copy in copies.items():
            own = json.loads(objects.get(f"{name}/zarr.json") or "{}")
            if not own or any(copy.get(key) != value for key, value in own.items()):
                return f"its consolidated metadata of {name} is not that of the array: consolidate it again"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return altered
    return ""


# The entries of a marker, by its kind: a shuffled store, a row range of another store, or a finished store with its
# rows in the order in which they were made (collect, import).
_ROWS: dict[str, type] = {"rows": int, "fields": dict}
_MARKERS = {
    "shuffle": {**_ROWS, "seed": int, "source_row": bool, "levels": int, "source_identity": str, "fill_missing": bool},
    "view": {**_ROWS, "source_row": bool, "of": str, "start": int, "stop": int},
    "collection": _ROWS,
}


def read_marker(objects: Objects) -> dict[str, Any] | None:
    """The completion marker, or None if there is none; raises `FormatError` if it cannot be read."""
    data = objects.get(MARKER_KEY)
    if data is None:
        return None
    try:
        body = json.loads(data)["attributes"]["actshuffle"]
        if body["format"] != FORMAT:
            raise FormatError(f"{MARKER_KEY} has format {body['format']}, this actshuffle {__version__} reads {FORMAT}")
        kind = body.setdefault("kind", "shuffle")
        if kind not in _MARKERS:
            raise FormatError(f"{MARKER_KEY} is of kind {kind!r}; known are {', '.join(_MARKERS)}")
        for name, kind_of in _MARKERS[kind].items():
            if type(body[name]) is not kind_of or (name in ("rows", "seed") and body[name] < 0):
                raise TypeError(f"{name} cannot be {str(body[name])[:40]!r}")
        if not isinstance(body.get("files", {}), dict):
            raise TypeError("files must be digests by key")
        if "key_bits" in body and not is_list(body["key_bits"], 2, lambda x: x in range(65)):
            raise TypeError("key_bits must be two numbers up to 64")
    except (ValueError, KeyError, TypeError, RecursionError) as err:
        raise FormatError(f"{MARKER_KEY} is damaged: {err}") from err
    found: dict[str, Any] = body
    return found


def array_names(marker: dict[str, Any]) -> list[str]:
    """The arrays of a finished store, that of source rows last."""
    return [*marker["fields"], *([SOURCE_ROW] if marker.get("source_row") else [])]


def is_finished(objects: Objects) -> bool:
    """True if there is a valid completion marker.  A torn one counts as absent; the resumed run writes it again."""
    with suppress(FormatError):
        return read_marker(objects) is not None
    return False


def is_begun(place: Place) -> bool:
    """True if a run that writes this store has begun and not ended, or has collected rows that are to be filtered."""
    keys = ((place, RUN_KEY), (place.beside(UNFILTERED), RUN_KEY), (place.beside(UNFILTERED), MARKER_KEY))
    return any(open_objects(at).size(key) is not None for at, key in keys)
