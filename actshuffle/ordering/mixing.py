"""Evidence that an output order is a uniform shuffle: two-sided tests on ``source_row``.

``source_row[r]`` is the source row at output row r; the null hypothesis is a uniform random
permutation. A shuffle can fail in two directions: rows stay together (*too clumped*), or are dealt
out more evenly than chance would (*too balanced*), as by cutting blocks into equal slices.

- ``chunks``: Pearson's chi-square of source chunk x output chunk, at several coarsenings.
- ``source offset``, ``output offset``, ``offsets``: the same test on the place inside the chunk, on
  one or both sides. If one seed permutes every block or bucket, the same places keep meeting.
- ``order``, ``serial``: correlation of source position with output position, and with itself at
  a few lags.
- ``spectrum``: the power spectrum of the source positions, flat for a shuffle, peaked if a pattern
  repeats at any lag up to about WINDOW rows. So the bucket size need not be known.
- ``fixed points``, ``neighbours``, ``chunk mates``: rows left in place, source neighbours still
  adjacent, adjacent rows from one source chunk.

Each p-value comes from a Poisson law, or from a gamma law (Pearson type III) with the statistic's
mean, sd and skewness; mean and sd are exact for a random permutation, except for ``spectrum``.

No report proves a shuffle uniform; it rules out the faults that its tests can see. They do not see a
few misplaced rows, equal slices of fewer than four blocks or outputs, or one seed reused over unequal
buckets if these are longer than WINDOW, or if the generator's permutations of m and m + 1 rows are
unrelated (`torch.randperm`; numpy's and `random.shuffle`'s are similar, and are detected).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from actshuffle.html import page
from actshuffle.ordering.digest import mix
from actshuffle.units import counted

WINDOW = 1 << 18  # rows scored at a time: bounds the memory (about 35 MB) and the lags seen
GROUPS = 256  # a table has at most GROUPS x GROUPS cells
MIN_ROWS = 64  # the fewest rows, or pairs at a lag, for which the limit laws are good
MIN_EXPECTED = 8  # rows per cell of a table, on average
MIN_DF = 9  # with fewer degrees of freedom an exactly even table is not rare
MIN_SPECTRUM = 1024  # rows in a window for a spectrum; in shorter ones the lower tail is not nominal

# The meaning of a statistic below and above its expected value.
CLUMPING = "too balanced", "too clumped"
TABLES = (  # in the order of itertools.product over source and output
    ("chunks", CLUMPING),
    ("output offset", ("too balanced", "repeats by output chunk")),
    ("source offset", ("too balanced", "repeats by source chunk")),
    ("offsets", ("too balanced", "repeats by chunk")),
)

Index = npt.NDArray[np.int64]
Moments = tuple[float, float, float]  # statistic, expected, sd


@dataclass(frozen=True)
class MixingTest:
    """One two-sided test: `statistic` against its `expected` value and `sd` for a uniform shuffle.

    `detail` tells tests of one `name` apart (table shape, lag). `direction` puts into words on which
    side of `expected` the statistic lies: the meaning of a rejection.
    """

    name: str
    detail: str
    statistic: float
    expected: float
    sd: float
    p_value: float
    direction: str

    def rejects(self, alpha: float) -> bool:
        """True if the two-sided p-value is at most `alpha`."""
        return self.p_value <= alpha


@dataclass(frozen=True)
class MixingReport:
    """The tests of one order; `skipped` says why others, by name, do not apply.

    `alpha` bounds the false-alarm rate of the whole report: each test is held to
    ``level = alpha / len(tests)`` (Bonferroni).
    """

    rows: int
    alpha: float
    tests: tuple[MixingTest, ...]
    skipped: dict[str, str]

    @property
    def level(self) -> float:
        """The p-value at or below which one test rejects."""
        return self.alpha / max(1, len(self.tests))

    @property
    def rejected(self) -> tuple[MixingTest, ...]:
        """The tests that reject, smallest p-value first."""
        bad = [test for test in self.tests if test.rejects(self.level)]
        return tuple(sorted(bad, key=lambda test: test.p_value))

    @property
    def passed(self) -> bool:
        """True if no test rejects, or if no test applies (then `tests` is empty)."""
        return not self.rejected

    def as_dict(self) -> dict[str, Any]:
        """The report as plain types that `json.dumps` accepts."""
        return asdict(self) | {
            "level": self.level,
            "passed": self.passed,
            "tests": [asdict(t) | {"rejects": t.rejects(self.level)} for t in self.tests],
        }

    def _repr_html_(self) -> str:
        return as_html(self)

    def table(self) -> str:
        """A terminal table: for each name, the test of smallest p-value; then the verdict."""
        lines = [f"{'test':14}{'tests':>6}{'worst at':>11}{'observed':>13}{'expected':>13}  p-value"]
        for name, group in itertools.groupby(self.tests, key=lambda t: t.name):
            same = list(group)
            t = min(same, key=lambda t: t.p_value)
            flag = t.direction.upper() if t.rejects(self.level) else ""
            line = f"{name:14}{len(same):6}{t.detail:>11}{t.statistic:13.6g}{t.expected:13.6g}"
            lines.append(f"{line}  {t.p_value:<9.2g}{flag}".rstrip())
        lines += [f"{name:14}not applicable: {why}" for name, why in self.skipped.items()]
        verdict = "nothing to test" if not self.tests else "pass" if self.passed else "FAIL"
        verb = "rejects" if len(self.tests) == 1 else "reject"
        lines.append(
            f"{verdict}: {len(self.rejected)} of {counted(len(self.tests), 'test')} {verb} at "
            f"p <= {self.level:.2g} (alpha {self.alpha:g} for all, {counted(self.rows, 'row')})"
        )
        return "\n".join(lines)


def as_html(found: MixingReport, title: str = "Mixing") -> str:
    """The tests of one order as a page, the worst first."""
    facts = {
        "rows": f"{found.rows:,}",
        "tests": f"{len(found.rejected)} of {len(found.tests)} reject at p <= {found.level:.2g}",
    }
    facts |= {name: f"not applicable: {why}" for name, why in found.skipped.items()}
    rows = []
    for t in sorted(found.tests, key=lambda t: t.p_value):
        flag = t.direction.upper() if t.rejects(found.level) else ""
        values = f"{t.statistic:.6g}", f"{t.expected:.6g}", f"{t.p_value:.2g}"
        rows.append((t.name, t.detail, *values, flag))
    header = ("test", "at", "observed", "expected", "p-value", "")
    return page(title, facts, header, rows, verdict=found.passed)


def report(source_row: npt.ArrayLike, *, src_chunk_rows: int, dst_chunk_rows: int, alpha: float = 0.01) -> MixingReport:
    """Test an in-memory order: `source_row`, an integer permutation of ``0..n-1``, shape (n,).

    Raises ValueError if `source_row` is not such a permutation, or if a chunk size or `alpha` is out
    of range. Memory beyond the input does not grow with n.
    """
    order = np.asarray(source_row)
    if order.ndim != 1:
        raise ValueError(f"source_row must be 1-D, not of shape {order.shape}")
    scorer = MixingAccumulator(len(order), src_chunk_rows=src_chunk_rows, dst_chunk_rows=dst_chunk_rows)
    scorer.update(0, order)
    return scorer.report(alpha)


class MixingAccumulator:
    """Scores an order of `rows` rows from consecutive pieces, in memory independent of `rows`.

    The report is the same, to the last bit, however the order is cut into pieces. Raises
    ValueError if `rows` is negative or a chunk has less than one row.
    """

    def __init__(self, rows: int, *, src_chunk_rows: int, dst_chunk_rows: int) -> None:
        if rows < 0 or src_chunk_rows < 1 or dst_chunk_rows < 1:
            raise ValueError(
                f"need rows >= 0 and chunks of at least one row, not {rows=}, {src_chunk_rows=}, {dst_chunk_rows=}"
            )
        self.rows = rows
        self._src = min(src_chunk_rows, max(rows, 1))
        self._dst = min(dst_chunk_rows, max(rows, 1))
        lags = {1, 2, 16, 256, self._src, self._dst, 2 * self._dst}
        reach = min(WINDOW, rows - MIN_ROWS)
        self._products = {lag: 0.0 for lag in sorted(lags) if lag <= reach}
        self._row_product = 0.0
        self._tables = np.zeros((len(TABLES), GROUPS * GROUPS), np.int64)
        self._power = 0.0
        self._fixed = self._neighbours = self._mates = 0
        self._fingerprint = 0
        self._seen = 0
        self._buffer = np.empty(min(WINDOW, rows), np.int64)
        self._tail = np.empty(0, np.int64)  # the rows before the buffer that a lag can reach

    def update(self, start: int, piece: npt.ArrayLike) -> None:
        """Add ``source_row[start : start + len(piece)]``; pieces must come in order.

        `piece` is 1-D of any integer dtype. Raises ValueError, and adds nothing, on any other
        shape or dtype, a value outside ``0..rows-1``, or a `start` other than the next row.
        """
        values = np.asarray(piece)
        if values.ndim != 1:
            raise ValueError(f"source_row must be 1-D, not of shape {values.shape}")
        if values.size and values.dtype.kind not in "iu":
            raise ValueError(f"source_row must be of an integer dtype, not {values.dtype}")
        if start != self._seen:
            raise ValueError(f"piece starts at row {start}, but the next row is {self._seen}")
        if start + len(values) > self.rows:
            raise ValueError(f"piece ends at row {start + len(values)}, past {counted(self.rows, 'row')}")
        if values.size and (int(values.min()) < 0 or int(values.max()) >= self.rows):
            raise ValueError(f"source_row has values outside 0..{self.rows - 1}")
        taken = 0
        while taken < len(values):
            at = self._seen % WINDOW
            part = values[taken : taken + WINDOW - at]
            self._buffer[at : at + len(part)] = part
            taken += len(part)
            self._seen += len(part)
            if self._seen % WINDOW == 0 or self._seen == self.rows:
                self._score(self._buffer[: at + len(part)])

    def _score(self, source: Index) -> None:
        """Add a window, the last rows seen, to every statistic."""
        n, size = self.rows, len(source)
        row = np.arange(self._seen - size, self._seen)
        self._fingerprint += _fingerprint(source) - _fingerprint(row)
        self._fixed += int(np.count_nonzero(source == row))

        src, dst = _groups(source, self._src, n), _groups(row, self._dst, n)
        for table, (a, b) in zip(self._tables, itertools.product(src, dst), strict=True):
            table += np.bincount(a * GROUPS + b, minlength=GROUPS * GROUPS)

        joined = np.concatenate([self._tail, source])
        recent = joined[-size - 1 :]  # with the row before the window, if there is one
        self._neighbours += int(np.count_nonzero(np.abs(np.diff(recent)) == 1))
        self._mates += int(np.count_nonzero(np.diff(recent // self._src) == 0))
        position = _centred(joined, n)
        self._row_product += float(position[-size:] @ _centred(row, n))
        for lag in self._products:
            first = max(lag, len(self._tail))
            earlier = position[first - lag : len(position) - lag]
            self._products[lag] += float(position[first:] @ earlier)
        if size >= MIN_SPECTRUM:
            power = np.abs(np.fft.rfft(position[-size:])[1 : (size + 1) // 2]) ** 2
            total = float(power.sum()) or 1.0  # zero only if rows repeat, which report() refuses
            self._power += (len(power) / total) ** 2 * float(power @ power)
        # One window is enough: all but the last are at least as long as any lag.
        self._tail = source[-max([1, *self._products]) :].copy()

    def report(self, alpha: float = 0.01) -> MixingReport:
        """The report at false-alarm rate `alpha`, once every row has been added.

        Raises ValueError if rows are missing, if rows repeat (detected by a 64-bit fingerprint of
        the set of rows), or if `alpha` is not between 0 and 1.
        """
        if not 0 < alpha < 1:
            raise ValueError(f"alpha must be between 0 and 1, not {alpha}")
        if self._seen < self.rows:
            raise ValueError(f"only {self._seen:,} of {counted(self.rows, 'row')} came")
        if self._fingerprint % 2**64:
            raise ValueError(f"source_row is not a permutation of 0..{self.rows - 1}: rows repeat")
        found = [*self._table_tests(), *self._position_tests(), *self._spectrum_test(), *self._count_tests()]
        return MixingReport(
            rows=self.rows,
            alpha=alpha,
            tests=tuple(test for test in found if isinstance(test, MixingTest)),
            skipped=dict(test for test in found if not isinstance(test, MixingTest)),
        )

    def _table_tests(self) -> Iterator[MixingTest | tuple[str, str]]:
        """Pearson's chi-square of each table, at each coarsening that leaves cells full enough."""
        for (name, words), flat in zip(TABLES, self._tables, strict=True):
            finest = flat.reshape(GROUPS, GROUPS)
            finest = finest[finest.any(axis=1)][:, finest.any(axis=0)]
            shapes = set()
            for limit in (256, 128, 64, 32, 16, 8, 4):
                table = _coarsen(_coarsen(finest, limit).T, limit).T
                a, b = table.shape
                full = self.rows >= MIN_EXPECTED * a * b and (a - 1) * (b - 1) >= MIN_DF
                if full and (a, b) not in shapes:
                    shapes.add((a, b))
                    x, mean, sd = _chi_square(table)
                    # The statistic is a multiple of a chi-square variable: its skewness is 2 sd / mean.
                    yield _test(name, f"{a}x{b}", (x, mean, sd), 2 * sd / mean, words)
            if not shapes:
                yield name, f"needs {MIN_EXPECTED} rows a cell and {MIN_DF} degrees of freedom"

    def _position_tests(self) -> Iterator[MixingTest | tuple[str, str]]:
        """Correlation of source positions with output positions, and with themselves."""
        n = self.rows
        square = (n * n - 1) / (3 * n) if n else 0.0  # sum of _centred(...) ** 2
        if n < MIN_ROWS:
            yield "order", f"needs {MIN_ROWS} rows"
        else:
            rho = self._row_product / square, 0.0, 1 / math.sqrt(n - 1)
            yield _test("order", "", rho, 0.0, ("reverses the source", "keeps source order"))
        if not self._products:
            yield "serial", f"needs {MIN_ROWS + 1} rows"
        for lag, product in self._products.items():
            mean, sd = _serial_moments(n, lag)
            scale = n / ((n - lag) * square)
            r = product * scale, mean * scale, sd * scale
            yield _test("serial", f"lag {lag}", r, 0.0, CLUMPING)

    def _spectrum_test(self) -> Iterator[MixingTest | tuple[str, str]]:
        """Mean squared power over squared mean power: 2 for exponential powers, more if peaked.

        In a window with m frequencies the powers of a shuffle behave as m independent exponential
        variables, so ``sum(p^2) / sum(p)^2`` is Greenwood's statistic: mean ``2/(m+1)``, variance
        ``4(m-1) / ((m+1)^2 (m+2) (m+3))`` (P. A. P. Moran, JRSS Supplement 9, 1947). Its skewness
        is ``10/sqrt(m)`` to leading order: E[h^3]/E[h^2]^(3/2) = 80/8 for h = p^2 - 4p + 2.
        """
        windows, rest = divmod(self.rows, WINDOW)
        sizes = [WINDOW] * windows + [rest]
        ms = [(size - 1) // 2 for size in sizes if size >= MIN_SPECTRUM]
        if not ms:
            yield "spectrum", f"needs {MIN_SPECTRUM} rows"
            return
        count = sum(ms)
        mean = sum(2 * m * m / (m + 1) for m in ms)
        var = sum(4 * m**4 * (m - 1) / ((m + 1) ** 2 * (m + 2) * (m + 3)) for m in ms)
        moments = self._power / count, mean / count, math.sqrt(var) / count
        words = "too even at every lag", "repeats at some lag"
        yield _test("spectrum", "", moments, 10 / math.sqrt(count), words)

    def _count_tests(self) -> Iterator[MixingTest | tuple[str, str]]:
        """Rows left in place (Poisson(1)), source neighbours still adjacent, and chunk mates.

        The count of adjacent rows with ``|difference| == 1`` has mean ``2(n-1)/n`` and is Poisson
        in the limit (J. Wolfowitz, Annals of Mathematical Statistics 15, 1944).
        """
        n = self.rows
        if n < MIN_ROWS:
            for name in ("fixed points", "neighbours", "chunk mates"):
                yield name, f"needs {MIN_ROWS} rows"
            return
        yield _poisson("fixed points", self._fixed, 1.0, ("too few in place", "left in place"))
        yield _poisson("neighbours", self._neighbours, 2 * (n - 1) / n, CLUMPING)
        mean, sd = _mates_moments(n, self._src)
        if sd == 0:
            yield "chunk mates", "needs two source chunks of two rows"
        elif mean < 30:
            yield _poisson("chunk mates", self._mates, mean, CLUMPING)
        else:
            # The skewness is a binomial count's; half a row is the continuity correction.
            moments = float(self._mates), mean, sd
            yield _test("chunk mates", "", moments, (1 - 2 * mean / (n - 1)) / sd, CLUMPING, 0.5)


def _groups(index: Index, chunk: int, n: int) -> tuple[Index, Index]:
    """Chunk number and place in the chunk, each in at most GROUPS equal runs (the last shorter)."""
    number, offset = np.divmod(index, chunk)
    chunks = -(-n // chunk)
    return number // -(-chunks // GROUPS), offset // -(-chunk // GROUPS)


def _centred(index: Index, n: int) -> npt.NDArray[np.float64]:
    """``(2 i - (n - 1)) / n``: mean 0 over all rows, between -1 and 1."""
    return (2.0 * index - (n - 1)) / n


def _fingerprint(values: Index) -> int:
    """Sum of a 64-bit mix of each value, which does not depend on their order."""
    return int(mix(values.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)).sum())


def _coarsen(table: Index, limit: int) -> Index:
    """Add up adjacent lines of `table`, 2^k at a time, so that at most `limit` are left."""
    width = 1
    while -(-len(table) // width) > limit:
        width *= 2
    starts = np.arange(0, len(table), width)
    # A short last line would spoil the chi-square law, so it is merged into its neighbour.
    if len(starts) > 1 and 2 * table[starts[-1] :].sum() < table[:width].sum():
        starts = starts[:-1]
    return np.add.reduceat(table, starts, axis=0)


def _chi_square(table: Index) -> Moments:
    """Pearson's chi-square of `table`, and its exact mean and sd when both margins are fixed.

    With N rows, r margins n_i and s margins m_j: mean ``N (r-1)(s-1) / (N-1)``, variance
    ``2N/(N-3) (v - a)(w - b) + N^2/(N-1) a b``, where ``v = (N-r)(r-1)/(N-1)`` and
    ``a = (N sum(1/n_i) - r^2)/(N-2)``, and w, b are the same of m_j and s
    (J. B. S. Haldane, Biometrika 31, 1940; R. B. Dawson, Biometrika 41, 1954).
    """
    n = int(table.sum())
    margins = table.sum(axis=1), table.sum(axis=0)
    expected = np.outer(margins[0] / n, margins[1])
    x = float(((table - expected) ** 2 / expected).sum())
    r, s = table.shape
    v, w = ((n - k) * (k - 1) / (n - 1) for k in (r, s))
    a, b = ((n * float((1 / m).sum()) - len(m) ** 2) / (n - 2) for m in margins)
    var = 2 * n / (n - 3) * (v - a) * (w - b) + n * n / (n - 1) * a * b
    return x, n * (r - 1) * (s - 1) / (n - 1), math.sqrt(var)


def _serial_moments(n: int, lag: int) -> tuple[float, float]:
    """Exact mean and sd of ``sum(x[i] x[i + lag])``, for x the `_centred` rows in random order.

    ``e11 = E[x1 x2]``, ``e22 = E[x1^2 x2^2]``, ``e211`` and ``e1111`` are over distinct entries,
    by the power sums s2 and s4, as s1 = 0 (cf. A. Wald and J. Wolfowitz, Annals of Mathematical
    Statistics 14, 1943, for the circular case).
    """
    s2 = (n * n - 1) / (3 * n)
    s4 = (n * n - 1) * (3 * n * n - 7) / (15 * n**3)
    e11 = -s2 / n / (n - 1)
    e22 = (s2 * s2 - s4) / n / (n - 1)
    e211 = (2 * s4 - s2 * s2) / n / (n - 1) / (n - 2)
    e1111 = (3 * s2 * s2 - 6 * s4) / n / (n - 1) / (n - 2) / (n - 3)
    pairs = n - lag
    chained = 2 * max(0, n - 2 * lag)  # ordered couples of pairs that share an entry
    apart = pairs * (pairs - 1) - chained
    mean = pairs * e11
    return mean, math.sqrt(pairs * e22 + chained * e211 + apart * e1111 - mean * mean)


def _mates_moments(n: int, chunk: int) -> tuple[float, float]:
    """Exact mean and sd of the count of adjacent rows from one source chunk.

    With f_k the sum over chunks of ``c (c-1) .. (c-k+1)`` for c rows, the chance that two rows,
    three, or two and two are mates is ``f2/n(n-1)``, ``f3/n(n-1)(n-2)``,
    ``(f2^2 - sum((c(c-1))^2) + f4) / n(n-1)(n-2)(n-3)``. In fractions, because these cancel.
    """
    sizes = (n // chunk, chunk), (1, n % chunk)
    f2, f3, f4 = (sum(k * math.perm(c, j) for k, c in sizes) for j in (2, 3, 4))
    squares = sum(k * math.perm(c, 2) ** 2 for k, c in sizes)
    mean = Fraction((n - 1) * f2, math.perm(n, 2))
    both = 2 * (n - 2) * Fraction(f3, math.perm(n, 3))
    both += (n - 2) * (n - 3) * Fraction(f2 * f2 - squares + f4, math.perm(n, 4))
    return float(mean), math.sqrt(mean + both - mean * mean)


def _test(
    name: str, detail: str, moments: Moments, skew: float, words: tuple[str, str], half: float = 0.0
) -> MixingTest:
    """A test by the gamma law; `half` is the continuity correction of a count."""
    statistic, mean, sd = moments
    lower = _gamma_law((statistic + half - mean) / sd, skew)[0]
    upper = _gamma_law((statistic - half - mean) / sd, skew)[1]
    p_value = min(1.0, 2 * min(lower, upper))
    return MixingTest(name, detail, statistic, mean, sd, p_value, words[statistic > mean])


def _poisson(name: str, count: int, mean: float, words: tuple[str, str]) -> MixingTest:
    """A test by the Poisson law: ``P(X <= k) = Q(k+1, mean)`` and ``P(X >= k) = P(k, mean)``.

    A small count takes few values, so this test rejects less often than its p-value says.
    """
    lower = _gamma_tails(count + 1, mean)[1]
    upper = _gamma_tails(count, mean)[0] if count else 1.0
    p_value = min(1.0, 2 * min(lower, upper))
    sd = math.sqrt(mean)
    return MixingTest(name, "", float(count), mean, sd, p_value, words[count > mean])


def _gamma_law(z: float, skew: float) -> tuple[float, float]:
    """Lower and upper tail at `z` of the gamma law of mean 0, sd 1 and this skewness."""
    if abs(skew) < 1e-3:  # normal, within 1% of either tail up to 4 sd
        return math.erfc(-z / math.sqrt(2)) / 2, math.erfc(z / math.sqrt(2)) / 2
    if skew < 0:
        upper, lower = _gamma_law(-z, -skew)
        return lower, upper
    shape = 4 / skew**2
    return _gamma_tails(shape, shape + z * math.sqrt(shape))


def _gamma_tails(a: float, x: float) -> tuple[float, float]:
    """Regularised incomplete gamma functions P(a, x) and Q(a, x); the smaller one is accurate.

    Computed by the series below ``a + 1``, else by the continued fraction (Abramowitz and Stegun
    6.5.29 and 6.5.31; Press et al., Numerical Recipes, 6.2).
    """
    if x <= 0:
        return 0.0, 1.0
    front = math.exp(a * math.log(x) - x - math.lgamma(a))
    if x < a + 1:
        k = a
        total = term = 1 / a
        while term > total * 1e-17:
            k += 1
            term *= x / k
            total += term
        lower = min(1.0, total * front)
        return lower, 1 - lower
    b = x + 1 - a
    c, d = math.inf, 1 / b
    value, step, k = d, 0.0, 0
    while abs(step - 1) > 1e-15:
        k += 1
        b += 2
        d = 1 / (b - k * (k - a) * d)
        c = b - k * (k - a) / c
        step = c * d
        value *= step
    upper = min(1.0, value * front)
    return 1 - upper, upper
