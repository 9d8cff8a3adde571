"""Describe a store: arrays, codecs, sizes, and its maker, from metadata alone; and show its first rows."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from actshuffle.arrays import metadata, virtual
from actshuffle.arrays.marker import array_names, read_marker
from actshuffle.arrays.names import RUN_KEY
from actshuffle.bfloat16 import widened
from actshuffle.errors import IncompleteStoreError, RequestError
from actshuffle.loading.dataset import is_ours, open_dataset, open_finished_or_plain
from actshuffle.storage.objects import open_objects
from actshuffle.storage.place import Place, as_place, public_url
from actshuffle.units import counted, dropped_text, format_bytes

SHOWN_ROWS = 10_000


def info(path: str | Path, storage_options: dict[str, Any] | None = None) -> dict[str, Any]:
    """Describe a store: rows, arrays, chunks, codecs, and whether a run of actshuffle finished it.

    ``shuffled`` is the completion marker, whatever its kind; ``unmarked`` says that there is none in a
    store of ours.  ``names_rows_of`` are the stores that a folder of `concat` or `split` names.  A view has no objects
    of its own.
    """
    place = as_place(path, storage_options)
    objects = open_objects(place)
    marker = read_marker(objects)
    if marker is None and objects.size(RUN_KEY) is not None:
        raise IncompleteStoreError(f"{path} is half done: see `actshuffle status {path}`")
    node = metadata.open_node(place)
    is_view = marker is not None and marker["kind"] == "view"
    view = open_dataset(path, storage_options=storage_options) if is_view else None
    names = array_names(marker) if metadata.is_group(node) and marker is not None else None
    arrays = metadata.source_arrays(place if view is None else view.root, names)
    rows = next(iter(arrays.values())).shape[0] if view is None else view.rows
    described = {
        name: {
            "shape": [rows, *a.shape[1:]],
            "dtype": "bfloat16" if metadata.is_bfloat16(a) else str(a.dtype),
            "chunks": list(a.chunks),
            "shards": list(a.shards) if a.shards else None,
            "zarr_format": a.metadata.zarr_format,
            "codecs": _codecs(a),
            "bytes": a.nbytes // max(1, a.shape[0]) * rows,
            "objects": _count(a) if view is None else 0,
            "raw": bool(metadata.source_field(name, a).source_key),
        }
        for name, a in arrays.items()
    }
    return {
        "path": public_url(place.url),
        "rows": rows,
        "bytes": sum(a["bytes"] for a in described.values()),
        "arrays": described,
        "attributes": dict(node.attrs),
        "shuffled": marker,
        "unmarked": marker is None and is_ours(objects),
        "names_rows_of": _named(place),
    }


def info_text(found: dict[str, Any]) -> str:
    """`info` as text."""
    lines = [f"{found['path']}: {counted(found['rows'], 'row')}, {format_bytes(found['bytes'])}"]
    table = [("array", "shape", "dtype", "chunk", "objects", "codecs")]
    for name, a in found["arrays"].items():
        chunk = "x".join(map(str, a["chunks"])) + (f" in {'x'.join(map(str, a['shards']))}" if a["shards"] else "")
        table.append(
            (name, "x".join(map(str, a["shape"])), a["dtype"], chunk, f"{a['objects']:,}", " ".join(a["codecs"]))
        )
    widths = [max(len(row[i]) for row in table) for i in range(6)]
    lines += ["  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in table]
    unmarked = "no completion marker: half written, or damaged since"
    made_by = unmarked if found["unmarked"] else _made_by(found["shuffled"])
    if found["names_rows_of"]:
        made_by = f"names rows of {', '.join(found['names_rows_of'])}, and copies none: `actshuffle run` reads them"
    # Attributes of several sources are those of the first.
    first = "of the first source: " * (len((found["shuffled"] or {}).get("parts", ())) > 1)
    splits = found["attributes"].get("split")
    for split in splits if isinstance(splits, list) else ():
        if isinstance(split, dict) and {"by", "seed", "from", "to"} <= split.keys():
            share = f"share {split['from']:g} to {split['to']:g}"
            seed = f"seed {split['seed']}; splits by other seeds overlap it"
            lines.append(f"{first}part of a split by {split['by']}: {share}, {seed}")
    dropped = found["attributes"].get("dropped_rows")
    told = dropped_text({k: n for k, n in dropped.items() if type(n) is int}) if isinstance(dropped, dict) else ""
    return "\n".join([*lines, made_by, *([f"{first}rows dropped: {told}"] if told else [])])


def _named(place: Place) -> list[str]:
    """The stores whose rows a folder of `concat` or `split` names, as paths from that folder."""
    parts = (virtual.describe(place) or {}).get("settings", {}).get("parts", [])
    return [public_url(str(part["store"])) for part in parts if isinstance(part, dict) and "store" in part]


def _made_by(marker: dict[str, Any] | None) -> str:
    """A completion marker as text."""
    if marker is None:
        return "not an actshuffle output"
    if marker["kind"] == "view":
        return f"view: rows {marker['start']:,} to {marker['stop']:,} of {marker['of']}"
    version = f"(actshuffle {marker.get('version', '?')}, format {marker['format']})"
    parts = marker.get("parts", ())
    source = f", from {marker['source']}" if marker.get("source") else ""
    if len(parts) > 1:
        source = f", from {len(parts)} sources"
        version += ":" + "".join(f"\n  {_source(part)}" for part in parts)
    if marker["kind"] == "collection":
        return f"collection: complete, in the order in which it was made{source} {version}"
    part = marker.get("population", marker["rows"])
    of = f", {marker['rows']:,} of {counted(part, 'row')}" if part != marker["rows"] else ""
    levels = f"{marker['levels']} level{'s' * (marker['levels'] != 1)}"
    return f"shuffled: complete, seed {marker['seed']}, {levels}{of}{source} {version}"


def _source(part: dict[str, Any]) -> str:
    """One source of several as text."""
    moved = part.get("numbered_from", {})
    numbers = "".join(f", {name} from {counted_from:,} on" for name, counted_from in moved.items())
    return f"{part['source']}: {counted(part['rows'], 'row')}{numbers}"


def _codecs(array: metadata.ZarrArray) -> list[str]:
    names = [type(c).__name__.removesuffix("Codec").lower() for c in (*array.filters, *array.compressors)]
    return names or ["none"]


def _count(array: metadata.ZarrArray) -> int:
    return math.prod(-(-n // c) for n, c in zip(array.shape, metadata.object_grid(array), strict=True))


def first_rows(path: str | Path, rows: int, storage_options: dict[str, Any] | None = None) -> dict[str, list[str]]:
    """The first rows of each array, as text for people."""
    store = open_finished_or_plain(path, storage_options=storage_options)
    count, shown = min(rows, store.rows), {}
    if count > SHOWN_ROWS:
        raise RequestError(
            f"{counted(count, 'row')} are more than the {SHOWN_ROWS:,} that are shown at most; name a store "
            "to write them to"
        )
    for name, info in store.fields.items():
        values = store.read(name, 0, count)
        if info.bfloat16:
            values = widened(values)
        with np.printoptions(edgeitems=3, threshold=6, precision=4, linewidth=100):
            shown[name] = [str(value) for value in values]
    return shown
