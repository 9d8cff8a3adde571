"""Exactly uniform, out-of-core shuffling of Zarr activation stores.

>>> import actshuffle
>>> actshuffle.shuffle("activations.zarr", "shuffled.zarr", workers=4)     # doctest: +SKIP
>>> print(actshuffle.verify("activations.zarr", "shuffled.zarr"))          # doctest: +SKIP
"""

from actshuffle._version import __version__
from actshuffle.inspect import info, plan, status
from actshuffle.keys import order
from actshuffle.run import Result, shuffle
from actshuffle.verify import VerifyReport, verify

__all__ = [
    "Result",
    "VerifyReport",
    "__version__",
    "info",
    "order",
    "plan",
    "shuffle",
    "status",
    "verify",
]
