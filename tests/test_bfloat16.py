"""bfloat16 on disk: zarr and tensorstore read the same values, and nothing is lost on the way."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import tensorstore
import zarr
from zarr.dtype import DataTypeValidationError

from actshuffle.bfloat16 import BFloat16, bits_to_float, float_to_bits
from support.oracle import assert_is_oracle
from support.runs import run
from support.stores import array, values

ALL = np.arange(1 << 16, dtype=np.uint16)


def with_tensorstore(path):
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}
    return tensorstore.open(spec).result()


def test_every_bit_pattern_comes_back(tmp_path):
    array(tmp_path / "a", ALL, dtype=BFloat16(), chunks=(10_000,))
    assert json.loads((tmp_path / "a" / "zarr.json").read_text())["data_type"] == "bfloat16"
    found = zarr.open_array(tmp_path / "a", mode="r")
    assert found.dtype == np.uint16
    np.testing.assert_array_equal(found[:], ALL)


def test_tensorstore_reads_the_values(tmp_path):
    array(tmp_path / "a", ALL, dtype=BFloat16(), chunks=(10_000,), fill_value=0x3FC0)
    store = with_tensorstore(tmp_path / "a")
    assert store.dtype == tensorstore.bfloat16
    assert float(store.fill_value) == 1.5
    np.testing.assert_array_equal(store.read().result().view(np.uint16), ALL)


def test_zarr_reads_what_tensorstore_wrote(tmp_path):
    tensorstore.open(
        {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": str(tmp_path / "a")},
            "metadata": {"shape": [6], "data_type": "bfloat16", "fill_value": "NaN"},
            "create": True,
        }
    ).result()[:4] = np.array([1, -2, 0.5, 3], "f4").astype(tensorstore.bfloat16.numpy_dtype)
    found = zarr.open_array(tmp_path / "a", mode="r")
    assert [bits_to_float(b) for b in found[:4]] == [1, -2, 0.5, 3]
    assert found[5] == 0x7FC0


@pytest.mark.parametrize(
    "first",
    [
        "import actshuffle",
        # What zarr up to 3.1.6 leaves undone by itself: it collects entry points of data types only.
        "from zarr.dtype import data_type_registry as r; r._lazy_load()",
    ],
)
def test_zarr_finds_the_type_in_a_fresh_process(tmp_path, first):
    array(tmp_path / "a", ALL[:50], dtype=BFloat16())
    code = f"{first}; import sys, zarr; print(int(zarr.open(sys.argv[1], mode='r')[:].sum()))"
    command = [sys.executable, "-c", code, str(tmp_path / "a")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) == ALL[:50].sum()


def test_big_endian_on_disk(tmp_path):
    array(tmp_path / "a", ALL, dtype=BFloat16(), serializer=zarr.codecs.BytesCodec(endian="big"), chunks=(1 << 16,))
    assert (tmp_path / "a" / "c" / "0").read_bytes() == ALL.astype(">u2").tobytes()
    np.testing.assert_array_equal(zarr.open_array(tmp_path / "a", mode="r")[:], ALL)
    np.testing.assert_array_equal(with_tensorstore(tmp_path / "a").read().result().view(np.uint16), ALL)


@pytest.mark.parametrize("levels", [1, 2])
def test_shuffle_keeps_the_type(tmp_path, levels):
    src, dst = tmp_path / "src", tmp_path / "dst"
    array(src, values(100, (3,), "<u2"), dtype=BFloat16(), fill_value=0x3F80, dimension_names=["token", "x"])
    run(src, dst, levels=levels, chunk_rows=9)
    assert_is_oracle(src, dst)
    order = zarr.open_array(dst / "source_row")[:]
    before, after = (with_tensorstore(src).read().result(), with_tensorstore(dst / "data").read().result())
    np.testing.assert_array_equal(after.view(np.uint16), before[order].view(np.uint16))


@pytest.mark.parametrize(
    ("bits", "text"),
    [
        (0, 0.0),
        (0x3F80, 1.0),
        (0xC000, -2.0),
        (0x7F80, "Infinity"),
        (0xFF80, "-Infinity"),
        (0x7FC0, "NaN"),
        (0x7FC1, "0x7fc1"),
        (0xFFFF, "0xffff"),
        (0x0001, 2.0**-133),
        (0x8000, -0.0),
    ],
)
def test_fill_values_as_json(bits, text):
    kind = BFloat16()
    found = kind.to_json_scalar(np.uint16(bits), zarr_format=3)
    assert found == text
    assert math.copysign(1, found) == math.copysign(1, text) if isinstance(text, float) else True
    assert kind.from_json_scalar(json.loads(json.dumps(found)), zarr_format=3) == bits


def test_every_fill_value_survives_json():
    kind = BFloat16()
    back = [kind.from_json_scalar(kind.to_json_scalar(b, zarr_format=3), zarr_format=3) for b in ALL]
    np.testing.assert_array_equal(np.array(back, np.uint16), ALL)


def test_numbers_round_to_nearest_even_like_those_who_know():
    rng = np.random.default_rng(0)
    numbers = rng.integers(0, 1 << 32, 20_000, np.uint64).astype(np.uint32).view(np.float32)
    numbers = np.concatenate([numbers[np.isfinite(numbers)], np.float32([0, -0.0, np.inf, -np.inf])])
    expected = numbers.astype(tensorstore.bfloat16.numpy_dtype).view(np.uint16)
    np.testing.assert_array_equal(np.array([float_to_bits(x) for x in numbers]), expected)
    assert float_to_bits(math.nan) == 0x7FC0


def test_no_other_type_is_taken_for_it():
    with pytest.raises(DataTypeValidationError):
        BFloat16.from_native_dtype(np.dtype("u2"))
    with pytest.raises(DataTypeValidationError):
        BFloat16._from_json_v2("bfloat16")
    with pytest.raises(DataTypeValidationError):
        BFloat16._from_json_v3("uint16")
    with pytest.raises(ValueError, match="v2"):
        BFloat16().to_json(2)
    with pytest.raises(TypeError):
        BFloat16().cast_scalar(1.5)
    assert zarr.dtype.parse_dtype("uint16", zarr_format=3).to_json(3) == "uint16"
