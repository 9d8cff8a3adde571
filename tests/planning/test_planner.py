"""The arithmetic of passes: published reach, refusals with their sums, a tree that covers all rows once."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from actshuffle.errors import InfeasibleError, RequestError
from actshuffle.limits import MAX_FAN_OUT
from actshuffle.planning.memory import MemoryModel
from actshuffle.planning.planner import make_plan, reach_table
from actshuffle.units import format_bytes

GB, TB, PB = 10**9, 10**12, 10**15
PUBLISHED = [(1, 100 * GB), (2, 10 * TB), (3, PB), (4, 100 * PB)]


def published_plan(nbytes, **settings):
    return make_plan(nbytes // 1000, 1000, block_bytes=100 * GB, run_bytes=GB, **settings)


@pytest.mark.parametrize(("levels", "reach"), PUBLISHED)
def test_published_table(levels, reach):
    assert published_plan(reach).levels == levels
    assert published_plan(reach - 1000).levels == levels
    assert published_plan(reach + 1000).levels == levels + 1  # one row more than the edge
    assert reach_table(100 * GB, GB)[levels - 1] == (levels, reach)


@pytest.mark.parametrize(("levels", "reach"), PUBLISHED[:3])
def test_too_few_levels_are_refused_with_the_arithmetic(levels, reach):
    with pytest.raises(InfeasibleError) as caught:
        published_plan(reach + 1000, levels=levels)
    power = f"M x (M/P)^{levels - 1} = {format_bytes(reach)}"
    for part in (power, "M = 100 GB", "P = 1 GB", "M/P = 100", f"use levels={levels + 1}"):
        assert part in str(caught.value)


@pytest.mark.parametrize("levels", [2, 3, 4])
def test_more_levels_than_needed_are_allowed(levels):
    plan = published_plan(100 * GB, levels=levels)
    assert plan.levels == levels
    check_tree(plan)


@pytest.mark.parametrize("levels", [0, -1, 17])
def test_levels_out_of_range_are_refused(levels):
    with pytest.raises(RequestError, match="levels must be auto or 1 to 16"):
        published_plan(GB, levels=levels)


@pytest.mark.parametrize(
    "arguments",
    [
        {"rows": -1, "row_bytes": 8, "block_bytes": 100},
        {"rows": 1, "row_bytes": 0, "block_bytes": 100},
        {"rows": 1, "row_bytes": 8},
        {"rows": 1, "row_bytes": 8, "block_bytes": 0},
        {"rows": 1, "row_bytes": 8, "block_bytes": 100, "run_bytes": 0},
        {"rows": 1, "row_bytes": 8, "memory": -5},
        {"rows": 9, "row_bytes": 8, "block_bytes": 100, "chunk_rows": 0},
        {"rows": 9, "row_bytes": 8, "block_bytes": 100, "chunks_per_shard": 0},
    ],
)
def test_senseless_arguments_are_refused(arguments):
    with pytest.raises(RequestError):
        make_plan(arguments.pop("rows"), arguments.pop("row_bytes"), **arguments)


def test_memory_too_small_names_what_would_do():
    with pytest.raises(InfeasibleError, match=r"give at least memory=.([0-9.]+[KMG]B)") as caught:
        make_plan(10**6, 1000, memory=17_000_000, chunk_rows=100_000)
    least = str(caught.value).rsplit('memory="', 1)[1].split('"')[0]
    assert make_plan(10**6, 1000, memory=least_bytes(least), chunk_rows=100_000).levels >= 1


def least_bytes(text):
    from actshuffle.units import parse_bytes

    return parse_bytes(text)


def test_blocks_that_cannot_be_split_are_refused():
    with pytest.raises(InfeasibleError, match="M/P < 2"):
        make_plan(10**6, 1000, block_bytes=10**6, run_bytes=10**6)


def test_extra_levels_split_nothing_that_runs_would_be_too_small_for():
    # All fits one block (15 rows), if not a whole number of objects (10 rows); M/P is 1.
    plan = make_plan(15, 8, block_bytes=120, run_bytes=100, chunk_rows=10, levels=2)
    assert plan.leaves == 1
    check_tree(plan)


@pytest.mark.parametrize(("rows", "row_bytes"), [(0, 8), (1, 8), (1, 10**7), (5, 3)])
def test_few_rows_are_one_leaf(rows, row_bytes):
    plan = make_plan(rows, row_bytes, memory=10**9)
    assert (plan.levels, plan.leaves) == (1, min(rows, 1))
    check_tree(plan)


def test_given_chunk_rows_are_taken_as_they_are():
    for levels in (1, 2, 3):
        assert make_plan(10**5, 64, block_bytes=10**7, run_bytes=1, chunk_rows=77, levels=levels).chunk_rows == 77


def test_first_level_blocks_are_whole_source_chunks():
    plan = make_plan(10**6, 1000, memory=10**8, source_chunk_rows=999)
    assert plan.levels > 1
    assert plan.block_rows[0] % 999 == 0


def test_many_workers_have_tasks_for_all_where_it_costs_no_level():
    few = make_plan(10**6, 1000, memory=2 * 10**9)
    many = make_plan(10**6, 1000, memory=2 * 10**9, levels=2, tasks_wanted=12)
    assert few.levels == 1
    assert many.blocks(1) >= 12
    assert many.leaves >= 10  # whole objects, so not quite as many
    check_tree(many)


def test_shards_only_where_objects_are_many():
    assert make_plan(10**6, 1000, memory=10**9).object_rows == make_plan(10**6, 1000, memory=10**9).chunk_rows
    many = make_plan(10**12, 1000, block_bytes=100 * GB, run_bytes=GB, chunk_rows=1000)
    assert many.object_rows > many.chunk_rows
    assert many.object_rows % many.chunk_rows == 0


# --- Invariants ---------------------------------------------------------------------------------


def check_tree(plan):
    """Every rank is in exactly one leaf, children nest, blocks cover parents, and everything stays within bounds."""
    leaf_depth, run = plan.levels - 1, max(plan.run_bytes, plan.row_bytes)
    assert plan.leaf_rows % plan.object_rows == 0
    assert plan.object_rows % plan.chunk_rows == 0
    assert (len(plan.widths), len(plan.block_rows)) == (plan.levels, plan.levels - 1)
    assert plan.buckets(0) == min(plan.rows, 1)
    assert plan.buckets(leaf_depth) == plan.leaves
    for depth in range(plan.levels):
        ranges = [plan.bucket_ranks(depth, b) for b in range(plan.buckets(depth))]
        assert_covers(ranges, plan.rows)
        if depth == leaf_depth:
            assert all(start % plan.object_rows == 0 for start, _ in ranges)
            continue
        children = [plan.children(depth, b) for b in range(plan.buckets(depth))]
        assert list(itertools.chain(*children)) == list(range(plan.buckets(depth + 1)))
        for (start, stop), inside in zip(ranges, children, strict=True):
            parts = [plan.bucket_ranks(depth + 1, c) for c in inside]
            assert_covers([(a - start, b - start) for a, b in parts], stop - start)
            assert len(inside) <= MAX_FAN_OUT
            assert len(inside) <= max(1, plan.block_bytes // run), "fan-out above M/P"
        level = depth + 1
        blocks = [plan.block(level, i) for i in range(plan.blocks(level))]
        assert len(blocks) == plan.task_count(level)
        for parent, (start, stop) in enumerate(ranges):
            mine = [blocks[i] for i in plan.blocks_of(level, parent)]
            assert {b.parent for b in mine} == {parent}
            assert_covers([(b.start, b.stop) for b in mine], stop - start)
        assert sum(b.stop - b.start for b in blocks) == plan.rows
        rows = max((b.stop - b.start for b in blocks), default=0)
        assert rows <= plan.block_rows[level - 1]
        assert rows * plan.row_bytes <= plan.block_bytes
        assert plan.model.split_bytes(rows) <= plan.memory
    rows = min(plan.leaf_rows, plan.rows)
    assert rows * plan.row_bytes <= plan.block_bytes or plan.levels == 1
    assert plan.model.leaf_bytes(rows, plan.object_rows * plan.row_bytes) <= plan.memory


def assert_covers(ranges, total):
    """The ranges follow each other from 0 to the total without gap or overlap, none empty."""
    assert all(a < b for a, b in ranges)
    assert [0, *(b for _, b in ranges)] == [*(a for a, _ in ranges), total]


def test_check_tree_sees_faults():
    plan = make_plan(1000, 8, block_bytes=800, run_bytes=16, chunk_rows=10, levels=3)
    check_tree(plan)
    for damaged in (
        {"leaf_rows": 95},
        {"block_rows": (100, 200)},
        {"memory": 1000},
        {"run_bytes": 500},
        {"widths": (10, 3, 2)},
    ):
        with pytest.raises(AssertionError):
            check_tree(dataclasses.replace(plan, **damaged))


sizes = st.one_of(st.integers(1, 64), st.sampled_from([100, 999, 1000, 4096]))


@settings(deadline=None, max_examples=400)
@given(
    rows=st.integers(0, 5000),
    row_bytes=sizes,
    block=st.integers(1, 200),
    run=st.integers(1, 5000),
    levels=st.sampled_from(["auto", 1, 2, 3, 4]),
    chunk_rows=st.none() | st.integers(1, 50),
    per_shard=st.none() | st.integers(1, 4),
    align=st.integers(1, 300),
    tasks=st.integers(1, 20),
)
def test_tree_of_any_feasible_plan_by_block_bytes(
    rows, row_bytes, block, run, levels, chunk_rows, per_shard, align, tasks
):
    try:
        plan = make_plan(
            rows,
            row_bytes,
            levels=levels,
            block_bytes=block * row_bytes,
            run_bytes=run,
            chunk_rows=chunk_rows,
            chunks_per_shard=per_shard,
            source_chunk_rows=align,
            tasks_wanted=tasks,
        )
    except InfeasibleError:
        assume(False)
    check_tree(plan)
    if levels != "auto":
        assert plan.levels == levels


@settings(deadline=None, max_examples=300)
@given(
    rows=st.integers(0, 10**7),
    row_bytes=st.sampled_from([1, 8, 64, 1000, 10**5]),
    memory=st.integers(16 << 20, 1 << 29),
    levels=st.sampled_from(["auto", 2, 3]),
    remote=st.booleans(),
    buffer=st.sampled_from([0, 10**6]),
    copies=st.sampled_from([0, 2]),
    tasks=st.integers(1, 20),
)
def test_tree_of_any_feasible_plan_by_memory(rows, row_bytes, memory, levels, remote, buffer, copies, tasks):
    model = MemoryModel(row_bytes, buffer, remote, copies)
    try:
        plan = make_plan(rows, row_bytes, levels=levels, memory=memory, model=model, tasks_wanted=tasks)
    except InfeasibleError:
        assume(False)
    assume(plan.leaves < 3000)
    check_tree(plan)


def test_level_bytes_and_disk_of_a_plan():
    plan = make_plan(10**6, 1000, block_bytes=10**8, run_bytes=10**6, levels=3)
    bare, spilled = GB, 1016 * 10**6
    assert [plan.level_bytes(level) for level in (1, 2, 3)] == [(bare, spilled), (spilled, spilled), (spilled, bare)]
    assert plan.scratch_bytes == 2 * spilled
    assert plan.disk_bytes == max(2 * spilled, spilled + 1008 * 10**6)


def test_large_tasks_are_cut_so_that_several_share_a_workers_memory():
    big = {"memory": 7 << 30, "tasks_wanted": 6}
    made = make_plan(10**6, 8192, **big)  # 8 GB
    blocks = made.block_rows[0] * made.row_bytes, made.leaf_rows * made.row_bytes
    assert made.levels == 2
    assert all(500e6 < size < 600e6 for size in blocks)
    assert make_plan(10**6, 8192, gather=True, **big).leaves == 6, "needs no memory for its rows"
    assert make_plan(10**6, 8192, memory=7 << 30).block_rows[0] * 8192 > 4e9, "one worker"
    asked = make_plan(10**6, 8192, run_bytes=64 << 20, **big)  # of 8 GB in 15 blocks they have 36 MB
    assert asked.block_rows[0] * 8192 > 1.3e9
    # Not where runs would be short: 100 TB in blocks of 3.5 GB has them of 100 KB.
    wide = make_plan(12_200_000_000, 8192, memory=16 * 10**9, tasks_wanted=9600)
    assert wide.block_rows[0] * 8192 > 10e9
