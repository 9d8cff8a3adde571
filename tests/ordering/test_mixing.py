import itertools
import json
import math
import tracemalloc
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from scipy import stats

import actshuffle.ordering.mixing as mixing
from actshuffle.ordering.mixing import MixingAccumulator, MixingReport, report
from support import orders

ALPHA = 0.01

# --- p-values and moments -----------------------------------------------------------------------


@pytest.mark.parametrize("a", [0.5, 1, 7, 300, 32512, 1e6])
@pytest.mark.parametrize("z", [-6, -3, -0.5, 0, 0.5, 3, 6, 30])
def test_gamma_tails_against_scipy(a: float, z: float) -> None:
    x = a + z * math.sqrt(a)
    exact = (stats.gamma.cdf(x, a), stats.gamma.sf(x, a)) if x > 0 else (0, 1)
    assert mixing._gamma_tails(a, x) == pytest.approx(exact, rel=1e-6, abs=1e-300)


@pytest.mark.parametrize("skew", [-1.3, -0.01, 0, 1e-4, 0.002, 0.1, 0.9])
@pytest.mark.parametrize("z", [-4, -1, 0, 0.2, 2, 5])
def test_gamma_law_against_scipy(skew: float, z: float) -> None:
    exact = stats.pearson3.cdf(z, skew), stats.pearson3.sf(z, skew)
    assert mixing._gamma_law(z, skew) == pytest.approx(exact, rel=0.01, abs=1e-9)


@pytest.mark.parametrize("mean", [1.0, 2.0, 29.0])
@pytest.mark.parametrize("count", [0, 1, 2, 7, 30, 60])
def test_poisson_against_scipy(mean: float, count: int) -> None:
    tails = stats.poisson.cdf(count, mean), stats.poisson.sf(count - 1, mean)
    test = mixing._poisson("fixed points", count, mean, mixing.CLUMPING)
    assert test.p_value == pytest.approx(min(1, 2 * min(tails)), rel=1e-9)


def all_orders(n: int) -> list[orders.Order]:
    return [np.array(order) for order in itertools.permutations(range(n))]


def assert_moments(values: list[Any], mean: float, sd: float) -> None:
    assert np.mean(values) == pytest.approx(mean, abs=1e-12)
    assert np.std(values) == pytest.approx(sd, abs=1e-12)


def test_chi_square_moments_over_all_orders() -> None:
    a, b = np.array([0, 0, 0, 1, 1, 2, 2]), np.array([0, 0, 0, 0, 1, 1, 2])
    tables = [np.bincount(a[order] * 3 + b, minlength=9).reshape(3, 3) for order in all_orders(len(a))]
    assert_moments([mixing._chi_square(t)[0] for t in tables], *mixing._chi_square(tables[0])[1:])


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 6])
def test_serial_moments_over_all_orders(lag: int) -> None:
    products = []
    for order in all_orders(7):
        x = mixing._centred(order, 7)
        products.append(x[lag:] @ x[:-lag])
    assert_moments(products, *mixing._serial_moments(7, lag))


