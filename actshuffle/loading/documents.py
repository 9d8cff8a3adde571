"""Document numbers of several stores as one: numbered on from part to part, under the names of all parts.

Each store numbers its documents from 0.  Side by side, document 0 of one would be document 0 of the next, and
everything computed by document would take the two for one.  So in a joint store the numbers of each part are moved
past those of the parts before it::

    part        its documents       in the joint store
    monday      0 .. 29             0 .. 29
    tuesday     0 .. 9              30 .. 39

The end of a part is the larger of its largest number and of what its attributes list, so that documents of which no
row is left keep their numbers too: those that collecting all files at once would give.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actshuffle.arraytypes import U8
from actshuffle.errors import RequestError
from actshuffle.loading.dataset import Dataset

# Usual names of the array of document numbers; the first one present is the one that the attributes list.
DOCUMENT = ("document", "documents", "document_id", "document_ids", "doc", "doc_id", "doc_ids")
LISTED = "documents"  # the attribute: names by number, or files and the documents in them
STEP_ROWS = 1 << 20  # rows read at a time


def shifts_of(stores: Sequence[Dataset], names: Sequence[str]) -> list[dict[str, int]]:
    """By how much the document numbers of each store move, by array; one pass over these arrays.

    Raises
    ------
    RequestError : the moved numbers do not fit into the array's type.
    """
    shifts: list[dict[str, int]] = [{} for _ in stores]
    for name in sorted(set(names) & set(DOCUMENT)):
        infos = [store.fields[name] for store in stores]
        if any(info.dtype.kind not in "iu" or info.row_shape or info.bfloat16 for info in infos):
            continue
        end = 0
        for shift, store in zip(shifts, stores, strict=True):
            if store is not stores[0]:
                shift[name] = end
            end += _end(store, name)
            most = np.iinfo(infos[0].dtype).max
            if end - 1 > most:
                raise RequestError(
                    f"the documents of {store.path} would be numbered up to {end - 1:,}, and {name!r} holds "
                    f"{infos[0].dtype_name} up to {most:,}; leave the array out with --fields, or keep its numbers "
                    "with --no-renumber"
                )
    return shifts


def _end(store: Dataset, name: str) -> int:
    """One more than the largest document number of a store."""
    starts = range(0, store.rows, STEP_ROWS)
    largest = max((int(store.read(name, a, min(a + STEP_ROWS, store.rows)).max()) for a in starts), default=-1)
    primary = next(n for n in DOCUMENT if n in store.fields)
    listed = _entries(store.attributes, 0) if name == primary else []
    ends = [int(entry["first"]) + int(entry["count"]) for entry in listed]
    return max(largest + 1, *ends, 0)


def move(rows: U8, dtype: np.dtype[Any], shift: int) -> None:
    """Add to the document numbers in rows as bytes, uint8 ``(m, itemsize)``; negative ones stand for none, and stay."""
    values: NDArray[Any] = rows.view(dtype.newbyteorder("<"))
    values[values >= 0] += dtype.type(shift)


def joint_attributes(stores: Sequence[Dataset], shifts: Sequence[Mapping[str, int]]) -> dict[str, Any]:
    """The attributes of the first store, with the documents of all of them listed under their moved numbers."""
    if len(stores) == 1 and not any(shifts):
        return stores[0].attributes
    entries = []
    for store, shift in zip(stores, shifts, strict=True):
        primary = next((name for name in DOCUMENT if name in store.fields), "")
        entries += _entries(store.attributes, shift.get(primary, 0))
    attributes = dict(stores[0].attributes)
    if entries:
        attributes[LISTED] = entries
    return attributes


def _entries(attributes: Mapping[str, Any], shift: int) -> list[dict[str, Any]]:
    """The documents that a store's attributes list, as files and the documents in them."""
    listed = attributes.get(LISTED)
    if not isinstance(listed, list):
        return []
    if all(isinstance(entry, str) for entry in listed):
        return [{"file": name, "first": shift + number, "count": 1} for number, name in enumerate(listed)]
    if not all(isinstance(e, dict) and type(e.get("first")) is int and type(e.get("count")) is int for e in listed):
        return []
    return [{**entry, "first": shift + entry["first"]} for entry in listed]
