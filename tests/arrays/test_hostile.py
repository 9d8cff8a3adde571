"""Malicious stores: a typed error within seconds, bounded memory, and nothing touched outside the root.

Hostile stores are made by combining a small honest store with one lie at a time.  A fuzzer then garbles
metadata, run.json and receipts at random.
"""

from __future__ import annotations

import base64
import bz2
import gzip
import hashlib
import json
import lzma
import os
import pickle
import random
import shutil
import struct
import time
import zlib
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import numcodecs
import numpy as np
import pytest
import zarr

import actshuffle
from actshuffle.arrays import guard
from actshuffle.engine.scratch import scratch_place
from actshuffle.errors import ActshuffleError, ResumeMismatchError, SourceError
from actshuffle.jobs.records import sealed
from actshuffle.storage.files import LocalObjects
from actshuffle.storage.objects import open_objects
from actshuffle.storage.place import as_place
from actshuffle.testing import Faults, Killed, differences, matching
from actshuffle.testing import run as serial_run
from actshuffle.testing.stories import new_process
from support.processes import PHASES, PLAN, SEED, assert_exact, source
from support.stores import array, values

SECONDS = 5.0  # of work; on a machine that has nothing else to do, of time
PATIENCE = 60.0  # seconds for one that has
EXTRA_MEMORY = 300 << 20  # what an attempt may add to this process


# --- How they are met ---------------------------------------------------------------------------


class Witness:
    """Records every path that is opened, listed or looked up, by Python's audit hooks."""

    EVENTS = ("open", "os.listdir", "os.scandir", "os.remove", "os.rename", "os.mkdir", "os.rmdir", "shutil.rmtree")

    def __init__(self):
        self.watched = None
        self.paths = []
        import sys

        sys.addaudithook(self._saw)

    def _saw(self, event, args):
        if self.watched is not None and event in self.EVENTS and isinstance(args[0], (str, bytes)):
            self.paths.append(os.fsdecode(args[0]))

    def outside(self, *roots):
        """Paths under the test's folder that were touched, and lie in none of the roots."""
        roots = [os.path.realpath(root) for root in roots]
        real = {os.path.realpath(p) for p in self.paths}
        mine = (p for p in real if p.startswith(self.watched))
        return sorted(p for p in mine if not any(p == r or p.startswith(r + "/") for r in roots))


@pytest.fixture(scope="session")
def witness():
    return Witness()


