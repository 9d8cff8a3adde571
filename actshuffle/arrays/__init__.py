"""This room knows Zarr: fields, metadata, reading sources, writing outputs, the marker; see docs/format.md."""
