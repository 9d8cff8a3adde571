"""Samples are exactly uniform: chi-square over a thousand seeds, two-sided, with biased samplers as controls."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy.stats import chi2

import saetrain
from actshuffle import priorities
from saetrain.describing import samples, sorting, statistics, together
from saetrain.describing.entries import Context, Entries
from saetrain.describing.samples import choose, smallest
from saetrain.describing.slots import Slots
from saetrain.describing.sorting import ordered
from saetrain.describing.together import Sample
from support.features import TINY, dictionary
from support.finished import finish
from support.stores import group

SEEDS, ROWS, LATENTS = 1000, 60, 3
SLOTS = Slots(top=2, intervals=2, each=3, random=4, quiet=5)
ACTIVE = np.flatnonzero(np.random.default_rng(0).random(ROWS) < 0.4)
VALUES = np.linspace(0.1, 8, len(ACTIVE)).astype(np.float32)[np.random.default_rng(1).permutation(len(ACTIVE))]


def one_seed(seed: int, first: int) -> dict[str, list[int]]:
    """The rows chosen of each kind for latent `first`, active on ACTIVE."""
    words = priorities(seed, 0, ROWS)
    entries = Entries(
        first=first,
        counts=np.array([len(ACTIVE)]),
        row=ACTIVE,
        value=VALUES,
        document=np.zeros(len(ACTIVE), np.int32),
        token=None,
        word=words[ACTIVE],
    )
    pool = np.argsort(words, kind="stable")
    context = Context(ROWS, np.array([0, ROWS]), pool, 0, 0, False, SLOTS, 128, 48, 24)
    median = np.sort(VALUES)[-(-len(VALUES) // 2) - 1]
    rows = choose(entries, context, VALUES.max(keepdims=True), np.array([[median]], np.float32)).row[0]
    return {kind: rows[a:b].tolist() for kind, (a, b) in SLOTS.kinds().items()}


def p_value(counts: np.ndarray, each: int) -> float:
    """Of equal chances for n rows, of which each of SEEDS samples takes `each` without replacement."""
    n = len(counts)
    due = SEEDS * each / n
    statistic = ((counts - due) ** 2).sum() / due * (n - 1) / (n - each)
    return float(chi2.cdf(statistic, n - 1))


def is_uniform(counts: np.ndarray, each: int) -> bool:
    """Two-sided: too even is a fault too."""
    return 1e-4 < p_value(counts, each) < 1 - 1e-4


@pytest.fixture(scope="module")
def chosen() -> list[dict[str, np.ndarray]]:
    """For each latent, how often each row was chosen, by kind."""
    found = []
    for latent in range(LATENTS):
        counts: dict[str, np.ndarray] = {kind: np.zeros(ROWS, np.int64) for kind in SLOTS.kinds()}
        for seed in range(SEEDS):
            for kind, rows in one_seed(seed, latent).items():
                counts[kind][[r for r in rows if r >= 0]] += 1
        found.append(counts)
    return found


def populations() -> dict[str, np.ndarray]:
    half = VALUES.max() / 2
    median = np.sort(VALUES)[-(-len(VALUES) // 2) - 1]
    return {
        "interval 1": ACTIVE[half >= VALUES],
        "interval 2": ACTIVE[half < VALUES],
        "part 1": ACTIVE[median >= VALUES],
        "part 2": ACTIVE[median < VALUES],
        "random": ACTIVE,
        "quiet": np.setdiff1d(np.arange(ROWS), ACTIVE),
    }


@pytest.mark.parametrize("kind", [k for k in SLOTS.kinds() if k != "top"])
@pytest.mark.parametrize("latent", range(LATENTS))
def test_samples_are_uniform(chosen, kind, latent):
    rows, counts = populations()[kind], chosen[latent][kind]
    first, end = SLOTS.kinds()[kind]
    assert counts.sum() == counts[rows].sum() == SEEDS * (end - first)
    assert is_uniform(counts[rows], end - first)


def test_the_largest_do_not_depend_on_the_seed(chosen):
    best = ACTIVE[np.argsort(-VALUES)[0]]
    assert chosen[0]["top"][best] == SEEDS


def test_latents_have_unrelated_samples():
    """Of two latents with the same rows, the samples share no more rows than chance gives."""
    shared = sum(len(set(one_seed(seed, 0)["random"]) & set(one_seed(seed, 1)["random"])) for seed in range(SEEDS))
    n, m = len(ACTIVE), SLOTS.random
    due, spread = SEEDS * m * m / n, (SEEDS * m * m / n * (1 - m / n) ** 2 * n / (n - 1)) ** 0.5
    assert abs(shared - due) < 4 * spread


def drawn(choice: Callable[[int], np.ndarray]) -> np.ndarray:
    counts = np.zeros(len(ACTIVE), np.int64)
    for seed in range(SEEDS):
        counts[choice(seed)] += 1
    return counts


@pytest.mark.parametrize("fault", ["favours late rows", "takes turns", "modulo"])
def test_control_a_biased_sampler_fails(fault):
    n, m = len(ACTIVE), SLOTS.random

    def choice(seed: int) -> np.ndarray:
        words = priorities(seed, 0, ROWS)[ACTIVE].astype(np.float64)
        if fault == "favours late rows":
            return np.argsort(words * (1.15 - 0.3 * np.arange(n) / n))[:m]
        if fault == "takes turns":  # too even
            return (seed * m + np.arange(m)) % n
        return np.argsort(priorities(seed, 0, ROWS)[ACTIVE] % np.uint64(16), kind="stable")[:m]

    assert not is_uniform(drawn(choice), m)
    assert is_uniform(drawn(lambda seed: np.argsort(priorities(seed, 0, ROWS)[ACTIVE])[:m]), m)


# --- The selection itself -----------------------------------------------------------------------


@pytest.mark.parametrize("m", [1, 5, 30])
def test_smallest_is_a_full_sort(m):
    rng = np.random.default_rng(m)
    groups = np.sort(rng.integers(0, 40, 5000) ** 2 // 50)
    priority = rng.integers(0, 2**63, 5000, np.uint64) << np.uint64(1)
    priority[groups == 3] >>= np.uint64(50)  # a group whose priorities all lie below any bound
    priority[groups == 5] |= np.uint64(0xFF << 56)  # and one whose priorities lie above it
    found = smallest(groups, priority, 50, m)
    for number in range(50):
        inside = np.flatnonzero(groups == number)
        due = inside[np.argsort(priority[inside], kind="stable")][:m].tolist()
        assert found[number].tolist() == due + [-1] * (m - len(due))


WINDOW, DOCUMENT = 16, 50


def bursts(seed: int) -> tuple[Entries, Context]:
    """Latents of no, few and many entries with equal values among them; every third has its largest side by side."""
    rng, rows = np.random.default_rng(seed), 2000
    counts = rng.integers(0, 30, 40) * rng.choice([0, 1, 40], 40)
    row = np.concatenate([np.sort(rng.choice(rows, n, replace=False)) for n in counts])
    latent = np.repeat(np.arange(40), counts)
    value = rng.integers(1, 300, len(row)).astype(np.float32)
    value[(latent % 3 == 0) & (row // 200 == latent % 7)] += 300
    token, word = rng.integers(0, 20, len(row)).astype(np.uint32), priorities(seed, 0, rows)[row]
    edges, none = np.arange(0, rows + 1, DOCUMENT), np.zeros(0, np.int64)
    context = Context(rows, edges, none, 0, 19, True, Slots(), WINDOW, 48, 24)
    return Entries(0, counts, row, value, (row // DOCUMENT).astype(np.int32), token, word), context


@pytest.mark.parametrize("count", [0, 1, 5, 20])
def test_the_largest_are_one_of_each_window(count):
    crowded = 0
    for seed in range(5):
        entries, context = bursts(seed)
        found = samples.top(entries, context, count)
        for latent, (start, stop) in enumerate(zip(entries.starts[:-1], entries.starts[1:], strict=True)):
            order = start + np.argsort(-entries.value[start:stop], kind="stable")
            due: list[int] = []
            for entry in order:
                seen = {(entries.row[e] // DOCUMENT, entries.row[e] % DOCUMENT // WINDOW) for e in due}
                row = entries.row[entry]
                if len(due) < count and (row // DOCUMENT, row % DOCUMENT // WINDOW) not in seen:
                    due.append(int(entry))
            assert found[latent].tolist() == due + [-1] * (count - len(due))
            largest = entries.row[order[: samples.CROWD * count]]
            windows = set(zip(largest // DOCUMENT, largest % DOCUMENT // WINDOW, strict=True))
            crowded += len(order) > samples.CROWD * count and len(windows) < count
    assert crowded or count < 20  # where the first look finds too few windows


def test_latents_of_few_and_of_many_entries_are_sorted_alike(monkeypatch):
    """Each alone, or all in one sort."""
    found = []
    for short in (0, 10**9):
        monkeypatch.setattr(sorting, "SHORT", short)
        entries, context = bursts(1)
        assert sorting.are_short(entries.starts) == bool(short)
        maximum = statistics.moments(entries)["stat/max"]
        found.append({"bits": entries.ordered_bits} | statistics.tokens(entries, context, maximum))
    assert all(np.array_equal(found[0][name], found[1][name], equal_nan=name == "token/mean") for name in found[0])
    due = [np.sort(part) for part in np.split(entries.value, entries.starts[1:-1])]
    assert np.array_equal(found[0]["bits"].view(np.float32), np.concatenate(due))


# --- Latents that are active together -----------------------------------------------------------


def test_pairs_are_the_same_by_tables_and_by_sorting(monkeypatch):
    """Of any range of latents, and however few pairs are expanded at a time."""
    rng = np.random.default_rng(3)
    dense = rng.random((200, 30)) < rng.random(30) * 0.5
    row, latent = np.nonzero(dense)
    sample = Sample(30, np.bincount(row, minlength=200), latent.astype(np.int32), np.arange(200) // 7)
    due = together.together(sample, 0, 30)
    assert (due["together/id"] >= 0).sum() > 100
    for most, share in [(1, 4), (300, 0), (10**6, 0)]:
        monkeypatch.setattr(together, "MOST_PAIRS", most)
        monkeypatch.setattr(together, "TABLE", share)
        for lo, hi in [(0, 30), (11, 19)]:
            found = together.together(sample, lo, hi)
            assert all(np.array_equal(found[n], due[n][lo:hi], equal_nan=n != "together/id") for n in due), (most, lo)


# --- Orders -------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(3, 5), (1000, 2**63), (2**40, 7, 2**30), (2**62, 2**62), (1, 1)])
def test_packed_words_give_the_stable_order_of_columns(sizes):
    rng = np.random.default_rng(len(sizes))
    for n in (0, 1, 2, 500):
        columns = [rng.integers(0, size, n).astype(np.uint64) for size in sizes]
        assert np.array_equal(ordered(*columns), np.lexsort(columns[::-1])), sizes
    far = np.array([5, 4], np.uint64) + np.uint64(2**63)  # differ in bits that are cut off
    assert ordered(np.array([2**20, 2**20]), far).tolist() == [1, 0]


# --- Examples with the same surroundings --------------------------------------------------------


def test_repeated_examples_have_the_tokens_of_an_earlier_one(tmp_path):
    """Documents of 40 rows, of which every second one is the same text with other activations."""
    rng, rows = np.random.default_rng(2), 400
    document = np.arange(rows) // 40
    token = np.where(document % 2, np.arange(rows) % 40, rng.integers(100, 999, rows))
    x = (rng.normal(0, 1, (1000, 12))[token] + rng.normal(0, 0.2, (rows, 12))).astype("<f4")
    group(tmp_path / "acts.zarr", {"x": x, "token": token.astype("<i4"), "document": document.astype("<i4")})
    finish(tmp_path / "acts.zarr", rows, ["x", "token", "document"])
    saetrain.build_features(
        dictionary(tmp_path / "d", "topk"), tmp_path / "acts.zarr", tmp_path / "out", fsync=False, **TINY
    )
    features, seen = saetrain.open_features(tmp_path / "out"), [0, 0]
    for latent in range(40):
        for kind in features.kinds:
            found = features[latent].examples(kind)
            for i, example in enumerate(found):
                lo, hi = document[example.row] * 40, document[example.row] * 40 + 40

                def around(row: int, lo: int = lo, hi: int = hi) -> list[int]:
                    return token[max(row - 8, lo) : min(row + 8, hi)].tolist()

                same = [
                    row
                    for row in (other.row for other in found[:i])
                    if document[row] % 2 and document[example.row] % 2 and row % 40 == example.row % 40
                ]
                assert example.is_repeated == bool(same)
                assert list(example.around) == around(example.row)
                seen[example.is_repeated] += 1
    assert min(seen) > 20
