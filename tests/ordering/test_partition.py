"""The row-moving kernels against a sort of (hi, lo, source row) triples."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actshuffle.limits import MAX_FAN_OUT
from actshuffle.ordering.keys import Keys
from actshuffle.ordering.partition import boundaries_at, bucket_of, group, key_order

few_bits = st.builds(Keys, st.integers(0, 50), st.integers(0, 7), st.sampled_from([0, 1, 2, 64]))


def triples(keys, hi, rows):
    return list(zip(hi.tolist(), keys.lo_at(rows).tolist(), rows.tolist(), strict=True))


def shuffled_rows(n, seed, first=0):
    return np.random.default_rng(seed).permutation(np.arange(first, first + n, dtype=np.uint64))


@settings(deadline=None, max_examples=200)
@given(keys=few_bits, n=st.integers(0, 200), first=st.integers(0, 2**40), mix=st.integers(0, 9))
def test_key_order_is_the_sort_of_full_keys(keys, n, first, mix):
    rows = shuffled_rows(n, mix, first)
    hi = keys.hi_at(rows)
    found = key_order(keys, hi, rows)
    assert found.dtype == np.int64
    expected = sorted(triples(keys, hi, rows))
    assert [int(rows[i]) for i in found] == [row for _, _, row in expected]


words = st.sampled_from([0, 1, 2, 3, 2**16, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**63, 2**64 - 2, 2**64 - 1])


@settings(deadline=None, max_examples=300)
@given(hi=st.lists(st.one_of(words, st.integers(0, 2**64 - 1)), max_size=40), low=words)
def test_key_order_over_any_range_of_hi(hi, low):
    # Ranges narrow and wide, at both ends of the words, from which the leading digits must be cut.
    keys, rows = Keys(1), np.arange(len(hi), dtype=np.uint64)
    hi = np.array([h // 2**20 + low // 2 if low else h for h in hi], np.uint64)
    found = key_order(keys, hi, rows)
    assert [triples(keys, hi, rows)[i] for i in found] == sorted(triples(keys, hi, rows))


@pytest.mark.parametrize("n", [2, 1000, 100_003])
def test_key_order_of_real_keys_is_the_oracle(n):
    keys = Keys(11)
    rows = np.arange(n, dtype=np.uint64)
    np.testing.assert_array_equal(key_order(keys, keys.hi(0, n), rows), keys.order(n))


def test_key_order_of_one_leaf_among_many():
    keys = Keys(11)
    leaf = np.sort(keys.order(300_000)[120_000:121_000]).astype(np.uint64)
    order = key_order(keys, keys.hi_at(leaf), leaf)
    np.testing.assert_array_equal(leaf[order], keys.order(300_000)[120_000:121_000])


@settings(deadline=None, max_examples=200)
@given(keys=few_bits, n=st.integers(0, 150), data=st.data())
def test_group_counts_bounds_at_or_below_each_key(keys, n, data):
    rows = shuffled_rows(n, data.draw(st.integers(0, 9)))
    ranks = sorted(data.draw(st.sets(st.integers(0, max(n - 1, 0)), max_size=min(n, 12))))
    bounds = boundaries_at(keys, keys.order(n)[ranks].astype(np.uint64))
    some = rows[: data.draw(st.integers(0, n))]  # a block holds some of the rows, in any order
    hi = keys.hi_at(some)
    order, cuts = group(bucket_of(keys, hi, some, bounds), len(bounds) + 1)

    limits = [tuple(b) for b in bounds.tolist()]
    labels = [sum(limit <= key for limit in limits) for key in triples(keys, hi, some)]
    assert len(cuts) == len(bounds) + 2
    assert (cuts[0], cuts[-1]) == (0, len(some))
    for bucket, (start, stop) in enumerate(itertools.pairwise(cuts)):
        assert order[start:stop].tolist() == [i for i, label in enumerate(labels) if label == bucket]


def test_group_of_everything_then_key_order_is_the_oracle():
    keys, n, leaf = Keys(2, hi_bits=4, lo_bits=3), 2000, 130
    rows = np.arange(n, dtype=np.uint64)
    hi, oracle = keys.hi(0, n), keys.order(n)
    bounds = boundaries_at(keys, oracle[leaf::leaf].astype(np.uint64))
    order, cuts = group(bucket_of(keys, hi, rows, bounds), len(bounds) + 1)
    assert np.diff(cuts).tolist() == [leaf] * (n // leaf) + [n % leaf]
    parts = [order[a:b] for a, b in itertools.pairwise(cuts)]
    found = np.concatenate([part[key_order(keys, hi[part], rows[part])] for part in parts])
    np.testing.assert_array_equal(found, oracle)
    # Negative control: without the order within buckets it is not the oracle yet.
    assert not np.array_equal(order, oracle)


def test_group_at_the_largest_fan_out():
    keys, n = Keys(7), 3 * MAX_FAN_OUT
    oracle = keys.order(n).astype(np.uint64)
    bounds = boundaries_at(keys, oracle[3::3])
    assert len(bounds) == MAX_FAN_OUT - 1
    buckets = bucket_of(keys, keys.hi(0, n), np.arange(n, dtype=np.uint64), bounds)
    order, cuts = group(buckets, MAX_FAN_OUT)
    assert set(np.diff(cuts).tolist()) == {3}
    np.testing.assert_array_equal(np.sort(order.reshape(-1, 3)), np.sort(oracle.reshape(-1, 3)))
