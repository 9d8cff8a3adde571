"""The table of output codecs: every row of it round-trips every type, and other readers agree."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tensorstore
import xarray
import zarr
from zarr.codecs import ZstdCodec

import actshuffle
from actshuffle.arrays.codecs import CODECS, name_of
from actshuffle.arrays.guard import described
from actshuffle.bfloat16 import BFloat16
from actshuffle.errors import RequestError
from actshuffle.testing import differences
from support.axes import halved

pytestmark = [
    # Zarr warns about each codec of numcodecs that has no specification.
    pytest.mark.filterwarnings("ignore:Numcodecs codecs are not in the Zarr version 3 specification")
]
SEED, ROWS = 3, 90
DTYPES = ["?", "i1", "<u2", "<i8", "<f2", "<f4", "<f8", "<c16", "S5", "<U3", "<M8[ns]"]
STRUCTURED = {"pair": np.dtype([("a", "<f4"), ("b", "<i8")]), "wide": np.dtype("V300")}


def draw(rng: np.random.Generator, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """Rows half of whose bytes are zeros, so that codecs have something to compress."""
    dtype = np.dtype(dtype)
    top = {"?": 2, "U": 128, "S": 128}.get(dtype.kind if dtype.kind != "b" else "?", 256)
    size = int(np.prod(shape)) * dtype.itemsize
    data = rng.integers(0, top, size, np.uint8) * rng.integers(0, 2, size, np.uint8)
    if dtype.kind == "U":
        data = (rng.integers(97, 123, size // 4).astype("<u4")).view(np.uint8)
    return data.view(dtype).reshape(shape)


@pytest.fixture(scope="module")
def src(tmp_path_factory):
    path, rng = tmp_path_factory.mktemp("codecs") / "src.zarr", np.random.default_rng(0)
    group, full = zarr.create_group(path), {"write_empty_chunks": True}
    for number, dtype in enumerate(DTYPES):
        group.create_array(
            f"f{number}",
            data=draw(rng, dtype, (ROWS, *(2,) * (number % 3))),
            chunks=(20, *(2,) * (number % 3)),
            config=full,
        )
    made = group.create_array("bf16", shape=(ROWS, 4), chunks=(20, 4), dtype=BFloat16(), config=full)
    made[...] = rng.integers(0, 1 << 16, (ROWS, 4), np.uint16)
    for name, dtype in STRUCTURED.items():
        group.create_array(name, data=draw(rng, dtype, (ROWS,)), chunks=(20,), config=full)
    return path


@pytest.mark.parametrize(("codec", "levels"), halved(CODECS, [1, 2]))
def test_rows_round_trip(codec, levels, src, tmp_path):
    actshuffle.shuffle(src, tmp_path / "d", seed=SEED, codec=codec, levels=levels, block_bytes=60_000, fsync=False)
    assert differences(src, tmp_path / "d", SEED) == []
    report = actshuffle.verify(src, tmp_path / "d")
    assert report.ok, report
    assert actshuffle.verify(src, tmp_path / "d", quick=True).ok
    store = actshuffle.open_dataset(tmp_path / "d")
    assert {info.raw for info in store.fields.values()} == {CODECS[codec].raw}
    again = tmp_path / "again"  # and as a source
    actshuffle.shuffle(tmp_path / "d", again, seed=SEED, source_row=False, fields=("f5", "bf16"), fsync=False)
    assert actshuffle.verify(tmp_path / "d", again).ok


@pytest.mark.parametrize("codec", CODECS)
def test_rows_round_trip_in_shards(codec, src, tmp_path):
    fields = [f"f{i}" for i in range(len(DTYPES))] + ["bf16"]  # zarr cannot shard structured types
    dst = tmp_path / "d"
    actshuffle.shuffle(src, dst, seed=SEED, codec=codec, chunks_per_shard=3, chunk_rows=5, fields=fields, fsync=False)
    assert actshuffle.verify(src, dst).ok
    assert not any(info.raw for info in actshuffle.open_dataset(dst).fields.values())


@pytest.mark.parametrize("codec", set(CODECS) - {"lz4"})
def test_other_readers_agree(codec, src, tmp_path):
    names = [f"f{i}" for i, dtype in enumerate(DTYPES) if np.dtype(dtype).kind not in "SUM"] + ["bf16"]
    dst = tmp_path / "d"
    actshuffle.shuffle(src, dst, seed=SEED, codec=codec, fields=names, fsync=False)
    with xarray.open_zarr(dst, consolidated=False) as dataset:
        order = dataset["source_row"].values
        for name in names:
            before = zarr.open_array(src / name, mode="r")[...][order]
            assert dataset[name].values.tobytes() == before.tobytes()
            spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(dst / name)}}
            assert tensorstore.open(spec).result().read().result().tobytes() == before.tobytes()


def test_chunks_are_what_the_names_say(src, tmp_path):
    chunks = {}
    for codec in CODECS:
        dst = tmp_path / codec
        actshuffle.shuffle(src, dst, seed=SEED, codec=codec, fields=("f5", "bf16"), fsync=False)
        meta = json.loads((dst / "bf16/zarr.json").read_text())
        steps = meta["codecs"][1:]
        assert [step["name"] for step in steps] == [step["name"] for step in CODECS[codec].steps]
        for step in steps:
            assert step.get("configuration", {}).get("typesize", 2) == 2  # a bfloat16's bytes are shuffled by twos
        found = zarr.open_array(dst / "bf16", mode="r")
        assert name_of([described(step) for step in found.compressors]) == (None if codec == "none" else codec)
        chunks[codec] = (dst / "f5/c.0.0.0").read_bytes()
    assert chunks["crc32c"][:-4] == chunks["none"]
    assert len(set(chunks.values())) == len(CODECS)


def test_steps_of_no_row_have_no_name():
    assert name_of([described(ZstdCodec(level=9))]) is None
    assert name_of([described(ZstdCodec()), described(ZstdCodec())]) is None
    assert name_of([]) is None


def test_unknown_codec_is_refused_with_the_known_ones(src, tmp_path):
    with pytest.raises(RequestError, match=f"codec must be one of {', '.join(CODECS)}, got 'brotli'"):
        actshuffle.shuffle(src, tmp_path / "d", codec="brotli")


def test_chunks_too_large_for_a_codec_are_refused_before_anything_is_written(tmp_path):
    zarr.create_array(tmp_path / "src", shape=(1 << 16, 1 << 16), chunks=(1, 1 << 16), dtype="u1", compressors=None)
    plan = {"chunk_rows": 1 << 15, "block_bytes": 1 << 33, "missing_chunks": "fill", "seed": 1}
    with pytest.raises(RequestError, match="codec blosc-lz4 takes 2,147,483,631 at most"):
        actshuffle.shuffle(tmp_path / "src", tmp_path / "d", codec="blosc-lz4", **plan)
    assert not (tmp_path / "d").exists()