def peak_memory(*, reset=False):
    """Peak memory of this process since the last reset, in bytes."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    text = Path("/proc/self/status").read_text()
    return int(text.split("VmHWM:")[1].split()[0]) << 10


def assert_met(src, tmp_path, witness, **settings):
    """Shuffle a hostile store: it must be refused, in time, with little memory, and with no access outside its root."""
    dst = tmp_path / "out" / "dst.zarr"
    dst.parent.mkdir(exist_ok=True)
    witness.paths.clear()
    witness.watched = os.path.realpath(tmp_path)
    before = peak_memory(reset=True)
    started, worked = time.monotonic(), time.process_time()
    try:
        with pytest.raises(ActshuffleError) as raised:
            actshuffle.shuffle(src, dst, **({"seed": 1, "fsync": False, "memory": "200MB"} | settings))
    finally:
        outside = witness.outside(src, dst.parent)
        witness.watched = None
    assert time.process_time() - worked < SECONDS
    assert time.monotonic() - started < PATIENCE
    assert peak_memory() - before < EXTRA_MEMORY
    assert not outside
    assert not dst.exists() or not (dst / "_actshuffle/zarr.json").exists()
    message = str(raised.value)
    assert len(message) < 3000
    shutil.rmtree(dst, ignore_errors=True)
    return message


def honest(path, zarr_format=3, rows=30, **settings):
    """A group of one array ``x``."""
    zarr.create_group(path, zarr_format=zarr_format)
    array(path, values(rows, (4,)), "x", zarr_format=zarr_format, **settings)
    return path


def edit(path, change):
    """Change a JSON document; ``change`` may return another document, or text or bytes."""
    document = json.loads(path.read_text())
    changed = change(document)
    changed = document if changed is None else changed
    if isinstance(changed, (dict, list)):
        changed = json.dumps(changed)
    path.write_bytes(changed if isinstance(changed, bytes) else changed.encode())


# --- Controls: those who meet them see what they are there for ----------------------------------


def test_control_an_honest_store_is_not_refused(tmp_path, witness):
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        assert_met(honest(tmp_path / "in.zarr"), tmp_path, witness)


def test_control_straying_is_seen(tmp_path, witness, monkeypatch):
    """A reader that follows links out of the root."""
    from actshuffle.engine import prepare

    (tmp_path / "secret").write_bytes(b"7")
    inner = prepare.check_places

    def strays(*args):
        (tmp_path / "secret").read_bytes()
        inner(*args)

    monkeypatch.setattr(prepare, "check_places", strays)
    src = honest(tmp_path / "in.zarr")
    (src / "zarr.json").write_bytes(b"[]")
    with pytest.raises(AssertionError, match="secret"):
        assert_met(src, tmp_path, witness)


def test_control_slow_and_greedy_are_seen(tmp_path, witness, monkeypatch):
    from actshuffle.engine import prepare

    src = honest(tmp_path / "in.zarr")
    (src / "zarr.json").write_bytes(b"[]")
    inner, held, started = prepare.check_places, [], [time.process_time()]

    def dawdles(*args):
        while time.process_time() < started[0] + 0.3:
            pass
        inner(*args)

    def takes(*args):
        held.append(np.ones((EXTRA_MEMORY + (700 << 20)) >> 3))
        inner(*args)

    monkeypatch.setattr(prepare, "check_places", dawdles)
    with monkeypatch.context() as patch, pytest.raises(AssertionError, match=r"< 0\.2"):
        patch.setitem(globals(), "SECONDS", 0.2)
        assert_met(src, tmp_path, witness)
    monkeypatch.setattr(prepare, "check_places", takes)
    with pytest.raises(AssertionError, match="peak_memory"):
        assert_met(src, tmp_path, witness)


def test_control_without_the_guard_a_key_that_is_there_twice_is_taken(tmp_path, witness, monkeypatch):
    src = honest(tmp_path / "in.zarr")
    edit(src / "x/zarr.json", lambda d: json.dumps(d)[:-1] + ', "node_type": "array"}')
    assert "twice" in assert_met(src, tmp_path, witness)
    monkeypatch.setattr(guard, "check_document", lambda *args: None)
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        assert_met(src, tmp_path, witness)


def test_control_the_fuzzer_sees_errors_of_no_type(tmp_path, monkeypatch):
    from actshuffle.engine import prepare

    def raw(*args):
        raise KeyError("shape")

    monkeypatch.setattr(prepare, "check_places", raw)
    with pytest.raises(AssertionError, match="seed 0: KeyError"):
        fuzz_metadata(tmp_path, range(60), 3)


# --- Lies in metadata, by combinatorics ---------------------------------------------------------

HUGE = [2**31, 2**40, 2**62, 2**63 - 1, 2**63, 2**64, 10**30]
ODD = [-1, -(2**63), 0.5, "30", None, [30], {}, 1e400]

LIES = {}


def lie(name, file, change):
    assert name not in LIES
    LIES[name] = (file, change)


def put(document, path, value):
    for key in path[:-1]:
        document = document[key]
    document[path[-1]] = value


def setter(path, value):
    return lambda document: put(document, path, value)


for value in (*HUGE, *ODD):
    lie(f"v3 shape[0] {value}", "x/zarr.json", setter(["shape", 0], value))
    lie(f"v3 shape[1] {value}", "x/zarr.json", setter(["shape", 1], value))
    lie(f"v2 shape[0] {value}", "x/.zarray", setter(["shape", 0], value))
    lie(f"v2 shape[1] {value}", "x/.zarray", setter(["shape", 1], value))
for value in (*HUGE, *ODD, 0):
    chunk = ["chunk_grid", "configuration", "chunk_shape"]
    lie(f"v3 chunk[0] {value}", "x/zarr.json", setter([*chunk, 0], value))
    lie(f"v3 chunk[1] {value}", "x/zarr.json", setter([*chunk, 1], value))
    lie(f"v2 chunk[0] {value}", "x/.zarray", setter(["chunks", 0], value))
    lie(f"v2 chunk[1] {value}", "x/.zarray", setter(["chunks", 1], value))
for value in [[], [30], [30, 4, 1], [[30, 4]], "30,4", None, 30, [2**40, 2**40], [30] * 200]:
    lie(f"v3 shape {value!s:.20}", "x/zarr.json", setter(["shape"], value))
    lie(f"v2 shape {value!s:.20}", "x/.zarray", setter(["shape"], value))
    lie(f"v3 chunk shape {value!s:.20}", "x/zarr.json", setter(["chunk_grid", "configuration", "chunk_shape"], value))
    lie(f"v2 chunks {value!s:.20}", "x/.zarray", setter(["chunks"], value))
for value in [
    "object",
    "|O",
    "O",
    "string",
    "<U",
    "|V0",
    "|S0",
    "r0",
    "r8000000000000",
    "float99",
    "",
    None,
    7,
    [],
    {},
    {"name": "numpy.datetime64", "configuration": {"unit": "fortnight"}},
    {"name": "fixed_length_utf32", "configuration": {"length_bytes": 2**40}},
    {"name": "null_terminated_bytes", "configuration": {"length_bytes": -4}},
    {"name": "variable_length_bytes"},
    {"name": "../../etc/passwd"},
    {"name": "struct", "configuration": {"fields": []}},
]:
    lie(f"v3 dtype {value!s:.60}", "x/zarr.json", setter(["data_type"], value))
for value in [
    "|O",
    "O",
    "<f99",
    "|V0",
    "|S0",
    "<U0",
    "",
    None,
    7,
    [],
    {},
    "|S99999999999",
    "<U2147483647",
    [["a", "|O"]],
    [["a", "<f4"], ["a", "<f4"]],
    [["a", "<f4", [1000000, 1000000]]],
    ">f3",
    "os.system",
    "<M8[fortnights]",
]:
    lie(f"v2 dtype {value!s:.40}", "x/.zarray", setter(["dtype"], value))
for name in [
    "pickle",
    "json2",
    "msgpack2",
    "vlen-utf8",
    "vlen-array",
    "vlen-bytes",
    "categorize",
    "base64",
    "nosuch",
    "../codec",
    "os.system",
    "",
    None,
    7,
]:
    lie(
        f"v2 filter {name}",
        "x/.zarray",
        setter(["filters"], [{"id": name, "protocol": 5, "dtype": "|O", "labels": ["a"]}]),
    )
    lie(
        f"v2 compressor {name}",
        "x/.zarray",
        setter(["compressor"], {"id": name, "protocol": 5, "dtype": "|O", "labels": []}),
    )
for name in [
    "pickle",
    "numcodecs.pickle",
    "numcodecs.json2",
    "vlen-utf8",
    "vlen-bytes",
    "nosuch",
    "../codec",
    "",
    None,
    7,
]:
    codec = {"name": name, "configuration": {}}
    lie(f"v3 codec alone {name}", "x/zarr.json", setter(["codecs"], [codec]))
    lie(f"v3 codec last {name}", "x/zarr.json", lambda d, codec=codec: d["codecs"].append(codec))
for value in [
    [],
    None,
    "bytes",
    [[]],
    [{}],
    [{"name": "bytes"}] * 2,
    [{"name": "gzip"}],
    [{"name": "bytes", "configuration": {"endian": "middle"}}],
    [{"name": "transpose", "configuration": {"order": [0, 0]}}],
]:
    lie(f"v3 codecs {value!s:.60}", "x/zarr.json", setter(["codecs"], value))
for value in [[0, 0], [-1, 4], [2**62, 4], [7], [3, 3], "7", None, [7, 4, 1]]:
    sharding = {
        "name": "sharding_indexed",
        "configuration": {
            "chunk_shape": value,
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
            "index_codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
        },
    }
    lie(f"v3 inner chunk {value}", "x/zarr.json", setter(["codecs"], [sharding]))
for value in [
    "default",
    {"name": "nosuch"},
    {"name": "default", "configuration": {"separator": "/../"}},
    {"name": "default", "configuration": {"separator": ""}},
    {"name": "v2", "configuration": {"separator": "../"}},
    {},
]:
    lie(f"v3 key encoding {value!s:.70}", "x/zarr.json", setter(["chunk_key_encoding"], value))
for value in ["../", "/../", "", 7, None, [], "\\"]:
    if value is not None:
        lie(f"v2 separator {value!r}", "x/.zarray", setter(["dimension_separator"], value))
for key in ["shape", "data_type", "chunk_grid", "chunk_key_encoding", "codecs", "node_type", "zarr_format"]:
    lie(f"v3 without {key}", "x/zarr.json", lambda d, key=key: d.pop(key) and None)
for key in ["shape", "dtype", "chunks", "zarr_format"]:
    lie(f"v2 without {key}", "x/.zarray", lambda d, key=key: d.pop(key) and None)
for value in [1, 4, 99, -3, "3", None, 3.5, []]:
    lie(f"v3 format {value}", "x/zarr.json", setter(["zarr_format"], value))
    lie(f"v3 group format {value}", "zarr.json", setter(["zarr_format"], value))
for value in ["group", "dataset", None, 3, []]:
    lie(f"v3 node type {value}", "x/zarr.json", setter(["node_type"], value))
for name, text in {
    "empty": b"",
    "null": b"null",
    "list": b"[]",
    "number": b"7",
    "not JSON": b"{shape: 30}",
    "cut": b'{"zarr_format": 3, "node_type": "arr',
    "latin-1": '{"é": 1}'.encode("latin-1"),
    "UTF-16": '{"zarr_format": 3}'.encode("utf-16"),
    "zeros": b"\0" * 1000,
    "lone surrogate": b'{"a": "\xed\xa0\x80"}',
    "deep list": b"[" * 100_000,
    "deep object": b'{"a":' * 100_000,
    "long number": b'{"shape": [' + b"9" * 10_000 + b"]}",
    "bom": b"\xef\xbb\xbf{}",
    "noise": random.Random(0).randbytes(4096),
}.items():
    lie(f"v3 array is {name}", "x/zarr.json", lambda d, text=text: text)
    lie(f"v3 group is {name}", "zarr.json", lambda d, text=text: text)
    lie(f"v2 array is {name}", "x/.zarray", lambda d, text=text: text)
for key, value in {"shape": [60, 4], "node_type": "group", "codecs": []}.items():
    twice = f'"{key}": {json.dumps(value)}'
    lie(f"v3 {key} twice", "x/zarr.json", lambda d, twice=twice: json.dumps(d)[:-1] + ", " + twice + "}")
lie("v2 shape twice", "x/.zarray", lambda d: json.dumps(d)[:-1] + ', "shape": [7, 4]}')
lie("v2 group twice", ".zgroup", lambda d: '{"zarr_format": 2, "zarr_format": 2}')
lie(
    "v3 attributes twice",
    "x/zarr.json",
    lambda d: json.dumps(d | {"attributes": 0}).replace('"attributes": 0', '"attributes": {"a": 1, "a": 2}'),
)
for extra in ["storage_transformers", "must_understand_me"]:
    lie(f"v3 with {extra}", "x/zarr.json", setter([extra], [{"name": "../../run.py", "must_understand": True}]))


@pytest.mark.parametrize("name", LIES)
def test_metadata_that_lies(name, tmp_path, witness):
    file, change = LIES[name]
    zarr_format = 3 if file.endswith("zarr.json") else 2
    src = honest(tmp_path / "in.zarr", zarr_format)
    edit(src / file, change)
    assert_met(src, tmp_path, witness)


def test_there_are_enough_lies():
    assert len(LIES) + len(CASES) >= 300


# --- Consolidated metadata ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../outside", "../../etc", "/etc", "a\\b", "..", ".", "{}", "a{", "", "_actshuffle"])
def test_consolidated_names(name, tmp_path, witness):
    outside = honest(tmp_path / "outside")
    src = honest(tmp_path / "in.zarr")
    metadata = json.loads((outside / "x/zarr.json").read_text())

    def consolidate(document):
        document["consolidated_metadata"] = {
            "kind": "inline",
            "must_understand": False,
            "metadata": {name: metadata, "x": metadata},
        }

    edit(src / "zarr.json", consolidate)
    assert_met(src, tmp_path, witness)


@pytest.mark.parametrize("name", ["x", "x/../../outside"])
def test_stale_consolidated_metadata(name, tmp_path):
    """It declares 60 rows where the array has 30, or lists a name that is no member: the array's metadata counts."""
    src = honest(tmp_path / "in.zarr")
    metadata = json.loads((src / "x/zarr.json").read_text()) | {"shape": [60, 4]}
    copies = {"kind": "inline", "must_understand": False, "metadata": {"x": metadata, name: metadata}}
    edit(src / "zarr.json", setter(["consolidated_metadata"], copies))
    serial_run(src, tmp_path / "dst.zarr", SEED, **PLAN)
    assert_exact(src, tmp_path / "dst.zarr")


