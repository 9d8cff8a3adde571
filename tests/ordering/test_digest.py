"""The conservation digest ignores the order of rows, and detects every other change."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actshuffle.ordering.digest import RowHash, add_to_groups, add_up, from_hex, to_hex

WIDTHS = [*range(1, 34), 4096]


def rows_of_width(width, n=9, seed=3):
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, 256, (n, width), np.uint8)
    return rows, rng.permutation(1000)[:n].astype(np.uint64)


def changed(row_hash, rows, numbers, before):
    return not np.array_equal(row_hash.total(rows, numbers), before)


@pytest.mark.parametrize("width", WIDTHS)
def test_total_does_not_depend_on_order_or_cuts(width):
    rows, numbers = rows_of_width(width)
    row_hash = RowHash(1, 0, width)
    total = row_hash.total(rows, numbers)
    mixed = np.random.default_rng(0).permutation(len(rows))
    np.testing.assert_array_equal(row_hash.total(rows[mixed], numbers[mixed]), total)
    parts = [row_hash.total(np.ascontiguousarray(rows[a:b]), numbers[a:b]) for a, b in [(0, 0), (0, 4), (4, 9)]]
    np.testing.assert_array_equal(add_up(np.array(parts)), total)


@pytest.mark.parametrize("width", WIDTHS)
def test_every_single_bit_changes_it(width):
    rows, numbers = rows_of_width(width, n=2)
    row_hash = RowHash(1, 0, width)
    before = row_hash.total(rows, numbers)
    bits = range(8 * width) if width < 100 else range(0, 8 * width, 61)
    for bit in bits:
        rows[1, bit // 8] ^= 1 << bit % 8
        assert changed(row_hash, rows, numbers, before), bit
        rows[1, bit // 8] ^= 1 << bit % 8
    # Negative control of the check itself: the same rows have the same digest.
    assert not changed(row_hash, rows, numbers, before)


@pytest.mark.parametrize("width", WIDTHS)
def test_contents_of_two_rows_swapped(width):
    rows, numbers = rows_of_width(width)
    row_hash = RowHash(1, 0, width)
    before = row_hash.total(rows, numbers)
    assert (rows[2] != rows[5]).any()
    rows[[2, 5]] = rows[[5, 2]]
    assert changed(row_hash, rows, numbers, before)
    # With their numbers they are the same rows in another order.
    numbers[[2, 5]] = numbers[[5, 2]]
    assert not changed(row_hash, rows, numbers, before)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("pick", [[0, 1, 2, 3, 3], [0, 1, 2], [0, 1, 2, 2], [0, 1, 2, 2, 2, 3], []])
def test_rows_doubled_or_dropped(width, pick):
    rows, numbers = rows_of_width(width, n=4)
    row_hash = RowHash(1, 0, width)
    before = row_hash.total(rows, numbers)
    assert changed(row_hash, rows[pick], numbers[pick], before)


def test_a_row_written_twice_more_would_vanish_in_a_xor():
    rows, numbers = rows_of_width(16, n=4)
    hashes = RowHash(1, 0, 16).hashes(rows, numbers)
    tripled = hashes[[0, 0, 0, 1, 2, 3]]
    xor = np.bitwise_xor.reduce
    np.testing.assert_array_equal(xor(tripled, axis=0), xor(hashes, axis=0))
    assert not np.array_equal(add_up(tripled), add_up(hashes))


def test_signs_of_two_words_escape_one_form_but_not_both():
    rows = np.random.default_rng(1).standard_normal((6, 5))
    numbers, row_hash = np.arange(6, dtype=np.uint64), RowHash(1, 0, 40)
    before = row_hash.total(rows.view(np.uint8), numbers)
    for a, b in [(0, 1), (0, 4), (2, 3)]:
        flipped = rows.copy()
        flipped[3, [a, b]] *= -1
        after = row_hash.total(flipped.view(np.uint8), numbers)
        assert after[0] == before[0]  # why one form is not enough
        assert after[1] != before[1]


@settings(deadline=None, max_examples=200)
@given(width=st.sampled_from([1, 2, 3, 4, 7, 8, 12, 16, 33]), data=st.data())
def test_any_change_within_rows_shows(width, data):
    rows, numbers = rows_of_width(width)
    row_hash = RowHash(data.draw(st.integers(0, 2**64)), data.draw(st.integers(0, 5)), width)
    before = row_hash.total(rows, numbers)
    # Bits flipped in the same places of several words are the weak spot of multilinear hashes.
    mask = data.draw(st.binary(min_size=width, max_size=width))
    which = data.draw(st.sets(st.integers(0, 8), min_size=1))
    rows[list(which)] ^= np.frombuffer(mask, np.uint8)
    assert changed(row_hash, rows, numbers, before) == any(mask)


def test_fields_and_seeds_have_weights_of_their_own():
    rows, numbers = rows_of_width(24)
    totals = {to_hex(RowHash(s, f, 24).total(rows, numbers)) for s in (0, 1) for f in (0, 1, 2)}
    assert len(totals) == 6


@pytest.mark.parametrize("width", [3, 8, 4096])
def test_slices_do_not_show(width, monkeypatch):
    rows, numbers = rows_of_width(width, n=50)
    row_hash = RowHash(1, 0, width)
    whole = row_hash.hashes(rows, numbers)
    monkeypatch.setattr("actshuffle.ordering.digest._SLICE_BYTES", 7 * width)
    np.testing.assert_array_equal(row_hash.hashes(rows, numbers), whole)
    one_by_one = [row_hash.hashes(rows[i : i + 1], numbers[i : i + 1])[0] for i in range(50)]
    np.testing.assert_array_equal(one_by_one, whole)


@pytest.mark.parametrize("width", [3, 4, 8, 4096])
def test_hashes_of_parts_are_those_of_the_rows(width, monkeypatch):
    rows, numbers = rows_of_width(width, n=50)
    row_hash = RowHash(1, 0, width)
    for slices, mixed in ((7 * width, 16), (1 << 19, 1 << 12)):
        whole = row_hash.hashes(rows, numbers)
        monkeypatch.setattr("actshuffle.ordering.digest._PLACE_BYTES", slices)
        monkeypatch.setattr("actshuffle.ordering.digest._MIXED_ROWS", mixed)
        parts = ((at, rows[at : at + 20].copy()) for at in range(0, 50, 20))
        np.testing.assert_array_equal(row_hash.hashes_of_parts(parts, numbers), whole)
        parts = ((at, rows[at : at + 20][::-1].copy()) for at in range(0, 50, 20))
        assert (row_hash.hashes_of_parts(parts, numbers) != whole).any()


def test_memory_that_is_not_aligned():
    rows, numbers = rows_of_width(16)
    shifted = np.frombuffer(b"x" + rows.tobytes(), np.uint8)[1:].reshape(rows.shape)
    row_hash = RowHash(1, 0, 16)
    np.testing.assert_array_equal(row_hash.hashes(shifted, numbers), row_hash.hashes(rows, numbers))


def test_no_rows_add_up_to_nothing():
    rows, numbers = rows_of_width(8, n=0)
    assert RowHash(1, 0, 8).total(rows, numbers).tolist() == [0, 0]


@settings(deadline=None, max_examples=50)
@given(n=st.integers(0, 60), buckets=st.integers(1, 8), seed=st.integers(0, 99))
def test_groups_add_up_to_what_their_rows_do(n, buckets, seed):
    rng = np.random.default_rng(seed)
    rows, numbers = rng.integers(0, 256, (n, 8), np.uint8), np.arange(n, dtype=np.uint64)
    labels, row_hash = rng.integers(0, buckets, n).astype(np.uint16), RowHash(1, 0, 8)
    found = np.zeros((buckets, 2), np.uint64)
    for part in (slice(0, n // 3), slice(n // 3, n)):  # what is added first stays
        add_to_groups(found, row_hash.hashes(rows[part], numbers[part]), labels[part])
    for bucket in range(buckets):
        inside = labels == bucket
        np.testing.assert_array_equal(found[bucket], row_hash.total(rows[inside], numbers[inside]))


def test_hex_and_back():
    digest = np.array([0, 2**64 - 1], np.uint64)
    assert to_hex(digest) == "0" * 16 + "f" * 16
    assert len(to_hex(np.array([1, 2], np.uint64))) == 32
    np.testing.assert_array_equal(from_hex(to_hex(digest)), digest)
