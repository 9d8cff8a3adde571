"""Advice that is enough: a request that follows it is not refused with the same words."""

import re

import pytest

from actshuffle.engine.preview import plan_rows
from actshuffle.engine.request import Request
from actshuffle.errors import InfeasibleError
from actshuffle.planning.memory import MemoryModel
from actshuffle.planning.report import plan_text
from actshuffle.units import counted, parse_bytes, size_at_least


def planned(memory, sharing, model, **more):
    request = Request.of(memory=memory, tasks_per_worker=sharing, chunk_rows=16, **more)
    return plan_rows(100_000, model, request, widest_row=model.row_bytes)


@pytest.mark.parametrize("sharing", [1, 2, 3, 7])
@pytest.mark.parametrize("row_bytes", [100, 4096, 50_000_001])
@pytest.mark.parametrize("source_buffer", [0, 25_100_000])
def test_the_memory_that_is_advised_is_enough(sharing, row_bytes, source_buffer):
    model = MemoryModel(row_bytes, source_buffer=source_buffer)
    with pytest.raises(InfeasibleError, match="give at least memory=") as raised:
        planned("1MB", sharing, model)
    advice = re.search(r'memory="(\S+)"', str(raised.value))[1]
    made = planned(advice, sharing, model)  # nothing else has to change
    assert made.memory <= parse_bytes(advice)
    assert (f"the {sharing} tasks of a worker need" in str(raised.value)) == (sharing > 1)
    assert ("for reading the source" in str(raised.value)) == (source_buffer > 0)
    if source_buffer:  # control: what one task needs is less than the worker does
        with pytest.raises(InfeasibleError):
            planned(parse_bytes(advice) // 2, sharing, model)


@pytest.mark.parametrize("row_bytes", [256, 4096])
def test_the_memory_that_runs_need_is_advised_too(row_bytes):
    """Enough for an object of rows, and not for a split of all of them."""
    with pytest.raises(InfeasibleError, match=r"cannot be split .* lower run_bytes, or give at least") as raised:
        planned(MemoryModel(row_bytes).leaf_bytes(100, 16 * row_bytes), 1, MemoryModel(row_bytes))
    advice = re.search(r'memory="(\S+)"', str(raised.value))[1]
    assert planned(advice, 1, MemoryModel(row_bytes))
    with pytest.raises(InfeasibleError):
        planned(int(parse_bytes(advice) * 0.97), 1, MemoryModel(row_bytes))


def test_blocks_that_are_too_small_ask_for_larger_blocks():
    with pytest.raises(InfeasibleError, match=r"blocks too small: .* 16 rows of 100 bytes .*block_bytes=.1600B"):
        planned(None, 1, MemoryModel(100), block_bytes=500)
    assert planned(None, 1, MemoryModel(100), block_bytes="1600B", run_bytes=1)


@pytest.mark.parametrize("n", [1, 999, 1000, 12_345, 999_999, 46_100_001, 1_230_000_001, 999_999_999, 5 * 10**14])
def test_a_size_that_is_advised_is_read_as_no_less(n):
    assert n <= parse_bytes(size_at_least(n)) <= 1.02 * n


def test_numbers_agree_with_their_nouns():
    assert [counted(n, "row") for n in (0, 1, 2, 1500)] == ["0 rows", "1 row", "2 rows", "1,500 rows"]
    text = plan_text(plan_rows(1, MemoryModel(4), Request.of(memory="200MB")))
    assert "1 row x 4 B" in text
    assert not re.search(r"\b1 (rows|objects|bytes)\b", text)