# --- Names --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["{:>9999999999}", "{0.__class__}", "{}", "{", "}", "{{}}", "x{0!r:>1000000000}"])
def test_array_names_that_are_format_strings(name, tmp_path):
    """These are odd, and accepted."""
    src = tmp_path / "in.zarr"
    zarr.create_group(src)
    array(src, values(30, (4,)), name)
    started = time.process_time()
    serial_run(src, tmp_path / "dst.zarr", SEED, **PLAN | {"block_bytes": 300})
    assert time.process_time() - started < SECONDS
    assert_exact(src, tmp_path / "dst.zarr")
    assert actshuffle.verify(src, tmp_path / "dst.zarr").ok


@pytest.mark.parametrize("name", [b"a\xff", b"a\nb", b"a\x1b[31m", b"\xed\xa0\x80", b"a\\b", "a\u202eb".encode()])
def test_array_names_that_are_no_keys(name, tmp_path, witness):
    src = honest(tmp_path / "in.zarr")
    (src / "x").rename(src / os.fsdecode(name))
    message = assert_met(src, tmp_path, witness)
    assert message.isprintable() or "\n" not in message


# --- Links, pipes, devices ----------------------------------------------------------------------


def test_chunk_that_links_out_of_the_root(tmp_path, witness):
    src = honest(tmp_path / "in.zarr")
    secret = tmp_path / "secret"
    secret.write_bytes(bytes((src / "x/c/1/0").stat().st_size))
    (src / "x/c/1/0").unlink()
    (src / "x/c/1/0").symlink_to(secret)
    assert "link out of" in assert_met(src, tmp_path, witness)
    (src / "x/c/1/0").unlink()
    (src / "x/c/1/0").symlink_to("../../../../secret")
    assert "link out of" in assert_met(src, tmp_path, witness)


