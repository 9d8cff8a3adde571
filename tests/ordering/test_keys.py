"""The permutation: two independent implementations agree with each other, with numpy, and with published values."""

from __future__ import annotations

import hashlib
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import actshuffle
from actshuffle.ordering.keys import Keys, order, order_words, words_at

SEEDS = [0, 1, 2**40 + 7, 2**64 - 1, 2**200 + 3]


def test_check_values_of_words():
    assert [hex(w) for w in Keys(0).hi(0, 2)] == ["0xb8a059b224a7eb39", "0x6e4932400f2aaca"]


@pytest.mark.parametrize(("seed", "expected"), [(0, [1, 4, 5, 6, 2, 0, 3, 7]), (1, [0, 5, 7, 4, 2, 6, 3, 1])])
def test_check_values_of_order(seed, expected):
    assert order(8, seed).tolist() == expected
    assert actshuffle.order(8, seed).tolist() == expected


@pytest.mark.parametrize(
    ("seed", "begins"), [(0, "321f5dd32dce0607"), (1, "d8249f95bea03ce2"), (2**40 + 7, "09848080f495d17d")]
)
def test_check_values_of_long_order(seed, begins):
    text = order(100_003, seed).astype("<u8").tobytes()
    assert hashlib.sha256(text).hexdigest().startswith(begins)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("stream", [0, 1])
def test_words_are_those_of_numpy(seed, stream):
    philox = np.random.Philox(np.random.SeedSequence(seed, spawn_key=(stream,)))
    words = philox.random_raw(1003)
    keys = Keys(seed)
    np.testing.assert_array_equal(order_words(seed, stream, 0, 1003), words)
    np.testing.assert_array_equal(words_at(seed, stream, np.arange(1003)), words)
    np.testing.assert_array_equal((keys.lo_at if stream else keys.hi_at)(np.arange(1003)), words)
    if stream == 0:
        np.testing.assert_array_equal(keys.hi(0, 1003), words)


@settings(deadline=None, max_examples=150)
@given(
    seed=st.integers(0, 2**70),
    stream=st.sampled_from([0, 1]),
    start=st.one_of(st.integers(0, 9), st.integers(2**33 - 9, 2**33 + 9), st.integers(0, 2**63)),
    count=st.integers(0, 37),
)
def test_words_at_any_position_agree(seed, stream, start, count):
    rows = np.arange(start, start + count, dtype=np.uint64)
    expected = order_words(seed, stream, start, start + count)
    assert len(expected) == count
    np.testing.assert_array_equal(words_at(seed, stream, rows), expected)


def test_words_at_scattered_positions_across_slices():
    rng = np.random.default_rng(3)
    rows = rng.permutation(60_000)[:20_001]
    np.testing.assert_array_equal(words_at(4, 1, rows), order_words(4, 1, 0, 60_000)[rows])
    assert len(words_at(4, 1, rows[:0])) == 0


def test_words_cut_anywhere_join_to_the_same():
    whole = Keys(9).hi(0, 500)
    cuts = [0, 1, 3, 4, 5, 130, 131, 500]
    parts = [Keys(9).hi(a, b) for a, b in itertools.pairwise(cuts)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_streams_and_seeds_differ():
    words = {order_words(seed, s, 0, 4).tobytes() for seed in SEEDS for s in (0, 1)}
    assert len(words) == 2 * len(SEEDS)


@pytest.mark.parametrize("bits", [0, 1, 5, 63, 64])
def test_few_bits_keep_the_leading_ones(bits):
    keys, rows = Keys(3, hi_bits=bits, lo_bits=bits), np.arange(100)
    kept = [int(w) >> (64 - bits) << (64 - bits) for w in Keys(3).hi(0, 100)]
    assert keys.hi(0, 100).tolist() == kept == keys.hi_at(rows).tolist()
    kept = [int(w) >> (64 - bits) << (64 - bits) for w in Keys(3).lo_at(rows)]
    assert keys.lo_at(rows).tolist() == kept


@pytest.mark.parametrize("bits", [(0, 0), (1, 0), (2, 1), (3, 64)])
def test_ties_go_by_lo_and_then_by_source_row(bits):
    keys, rows = Keys(3, *bits), np.arange(200)
    triples = zip(keys.hi(0, 200).tolist(), keys.lo_at(rows).tolist(), rows.tolist(), strict=True)
    assert keys.order(200).tolist() == [row for _, _, row in sorted(triples)]


@pytest.mark.parametrize("n", [0, 1, 2])
def test_order_of_few_rows(n):
    assert sorted(order(n, 5).tolist()) == list(range(n))


def test_rows_appended_keep_the_order_of_the_old():
    longer = order(1000, 6)
    np.testing.assert_array_equal(longer[longer < 700], order(700, 6))
