"""The names of the on-disk format: `docs/format.md` as constants."""

from __future__ import annotations

OUR_GROUP = "_actshuffle"  # holds receipts during a run, and then the completion marker
SOURCE_ROW = "source_row"
FORMAT = 1  # the version of all that `docs/format.md` describes
UNFILTERED = ".unfiltered"  # beside a store: rows that are collected, before some are dropped by their norms
RUN_KEY = f"{OUR_GROUP}/run.json"
MARKER_KEY = f"{OUR_GROUP}/zarr.json"
RECEIPTS = f"{OUR_GROUP}/receipts"
PACKS = f"{OUR_GROUP}/packs"  # what many receipts hold together
DIGESTS = f"{OUR_GROUP}/digests"
