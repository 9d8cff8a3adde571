"""The places of a field's rows in its objects: ranges, scattered rows, reads."""

from __future__ import annotations

import numpy as np
import pytest

from actshuffle.arrays.field import Field


def field(step: int, width: int) -> Field:
    return Field("x", "x", width, (width,), step, "x/c.{}.0")


@pytest.mark.parametrize("step", [1, 3, 7, 100])
@pytest.mark.parametrize(("start", "stop"), [(0, 0), (5, 5), (0, 1), (2, 9), (6, 7), (0, 21), (13, 40)])
def test_spans_cover_a_range_once_and_in_order(step, start, stop):
    found = [
        int(key.split(".")[1]) * step + (offset + at) // 2
        for key, offset, nbytes in field(step, 2).spans(start, stop)
        for at in range(0, nbytes, 2)
    ]
    assert found == list(range(start, stop))
    keys = [key for key, _, _ in field(step, 2).spans(start, stop)]
    assert len(keys) == len(set(keys))


def test_extents_fill_the_memory_of_exactly_the_rows():
    out = bytearray(8 * 3)
    for extent in field(4, 3).extents(5, 13, memoryview(out), once=True):
        assert extent.once
        for view in extent.views:
            first = int(extent.key.split(".")[1]) * 12 + extent.offset
            view[:] = bytes(range(first, first + len(view)))
    assert out == bytes(range(15, 39))


@pytest.mark.parametrize("rows", [[], [0], [9, 0, 4, 4, 3], list(range(30, 0, -1))])
def test_scattered_rows_come_by_object_with_their_goals(rows):
    found = {}
    keys = []
    for key, offsets, goals in field(4, 3).scattered(np.array(rows, np.int64)):
        keys.append(key)
        found |= {
            goal // 3: int(key.split(".")[1]) * 4 + offset // 3 for offset, goal in zip(offsets, goals, strict=True)
        }
    assert [found[i] for i in range(len(rows))] == rows
    assert len(keys) == len(set(keys)) == len({row // 4 for row in rows})
