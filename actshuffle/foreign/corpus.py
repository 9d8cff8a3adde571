"""The documents of files of text, for other packages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from actshuffle.foreign.finding import text_files
from actshuffle.foreign.textfiles import documents, kind_of
from actshuffle.units import several


def read_texts(paths: Sequence[str | Path], *, field: str = "text") -> Iterator[tuple[str, str]]:
    """Names and texts of the documents that `collect` would read from ``paths``, in its order.

    The name of a document is its file, with ``#n`` for the n-th document of a file that holds several.  ``field``
    names the text in JSON and tables.  Raises `SourceError` for a path that is absent and for a file that is not text,
    the latter before the first document is given.
    """
    listed = [paths] if isinstance(paths, str) else several("paths", paths, of="paths")
    files = text_files([Path(path) for path in listed])
    for file in files:
        kind_of(file)
    for file in files:
        for number, text in enumerate(documents(file, field)):
            yield f"{file}#{number}" if number else str(file), text
