"""The subject of `verify`: the store that has the rows to check, or a refusal that names another check.

=============  ===========================================================================================
whole shuffle  checked against its source
grown          checked against the concatenation of its sources, which is what it is a shuffle of
view           its marker is checked; then the store that has its rows, whole, against the source
sample, range  refused: their keys tell their order, but not that no row between them is left out
collection     refused: it is in the order in which it was made
=============  ===========================================================================================
"""

from __future__ import annotations

import json
from typing import Any

from actshuffle.arrays import virtual
from actshuffle.arrays.marker import altered_files, is_sealed, read_marker
from actshuffle.arrays.names import MARKER_KEY
from actshuffle.errors import FormatError, IncompleteStoreError, RequestError, SourceError, words_of
from actshuffle.loading.dataset import open_dataset
from actshuffle.loading.documents import DOCUMENT
from actshuffle.storage.objects import open_objects
from actshuffle.storage.place import Place
from actshuffle.units import counted

NAMED = 8  # sources of a grown store named in a message

Fault = tuple[str, str]  # a file, and what is wrong with it


def subject(source: Place, given: Place) -> tuple[Place, dict[str, Any], list[Fault], list[str]]:
    """The store that has the rows of ``given``, its marker, the altered small files of both, and notes.

    Raises
    ------
    IncompleteStoreError : nothing is there, or there is no completion marker.
    RequestError : the source is the store itself, or the one of which it is a view.
    """
    marker = read_marker(open_objects(given))
    if marker is None:
        if next(iter(open_objects(given).list("")), None) is None:
            raise IncompleteStoreError(f"no such store: {given}")
        if virtual.describe(given) is not None:
            raise RequestError(f"{given} holds no rows, only the names of stores that do: there is nothing to verify")
        raise IncompleteStoreError(
            f"{given} has no completion marker: not an actshuffle output, or its run has not finished"
        )
    if source == given:
        raise RequestError(f"{given} is given twice; give the store from which it was made, and then it")
    faults, notes = list(altered_files(open_objects(given), marker)), list[str]()
    if marker["kind"] != "view":
        return given, marker, faults, notes
    try:
        view = open_dataset(given.url, storage_options=json.loads(given.options))
    except (FormatError, SourceError, IncompleteStoreError) as err:  # the view is void
        return given, marker, [*faults, (MARKER_KEY, words_of(err))], notes
    if not is_sealed(marker):
        notes.append("the view's marker is of an earlier version, which kept no checksum of it")
    assert view.root_marker is not None
    if source == view.root:
        raise RequestError(
            f"{given} is a view of {source}, which has its rows; give the store from which that was made"
            + (f": {view.root_marker['source']}" if view.root_marker.get("source") else "")
        )
    rows = f"rows {view.start:,} to {view.start + view.rows:,}"
    notes.append(f"{given} is a view, {rows} of {view.root}; what is checked is that store")
    return view.root, view.root_marker, [*faults, *altered_files(open_objects(view.root), view.root_marker)], notes


def refuse_others(given: Place, marker: dict[str, Any]) -> None:
    """Refuse what is no whole shuffle, and say what checks it."""
    if marker["kind"] == "collection":
        raise RequestError(
            f"{given} is a collection, whose rows are in the order in which they were made; only a shuffle can be "
            "verified against its source (`actshuffle stats` reads every row of any store)"
        )
    if (population := marker.get("population", marker["rows"])) == marker["rows"]:
        return
    rows = f"{marker['rows']:,} of {counted(population, 'row')}"
    if "split" in marker:
        by = marker["split"]["by"]
        raise RequestError(
            f"{given} is a part of a shuffle, by {by}, {rows}; verify the store that was split, of which the same "
            "`actshuffle split` makes the same part"
        )
    if "first_rank" in marker:
        raise RequestError(f"{given} is a copied part of a shuffle, {rows}; verify the store from which it was cut")
    raise RequestError(
        f"{given} is a sample, {rows}, and only a whole shuffle can be verified; `actshuffle sample "
        f"--seed {marker['seed']}` writes the same bytes again, to compare"
    )


def refuse_part_of_sources(source: Place, given: Place, marker: dict[str, Any], rows: int) -> None:
    """Refuse to compare a grown store with anything but all its sources: with one of them, say."""
    parts = marker.get("parts", ())
    if len(parts) < 2 or rows == marker["rows"]:
        return
    kept = " --no-renumber" * (
        not any("numbered_from" in part for part in parts) and bool(set(DOCUMENT) & set(marker["fields"]))
    )
    named = " ".join(str(part["source"]) for part in parts[:NAMED]) + " ..." * (len(parts) > NAMED)
    raise RequestError(
        f"{given} has {counted(marker['rows'], 'row')} of {len(parts)} sources, and {source} has {rows:,}; "
        f"join the sources (`actshuffle concat {named} --out ALL{kept}`) and verify it against ALL"
    )
