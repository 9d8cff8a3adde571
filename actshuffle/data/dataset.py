"""Finished stores under their earlier import path; see `actshuffle.loading.dataset`."""

from actshuffle.loading.dataset import Dataset, open_dataset, write_view
from actshuffle.loading.fieldinfo import FieldInfo

__all__ = ["Dataset", "FieldInfo", "open_dataset", "write_view"]
