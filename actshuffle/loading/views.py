"""The name by which a view refers to the store of its rows, and the places that such a name may lead to.

The name is relative where one of them lies below the folder of the other, so that the folder can be moved as a whole;
otherwise absolute.  Others may have written the name: a remote view never leads to local files or to another host.
"""

from __future__ import annotations

import posixpath

from actshuffle.errors import FormatError
from actshuffle.storage.place import Place, local_path, public_url


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
