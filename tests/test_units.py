"""Sizes, counts and durations, in the forms that people write and read."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actshuffle.errors import RequestError
from actshuffle.units import format_bytes, format_seconds, parse_bytes, parse_count


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", 0),
        ("512", 512),
        (512, 512),
        ("1B", 1),
        ("1kb", 1000),
        ("1KB", 1000),
        ("1k", 1000),
        ("1KiB", 1024),
        ("64 kib", 65536),
        ("8GB", 8 * 10**9),
        (" 8 GiB ", 8 << 30),
        ("1.5MB", 1_500_000),
        (".5k", 500),
        ("1.1GB", 1_100_000_000),
        ("2TB", 2 * 10**12),
        ("1PiB", 1 << 50),
        ("1e3", 1000),
        ("1e3MB", 10**9),
        ("3E", 3 * 10**18),
        (1e16, 10**16),
        (2.5, 2),
    ],
)
def test_parse_bytes(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize(
    "text", ["", "GB", "-1", "-1GB", "8 bytes", "8GBB", "1,5GB", "nan", "inf", "1e400", "0x10", None]
)
def test_parse_bytes_refuses(text):
    with pytest.raises(RequestError, match="as a size"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("text", "expected"), [("0", 0), ("1_000", 1000), ("100e9", 10**11), (7, 7), (7.0, 7), (str(2**60 + 1), 2**60 + 1)]
)
def test_parse_count(text, expected):
    assert parse_count(text) == expected
    assert type(parse_count(text)) is int


@pytest.mark.parametrize("text", ["", "many", "1.5", 1.5, "nan", "inf", float("inf"), "1e400"])
def test_parse_count_refuses(text):
    with pytest.raises(RequestError, match="whole number"):
        parse_count(text)


@pytest.mark.parametrize(
    ("n", "expected"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 KB"),
        (12_345, "12.3 KB"),
        (999_499, "999 KB"),
        (999_999, "1 MB"),
        (10**11, "100 GB"),
        (10**13, "10 TB"),
        (10**15, "1 PB"),
        (10**17, "100 PB"),
        (10**19, "10,000 PB"),
    ],
)
def test_format_bytes(n, expected):
    assert format_bytes(n) == expected


@given(st.integers(0, 10**20))
def test_format_bytes_reads_back_to_three_digits(n):
    text = format_bytes(n)
    assert "e+" not in text
    assert parse_bytes(text.replace(",", "")) == pytest.approx(n, rel=0.0051)


@pytest.mark.parametrize(
    ("s", "expected"),
    [
        (0, "0.0 s"),
        (4.21, "4.2 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 00 s"),
        (185, "3 min 05 s"),
        (3599.7, "1 h 00 min"),
        (7800, "2 h 10 min"),
        (86400 * 3, "72 h 00 min"),
    ],
)
def test_format_seconds(s, expected):
    assert format_seconds(s) == expected
