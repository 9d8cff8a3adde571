"""The readers of virtual sources (`actshuffle.arrays.virtual`), by the names that stores call them.

Readers live in rooms above this one, so nothing here imports them.  `load_with` takes the function that does; it is
called when a name is first looked up.  This module itself imports neither numpy nor zarr.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias, TypeVar

if TYPE_CHECKING:
    from actshuffle.arraytypes import U8, U64
    from actshuffle.storage.place import Place


class Backing(NamedTuple):
    """The stores or files behind a virtual source.

    ``identity`` is the digest of all its rows, ``marker`` holds entries for the completion marker, and ``places``
    are the stores that a run must not write to.
    """

    identity: str
    marker: dict[str, Any]
    places: tuple[str, ...] = ()


class Reader(Protocol):
    """Provides the rows of one virtual source; `reader` registers each class under a name."""

    def read(self, name: str, start: int, out: U8) -> None:
        """Rows ``[start, start + len(out))`` of an array into ``out``, uint8 ``(m, row_bytes)``."""

    def numbers(self, start: int, stop: int) -> U64:
        """The numbers of rows ``[start, stop)`` in ``source_row``, uint64, which also decide their keys."""

    def inventory(self, names: Sequence[str]) -> Backing:
        """Check everything that the rows come from, as `take_inventory` does."""


Opener: TypeAlias = "Callable[[Place, dict[str, Any]], Reader]"
Made = TypeVar("Made", bound="Opener")

# A store gives the name of a reader and never code; unknown names are refused.
_READERS: dict[str, Opener] = {}
_LOADERS: list[Callable[[], object]] = []


def reader(name: str) -> Callable[[Made], Made]:
    """Register ``opener(place, settings)`` as the reader that virtual sources call ``name``."""

    def register(opener: Made) -> Made:
        _READERS[name] = opener
        return opener

    return register


def load_with(load: Callable[[], object]) -> None:
    """Have ``load``, which imports the modules of readers, called when a reader is first looked up."""
    _LOADERS.append(load)


def known() -> Mapping[str, Opener]:
    """All readers by name."""
    for load in _LOADERS:
        load()
    return _READERS
