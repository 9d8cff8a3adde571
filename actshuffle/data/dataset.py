"""Finished stores under their earlier import path; see `actshuffle.loading.dataset`."""

from actshuffle.loading.dataset import Dataset, FieldInfo, open_dataset, write_view

__all__ = ["Dataset", "FieldInfo", "open_dataset", "write_view"]