@pytest.mark.parametrize("what", ["x", "x/c", "x/c/1", "x/zarr.json", "zarr.json"])
def test_folder_or_metadata_that_links_out_of_the_root(what, tmp_path, witness):
    src = honest(tmp_path / "in.zarr")
    (src / what).rename(tmp_path / "moved")
    (src / what).symlink_to(tmp_path / "moved")
    assert_met(src, tmp_path, witness)


@pytest.mark.parametrize("target", ["/dev/zero", "/dev/urandom", "/proc/self/mem", "/etc/passwd", "/"])
@pytest.mark.parametrize("what", ["x/zarr.json", "x/c/1/0", "zarr.json"])
def test_links_to_devices(target, what, tmp_path, witness):
    src = honest(tmp_path / "in.zarr")
    (src / what).unlink()
    (src / what).symlink_to(target)
    assert_met(src, tmp_path, witness)


@pytest.mark.parametrize("what", ["x/zarr.json", "x/c/1/0", "zarr.json"])
def test_pipes(what, tmp_path, witness):
    src = honest(tmp_path / "in.zarr")
    (src / what).unlink()
    os.mkfifo(src / what)
    assert_met(src, tmp_path, witness)


def test_links_in_circles(tmp_path, witness):
    src = honest(tmp_path / "in.zarr")
    shutil.rmtree(src / "x/c/1")
    (src / "x/c/1").symlink_to("../c")
    assert_met(src, tmp_path, witness)
    (src / "x/c/1").unlink()
    (src / "x/c/1").symlink_to("1")
    assert_met(src, tmp_path, witness)


def test_links_inside_the_root_are_fine(tmp_path):
    src = honest(tmp_path / "in.zarr")
    (src / "x/c/1/0").rename(src / "kept")
    (src / "x/c/1/0").symlink_to("../../../kept")
    (tmp_path / "link.zarr").symlink_to(src)
    serial_run(tmp_path / "link.zarr", tmp_path / "dst.zarr", SEED)
    assert differences(src, tmp_path / "dst.zarr", SEED) == []


def test_half_done_destination_that_links_out(tmp_path, witness):
    """Somebody passes on a half-done run whose array folder links to a folder of yours."""
    src, dst, mine = source(tmp_path / "src.zarr"), tmp_path / "out/dst.zarr", tmp_path / "mine"
    dst.parent.mkdir()
    mine.mkdir()
    (mine / "c.0.0").write_bytes(b"precious")
    _stop(src, dst, PHASES["second split"])
    (dst / "x").symlink_to(mine)
    with pytest.raises(ActshuffleError, match="link out of"):
        serial_run(src, dst, SEED, **PLAN)
    assert [p.name for p in mine.iterdir()] == ["c.0.0"]
    assert (mine / "c.0.0").read_bytes() == b"precious"
    serial_run(src, dst, SEED, overwrite=True, **PLAN)
    assert (mine / "c.0.0").read_bytes() == b"precious"
    assert_exact(src, dst)


# --- Code ---------------------------------------------------------------------------------------


