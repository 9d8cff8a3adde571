"""Codecs of output arrays, in one table that the engine and the command line read.

A row gives the bytes-to-bytes codecs that follow ``bytes`` in ``zarr.json``.  A new codec is one more row,
of any codecs that zarr and numcodecs know and that guard.py lets a store be read with::

    rows --bytes--> little-endian values --steps--> chunk file
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

Step = dict[str, Any]  # name and configuration of a codec, as JSON


class OutputCodec(NamedTuple):
    """One row: what it does, its steps, and the most bytes of a chunk that they can take.

    A setting of None stands for the bytes of an item.
    """

    help: str
    steps: tuple[Step, ...] = ()
    most_bytes: int = 1 << 62

    @property
    def raw(self) -> bool:
        """True if chunk files are the plain bytes of their rows."""
        return not self.steps

    def chain(self, itemsize: int) -> list[Step]:
        """The steps for an array whose items have ``itemsize`` bytes."""
        return [_filled(step, itemsize) for step in self.steps]


def _filled(step: Step, itemsize: int) -> Step:
    settings = step.get("configuration", {})
    return {**step, "configuration": {k: itemsize if v is None else v for k, v in settings.items()}}


def _blosc(help: str, cname: str, clevel: int, shuffle: str) -> OutputCodec:
    settings = {"typesize": None, "cname": cname, "clevel": clevel, "shuffle": shuffle, "blocksize": 0}
    return OutputCodec(help, ({"name": "blosc", "configuration": settings},), (1 << 31) - 17)


# Level 2 of Blosc is level 3 of zstd, its default.
CODECS = {
    "none": OutputCodec("plain bytes, read and written without decoding"),
    "crc32c": OutputCodec("plain bytes with a checksum for every chunk", ({"name": "crc32c"},)),
    "zstd": OutputCodec(
        "zstd at its default level", ({"name": "zstd", "configuration": {"level": 0, "checksum": False}},)
    ),
    "gzip": OutputCodec("gzip at level 5", ({"name": "gzip", "configuration": {"level": 5}},)),
    "lz4": OutputCodec(
        "numcodecs' LZ4, which only zarr-python reads", ({"name": "numcodecs.lz4", "configuration": {}},), 0x7E000000
    ),
    "blosc-lz4": _blosc("bytes shuffled by significance, then LZ4", "lz4", 5, "shuffle"),
    "blosc-zstd": _blosc("bytes shuffled by significance, then zstd", "zstd", 2, "shuffle"),
    "bitshuffle-lz4": _blosc("bits shuffled by significance, then LZ4", "lz4", 5, "bitshuffle"),
    "bitshuffle-zstd": _blosc("bits shuffled by significance, then zstd", "zstd", 2, "bitshuffle"),
}


def name_of(found: Sequence[tuple[str, dict[str, Any]]]) -> str | None:
    """The row that gave an array its steps, by their names and settings; None for plain bytes and others' steps."""
    for name, codec in CODECS.items():
        if 0 < len(found) == len(codec.steps) and all(map(_fits, codec.steps, found)):
            return name
    return None


def _fits(step: Step, found: tuple[str, dict[str, Any]]) -> bool:
    name, settings = found
    wanted = step.get("configuration", {}).items()
    return step["name"].removeprefix("numcodecs.") == name and all(v in (None, settings.get(k)) for k, v in wanted)
