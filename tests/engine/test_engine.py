"""The engine against the oracle: every order is equally likely, and every cut of a run gives the same bytes."""

from __future__ import annotations

import itertools
import math
import threading
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import tensorstore
import xarray
import zarr
from scipy import stats
from zarr.storage import FsspecStore

import actshuffle
from actshuffle.arrays.names import DIGESTS
from actshuffle.arrays.small import get_array
from actshuffle.bfloat16 import BFloat16
from actshuffle.engine import leaves, spill, tasks
from actshuffle.errors import ConservationError, MissingChunkError, RequestError
from actshuffle.executors import Serial
from actshuffle.jobs.receipts import each
from actshuffle.limits import RECEIPTS_AT_ONCE
from actshuffle.ordering.keys import Keys, order
from actshuffle.planning.tree import Task
from actshuffle.storage import directio as reading
from actshuffle.storage.files import LocalObjects
from actshuffle.storage.objects import open_objects
from actshuffle.storage.place import as_place
from support.axes import halved
from support.executors import Twice
from support.oracle import assert_is_oracle
from support.runs import run
from support.stores import SOURCES, STRUCT, array, files, group, opened, rows_of, values

# --- Every order equally often -------------------------------------------------------------------


def order_counts(n, orders):
    """The number of occurrences of each of the n! orders."""
    seen = Counter(map(tuple, orders))
    assert all(sorted(found) == list(range(n)) for found in seen)
    return [seen[o] for o in itertools.permutations(range(n))]


def two_sided_p(counts):
    """Counts that are too uneven fail, and so do counts that are too even."""
    statistic, df = stats.chisquare(counts).statistic, len(counts) - 1
    return min(1, 2 * min(stats.chi2.cdf(statistic, df), stats.chi2.sf(statistic, df)))


@pytest.mark.parametrize("n", [2, 3, 4, 5, 6])
def test_uniform_every_order_is_as_frequent_over_seeds(n):
    seeds = 40 * math.factorial(n) if n > 3 else 2000
    counts = order_counts(n, (order(n, seed).tolist() for seed in range(seeds)))
    assert min(counts) > 0
    assert two_sided_p(counts) > 0.001


@pytest.mark.soak
@pytest.mark.parametrize("n", [2, 3, 4, 5, 6])
def test_uniform_every_order_over_a_million_seeds(n):
    counts = order_counts(n, (order(n, seed).tolist() for seed in range(2**41, 2**41 + 10**6)))
    assert two_sided_p(counts) > 0.001


def naive_shuffle(n, seed):
    """The well-known mistake: n^n equally likely histories do not divide into n! orders."""
    rng, found = np.random.default_rng(seed), list(range(n))
    for i in range(n):
        j = rng.integers(n)
        found[i], found[j] = found[j], found[i]
    return found


@pytest.mark.parametrize("n", [3, 4])
def test_uniform_check_sees_a_biased_shuffle(n):
    seeds = range(500 * math.factorial(n))
    assert two_sided_p(order_counts(n, (naive_shuffle(n, s) for s in seeds))) < 0.001


def test_uniform_check_sees_orders_dealt_evenly():
    dealt = itertools.chain.from_iterable(itertools.permutations(range(4)) for _ in range(50))
    assert two_sided_p(order_counts(4, dealt)) < 0.001


@pytest.mark.parametrize("n", range(7))
def test_uniform_engine_is_the_oracle_for_few_rows(tmp_path, n):
    src = tmp_path / "src"
    array(src, values(n, (3,)), chunks=(2, 3))
    for seed in range(6):
        dst = tmp_path / f"{seed}"
        block = {} if seed % 3 == 0 else {"block_bytes": 12 * 3}
        run(src, dst, seed=seed, levels=1 + seed % 3, chunk_rows=1 + seed % 2, **block)
        assert_is_oracle(src, dst, seed)


