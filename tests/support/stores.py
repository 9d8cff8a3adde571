"""Zarr stores of every kind that the engine accepts as a source, and their contents as zarr alone reads them."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numcodecs import Blosc, Zstd
from zarr.codecs import ZstdCodec
from zarr.errors import UnstableSpecificationWarning

from actshuffle.bfloat16 import BFloat16

STRUCT = np.dtype([("id", "<u4"), ("score", "<f8"), ("flag", "i1")])
DTYPES = ["?", "i1", "<u2", "<i8", "<f2", "<f4", "<f8", "<c8", "<c16", "<M8[ns]", "<m8[s]", "S5", "<U3", "V3", STRUCT]


def values(n: int, shape: tuple[int, ...] = (), dtype: Any = "<f4", seed: int = 7) -> np.ndarray:
    """``n`` rows of random bits, with NaNs of all kinds; booleans and letters where the data type requires them."""
    rng, dtype = np.random.default_rng(seed), np.dtype(dtype)
    count = n * math.prod(shape)
    if dtype.kind == "b":
        bits = rng.integers(0, 2, count, np.uint8)
    elif dtype.kind == "S":
        bits = rng.integers(65, 91, count * dtype.itemsize, np.uint8)
    elif dtype.kind == "U":
        bits = rng.integers(65, 0x3000, count * dtype.itemsize // 4, np.uint32)
    else:
        bits = rng.integers(0, 256, count * dtype.itemsize, np.uint8)
    return bits.view(dtype).reshape(n, *shape)


# --- Source stores ------------------------------------------------------------------------------


def array(path: Path | str, data: np.ndarray, name: str | None = None, **settings: Any) -> None:
    """One Zarr array, uncompressed and in chunks of 7 rows unless told otherwise."""
    settings = {"chunks": (7, *(max(1, s) for s in data.shape[1:])), "compressors": None} | settings
    if "dtype" in settings:
        settings |= {"shape": data.shape}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnstableSpecificationWarning)
        made = zarr.create_array(
            str(path),
            name=name,
            **settings,
            config={"write_empty_chunks": True},
            **({} if "dtype" in settings else {"data": data}),
        )
        if "dtype" in settings:
            made[...] = data


def group(path: Path, arrays: dict[str, np.ndarray], **settings: Any) -> None:
    """A group whose arrays share their rows."""
    zarr.create_group(path, attributes={"model": "tiny", "layer": 3}).store.close()
    for name, data in arrays.items():
        array(path, data, name, **settings)


def _wide(path: Path, n: int, **settings: Any) -> None:
    array(path, values(n, (4, 3)), **settings)


def _mixed(path: Path, n: int) -> None:
    zarr.create_group(path, attributes={"model": "tiny", "nested": {"layers": [1, 2]}})
    for number, dtype in enumerate(DTYPES):
        data = values(n, (2,) if number % 2 else (), dtype, seed=number)
        array(path, data, f"f{number}", chunks=(5 + number, *data.shape[1:]))
    array(path, values(n, (3,), "<u2"), "bf16", dtype=BFloat16(), fill_value=0x3F80)


def _mixed_v2(path: Path, n: int) -> None:
    zarr.create_group(path, zarr_format=2, attributes={"model": "tiny"})
    for number, dtype in enumerate(DTYPES):
        data = values(n, (2,) if number % 2 else (), dtype, seed=number)
        array(path, data, f"f{number}", chunks=(5 + number, *data.shape[1:]), zarr_format=2)


def _named(path: Path, n: int) -> None:
    zarr.create_group(path, attributes={"title": "named dimensions"})
    array(
        path,
        values(n, (4,)),
        "x",
        dimension_names=["token", "feature"],
        fill_value=math.nan,
        attributes={"unit": "nats"},
    )
    array(path, values(n, (), "<i4"), "id", dimension_names=["token"], fill_value=-1)
    array(path, values(n, (2, 2), "<f8"), "y", dimension_names=["token", None, "k"])


def _named_v2(path: Path, n: int) -> None:
    zarr.create_group(path, zarr_format=2)
    array(
        path,
        values(n, (4,)),
        "x",
        zarr_format=2,
        fill_value=2.5,
        attributes={"_ARRAY_DIMENSIONS": ["token", "feature"], "unit": "nats"},
    )


SOURCES: dict[str, Callable[[Path, int], None]] = {
    "bare": _wide,
    "bare_v2": lambda p, n: _wide(p, n, zarr_format=2),
    "mixed_group": _mixed,
    "mixed_group_v2": _mixed_v2,
    "named": _named,
    "named_v2": _named_v2,
    "null_fill_v2": lambda p, n: _wide(p, n, fill_value=None, zarr_format=2),
    "bfloat16": lambda p, n: array(p, values(n, (6,), "<u2"), dtype=BFloat16()),
    "bfloat16_zstd": lambda p, n: array(p, values(n, (6,), "<u2"), dtype=BFloat16(), compressors=[ZstdCodec()]),
    "scalars": lambda p, n: array(p, values(n, (), "i1")),
    "scalars_v2": lambda p, n: array(p, values(n, (), "<f8"), zarr_format=2),
    "three_bytes": lambda p, n: array(p, values(n, (3,), "u1")),
    "odd_width": lambda p, n: array(p, values(n, (1001,), "u1")),
    "deep_rows": lambda p, n: array(p, values(n, (2, 1, 3, 2), "<f2")),
    "cut_rows": lambda p, n: _wide(p, n, chunks=(5, 3, 2)),
    "cut_rows_v2": lambda p, n: _wide(p, n, chunks=(5, 3, 2), zarr_format=2),
    "one_chunk": lambda p, n: _wide(p, n, chunks=(n + 13, 4, 3)),
    "row_chunks": lambda p, n: _wide(p, n, chunks=(1, 4, 3)),
    "zstd": lambda p, n: _wide(p, n, compressors=[ZstdCodec(level=1)]),
    "crc": lambda p, n: _wide(p, n, compressors=[zarr.codecs.Crc32cCodec()]),
    "blosc_v2": lambda p, n: _wide(p, n, compressors=[Blosc("zstd")], zarr_format=2),
    "zstd_v2": lambda p, n: _wide(p, n, compressors=[Zstd()], zarr_format=2),
    "fortran_v2": lambda p, n: _wide(p, n, order="F", zarr_format=2),
    "sharded": lambda p, n: _wide(p, n, chunks=(4, 4, 3), shards=(20, 4, 3)),
    "sharded_cut_zstd": lambda p, n: _wide(p, n, chunks=(4, 2, 3), shards=(12, 4, 3), compressors=[ZstdCodec()]),
    "big_endian_v2": lambda p, n: array(p, values(n, (4,), ">f4"), zarr_format=2),
    "big_endian_v3": lambda p, n: array(p, values(n, (4,), ">i8"), serializer=zarr.codecs.BytesCodec(endian="big")),
    "dots": lambda p, n: _wide(p, n, chunk_key_encoding={"name": "default", "separator": "."}),
    "v2_keys": lambda p, n: _wide(p, n, chunk_key_encoding={"name": "v2", "separator": "."}),
    "slashes_v2": lambda p, n: _wide(p, n, zarr_format=2, chunk_key_encoding={"name": "v2", "separator": "/"}),
}


def act_and_token(n: int) -> dict[str, np.ndarray]:
    """Two fields of ``n`` rows, of 20 and 4 bytes."""
    return {"act": values(n, (5,)), "token": values(n, (), "<i4", seed=1)}


# --- Contents -----------------------------------------------------------------------------------


def rows_of(data: np.ndarray) -> np.ndarray:
    """The little-endian bytes of each row, uint8 ``(n, row bytes)``."""
    little = np.ascontiguousarray(data, data.dtype.newbyteorder("<"))
    width = little.dtype.itemsize * math.prod(little.shape[1:])
    return np.frombuffer(little.tobytes(), np.uint8).reshape(len(little), width)


def opened(path: Path | str) -> tuple[dict[str, Any], dict[str, zarr.Array]]:
    """A store's group attributes and arrays, as zarr alone reads them; a bare array is ``data``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnstableSpecificationWarning)
        node = zarr.open(str(path), mode="r")
        if isinstance(node, zarr.Array):
            return {}, {"data": node}
        return dict(node.attrs), dict(node.arrays())


def files(store: Path) -> dict[str, bytes]:
    """Every file of a store but the run's own records, by path."""
    found = {str(p.relative_to(store)): p for p in sorted(store.rglob("*")) if p.is_file()}
    return {k: p.read_bytes() for k, p in found.items() if not k.startswith("_actshuffle/")}


def evict(path: Path) -> None:
    """Evict a file from the page cache."""
    with path.open("rb") as held:
        os.fsync(held)
        os.posix_fadvise(held.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
