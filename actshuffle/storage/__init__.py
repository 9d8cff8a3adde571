"""This room moves bytes under a root: places, local files, object stores, buffers; see docs/format.md."""
