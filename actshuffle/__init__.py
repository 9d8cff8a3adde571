"""Exactly uniform, out-of-core shuffling of Zarr activation stores, and the tools around them.

>>> import actshuffle
>>> actshuffle.shuffle("activations.zarr", "shuffled.zarr", workers=4)     # doctest: +SKIP
>>> print(actshuffle.verify("activations.zarr", "shuffled.zarr"))          # doctest: +SKIP
>>> for batch in actshuffle.Loader("shuffled.zarr", batch_size=4096):      # doctest: +SKIP
...     batch["activations"]

Each folder here is one room of the code; docs/architecture.md draws them and the way of a row through them.

The import itself is light: the room of a public name is imported when a program first uses the name.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING

from actshuffle._version import __version__
from actshuffle.arrays.readers import load_with


def _program() -> str:
    """The program that runs: its path or, with ``python -m``, its package, which is called "-m" until it is found."""
    name = sys.argv[0]
    return "/" + "".join(sys.orig_argv[-len(sys.argv) :][:1]) if name == "-m" else name


# Zarr up to 3.1.6 does not load the data types of other packages, so importing this package registers ours.  Only our
# commands go without: no other code opens stores in their processes, and --help need not wait for zarr.
if not _program().endswith(("/actshuffle", "/saetrain")):
    from actshuffle import bfloat16  # noqa: F401

if TYPE_CHECKING:
    from actshuffle.building.collection import collect
    from actshuffle.building.growth import append
    from actshuffle.building.importers import import_store
    from actshuffle.building.joining import concat
    from actshuffle.building.sampling import sample
    from actshuffle.building.splitting import head, split
    from actshuffle.checking.contents import info
    from actshuffle.checking.scores import quality
    from actshuffle.checking.statspass import read_stats, stats
    from actshuffle.checking.verifier import VerifyReport, verify
    from actshuffle.engine.preview import plan
    from actshuffle.engine.run import Result, shuffle
    from actshuffle.engine.state import status
    from actshuffle.foreign.corpus import read_texts
    from actshuffle.loading.dataset import Dataset, open_dataset
    from actshuffle.loading.loader import Loader
    from actshuffle.loading.trace import came_from, decoder, document_name, where_is
    from actshuffle.loading.unchanged import watch
    from actshuffle.ordering.keys import order, priorities
    from actshuffle.units import format_bytes, parse_bytes

__all__ = [
    "Dataset",
    "Loader",
    "Result",
    "VerifyReport",
    "__version__",
    "append",
    "came_from",
    "collect",
    "concat",
    "decoder",
    "document_name",
    "filter_rows",
    "format_bytes",
    "head",
    "import_store",
    "info",
    "open_dataset",
    "order",
    "parse_bytes",
    "plan",
    "priorities",
    "quality",
    "read_stats",
    "read_texts",
    "sample",
    "shuffle",
    "split",
    "stats",
    "status",
    "verify",
    "watch",
    "where_is",
]


def _rooms() -> tuple[ModuleType, ...]:
    """The modules that define the public names."""
    from actshuffle import units
    from actshuffle.building import collection, filtering, growth, importers, joining, sampling, splitting
    from actshuffle.checking import contents, scores, statspass, verifier
    from actshuffle.engine import preview, run, state
    from actshuffle.foreign import corpus
    from actshuffle.loading import dataset, loader, trace, unchanged
    from actshuffle.ordering import keys

    building = collection, filtering, growth, importers, joining, sampling, splitting
    checking = contents, scores, statspass, verifier
    return *building, *checking, preview, run, state, corpus, dataset, loader, trace, unchanged, keys, units


load_with(_rooms)


if not TYPE_CHECKING:  # a type checker would take any name

    def __getattr__(name: str) -> object:
        for module in _rooms() if name in __all__ else ():
            found = vars(module).get(name)
            if getattr(found, "__module__", None) == module.__name__:
                globals()[name] = found
                return found
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
