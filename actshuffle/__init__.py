"""Exactly uniform, out-of-core shuffling of Zarr activation stores, and the tools around them.

>>> import actshuffle
>>> actshuffle.shuffle("activations.zarr", "shuffled.zarr", workers=4)     # doctest: +SKIP
>>> print(actshuffle.verify("activations.zarr", "shuffled.zarr"))          # doctest: +SKIP
>>> for batch in actshuffle.Loader("shuffled.zarr", batch_size=4096):      # doctest: +SKIP
...     batch["activations"]

Further tools are functions of the modules that are named for them: `actshuffle.append`, `collect`,
`concat`, `importers`, `quality`, `stats`.
"""

from actshuffle._version import __version__
from actshuffle.cut import head, sample, split
from actshuffle.dataset import Dataset, open_dataset
from actshuffle.inspect import info, plan, status
from actshuffle.keys import order
from actshuffle.loader import Loader
from actshuffle.run import Result, shuffle
from actshuffle.trace import came_from, where_is
from actshuffle.verify import VerifyReport, verify

__all__ = [
    "Dataset",
    "Loader",
    "Result",
    "VerifyReport",
    "__version__",
    "came_from",
    "head",
    "info",
    "open_dataset",
    "order",
    "plan",
    "sample",
    "shuffle",
    "split",
    "status",
    "verify",
    "where_is",
]
