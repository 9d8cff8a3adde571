"""The name by which a view refers to the store of its rows, and the places that such a name may lead to.

The name is relative where one of them lies below the folder of the other, so that the folder can be moved as a whole;
otherwise absolute.  Others may have written the name: a remote view never leads to local files or to another host.
"""

from __future__ import annotations

import posixpath
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from actshuffle.errors import FormatError
from actshuffle.seals import seal
from actshuffle.storage.place import Place, local_path, public_url
from actshuffle.units import counted


def reference(view: Place, target: Place) -> str:
    """The name of its store in a view."""
    (host, path), (other, goal) = _parts(view), _parts(target)
    folder, home = posixpath.dirname(path), posixpath.dirname(goal)
    if host == other and (_below(goal, folder) or _below(path, home)):
        return posixpath.relpath(goal, path)
    return public_url(target.url)


def followed(view: Place, of: str) -> Place:
    """The place a view names; never from a remote view to local files or to another host."""
    host, path = _parts(view)
    if "://" in of or of.startswith("/"):
        other, _ = _parts(Place(of))
        if host and other != host:
            raise FormatError(f"the view {host}{path} leads elsewhere: {public_url(of)}")
        return Place(of, view.options)
    return Place(host + posixpath.normpath(posixpath.join(path, of)), view.options)


def combined(identities: Sequence[str]) -> str:
    """The identity of a concatenation of sources with these identities."""
    return seal(list(identities))


def identity_of(parts: Sequence[Mapping[str, Any]]) -> str:
    """The identity of a concatenation of these sources, with documents numbered as recorded."""
    return combined([p["identity"] + (seal(p["numbered_from"]) if "numbered_from" in p else "") for p in parts])


def has_grown(view: Mapping[str, Any], whole: Mapping[str, Any]) -> bool:
    """True if the store of a view has since become one of the same sources and more, by their markers."""
    before, parts = view.get("of_source"), whole.get("parts", ())
    known = {parts[0]["identity"]: 1} if parts else {}
    known |= {identity_of(parts[:count]): count for count in range(1, len(parts))}
    return before is not None and known.get(before, len(parts)) < len(parts)


class Parent(Protocol):
    """The store of a view, as it is now."""

    rows: int
    fields: dict[str, Any]
    root_marker: dict[str, Any] | None

    @property
    def path(self) -> str: ...
    @property
    def identity(self) -> str: ...


def fault_of(where: str, view: Mapping[str, Any], names: Sequence[str], parent: Parent) -> str:
    """Why a view, by its marker, is none of its store as that is now; an empty text if it is one."""
    start, stop, path = view["start"], view["stop"], parent.path
    if not 0 <= start <= stop <= parent.rows or view["rows"] != stop - start:
        return f"{where} is rows {start:,} to {stop:,} of {path}, which has {parent.rows:,}"
    if absent := [name for name in names if name not in parent.fields]:
        return f"{where} is a view of {path}, but no array {absent[0]!r} is there; make the view again"
    if view.get("of_identity", parent.identity) == parent.identity:
        return ""
    if not has_grown(view, parent.root_marker or {}):
        return f"{where} is a view of {path}, but it is not the store it was; make the view again"
    return (
        f"{where} is rows {start:,} to {stop:,} of {path}, which an append has since made "
        f"{counted(parent.rows, 'row')}, so "
        "others stand there now. New ranges could move rows from one part to another; parts by a rule keep theirs, "
        f"and a run on one can resume: remove {where}, and give `actshuffle split {path} {where}=SHARE ... --by "
        "document --copy` (or by row). `append --out` leaves a store, and its views, as they are"
    )


def _parts(place: Place) -> tuple[str, str]:
    """Scheme and host (empty for local paths), and the path."""
    local = local_path(place)
    if local is not None:
        return "", posixpath.normpath(str(local))
    scheme, rest = place.url.split("://", 1)
    head, _, tail = rest.partition("/")
    return f"{scheme}://{head}", posixpath.normpath("/" + tail)


def _below(path: str, folder: str) -> bool:
    return path.startswith(folder.rstrip("/") + "/")