# --- The check itself ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "damage",
    ["swap", "bit", "row_number", "attribute", "group_attribute", "fill", "dimension", "dtype", "extra", "chunk"],
)
def test_oracle_check_sees_damage(tmp_path, sources, damage):
    src, dst = sources("named", 150), tmp_path / "dst"
    run(src, dst, chunk_rows=10)
    assert_is_oracle(src, dst)
    node = zarr.open_group(dst, mode="r+")
    x = node["x"]
    if damage == "swap":
        x[3:5] = x[3:5][::-1]
    elif damage == "bit":
        bits = x[17:18].view("u4")
        bits[0, 2] ^= 1
        x[17:18] = bits.view("f4")
    elif damage == "row_number":
        node["source_row"][5] = node["source_row"][6]
    elif damage == "attribute":
        x.attrs["unit"] = "bits"
    elif damage == "group_attribute":
        node.attrs["title"] = "another"
    elif damage == "chunk":
        (dst / "y" / "c.0.0.0").unlink()
    elif damage == "extra":
        array(dst, values(150), "more")
    else:
        text = (dst / "x" / "zarr.json").read_text()
        old, new = {"fill": ('"NaN"', "0.0"), "dimension": ('"token"', '"tok"'), "dtype": ('"float32"', '"uint32"')}[
            damage
        ]
        assert old in text
        text = text.replace('"NaN"', "0") if damage == "dtype" else text
        (dst / "x" / "zarr.json").write_text(text.replace(old, new))
    with pytest.raises(AssertionError):
        assert_is_oracle(src, dst)


def test_oracle_check_sees_another_seed(tmp_path, sources):
    run(sources("bare"), tmp_path / "dst", seed=5)
    with pytest.raises(AssertionError):
        assert_is_oracle(sources("bare"), tmp_path / "dst", seed=6)


# --- However it is cut ---------------------------------------------------------------------------

