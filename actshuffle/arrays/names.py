"""The names of the on-disk format, once: `docs/format.md` as constants."""

from __future__ import annotations

OUR_GROUP = "_actshuffle"  # receipts while running; the completion marker when done
SOURCE_ROW = "source_row"
FORMAT = 1  # of everything named above
RUN_KEY = f"{OUR_GROUP}/run.json"
MARKER_KEY = f"{OUR_GROUP}/zarr.json"
RECEIPTS = f"{OUR_GROUP}/receipts"
DIGESTS = f"{OUR_GROUP}/digests"
