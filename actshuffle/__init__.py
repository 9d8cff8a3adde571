"""Exactly uniform, out-of-core shuffling of Zarr activation stores, and the tools around them.

>>> import actshuffle
>>> actshuffle.shuffle("activations.zarr", "shuffled.zarr", workers=4)     # doctest: +SKIP
>>> print(actshuffle.verify("activations.zarr", "shuffled.zarr"))          # doctest: +SKIP
>>> for batch in actshuffle.Loader("shuffled.zarr", batch_size=4096):      # doctest: +SKIP
...     batch["activations"]

Each folder here is one room of the code; docs/architecture.md draws them and the way of a row through them.
"""

from actshuffle._version import __version__
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
from actshuffle.loading.dataset import Dataset, open_dataset
from actshuffle.loading.loader import Loader
from actshuffle.loading.trace import came_from, where_is
from actshuffle.loading.unchanged import watch
from actshuffle.ordering.keys import order

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
    "head",
    "import_store",
    "info",
    "open_dataset",
    "order",
    "plan",
    "quality",
    "read_stats",
    "sample",
    "shuffle",
    "split",
    "stats",
    "status",
    "verify",
    "watch",
    "where_is",
]
