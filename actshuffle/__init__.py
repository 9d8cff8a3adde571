"""Exactly uniform, out-of-core shuffling of Zarr activation stores, and the tools around them.

>>> import actshuffle
>>> actshuffle.shuffle("activations.zarr", "shuffled.zarr", workers=4)     # doctest: +SKIP
>>> print(actshuffle.verify("activations.zarr", "shuffled.zarr"))          # doctest: +SKIP
>>> for batch in actshuffle.Loader("shuffled.zarr", batch_size=4096):      # doctest: +SKIP
...     batch["activations"]

The modules of this folder are the shuffle; `actshuffle.data` has the tools around it, `actshuffle.cli`
the command line.
"""

from actshuffle._version import __version__
from actshuffle.data.append import append
from actshuffle.data.collect import collect
from actshuffle.data.concat import concat
from actshuffle.data.cut import head, sample, split
from actshuffle.data.dataset import Dataset, open_dataset
from actshuffle.data.importers import import_store
from actshuffle.data.loader import Loader
from actshuffle.data.quality import quality
from actshuffle.data.stats import read_stats, stats
from actshuffle.data.trace import came_from, where_is
from actshuffle.inspect import info, plan, status
from actshuffle.keys import order
from actshuffle.run import Result, shuffle
from actshuffle.verify import VerifyReport, verify

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
    "where_is",
]