@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 7])
def test_mates_moments_over_all_orders(chunk: int) -> None:
    counts = [np.count_nonzero(np.diff(order // chunk) == 0) for order in all_orders(7)]
    assert_moments(counts, *mixing._mates_moments(7, chunk))


# --- the honest shuffle passes at the nominal rate ----------------------------------------------


@pytest.fixture(scope="module", params=[(20_000, 200, 500, 1 << 18), (9001, 97, 160, 2048)])
def honest_reports(request: pytest.FixtureRequest) -> list[MixingReport]:
    n, src, dst, window = request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixing, "WINDOW", window)
        return [
            report(orders.honest(n, seed), src_chunk_rows=src, dst_chunk_rows=dst, alpha=ALPHA) for seed in range(200)
        ]


def assert_rate(count: int, trials: int, rate: float, what: str) -> None:
    low, high = stats.binom.interval(0.999, trials, rate)
    assert low <= count <= high, f"{what}: {count} of {trials}, nominal {low:g}..{high:g}"


def test_honest_is_rejected_at_the_nominal_rate(honest_reports: list[MixingReport]) -> None:
    assert_rate(sum(not r.passed for r in honest_reports), 200, ALPHA, "report")
    # at a large alpha the interval is two-sided, so this fails for a report that is conservative
    loose = [min(t.p_value for t in r.tests) <= 0.2 / len(r.tests) for r in honest_reports]
    assert_rate(sum(loose), 200, 0.2, "report at alpha 0.2")


def test_each_p_value_is_nominal_in_both_tails(honest_reports: list[MixingReport]) -> None:
    by_test = defaultdict(list)
    for r in honest_reports:
        for test in r.tests:
            by_test[test.name, test.detail].append(test)
    assert len(by_test) > 20
    for what, tests in by_test.items():
        above = sum(t.p_value <= 0.1 and t.statistic > t.expected for t in tests)
        below = sum(t.p_value <= 0.1 and t.statistic <= t.expected for t in tests)
        if what[0] in ("fixed points", "neighbours"):  # few values, so the attained level is less
            law = stats.poisson(tests[0].expected)
            attained = max(p for p in law.sf(np.arange(-1, 9)) if p <= 0.05)
            assert below == 0  # a count of none has probability over 0.05
            assert_rate(above, 200, attained, f"{what} above")
            continue
        assert_rate(above, 200, 0.05, f"{what} above")
        assert_rate(below, 200, 0.05, f"{what} below")
        assert stats.kstest([t.p_value for t in tests], "uniform").pvalue > 1e-4, what


def test_skewed_laws_are_nominal_far_out() -> None:
    """The most skewed cases, a 4 x 4 table and a short spectrum, at 0.5% in each tail."""
    trials = 1500
    tests = [
        test
        for seed in range(trials)
        for test in report(orders.honest(1100, seed), src_chunk_rows=275, dst_chunk_rows=275).tests
        if (test.name, test.detail) in {("chunks", "4x4"), ("spectrum", "")}
    ]
    assert len(tests) == 2 * trials
    for name in ("chunks", "spectrum"):
        far = [t.statistic > t.expected for t in tests if t.name == name and t.p_value <= 0.01]
        assert_rate(sum(far), trials, 0.005, f"{name} above")
        assert_rate(len(far) - sum(far), trials, 0.005, f"{name} below")


# --- broken shuffles are rejected, in the right direction ---------------------------------------

SIZES = [  # rows, source chunk, output chunk, block, parts: buckets are not whole output chunks
    (8000, 100, 128, 400, 40),
    (20_000, 250, 256, 1000, 40),
    (100_000, 1000, 768, 3000, 37),
]
CLUMPED = ("chunks", "too clumped")
BALANCED = ("chunks", "too balanced")
LABELS = ("source offset", "repeats by source chunk")
LAG = ("spectrum", "repeats at some lag")
Maker = Callable[[int, int], Callable[[int, int], orders.Order]]  # of block and parts
BROKEN: dict[str, tuple[Maker, set[tuple[str, str]]]] = {
    "block_local": (lambda b, p: partial(orders.block_local, block=b), {CLUMPED}),
    "buffer": (lambda b, p: partial(orders.buffer, size=b), {CLUMPED}),
    "equal_slice": (lambda b, p: partial(orders.equal_slice, block=b, parts=p), {BALANCED}),
    "equal_slice, one seed": (
        lambda b, p: partial(orders.equal_slice, block=b, parts=p, one_seed=True),
        {BALANCED, LABELS, LAG},
    ),
    "reused_seed_blocks": (lambda b, p: partial(orders.reused_seed_blocks, block=b, parts=p), {LABELS}),
    "reused_seed_buckets": (lambda b, p: partial(orders.reused_seed_buckets, parts=p), {LAG}),
}


def found(r: MixingReport) -> set[tuple[str, str]]:
    return {(test.name, test.direction) for test in r.rejected}


@pytest.mark.parametrize("size", SIZES, ids=lambda size: str(size[0]))
@pytest.mark.parametrize("name", BROKEN)
def test_broken_is_rejected_in_the_right_direction(name: str, size: tuple[int, ...]) -> None:
    n, src, dst, block, parts = size
    make, expected = BROKEN[name]
    for seed in range(5):
        order = make(block, parts)(n, seed)
        r = report(order, src_chunk_rows=src, dst_chunk_rows=dst, alpha=ALPHA)
        assert not r.passed
        assert expected <= found(r), seed


def test_equal_slice_is_only_too_balanced() -> None:
    for seed in range(5):
        order = orders.equal_slice(20_000, seed, block=1000, parts=40)
        assert found(report(order, src_chunk_rows=200, dst_chunk_rows=500)) == {BALANCED}


def test_one_seed_over_buckets_longer_than_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buckets of 10 output chunks: the spectrum cannot see them repeat, the offsets do."""
    monkeypatch.setattr(mixing, "WINDOW", 2048)
    order = orders.equal_slice(100_000, 0, block=2000, parts=20, one_seed=True)
    r = report(order, src_chunk_rows=500, dst_chunk_rows=500)
    assert ("output offset", "repeats by output chunk") in found(r)


def regular_orders(n: int) -> dict[str, orders.Order]:
    r = np.arange(n)
    half = np.concatenate([r[: n // 2, None], r[n // 2 :, None]], axis=1).ravel()
    bits = int(math.log2(n))
    reverse = np.zeros(n, np.int64)
    for k in range(bits):
        reverse |= ((r >> k) & 1) << (bits - 1 - k)
    return {
        "identity": r,
        "reversed": r[::-1],
        "rotated": np.roll(r, n // 3),
        "riffle": half,
        "affine": (r * 6364136223846793005 + 1442695040888963407) % n,
        "golden": (r * (int(n * 0.6180339887) | 1)) % n,
        "transposed": r.reshape(64, -1).T.ravel(),
        "bit reversal": reverse,
    }


@pytest.mark.parametrize("name", regular_orders(64))
@pytest.mark.parametrize("n", [2048, 65_536])
def test_regular_order_is_rejected(name: str, n: int) -> None:
    order = regular_orders(n)[name]
    assert np.array_equal(np.sort(order), np.arange(n))
    assert len(report(order, src_chunk_rows=n // 50, dst_chunk_rows=n // 37).rejected) >= 2


# --- streaming, small sizes, bad input ----------------------------------------------------------


@pytest.mark.parametrize("order", [orders.honest, partial(orders.block_local, block=700)])
def test_pieces_give_the_same_report_to_the_bit(
    monkeypatch: pytest.MonkeyPatch, order: Callable[[int, int], orders.Order]
) -> None:
    monkeypatch.setattr(mixing, "WINDOW", 2048)
    n = 10_000
    rows = order(n, 3).astype(np.uint64)
    whole = report(rows, src_chunk_rows=300, dst_chunk_rows=450)
    for seed in range(5):
        rng = np.random.default_rng(seed)
        cuts = np.sort(rng.integers(0, n + 1, size=rng.integers(1, 40)))
        scorer = MixingAccumulator(n, src_chunk_rows=300, dst_chunk_rows=450)
        for start, stop in itertools.pairwise([0, *cuts.tolist(), n]):
            scorer.update(start, rows[start:stop])
        assert scorer.report() == whole


def test_windows_change_only_the_spectrum(monkeypatch: pytest.MonkeyPatch) -> None:
    order = orders.honest(10_000, 0)
    whole = report(order, src_chunk_rows=300, dst_chunk_rows=450)
    monkeypatch.setattr(mixing, "WINDOW", 1100)
    for one, other in zip(whole.tests, report(order, src_chunk_rows=300, dst_chunk_rows=450).tests, strict=True):
        if one.name != "spectrum":
            assert one.statistic == pytest.approx(other.statistic, abs=1e-12)


def test_memory_is_bounded_for_a_billion_rows() -> None:
    n, size = 1_000_000_000, 500_000
    piece = np.random.default_rng(0).integers(n, size=size)
    tracemalloc.start()
    scorer = MixingAccumulator(n, src_chunk_rows=4096, dst_chunk_rows=100_000)
    for k in range(3):
        scorer.update(k * size, piece)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 48e6


@pytest.mark.parametrize("n", [0, 1, 2, 10, 63, 64, 65, 100, 300, 1030])
def test_small_sizes(n: int) -> None:
    r = report(orders.honest(n, 1), src_chunk_rows=7, dst_chunk_rows=5)
    assert r.passed
    assert bool(r.tests) == (n >= 64)
    names = {name for name, _ in mixing.TABLES} | {"order", "serial", "spectrum", "chunk mates"}
    names |= {"fixed points", "neighbours"}
    assert {t.name for t in r.tests} | set(r.skipped) == names
    assert not {t.name for t in r.tests} & set(r.skipped)
    assert all(math.isfinite(t.statistic) and t.sd > 0 and 0 <= t.p_value <= 1 for t in r.tests)
    assert ("nothing to test" in r.table()) == (n < 64)


@pytest.mark.parametrize(("src", "dst"), [(1, 1), (1, 3000), (3000, 1), (9999, 10**12), (1500, 2)])
def test_chunks_of_any_size(src: int, dst: int) -> None:
    r = report(orders.honest(3000, 2), src_chunk_rows=src, dst_chunk_rows=dst)
    assert r.passed
    assert {"order", "serial", "spectrum"} <= {t.name for t in r.tests}


def test_report_as_json_and_table() -> None:
    r = report(orders.block_local(5000, 0, block=100), src_chunk_rows=50, dst_chunk_rows=70)
    d = json.loads(json.dumps(r.as_dict(), allow_nan=False))
    assert (d["rows"], d["alpha"], d["passed"]) == (5000, 0.01, False)
    assert d["level"] == r.level == 0.01 / len(r.tests)
    assert sum(test["rejects"] for test in d["tests"]) == len(r.rejected) > 0
    lines = r.table().splitlines()
    assert len(lines) == 12
    assert max(map(len, lines)) < 100
    assert any(line.startswith("chunks") and line.endswith("TOO CLUMPED") for line in lines)
    assert lines[-1].startswith("FAIL: ")
    assert report(np.arange(0), src_chunk_rows=1, dst_chunk_rows=1).table()


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (np.zeros((3, 2), np.int64), "must be 1-D"),
        (np.int64(3), "must be 1-D"),
        (np.arange(5.0), "integer dtype, not float64"),
        (np.ones(5, bool), "integer dtype, not bool"),
        (np.array([0, 1, 5]), r"outside 0\.\.2"),
        (np.array([0, -1, 2]), r"outside 0\.\.2"),
        (np.array([0, 1, 2**64 - 1], np.uint64), r"outside 0\.\.2"),
        (np.array([0, 1, 1]), "rows repeat"),
        (np.zeros(5000, np.int64), "rows repeat"),
        (np.r_[np.arange(1000), np.arange(1000)], "rows repeat"),
    ],
)
def test_bad_order(order: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        report(order, src_chunk_rows=2, dst_chunk_rows=2)


def test_bad_pieces_and_arguments() -> None:
    scorer = MixingAccumulator(10, src_chunk_rows=2, dst_chunk_rows=2)
    scorer.update(0, np.arange(4))
    for start in (0, 3, 5):
        with pytest.raises(ValueError, match=f"starts at row {start}, but the next row is 4"):
            scorer.update(start, np.arange(2))
    with pytest.raises(ValueError, match="ends at row 11, past 10 rows"):
        scorer.update(4, np.arange(7))
    with pytest.raises(ValueError, match="only 4 of 10 rows"):
        scorer.report()
    scorer.update(4, [])
    scorer.update(4, np.arange(4, 10))  # what was refused left no trace
    assert scorer.report() == report(np.arange(10), src_chunk_rows=2, dst_chunk_rows=2)
    for alpha in (0, 1, -0.1, math.nan):
        with pytest.raises(ValueError, match="alpha must be between 0 and 1"):
            scorer.report(alpha)
    for rows, src, dst in [(-1, 1, 1), (5, 0, 1), (5, 1, 0)]:
        with pytest.raises(ValueError, match="chunks of at least one row"):
            MixingAccumulator(rows, src_chunk_rows=src, dst_chunk_rows=dst)


@pytest.mark.parametrize(("rows", "words"), [(1, "1 row)"), (2, "2 rows)"), (1500, "1,500 rows)")])
def test_numbers_of_rows_agree_with_their_noun(rows, words):
    assert words in report(np.arange(rows)[::-1], src_chunk_rows=1, dst_chunk_rows=1).table()