ROWS, CHUNK = 1001, 20
CUTS = {  # levels, rows of a block, smallest run in rows
    "one": (1, 2000, 1),
    "two": (2, 300, 1),
    "two_wide": (2, 40, 1),
    "three": (3, 300, 1),
    "three_wide": (3, 60, 10),
    "four": (4, 120, 1),
    "four_binary": (4, 200, 100),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Three arrays, the widest of which has rows of 40 bytes."""
    path = tmp_path_factory.mktemp("engine") / "src.zarr"
    group(path, {"x": values(ROWS, (10,)), "token": values(ROWS, (), "<u2"), "pos": values(ROWS, (2,), "<i4")})
    return path


def cut(name):
    levels, block, run_rows = CUTS[name]
    return {"levels": levels, "block_bytes": block * 50, "run_bytes": run_rows * 50, "chunk_rows": CHUNK}


@pytest.fixture(scope="module")
def reference(source, tmp_path_factory):
    """The output of a run with one level, in this process, which all others must equal."""
    dst = tmp_path_factory.mktemp("engine") / "one.zarr"
    run(source, dst, **cut("one"))
    assert_is_oracle(source, dst)
    return dst


def assert_same_bytes(dst, reference):
    """All values are the same, and so are the bytes of every file whose chunks are cut the same way.

    The chunks of the widest array have the requested length; narrower arrays have longer ones, by a factor
    that divides a leaf and so depends on the cut of the run.
    """
    (_, arrays), (_, expected) = opened(dst), opened(reference)
    assert arrays.keys() == expected.keys()
    assert arrays["x"].chunks == expected["x"].chunks == (CHUNK, 10)
    found, wanted = files(dst), files(reference)
    assert found["zarr.json"] == wanted["zarr.json"]
    for name in arrays:
        np.testing.assert_array_equal(rows_of(arrays[name][:]), rows_of(expected[name][:]), err_msg=name)
        if arrays[name].chunks == expected[name].chunks:
            mine = {k: v for k, v in found.items() if k.startswith(f"{name}/")}
            assert mine == {k: v for k, v in wanted.items() if k.startswith(f"{name}/")}, name
    assert {k.split("/")[0] for k in found} == {"zarr.json", *arrays}


def test_same_bytes_check_sees_a_single_bit(source, reference, tmp_path):
    run(source, tmp_path / "dst", **cut("two"))
    assert_same_bytes(tmp_path / "dst", reference)
    chunk = tmp_path / "dst" / "x" / "c.3.0"
    data = bytearray(chunk.read_bytes())
    data[7] ^= 1
    chunk.write_bytes(data)
    with pytest.raises(AssertionError):
        assert_same_bytes(tmp_path / "dst", reference)


@pytest.mark.parametrize("name", CUTS)
def test_cut_any_way_serial(source, reference, tmp_path, name):
    result = run(source, tmp_path / "dst", **cut(name))
    assert result.plan.levels == CUTS[name][0]
    assert_same_bytes(tmp_path / "dst", reference)
    # Nothing else is left beside it.
    assert [p.name for p in tmp_path.iterdir()] == ["dst"]


def digests(dst):
    return {
        name: get_array(open_objects(as_place(dst)), f"{DIGESTS}/{name}").tolist() for name in ("x", "token", "pos")
    }


@pytest.mark.parametrize("name", [*CUTS, "gather"])
def test_pieces_through_the_page_cache_make_up_whole_objects(source, reference, tmp_path, monkeypatch, name):
    """Output that need not be durable is written in pieces, and by default whole objects are."""
    monkeypatch.setattr(leaves, "PIECE", 7 * 40)
    how = {"gather": True, "chunk_rows": CHUNK} if name == "gather" else cut(name)
    for fsync in (True, False):
        actshuffle.shuffle(source, tmp_path / f"{fsync}.zarr", seed=5, fsync=fsync, **how)
        assert_same_bytes(tmp_path / f"{fsync}.zarr", reference)
    assert digests(tmp_path / "True.zarr") == digests(tmp_path / "False.zarr")


@pytest.mark.parametrize("levels", [1, 2])
def test_pieces_are_written_before_their_memory_is_used_for_their_hashes(source, tmp_path, monkeypatch, levels):
    """If they were not, the bytes on disk would be others than those that the digests are of."""
    written = leaves._written

    def late(job, field, at, fill, rows, memory):
        with job.at_destination.writer(field.object_key.format(at), field.object_rows * field.row_bytes) as out:
            piece = memory[: len(rows) * field.row_bytes].reshape(-1, field.row_bytes)
            fill(rows.start, piece)
            yield 0, piece
            out.write(piece.data.cast("B"))

    how = {"levels": levels, "block_bytes": (2000 if levels == 1 else 300) * 50, "run_bytes": 1, "fsync": False}
    for name, way in ((f"good{levels}", written), (f"late{levels}", late)):
        monkeypatch.setattr(leaves, "_written", way)
        actshuffle.shuffle(source, tmp_path / name, seed=5, **how)
        assert actshuffle.verify(source, tmp_path / name).ok == (way is written)


def looks(monkeypatch, forget=None):
    """Make blocks be read and looked at a few rows at a time; returns the number of rows of each look."""
    seen, add = [], tasks.add_to_groups

    def noted(sums, hashes, group):
        seen.append(len(hashes))
        if len(seen) != forget:
            add(sums, hashes, group)

    monkeypatch.setattr(spill, "PIECE", 1)  # a run at a time
    monkeypatch.setattr(tasks, "LOOK_ROWS", 7)
    monkeypatch.setattr(tasks, "add_to_groups", noted)
    return seen


@pytest.mark.parametrize("name", ["two", "three", "four"])
def test_rows_are_looked_at_while_others_are_read(source, reference, tmp_path, monkeypatch, name):
    seen = looks(monkeypatch)
    result = run(source, tmp_path / "dst", **cut(name))
    assert max(seen) == 7
    # Every row once per split level, for its key and each of the three fields.
    assert sum(seen) == ROWS * (result.plan.levels - 1) * 4
    assert_same_bytes(tmp_path / "dst", reference)


def test_rows_that_were_not_looked_at_stop_the_run(source, tmp_path, monkeypatch):
    looks(monkeypatch, forget=100)
    with pytest.raises(ConservationError):
        run(source, tmp_path / "dst", **cut("three"))


def readers(monkeypatch, losing=False):
    """Make two threads do every read; returns the names of those that read, and can have one lose bytes."""
    seen, read = set(), LocalObjects._read

    def noted(self, key, extents, file):
        seen.add(threading.current_thread().name.split("_")[0])
        if not losing or threading.current_thread() is threading.main_thread():
            read(self, key, extents, file)

    monkeypatch.setattr(reading, "TWO_FROM", 0)
    monkeypatch.setattr(LocalObjects, "_read", noted)
    return seen


@pytest.mark.parametrize("name", ["one", "two", "three", "four"])
def test_two_threads_read(source, reference, tmp_path, monkeypatch, name):
    seen = readers(monkeypatch)
    run(source, tmp_path / "dst", **cut(name))
    assert {"actshuffle-read", "MainThread"} <= seen
    assert_same_bytes(tmp_path / "dst", reference)


def test_what_the_second_thread_did_not_read_stops_the_run(source, tmp_path, monkeypatch):
    readers(monkeypatch, losing=True)
    with pytest.raises(ConservationError):
        run(source, tmp_path / "dst", **cut("three"))


@pytest.mark.parametrize(("workers", "name"), halved([1, 2, 4], ["one", "two_wide", "three", "four"]))
def test_cut_any_way_on_a_cluster(source, reference, tmp_path, cluster, workers, name):
    result = run(source, tmp_path / "dst", cluster(workers), **cut(name))
    assert (result.workers, result.plan.levels) == (workers, CUTS[name][0])
    assert_same_bytes(tmp_path / "dst", reference)


@pytest.mark.parametrize(("how", "name"), halved(["receipt", "rewrite", "late"], ["one", "two_wide", "three", "four"]))
def test_tasks_run_twice_serial(source, reference, tmp_path, name, how):
    twice = Twice(Serial(), how, share=0.2 if name != "one" else 1)
    run(source, tmp_path / "dst", twice, **cut(name))
    assert twice.repeats > 0
    assert_same_bytes(tmp_path / "dst", reference)


@pytest.mark.parametrize(
    ("how", "where"), halved(["receipt", "rewrite", "late"], [(1, "two"), (2, "two_wide"), (2, "three"), (4, "four")])
)
def test_tasks_run_twice_at_once_on_a_cluster(source, reference, tmp_path, cluster, where, how):
    workers, name = where
    twice = Twice(cluster(workers), how)
    run(source, tmp_path / "dst", twice, **cut(name))
    assert twice.repeats > 0
    assert_same_bytes(tmp_path / "dst", reference)


@pytest.mark.parametrize("workers", [0, 2])
def test_levels_with_the_same_leaves_give_the_same_files(source, tmp_path, cluster, workers):
    # With leaves of the same size all arrays are cut alike, so not one file differs.
    made = []
    for levels in (2, 3, 4):
        dst = tmp_path / f"{levels}"
        executor = cluster(workers) if workers else None
        run(source, dst, executor, **(cut("two") | {"levels": levels}))
        made.append(files(dst))
    assert made[0] == made[1] == made[2]
    assert len(made[0]) > ROWS // CHUNK


@pytest.mark.soak
def test_cut_any_way_at_random(source, reference, tmp_path, cluster):
    rng = np.random.default_rng(0)
    for round_ in range(150):
        executor = cluster(int(rng.choice([1, 2, 4]))) if rng.random() < 0.5 else Serial()
        twice = Twice(executor, str(rng.choice(["receipt", "rewrite", "late"])), float(rng.choice([0.2, 1])))
        try:
            run(
                source,
                tmp_path / f"{round_}",
                twice,
                levels=int(rng.integers(1, 5)),
                chunk_rows=CHUNK,
                block_bytes=50 * int(rng.integers(20, 1100)),
                run_bytes=int(rng.integers(1, 500)),
            )
        except RequestError:
            continue
        assert_same_bytes(tmp_path / f"{round_}", reference)


# --- Every number of rows ------------------------------------------------------------------------

AROUND = sorted({0, 1, *(2**j + d for j in (1, 2, 3, 4, 5, 8, 10, 16, 17) for d in (-1, 0, 1))})
BETWEEN = sorted({2**j + d for j in range(1, 18) for d in (-1, 0, 1)} - set(AROUND))
THIN = [0, 1, 2, 3, 31, 32, 33, 1023, 1024, 1025, 65_535, 65_536, 65_537]


def assert_shuffled(tmp_path, n, dtype, shape, executor=None, **request):
    src, dst = tmp_path / "src", tmp_path / "dst"
    array(src, values(n, shape, dtype), chunks=(max(1, n // 5), *shape))
    run(src, dst, executor, **request)
    assert_is_oracle(src, dst)


@pytest.mark.parametrize("n", [*AROUND, *(pytest.param(n, marks=pytest.mark.soak) for n in BETWEEN)])
def test_rows_any_number_in_three_levels(tmp_path, n):
    block = max(3, n // 7)
    assert_shuffled(tmp_path, n, "<u2", (), levels=3, block_bytes=2 * block, chunk_rows=max(1, n // 20))


@pytest.mark.parametrize("n", THIN)
def test_rows_any_number_in_two_levels(tmp_path, n):
    block = max(2, math.ceil(n**0.5), n // 9)
    assert_shuffled(tmp_path, n, "<f4", (3,), levels=2, block_bytes=12 * block, chunk_rows=max(1, block // 2))


@pytest.mark.parametrize("n", THIN)
def test_rows_any_number_in_one_level(tmp_path, n):
    assert_shuffled(tmp_path, n, "<u2", (), levels=1)


@pytest.mark.parametrize("n", [0, 1, 1025])
def test_rows_any_number_on_a_cluster(tmp_path, cluster, n):
    assert_shuffled(tmp_path, n, "i1", (5,), cluster(2), levels=2, block_bytes=5 * max(4, n // 9), chunk_rows=4)


# --- Every kind of source ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("levels", [1, 3])
def test_source_of_any_kind(sources, tmp_path, kind, levels):
    src = sources(kind)
    width = sum(rows_of(a[:1]).shape[1] for a in opened(src)[1].values())
    settings = {"block_bytes": 20 * width, "chunk_rows": 4} if levels > 1 else {}
    run(src, tmp_path / "dst", levels=levels, **settings)
    assert_is_oracle(src, tmp_path / "dst")


@pytest.mark.parametrize("kind", ["mixed_group", "sharded_cut_zstd", "bfloat16_zstd", "big_endian_v2"])
def test_source_of_any_kind_on_a_cluster(sources, tmp_path, cluster, kind):
    src = sources(kind)
    width = sum(rows_of(a[:1]).shape[1] for a in opened(src)[1].values())
    run(src, tmp_path / "dst", cluster(2), levels=2, block_bytes=60 * width, chunk_rows=10)
    assert_is_oracle(src, tmp_path / "dst")


def test_source_in_an_object_store(tmp_path):
    data, url = values(300, (5,)), f"memory://{tmp_path.name}"
    zarr.create_array(FsspecStore.from_url(f"{url}/src"), data=data, chunks=(37, 5))
    for levels in (1, 2, 3):
        dst = f"{url}/dst{levels}"
        actshuffle.shuffle(
            f"{url}/src",
            dst,
            seed=5,
            levels=levels,
            run_bytes=1,
            chunk_rows=10,
            block_bytes=6000 if levels == 1 else 1200,
        )
        found = zarr.open(FsspecStore.from_url(dst, read_only=True), mode="r")
        np.testing.assert_array_equal(found["source_row"][:], order(300, 5))
        np.testing.assert_array_equal(rows_of(found["data"][:]), rows_of(data)[order(300, 5)])


@pytest.mark.parametrize("place", ["memory://somewhere", "somewhere"])
def test_tasks_of_a_store_are_looked_at_many_at_once(place):
    job = SimpleNamespace(is_local="://" not in place)
    count, seen = RECEIPTS_AT_ONCE, []
    together = threading.Barrier(count, timeout=120 if "://" in place else 0.1)

    def look(_, task):
        seen.append(task.number)
        if task.number:
            together.wait()
        return task.number

    found = each(job, look, (Task("leaf", 2, number) for number in range(1 + 2 * count)))
    assert (next(found), seen) == (0, [0])  # who stops here has asked for one
    if "://" in place:
        assert list(found) == list(range(1, 1 + 2 * count))
    else:  # a disk answers at once, so one by one; which this test sees
        with pytest.raises(threading.BrokenBarrierError):
            next(found)


def test_source_chunks_left_out_are_refused_or_filled(tmp_path):
    src, data = tmp_path / "src", values(100, (4,), "<f4")
    made = zarr.create_array(src, shape=(100, 4), dtype="f4", chunks=(9, 4), compressors=None, fill_value=1.5)
    made[18:50] = data[18:50]
    with pytest.raises(MissingChunkError, match=r"c/0/0 .*missing"):
        run(src, tmp_path / "dst")
    for levels, block in ((1, 1600), (3, 400)):
        dst = tmp_path / f"{levels}"
        run(src, dst, levels=levels, fill_missing=True, block_bytes=block, chunk_rows=5)
        assert_is_oracle(src, dst)
    filled = opened(tmp_path / "3")[1]["data"][:]
    assert ((filled == 1.5).all(axis=1)).sum() == 68


def test_source_inner_chunks_left_out_are_refused_or_filled(tmp_path):
    src = tmp_path / "src"
    made = zarr.create_array(src, shape=(100,), dtype="f4", chunks=(5,), shards=(25,), fill_value=-1)
    made[:] = values(100)
    made[30:40] = -1
    with pytest.raises(MissingChunkError, match="inner chunk"):
        run(src, tmp_path / "dst")
    run(src, tmp_path / "dst", fill_missing=True, levels=2, block_bytes=120, chunk_rows=5)
    assert_is_oracle(src, tmp_path / "dst")


# --- Ties ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "name"), halved([(0, 0), (0, 64), (1, 0), (3, 2), (7, 1), (12, 64)], ["one", "two_wide", "four"])
)
def test_ties_of_few_bit_keys(source, tmp_path, bits, name):
    run(source, tmp_path / "dst", key_bits=bits, **cut(name))
    assert_is_oracle(source, tmp_path / "dst", hi_bits=bits[0], lo_bits=bits[1])
    # Without keys at all the order is that of the source; the check knows one tie-break from another.
    with pytest.raises(AssertionError):
        assert_is_oracle(source, tmp_path / "dst")


def test_ties_of_few_bit_keys_on_a_cluster(source, tmp_path, cluster):
    run(source, tmp_path / "dst", Twice(cluster(2), "rewrite"), key_bits=(3, 2), **cut("three"))
    assert_is_oracle(source, tmp_path / "dst", hi_bits=3, lo_bits=2)


# --- What is written -----------------------------------------------------------------------------


@pytest.mark.parametrize(("codec", "per_shard", "levels"), halved(["none", "crc32c", "zstd"], [1, 3], [1, 3]))
def test_output_codecs_and_shards(sources, tmp_path, codec, per_shard, levels):
    src, dst = sources("mixed_group"), tmp_path / "dst"
    arrays = opened(src)[1]
    fields = [k for k, a in arrays.items() if a.dtype.kind != "V" or per_shard == 1]
    block = sum(rows_of(arrays[k][:1]).shape[1] for k in fields) * (40 if levels > 1 else 150)
    run(
        src,
        dst,
        levels=levels,
        codec=codec,
        chunks_per_shard=per_shard,
        chunk_rows=4,
        block_bytes=block,
        fields=tuple(fields),
    )
    assert_is_oracle(src, dst, fields=fields)
    for found in opened(dst)[1].values():
        assert (found.shards is None) == (per_shard == 1)
        assert ("Crc32c" in str(found.compressors)) == (codec == "crc32c")
        assert ("Zstd" in str(found.compressors)) == (codec == "zstd")


def test_output_shards_of_records_are_refused(sources, tmp_path):
    # zarr can neither write nor read them; if one day it can, this test says so.
    made = zarr.create_array({}, shape=(4,), dtype=STRUCT, chunks=(2,), shards=(4,))
    with pytest.raises(TypeError, match="unhashable"):
        made[:] = values(4, (), STRUCT)
    with pytest.raises(RequestError, match="cannot shard"):
        run(sources("mixed_group"), tmp_path / "dst", chunks_per_shard=3, chunk_rows=4)


def test_output_chunk_rows_are_as_asked(sources, tmp_path):
    for levels in (1, 2):
        dst = tmp_path / f"{levels}"
        run(sources("bare"), dst, levels=levels, chunk_rows=13, block_bytes=48 * (150 if levels == 1 else 50))
        assert opened(dst)[1]["data"].chunks == (13, 4, 3)


@pytest.mark.parametrize("dtype", ["i1", "<f8"])
def test_output_chunk_rows_are_as_asked_for_narrow_rows(tmp_path, dtype):
    array(tmp_path / "src", values(500, (), dtype))
    run(tmp_path / "src", tmp_path / "dst", chunk_rows=13)
    found = opened(tmp_path / "dst")[1]
    assert found["data"].chunks == (13,)
    assert found["source_row"].chunks == (13,)


def test_output_coded_and_plain_hold_the_same(source, reference, tmp_path):
    for codec, per_shard in itertools.product(["none", "crc32c", "zstd"], [1, 4]):
        dst = tmp_path / f"{codec}{per_shard}"
        run(source, dst, codec=codec, chunks_per_shard=per_shard, **cut("two"))
        assert_is_oracle(source, dst)


def test_output_of_some_fields(source, tmp_path):
    run(source, tmp_path / "dst", fields=("token", "x"), **cut("two"))
    assert_is_oracle(source, tmp_path / "dst", fields=["token", "x"])
    with pytest.raises(RequestError, match="no array named 'nope'"):
        run(source, tmp_path / "other", fields=("nope",))


def test_output_without_source_row(source, tmp_path):
    run(source, tmp_path / "dst", source_row=False, **cut("three"))
    assert_is_oracle(source, tmp_path / "dst", source_row=False)


def test_output_of_a_shuffle_can_be_shuffled_again(source, reference, tmp_path):
    with pytest.raises(RequestError, match="source_row"):
        run(reference, tmp_path / "dst")
    run(reference, tmp_path / "dst", seed=9, fields=("x",), **cut("two"))
    assert_is_oracle(reference, tmp_path / "dst", 9, fields=["x"])


def test_public_function_end_to_end(source, tmp_path):
    for workers in (0, 2):
        dst = tmp_path / f"{workers}"
        result = actshuffle.shuffle(source, dst, seed=3, workers=workers, levels=2, memory="40MB")
        assert (result.seed, result.workers, result.resumed) == (3, max(1, workers), 0)
        assert_is_oracle(source, dst, 3)


def test_public_function_on_a_client(source, tmp_path, cluster):
    result = actshuffle.shuffle(source, tmp_path / "dst", client=cluster(2).client)
    assert result.workers == 2
    assert_is_oracle(source, tmp_path / "dst", result.seed)


# --- Read by others ------------------------------------------------------------------------------


def test_read_by_xarray_with_dimensions(sources, tmp_path):
    src, dst = sources("named"), tmp_path / "dst"
    run(src, dst, levels=2, block_bytes=60 * 50, chunk_rows=10)
    found = order(150, 5)
    before = opened(src)[1]
    for dataset in (
        xarray.open_zarr(dst, consolidated=False),
        xarray.open_dataset(dst, engine="zarr", consolidated=False),
    ):
        with dataset:
            assert dataset["x"].dims == ("token", "feature")
            assert dataset["id"].dims == ("token",)
            assert dataset["y"].dims == ("row", "y_1", "y_2")
            assert dataset["source_row"].dims == ("row",)
            assert dataset.attrs == {"title": "named dimensions"}
            assert dataset["x"].attrs["unit"] == "nats"
            for name in ("x", "y"):
                np.testing.assert_array_equal(dataset[name].values, before[name][:][found])
            np.testing.assert_array_equal(dataset["source_row"].values, found)


@pytest.mark.parametrize("codec", ["none", "crc32c", "zstd"])
@pytest.mark.parametrize("per_shard", [1, 3])
def test_read_by_tensorstore(tmp_path, codec, per_shard):
    src, dst = tmp_path / "src", tmp_path / "dst"
    dtypes = ["?", "i1", "<u2", "<i8", "<f2", "<f4", "<f8", "<c8", "<c16"]
    group(src, {f"f{i}": values(90, (2,) * (i % 3), dtype) for i, dtype in enumerate(dtypes)})
    array(src, values(90, (4,), "<u2"), "bf16", dtype=BFloat16())
    run(src, dst, codec=codec, chunks_per_shard=per_shard, chunk_rows=7, levels=2, block_bytes=85 * 40)
    assert_is_oracle(src, dst)
    for name, found in opened(dst)[1].items():
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(dst / name)}}
        store = tensorstore.open(spec).result()
        read = store.read().result()
        read = read.view(np.uint16) if name == "bf16" else read
        assert read.dtype == found.dtype
        np.testing.assert_array_equal(rows_of(read), rows_of(found[:]), err_msg=name)
        assert store.domain.labels == found.metadata.dimension_names


def test_read_prefix_is_the_prefix_of_the_order(source, reference):
    # Rows [0, m) of the output are a sample of m rows; the keys alone say which.
    found = opened(reference)[1]["source_row"][:100]
    np.testing.assert_array_equal(found, Keys(5).order(ROWS)[:100])