class Bang:
    """An object that leaves a mark when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("place", ["filter", "compressor"])
def test_no_pickle_is_read(zarr_format, place, tmp_path, witness):
    src = honest(tmp_path / "in.zarr", zarr_format)
    payload = pickle.dumps(Bang(tmp_path / "bang"))
    payload += b"\0" * (112 - len(payload) % 112)
    if zarr_format == 2:
        codec = {"id": "pickle", "protocol": 5}
        packing = {"filters": None, "compressor": codec}
        if place == "filter":
            packing = {"filters": [codec], "compressor": None}
        edit(src / "x/.zarray", lambda d: d.update(packing))
    else:
        codec = {"name": "numcodecs.pickle", "configuration": {}}
        edit(src / "x/zarr.json", lambda d: d["codecs"].insert(len(d["codecs"]) * (place == "filter"), codec))
    for chunk in (p for p in (src / "x").rglob("*") if p.is_file() and p.name[0] not in ".z"):
        chunk.write_bytes(payload)
    assert_met(src, tmp_path, witness)
    assert not (tmp_path / "bang").exists()


def test_fill_value_is_not_unpickled(tmp_path, witness):
    src = honest(tmp_path / "in.zarr", 2)
    bang = base64.b64encode(pickle.dumps(Bang(tmp_path / "bang"))).decode()
    edit(src / "x/.zarray", lambda d: d.update({"fill_value": bang, "dtype": "|O"}))
    assert_met(src, tmp_path, witness)
    assert not (tmp_path / "bang").exists()


# --- Bombs --------------------------------------------------------------------------------------


def _zstd_declared():
    """A frame that claims to hold a terabyte."""
    return b"\x28\xb5\x2f\xfd" + bytes([0xE0]) + struct.pack("<Q", 1 << 40) + b"\x01\0\0"


def _zstd_blocks():
    """A frame without a size, whose blocks each repeat one byte: 2.6 GB in 80 KB."""
    block = ((131072 << 3) | 2).to_bytes(3, "little") + b"\0"
    return b"\x28\xb5\x2f\xfd\x00\x88" + block * 20_000 + ((1 << 3) | 3).to_bytes(3, "little") + b"\0"


def _blosc_lie():
    data = bytearray(numcodecs.Blosc().encode(np.zeros(112, "u1")))
    data[4:8] = struct.pack("<I", (1 << 31) - 100)
    return bytes(data)


BOMBS = {
    "zstd declared": _zstd_declared,
    "zstd blocks": _zstd_blocks,
    "blosc": lambda: numcodecs.Blosc().encode(np.zeros(1 << 27, "u1")),
    "blosc lie": _blosc_lie,
    "gzip": lambda: gzip.compress(bytes(1 << 29), 1),
    "gzip many": lambda: gzip.compress(bytes(1 << 20)) * 1000,
    "zlib": lambda: zlib.compress(bytes(1 << 28), 1),
    "bz2": lambda: bz2.compress(bytes(1 << 23), 1) * 40,
    "lzma": lambda: lzma.compress(bytes(1 << 23), preset=0) * 40,
    "lz4": lambda: struct.pack("<i", (1 << 31) - 1) + b"\0" * 100,
}
CONFIGURATION = {
    "zstd": {"level": 1, "checksum": False},
    "gzip": {"level": 1},
    "blosc": {"cname": "zstd", "clevel": 1, "shuffle": "noshuffle", "typesize": 4, "blocksize": 0},
}
CASES = [(name, 2) for name in BOMBS] + [
    (name, how) for name in BOMBS if name.split()[0] in CONFIGURATION for how in (3, "sharded", "checked")
]


@lru_cache(maxsize=2)
def bomb(name):
    return bytes(BOMBS[name]())


@pytest.mark.parametrize(("name", "how"), sorted(CASES, key=lambda case: case[0]))
def test_bombs(name, how, tmp_path, witness):
    data, codec = bomb(name), name.split()[0]
    src = honest(tmp_path / "in.zarr", 2 if how == 2 else 3)
    if how == 2:
        edit(src / "x/.zarray", setter(["compressor"], {"id": codec}))
    else:
        packed = {"name": codec, "configuration": CONFIGURATION[codec]}
        plain = {"name": "bytes", "configuration": {"endian": "little"}}
        codecs = [plain, packed, *([{"name": "crc32c"}] if how == "checked" else [])]
        if how == "sharded":
            index = [plain, {"name": "crc32c"}]
            codecs = [
                {
                    "name": "sharding_indexed",
                    "configuration": {
                        "chunk_shape": [7, 4],
                        "codecs": [plain, packed],
                        "index_codecs": index,
                        "index_location": "end",
                    },
                }
            ]
            table = struct.pack("<QQ", 0, len(data))
            checked = numcodecs.CRC32C(location="end").encode(np.frombuffer(table, "u1"))
            data += bytes(checked)
        edit(src / "x/zarr.json", setter(["codecs"], codecs))
    for chunk in (p for p in (src / "x").rglob("*") if p.is_file() and p.name[0] not in ".z"):
        chunk.write_bytes(data)
    assert_met(src, tmp_path, witness)


def test_bombs_that_are_none(tmp_path):
    """Chunks of zeros compress a thousandfold, and are accepted."""
    for number, compressor in enumerate(
        [
            numcodecs.Zstd(),
            numcodecs.Blosc(),
            numcodecs.GZip(),
            numcodecs.Zlib(),
            numcodecs.BZ2(),
            numcodecs.LZMA(),
            numcodecs.LZ4(),
        ]
    ):
        src, dst = tmp_path / f"in{number}", tmp_path / f"out{number}"
        array(src, np.zeros((3000, 100), "<f4"), zarr_format=2, chunks=(1000, 100), compressors=compressor)
        serial_run(src, dst, SEED)
        assert differences(src, dst, SEED) == []


def test_declared_sizes_are_those_of_the_formats():
    data = bytes(range(256)) * 1000
    for codec in ["zstd", "blosc", "lz4", "gzip", "zlib", "bz2", "lzma"]:
        packed = bytes(numcodecs.get_codec({"id": codec}).encode(data))
        assert guard._unpacked_size(packed, codec, 1 << 30) == len(data), codec
        guard.check_chunk(packed, codec, len(data), "k")
        with pytest.raises(SourceError, match="unpacks to"):
            guard.check_chunk(packed, codec, len(data) - 1, "k")


def test_file_far_larger_than_its_chunk(tmp_path, witness):
    """A sparse file has no bytes on disk, and more than fit into memory when it is read."""
    src = honest(tmp_path / "in.zarr", compressors="auto")
    os.truncate(src / "x/c/1/0", 1 << 40)
    assert "too many" in assert_met(src, tmp_path, witness)


def test_metadata_far_too_large(tmp_path, witness):
    src = honest(tmp_path / "in.zarr")
    os.truncate(src / "x/zarr.json", 1 << 40)
    assert "metadata of that size" in assert_met(src, tmp_path, witness)


def test_shard_index_far_too_large(tmp_path, witness):
    src = honest(tmp_path / "in.zarr", chunks=(1, 1), shards=(30, 4))
    rows = 1 << 26

    def widen(document):
        document["shape"][0] = rows
        document["chunk_grid"]["configuration"]["chunk_shape"][0] = rows

    edit(src / "x/zarr.json", widen)
    os.truncate(src / "x/c/0/0", 1 << 33)
    assert "inner chunks" in assert_met(src, tmp_path, witness)


def test_shard_index_that_wraps_round(tmp_path, witness):
    src = honest(tmp_path / "in.zarr", chunks=(5, 4), shards=(15, 4))
    path = src / "x/c/0/0"
    data = bytearray(path.read_bytes())
    data[-4 - 48 : -4 - 32] = struct.pack("<QQ", 2**64 - 100, 200)
    path.write_bytes(data)
    assert "past its end" in assert_met(src, tmp_path, witness)


def test_gaps_without_end(tmp_path, witness):
    src = honest(tmp_path / "in.zarr")
    edit(src / "x/zarr.json", setter(["shape", 0], 2**50))
    assert_met(src, tmp_path, witness, missing_chunks="fill")


def test_group_of_very_many_names(tmp_path, witness, monkeypatch):
    monkeypatch.setattr(guard, "MEMBERS", 500)
    src = honest(tmp_path / "in.zarr")
    for number in range(600):
        (src / f"n{number}").touch()
    assert "names" in assert_met(src, tmp_path, witness)


def test_deep_groups(tmp_path, witness):
    src = tmp_path / "in.zarr"
    path = src
    for _ in range(400):
        path.mkdir()
        (path / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group"}')
        path = path / "g"
    assert "groups" in assert_met(src, tmp_path, witness)


def test_shards_within_shards(tmp_path, witness):
    src = honest(tmp_path / "in.zarr", chunks=(5, 4), shards=(15, 4))

    def nest(document):
        outer = document["codecs"][0]
        inner = json.loads(json.dumps(outer))
        outer["configuration"]["codecs"] = [inner]

    edit(src / "x/zarr.json", nest)
    assert "shards" in assert_met(src, tmp_path, witness)


# --- run.json, which resuming reads --------------------------------------------------------------


def _stop(src, dst, what, **plan):
    new_process()
    with Faults(matching(what, "kill")), pytest.raises(Killed):
        serial_run(src, dst, SEED, **(PLAN | plan))
    new_process()


def _reseal(path, change):
    """Change a sealed file and give it a valid seal."""
    body = json.loads(path.read_bytes())["body"]
    changed = change(body)
    body = body if changed is None else changed
    text = json.dumps(body, sort_keys=True)
    check = hashlib.sha256(text.encode()).hexdigest()
    path.write_text(f'{{"sha256": "{check}", "body": {text}}}')


@pytest.fixture
def half_done(tmp_path):
    src = source(tmp_path / "in" / "src.zarr") if (tmp_path / "in").mkdir() is None else None
    dst = tmp_path / "out" / "dst.zarr"
    dst.parent.mkdir()
    _stop(src, dst, PHASES["leaf"])
    return src, dst


@pytest.mark.parametrize("scratch", ["/mine", "mine", "memory://mine", "s3://mine/x", "../../mine", "/"])
def test_scratch_in_run_json_is_not_believed(scratch, half_done, tmp_path, witness):
    src, dst = half_done
    mine = tmp_path / "mine"
    victim = Path(scratch_place(as_place(dst), str(mine)).url)
    victim.mkdir(parents=True)
    (victim / "run.json").write_text("{}")
    (victim / "thesis.tex").write_text("years of work")
    folder = str(mine) if scratch == "/mine" else scratch
    _reseal(dst / "_actshuffle/run.json", lambda b: b["request"].update(scratch=folder))
    witness.paths.clear()
    witness.watched = os.path.realpath(tmp_path)
    with pytest.raises(ResumeMismatchError, match="give scratch"):
        actshuffle.shuffle(src, dst, fsync=False)
    touched = witness.outside(src.parent, dst.parent)
    witness.watched = None
    assert (victim / "thesis.tex").read_text() == "years of work"
    assert touched in ([], [os.path.realpath(victim / "run.json")])


@pytest.mark.parametrize("key", ["source", "destination", "scratch"])
def test_places_in_run_json_are_not_gone_to(key, half_done, tmp_path, witness):
    src, dst = half_done
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "run.json").write_text("{}")
    _reseal(dst / "_actshuffle/run.json", lambda b: b["plan"].update({key: str(mine)}))
    witness.paths.clear()
    witness.watched = os.path.realpath(tmp_path)
    with suppress(ActshuffleError):
        actshuffle.status(dst)
    actshuffle.shuffle(src, dst, fsync=False)  # what it says of itself is made anew from the arguments
    touched = witness.outside(src.parent, dst.parent)
    witness.watched = None
    assert touched == []
    assert_exact(src, dst)


def test_recorded_scratch_elsewhere_resumes_if_it_agrees(tmp_path):
    src, dst, fast = source(tmp_path / "src.zarr"), tmp_path / "dst.zarr", tmp_path / "fast"
    _stop(src, dst, PHASES["leaf"], scratch=str(fast))
    actshuffle.shuffle(src, dst, fsync=False)
    assert differences(src, dst, SEED) == []
    assert list(fast.iterdir()) == []


REQUESTS = [
    {"seed": -1},
    {"seed": "5"},
    {"seed": None},
    {"seed": 1.5},
    {"seed": True},
    {"levels": "many"},
    {"levels": -2},
    {"levels": [3]},
    {"memory": "8GB"},
    {"memory": -1},
    {"block_bytes": {}},
    {"codec": 7},
    {"codec": "exec"},
    {"fields": "x"},
    {"fields": [1]},
    {"fields": ["../x"]},
    {"source_row": "yes"},
    {"scratch": 7},
    {"fill_missing": 1},
    {"key_bits": [1]},
    {"key_bits": ["a", "b"]},
    {"key_bits": [65, 0]},
    {"unheard": 1},
    {"tasks_wanted": "x"},
    {"chunk_rows": 0},
    {"chunks_per_shard": -1},
    {"run_bytes": 0},
    {"__class__": "x"},
]


@pytest.mark.parametrize("change", REQUESTS, ids=str)
def test_request_in_run_json_is_checked(change, half_done):
    src, dst = half_done
    path = dst / "_actshuffle/run.json"
    whole = path.read_bytes()
    _reseal(path, lambda b: b["request"].update(change))
    with pytest.raises(ActshuffleError):
        actshuffle.shuffle(src, dst, fsync=False)
    path.write_bytes(whole)
    actshuffle.shuffle(src, dst, fsync=False)
    assert_exact(src, dst)


# --- The fuzzer ---------------------------------------------------------------------------------

SCALARS = [
    0,
    1,
    -1,
    2**31,
    2**63,
    2**64,
    10**30,
    1.5,
    float("nan"),
    "",
    "x",
    "../x",
    "\0",
    "\ud800",
    None,
    True,
    [],
    {},
]


def mutate(dice, document):
    """One to three random changes anywhere in a document."""
    for _ in range(dice.randint(1, 3)):
        spots = list(_spots(document))
        if not spots:
            return dice.choice(SCALARS)
        holder, key = dice.choice(spots)
        how = dice.randrange(6)
        if how == 0:
            del holder[key]
        elif how == 1:
            holder[key] = dice.choice(SCALARS)
        elif how == 2:
            other, at = dice.choice(spots)
            holder[key] = json.loads(json.dumps(other[at])) if at in other or isinstance(other, list) else None
        elif how == 3 and isinstance(holder[key], int):
            holder[key] += dice.choice([-1, 1, 7, 2**32, -(2**40)])
        elif how == 4 and isinstance(holder[key], str) and holder[key]:
            at = dice.randrange(len(holder[key]))
            holder[key] = holder[key][:at] + dice.choice("0z/.{}\0é") + holder[key][at + 1 :]
        elif isinstance(holder, list):
            holder.append(dice.choice(SCALARS))
        else:
            holder[dice.choice(["name", "shape", "format", "x", "", "configuration"])] = dice.choice(SCALARS)
    return document


def _spots(document):
    if isinstance(document, dict):
        for key in list(document):
            yield document, key
            yield from _spots(document[key])
    elif isinstance(document, list):
        for at, value in enumerate(list(document)):
            yield document, at
            yield from _spots(value)


def garble(dice, data):
    """Random changes to the bytes, whether or not they remain JSON."""
    data = bytearray(data)
    for _ in range(dice.randint(1, 4)):
        at = dice.randrange(len(data) + 1)
        how = dice.randrange(4)
        if how == 0 and at < len(data):
            data[at] ^= 1 << dice.randrange(8)
        elif how == 1:
            del data[at : at + dice.randint(1, 30)]
        elif how == 2:
            data[at:at] = dice.randbytes(dice.randint(1, 8))
        else:
            data[at:at] = data[dice.randrange(len(data) + 1) :][:20]
    return bytes(data)


def fuzzed(dice, data, sealed):
    """A document that was changed: as JSON, sealed again where that is needed, or as bytes."""
    if dice.random() < 0.3:
        return garble(dice, data)
    document = json.loads(data)
    if sealed:
        document["body"] = body = mutate(dice, document["body"])
        document["sha256"] = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        return f'{{"sha256": "{document["sha256"]}", "body": {json.dumps(body, sort_keys=True)}}}'.encode()
    return json.dumps(mutate(dice, document)).encode()


def fuzz_metadata(folder, seeds, zarr_format):
    """Source metadata: an honest result, or a typed error; never long, never anything else."""
    pristine = honest(folder / "pristine", zarr_format)
    for seed in seeds:
        dice = random.Random(seed)
        src = folder / "src.zarr"
        shutil.rmtree(src, ignore_errors=True)
        shutil.copytree(pristine, src)
        names = [p for p in sorted(src.rglob("*")) if p.name in guard.METADATA_NAMES]
        path = dice.choice(names)
        path.write_bytes(fuzzed(dice, path.read_bytes(), sealed=False))
        dst, started = folder / "dst.zarr", time.process_time()
        try:
            new_process()
            serial_run(src, dst, SEED, memory=100 << 20)
        except ActshuffleError:
            pass
        except Exception as err:
            raise AssertionError(f"seed {seed}: {type(err).__name__}: {err}") from err
        else:
            if (differ := differences(src, dst, SEED)) and "int" not in str(differ):
                raise AssertionError(f"seed {seed}: {differ}")
        assert time.process_time() - started < SECONDS, seed
        shutil.rmtree(dst, ignore_errors=True)
        shutil.rmtree(scratch_place(as_place(dst), None).url, ignore_errors=True)


@pytest.mark.parametrize("name", ["", "z", "source_row"])
def test_receipts_of_fields_that_are_not_there_count_for_nothing(name, tmp_path):
    """The text of a record with a valid seal."""
    src, dst = source(tmp_path / "src.zarr"), tmp_path / "dst.zarr"
    _stop(src, dst, "put _actshuffle/receipts/1.json")
    path = dst / "_actshuffle/receipts/0.json"
    body = json.loads(path.read_text())["body"]
    body["digests"][name] = body["digests"]["x"]
    path.write_bytes(sealed(body))
    new_process()
    serial_run(src, dst, SEED, **PLAN)
    assert differences(src, dst, SEED) == []


RECORDS = [
    "out/_actshuffle/run.json",
    "out/_actshuffle/receipts/0.json",
    "scratch/run.json",
    "scratch/bounds.json",
    "scratch/level2/receipts/0.json",
    "scratch/level2/receipts/3.json",
    "scratch/level2/index/0.json",
]


def fuzz_records(folder, seeds):
    """Records of a half-done run: a typed error, or the exact output.  Then without them: the output."""
    src, dst = source(folder / "src.zarr"), folder / "dst.zarr"
    scratch = Path(scratch_place(as_place(dst), None).url)
    _stop(src, dst, "put _actshuffle/receipts/1.json")
    shutil.copytree(dst, folder / "out")
    shutil.copytree(scratch, folder / "scratch")
    for seed in seeds:
        dice = random.Random(seed)
        for place in (dst, scratch):
            shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(folder / "out", dst)
        shutil.copytree(folder / "scratch", scratch)
        name = dice.choice(RECORDS)
        path = (dst if name.startswith("out/") else scratch) / name.split("/", 1)[1]
        path.write_bytes(fuzzed(dice, path.read_bytes(), sealed=True))
        started = time.process_time()
        for _attempt in range(4):
            try:
                new_process()
                serial_run(src, dst, SEED, **PLAN)
                break
            except ActshuffleError as err:
                if "overwrite=True" in str(err) or "half done" in str(err):
                    break
            except Exception as err:
                raise AssertionError(f"seed {seed}, {name}: {type(err).__name__}: {err}") from err
        if (dst / "_actshuffle/zarr.json").exists():
            found = differences(src, dst, SEED)
            # A forged receipt with a valid seal can lie about digests; then verify detects it.
            if found or not actshuffle.verify(src, dst).ok:
                assert name == "out/_actshuffle/receipts/0.json", (seed, name, found)
                assert not found, (seed, name, found)
        assert time.process_time() - started < 4 * SECONDS, seed


def fuzz_marker(folder, seeds):
    """Changes to the marker and its neighbours: verify, info, status and a run end in a result or a typed error."""
    src, dst = source(folder / "src.zarr", 40), folder / "dst.zarr"
    serial_run(src, dst, SEED)
    names = ["_actshuffle/zarr.json", "x/zarr.json", "zarr.json", "_actshuffle/digests/x/zarr.json"]
    for seed in seeds:
        dice = random.Random(seed)
        path = dst / dice.choice(names)
        before = path.read_bytes()
        path.write_bytes(fuzzed(dice, before, sealed=False))
        same = _same(before, path.read_bytes())
        for call in (
            lambda: actshuffle.verify(src, dst),
            lambda: actshuffle.info(dst),
            lambda: actshuffle.status(dst),
            lambda: serial_run(src, dst, SEED),
        ):
            try:
                found = call()
            except ActshuffleError:
                continue
            except Exception as err:
                raise AssertionError(f"seed {seed}, {path.name}: {type(err).__name__}: {err}") from err
            if isinstance(found, actshuffle.VerifyReport) and not same:
                assert not found.ok, (seed, path)
        path.write_bytes(before)


def _same(one, other):
    try:
        return json.loads(one) == json.loads(other)
    except (ValueError, RecursionError):
        return False


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_fuzzed_metadata(zarr_format, tmp_path):
    fuzz_metadata(tmp_path, range(100), zarr_format)


def test_fuzzed_records(tmp_path):
    fuzz_records(tmp_path, range(25))


def test_fuzzed_marker(tmp_path):
    fuzz_marker(tmp_path, range(40))


@pytest.mark.soak
@pytest.mark.parametrize("block", range(20))
def test_fuzzed_metadata_by_the_thousand(block, tmp_path):
    fuzz_metadata(tmp_path, range(1000 + 350 * block, 1350 + 350 * block), 2 + block % 2)


@pytest.mark.soak
@pytest.mark.parametrize("block", range(10))
def test_fuzzed_records_by_the_thousand(block, tmp_path):
    fuzz_records(tmp_path, range(1000 + 60 * block, 1060 + 60 * block))


@pytest.mark.soak
@pytest.mark.parametrize("block", range(10))
def test_fuzzed_marker_by_the_thousand(block, tmp_path):
    fuzz_marker(tmp_path, range(1000 + 240 * block, 1240 + 240 * block))


# --- Keys ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["../x", "/etc/passwd", "a/../../x", "..", "a/..", "a\0b"])
@pytest.mark.parametrize("call", ["get", "size", "put", "delete", "delete_prefix", "list", "names"])
def test_keys_stay_under_the_root(call, key, tmp_path):
    objects = LocalObjects(tmp_path / "root")
    with pytest.raises(ActshuffleError):
        found = getattr(objects, call)(key, b"") if call == "put" else getattr(objects, call)(key)
        list(found)
    assert not list(tmp_path.iterdir())


def test_forked_processes_do_not_share_memory():
    """Memory that a parent's tasks work in is no place for its children to write."""
    from actshuffle.storage.buffers import Arena

    held = Arena().reset(1 << 16).take((16,))
    held[:] = 7
    child = os.fork()
    if child == 0:
        held[:] = 9
        os._exit(0)
    os.waitpid(child, 0)
    assert held.tolist() == [7] * 16


def test_forked_process_can_use_object_stores():
    objects = open_objects(as_place("memory://forked"))
    objects.put("k", b"1")
    child = os.fork()
    if child == 0:
        try:
            ok = open_objects(as_place("memory://forked")).get("k") == b"1"
        except BaseException:
            ok = False
        os._exit(0 if ok else 1)
    deadline = time.monotonic() + 120
    while (found := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
        time.sleep(0.02)
    if found[0] == 0:
        os.kill(child, 9)
        os.waitpid(child, 0)
    assert found[0] == child
    assert os.waitstatus_to_exitcode(found[1]) == 0
