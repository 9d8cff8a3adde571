"""Boundaries are the keys at exact ranks, however few bits distinguish keys, and however many rounds it takes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actshuffle.ordering import bounds
from actshuffle.ordering.bounds import Query, answer, find
from actshuffle.ordering.keys import Keys
from actshuffle.ordering.partition import boundaries_at


class Rows:
    """Answers queries over n rows in tasks of ``step`` rows, in any order; keeps the queries."""

    def __init__(self, keys, n, step):
        self.keys, self.n, self.step, self.asked = keys, n, step, []

    def ask(self, query: Query):
        self.asked.append(query)
        starts = np.random.default_rng(0).permutation(range(0, self.n, self.step))
        return (answer(self.keys, int(s), min(int(s) + self.step, self.n), query) for s in starts)


def at_ranks(keys, n, ranks):
    return boundaries_at(keys, keys.order(n)[ranks].astype(np.uint64))


@pytest.mark.parametrize("n", [1, 2, 1000, 100_003])
def test_find_every_kth_rank(n):
    keys, ranks = Keys(3), np.arange(0, n, max(1, n // 50))
    found = find(keys, ranks, Rows(keys, n, 20_000).ask)
    assert found.dtype == np.uint64
    np.testing.assert_array_equal(found, at_ranks(keys, n, ranks))


def test_find_nothing_asks_nothing():
    rows = Rows(Keys(3), 100, 10)
    assert find(rows.keys, np.zeros(0, np.int64), rows.ask).shape == (0, 3)
    assert not rows.asked


@pytest.mark.parametrize("bits", [(64, 64), (20, 1), (6, 2), (1, 0), (0, 64), (0, 0)])
def test_find_in_many_rounds(bits, monkeypatch):
    monkeypatch.setattr(bounds, "_COLLECT", 1)
    monkeypatch.setattr(bounds, "_COLLECT_EACH", 0)
    monkeypatch.setattr(bounds, "_SLICE", 97)
    keys, n = Keys(3, *bits), 1500
    ranks = np.array([0, 1, 2, 70, 71, 700, 1498, 1499])
    rows = Rows(keys, n, 400)
    np.testing.assert_array_equal(find(keys, ranks, rows.ask), at_ranks(keys, n, ranks))
    assert len(rows.asked) > 2
    if bits[0] < 64:  # equal keys are never told apart by counting, so it goes down to the last bit
        assert sum(q.more for q in rows.asked) == rows.asked[-1].bits == 64


@settings(deadline=None, max_examples=60)
@given(
    keys=st.builds(Keys, st.integers(0, 30), st.sampled_from([0, 2, 9, 64]), st.integers(0, 3)),
    n=st.integers(1, 400),
    collect=st.sampled_from([0, 1, 5, 1 << 20]),
    data=st.data(),
)
def test_find_any_ranks(keys, n, collect, data):
    ranks = np.array(sorted(data.draw(st.sets(st.integers(0, n - 1), min_size=1, max_size=20))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bounds, "_COLLECT", collect)
        patch.setattr(bounds, "_COLLECT_EACH", data.draw(st.sampled_from([0, 16])))
        found = find(keys, ranks, Rows(keys, n, data.draw(st.integers(1, n))).ask)
    np.testing.assert_array_equal(found, at_ranks(keys, n, ranks))


@pytest.mark.parametrize(("n", "leaves"), [(10**6, 2), (10**6, 100), (10**6, 2**18), (300, 20)])
def test_answers_are_as_long_as_foretold(n, leaves):
    keys, told = Keys(3), []
    ranks = np.arange(1, leaves) * (n // leaves)
    find(keys, ranks, lambda query: told.append(answer(keys, 0, n, query)) or told[-1:])
    lengths, foretold = [a.nbytes for a in told], bounds.answers(n, leaves)
    assert len(lengths) == len(foretold)
    assert lengths[:-1] == pytest.approx(foretold[:-1], rel=0.1)
    assert max(lengths[:-1]) <= 8 * bounds._MOST_COUNTS


def test_find_more_leaves_than_first_bins():
    keys, n = Keys(3), 150_000
    ranks = np.arange(1, n, 2)
    rows = Rows(keys, n, n)
    np.testing.assert_array_equal(find(keys, ranks, rows.ask), at_ranks(keys, n, ranks))
    assert rows.asked[0].more > 16


def test_find_sees_rows_counted_twice():
    # Negative control: a count task that overlaps another moves the boundaries.
    keys, n, ranks = Keys(3), 1000, np.array([500])

    def overlapping(query):
        return (answer(keys, a, b, query) for a, b in [(0, 600), (500, n)])

    assert not np.array_equal(find(keys, ranks, overlapping), at_ranks(keys, n, ranks))
