"""Objects on local disk under their earlier import path; see `actshuffle.storage.files`."""

from actshuffle.storage.files import LocalObjects

__all__ = ["LocalObjects"]
