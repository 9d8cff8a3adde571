"""Every type that `plan` accepts, on every path: what is in the array is in the output, byte for byte."""

import numpy as np
import pytest
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec, GzipCodec, TransposeCodec

import actshuffle
from actshuffle.arrays import source as source_module
from actshuffle.errors import RequestError
from actshuffle.testing.oracle import differences
from support.axes import halved

pytestmark = pytest.mark.filterwarnings("ignore::zarr.errors.UnstableSpecificationWarning")
N = 24
REQUEST = {"seed": 1, "block_bytes": 6000, "run_bytes": 1, "chunk_rows": 5, "fsync": False}

PAIR = np.dtype([("a", ">i4"), ("b", "<f4")])
TYPES = [
    *("?", "i1", "u1"),
    *(order + name for order in "<>" for name in ("i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8", "c8", "c16")),
    *("<M8[s]", ">M8[D]", "<M8[25ns]", "<m8[us]", ">m8[s]", "S5", "<U6", ">U6", "V3", PAIR),
]
NAMES = str.maketrans("<>|[]?", "lbn__q")
PATHS = {
    "plain": {"compressors": None},
    "compressed": {},
    "gzip": {"compressors": [GzipCodec()]},
    "blosc": {"compressors": [BloscCodec()]},
    "crc32c": {"compressors": [Crc32cCodec()]},
    "sharded": {"compressors": None, "shards": (14, 2)},
    "sharded and compressed": {"shards": (14, 2)},
    "F order": {"filters": [TransposeCodec(order=(1, 0))], "compressors": None},
    "rows cut": {"compressors": None, "chunks": (7, 1)},
    "v2": {"zarr_format": 2, "compressors": None},
    "v2, compressed": {"zarr_format": 2},
    "v2, F order": {"zarr_format": 2, "order": "F"},
}


def of_type(dtype: np.dtype, n: int = N) -> np.ndarray:
    """Values of a type from random bytes that every type can hold, ``(n, 2)``."""
    numbers = np.random.default_rng(3).integers(0, 100, (n, 2))
    if dtype.names:
        data = np.zeros((n, 2), dtype)
        for name in dtype.names:
            data[name] = numbers
        return data
    if dtype.kind == "V":
        return np.frombuffer(np.random.default_rng(3).bytes(2 * n * dtype.itemsize), dtype).reshape(n, 2)
    return numbers.astype("i8").astype(dtype) if dtype.kind in "mM" else numbers.astype(dtype)


def made(path, types, settings) -> None:
    """A group with an array of each type on one of the paths, named by type."""
    zarr.create_group(path, zarr_format=settings.get("zarr_format", 3))
    settings = {"chunks": (7, 2), "config": {"write_empty_chunks": True}} | settings
    for name, dtype in types.items():
        zarr.create_array(path, name=name, shape=(N, 2), dtype=dtype, **settings)[...] = of_type(dtype)


def types_for(path) -> dict[str, np.dtype]:
    """Types by a name that any store takes; zarr itself cannot write shards of raw bytes and of records."""
    found = {(d.str if not d.names else "record").translate(NAMES): d for d in map(np.dtype, TYPES)}
    return {name: d for name, d in found.items() if d.kind != "V" or "sharded" not in path}


@pytest.mark.parametrize(("path", "half"), halved(PATHS, [0, 1]))
def test_every_type_on_every_path(path, half, tmp_path):
    src, virtual, request = tmp_path / "in.zarr", tmp_path / "virtual", REQUEST | {"levels": 2}
    types = dict(list(types_for(path).items())[half::2])
    made(src, types, PATHS[path])
    assert actshuffle.plan(src, block_bytes=6000, run_bytes=1).rows == N
    actshuffle.shuffle(src, tmp_path / "out.zarr", **request)
    assert differences(src, tmp_path / "out.zarr", 1) == []
    assert actshuffle.verify(src, tmp_path / "out.zarr").ok
    actshuffle.concat([src, src], virtual)
    actshuffle.shuffle(virtual, tmp_path / "both.zarr", **request, codec="zstd")
    both = actshuffle.open_dataset(tmp_path / "both.zarr")
    order = both.read("source_row", 0, 2 * N)
    batches = list(actshuffle.Loader(src, 5, buffer_rows=0, incomplete=True))
    for name in types:
        data = np.asarray(zarr.open_array(src, path=name, mode="r"))
        read = np.concatenate([batch[name] for batch in batches])
        assert read.tobytes() == data.astype(read.dtype).tobytes(), name
        found = both.read(name, 0, 2 * N)
        assert found.tobytes() == np.concatenate([data, data])[order].astype(found.dtype).tobytes(), name


@pytest.mark.parametrize("settings", [{"codec": "crc32c"}, {"codec": "zstd"}, {"chunks_per_shard": 2}], ids=str)
def test_every_type_to_every_output(settings, tmp_path):
    src, dst = tmp_path / "in.zarr", tmp_path / "out.zarr"
    sharded = "chunks_per_shard" in settings
    made(src, types_for("sharded" if sharded else "compressed"), PATHS["compressed"])
    actshuffle.shuffle(src, dst, **REQUEST | settings)
    assert differences(src, dst, 1) == []
    assert actshuffle.verify(src, dst).ok
    assert actshuffle.stats(dst).rows == N


@pytest.mark.parametrize("dtype", [np.dtype("V3"), PAIR], ids=["bytes", "record"])
def test_types_that_zarr_cannot_shard_are_refused(dtype, tmp_path):
    made(tmp_path / "in.zarr", {"x": dtype}, PATHS["compressed"])
    with pytest.raises(RequestError, match="cannot shard"):
        actshuffle.shuffle(tmp_path / "in.zarr", tmp_path / "out.zarr", **REQUEST, chunks_per_shard=2)
    assert not (tmp_path / "out.zarr").exists()


def test_control_without_the_view_datetimes_fail(tmp_path, monkeypatch):
    """Through the buffer protocol, as it was done before."""

    def by_buffer(rows):
        little = np.ascontiguousarray(rows, dtype=rows.dtype.newbyteorder("<"))
        return np.frombuffer(little.data, np.uint8).reshape(len(little), -1)

    made(tmp_path / "in.zarr", {"x": np.dtype("<M8[s]")}, PATHS["compressed"])
    monkeypatch.setattr(source_module, "row_bytes_of", by_buffer)
    with pytest.raises(ValueError, match="buffer"):
        actshuffle.shuffle(tmp_path / "in.zarr", tmp_path / "out.zarr", **REQUEST)
