"""The check of an output's order: its short cut finds what all keys, compared one by one, show."""

from __future__ import annotations

import numpy as np
import pytest

from actshuffle.checking import keyorder
from actshuffle.checking.keyorder import check_ascent, descents, full_keys
from actshuffle.ordering.keys import Keys

ROWS = 400
KEYS = {"64 bits": Keys(3), "ties": Keys(3, 6, 64), "ties on both words": Keys(3, 3, 3)}


def oracle(keys, rows, before):
    """Positions whose key does not exceed the key before, by Python's own comparison of all words."""
    whole = list(zip(keys.hi_at(rows).tolist(), keys.lo_at(rows).tolist(), rows.tolist(), strict=True))
    earlier = [None if before is None else before, *whole[:-1]]
    return [
        at
        for at, (a, b) in enumerate(zip(earlier, whole, strict=True))
        if (a is not None and not a < b) or rows[at] >= ROWS
    ]


def broken(rows, kind):
    rows = rows.copy()
    if kind == "swapped":
        rows[[40, 41]] = rows[[41, 40]]
    if kind == "twice":
        rows[100] = rows[99]
    if kind == "beyond":
        rows[200] = ROWS + 5
    if kind == "far beyond":
        rows[0] = 2**64 - 1
    if kind == "first last":
        rows[[0, -1]] = rows[[-1, 0]]
    return rows


@pytest.mark.parametrize("table", [True, False])
@pytest.mark.parametrize("keys", KEYS.values(), ids=KEYS)
@pytest.mark.parametrize("kind", ["good", "swapped", "twice", "beyond", "far beyond", "first last"])
def test_descents_are_those_of_all_keys(kind, keys, table, monkeypatch):
    if not table:
        monkeypatch.setattr(keyorder, "TABLE_ROWS", 0)
    rows = broken(keys.order(ROWS).astype(np.uint64), kind)
    for cut in (0, 1, 150, ROWS - 1):
        before = None
        for part, place in ((rows[:cut], 0), (rows[cut:], cut)):
            if not len(part):
                continue
            found, ends = check_ascent(keys, part, ROWS, None if before is None else np.array(before, np.uint64))
            assert found.tolist() == oracle(keys, part, before), (cut, place)
            whole = full_keys(keys, part)
            np.testing.assert_array_equal(ends, whole[[0, -1]])
            np.testing.assert_array_equal(ends[:, 1], keys.lo_at(part[[0, -1]]))
            before = tuple(ends[1].tolist())
    if kind != "good":
        assert len(descents(full_keys(keys, rows), rows, ROWS, None))
