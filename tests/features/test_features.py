"""Every array of a result against plain numpy over dense activations, a latent at a time."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import actshuffle
import saetrain
from saetrain.describing.slots import CONTEXT, HISTOGRAM_BINS, QUANTILES
from saetrain.features.encode import largest
from support.features import LATENTS, TINY, dense, dictionary, store

ROWS, SEED = 300, 7
KINDS = ("standard", "topk", "jumprelu")
SLOTS = TINY["slots"]


@pytest.fixture(scope="module")
def acts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return store(tmp_path_factory.mktemp("store") / "acts.zarr", ROWS)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, acts: Path) -> dict[str, Any]:
    """For each kind: the open result, and the dense activations."""
    folder, found = tmp_path_factory.mktemp("built"), {}
    x = actshuffle.open_dataset(acts).read("x", 0, ROWS)
    for kind in KINDS:
        where = dictionary(folder / kind, kind)
        build(where, acts, folder / f"{kind}.out")
        found[kind] = saetrain.open_features(folder / f"{kind}.out"), dense(where, x), where
    return found


def build(where: Path, acts: Path, out: Path, **settings: Any) -> Any:
    return saetrain.build_features(where, acts, out, **{"fsync": False, "seed": SEED, **TINY, **settings})


@pytest.fixture(params=KINDS)
def case(request: pytest.FixtureRequest, built: dict[str, Any]) -> tuple[Any, np.ndarray]:
    return built[request.param][:2]


def columns(acts: Path) -> tuple[np.ndarray, np.ndarray]:
    data = actshuffle.open_dataset(acts)
    return data.read("token", 0, ROWS), data.read("document", 0, ROWS)


# --- Selection ----------------------------------------------------------------------------------


def selected(pre: np.ndarray, k: int, lower: bool = True) -> list[tuple[int, int, float]]:
    """The k largest of each row, if positive, by a plain sort; of equal ones the lower columns, or the higher ones."""
    found = []
    for row, values in enumerate(pre):
        column = np.arange(len(values))
        best = np.lexsort((column if lower else -column, -values))[:k]
        found += [(row, c, float(values[c])) for c in sorted(best.tolist()) if values[c] > 0]
    return found


@pytest.mark.parametrize("k", [1, 5, 12, 48, 96, 200])
def test_the_selection_is_that_of_a_plain_sort(k):
    pre = torch.randint(-3, 6, (30, 96), generator=torch.Generator().manual_seed(k)).float()
    pre[3] = -1.0
    pre[4, 7:] = 0.0
    found = list(zip(*(array.tolist() for array in largest(pre, k)), strict=True))
    assert found == selected(pre.numpy(), k)
    assert k > 48 or found != selected(pre.numpy(), k, lower=False), "no ties were cut"


# --- Statistics ---------------------------------------------------------------------------------


def test_the_case_has_dead_dense_and_equal_latents(case):
    _, dense = case
    counts = (dense > 0).sum(axis=0)
    assert counts[3] == counts[7] == 0
    assert counts.max() > 0.15 * ROWS
    assert np.sort(counts)[4] > 0


def test_moments(case):
    features, dense = case
    for latent in range(LATENTS):
        rows = np.flatnonzero(dense[:, latent])
        values, f = dense[rows, latent], features[latent]
        assert f.count == len(rows)
        for power in (1, 2, 3, 4):
            total = 0.0
            for value in values.astype(np.float64):
                term = value
                for _ in range(power - 1):
                    term = term * value
                total += term
            assert f.array(f"stat/sum{power if power > 1 else ''}").item() == total
        if len(rows):
            assert f.min == values.min()
            assert f.max == values.max()
            assert f.array("stat/max_row") == rows[np.argmax(values)]
            assert f.mean == pytest.approx(values.mean(), rel=1e-6)
            assert f.std == pytest.approx(values.std(), rel=1e-4, abs=1e-4)
        else:
            assert math.isnan(f.min)
            assert math.isnan(f.max)
            assert f.array("stat/max_row") == -1
            assert f.is_dead


def test_density_with_documents_as_clusters(case, acts):
    features, dense = case
    _, document = columns(acts)
    names = np.unique(document)
    for latent in range(LATENTS):
        active = dense[:, latent] > 0
        inside = np.array([active[document == d].sum() for d in names])
        sizes = np.array([(document == d).sum() for d in names])
        f, p = features[latent], active.mean()
        assert f.documents == (inside > 0).sum()
        assert f.density.value == p
        assert f.density.low <= p <= f.density.high
        if 0 < p < 1:
            d = len(names)
            variance = d / (d - 1) * ((inside - p * sizes) ** 2).sum() / ROWS**2
            n, z = min(p * (1 - p) / variance, ROWS), 1.959963984540054
            centre, half = p + z * z / 2 / n, z * math.sqrt(p * (1 - p) / n + z * z / 4 / n / n)
            assert f.density.low == pytest.approx((centre - half) / (1 + z * z / n), rel=1e-9)
            assert f.density.high == pytest.approx((centre + half) / (1 + z * z / n), rel=1e-9)
        else:
            assert f.density.low == 0.0
            assert f.density.high == pytest.approx(z2() / (len(names) + z2()))


def z2() -> float:
    return 1.959963984540054**2


def test_histogram(case):
    features, dense = case
    for latent in range(LATENTS):
        values = dense[dense[:, latent] > 0, latent]
        edges, counts = features[latent].histogram
        assert counts.sum() == len(values)
        if not len(values):
            continue
        assert np.all(np.diff(edges) > 0)
        assert edges[-2] <= values.max() < edges[-1]
        assert len(counts) == HISTOGRAM_BINS
        assert edges[0] * 2**16 == edges[-1]
        assert np.allclose((edges[1:] / edges[:-1]).reshape(-1, 4).prod(axis=1), 2)
        due = [int(((values >= a) & (values < b)).sum()) for a, b in pairwise(edges)]
        due[0] += int((values < edges[0]).sum())
        assert counts.tolist() == due


def test_quantiles(case):
    features, dense = case
    for latent in range(LATENTS):
        values = np.sort(dense[dense[:, latent] > 0, latent])
        for q, found in features[latent].quantiles.items():
            if len(values):
                assert found == np.quantile(values, q, method="inverted_cdf")
            else:
                assert math.isnan(found)
    assert tuple(features[0].quantiles) == QUANTILES


def test_positions(case, acts):
    features, dense = case
    _, document = columns(acts)
    start = {d: int(np.flatnonzero(document == d)[0]) for d in np.unique(document)}
    for latent in range(LATENTS):
        due = [0] * 16
        for row in np.flatnonzero(dense[:, latent]):
            due[int(row - start[document[row]] + 1).bit_length() - 1] += 1
        assert features[latent].by_position.tolist() == due


def test_top_tokens(case, acts):
    features, dense = case
    token, _ = columns(acts)
    for latent in range(LATENTS):
        rows = np.flatnonzero(dense[:, latent])
        count = {int(t): int((token[rows] == t).sum()) for t in np.unique(token[rows])}
        due = sorted(count.items(), key=lambda x: (-x[1], x[0]))[:16]
        found = features[latent].top_tokens
        assert [(t.id, t.times) for t in found] == due
        for t in found:
            assert t.mean == pytest.approx(dense[rows[token[rows] == t.id], latent].mean(dtype=np.float64), rel=1e-6)


# --- Examples -----------------------------------------------------------------------------------


def mix(latent: int) -> int:
    """SplitMix64's output function, in Python's integers."""
    return finalized((latent + 1) * 0x9E3779B97F4A7C15 % 2**64)


def finalized(z: int) -> int:
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def slots_of(f: Any, kind: str) -> list[int]:
    first, end = f.features.kinds[kind]
    rows = f.array("example/row")[first:end].tolist()
    assert -1 not in rows[: len([r for r in rows if r >= 0])], "empty slots come last"
    return [r for r in rows if r >= 0]


def test_top_examples(case, acts):
    features, dense = case
    _, document = columns(acts)
    for latent in range(LATENTS):
        largest: dict[tuple[int, int], int] = {}
        for row in np.flatnonzero(dense[:, latent]):
            start = int(np.flatnonzero(document == document[row])[0])
            window = int(document[row]), (int(row) - start) // 128
            if window not in largest or dense[row, latent] > dense[largest[window], latent]:
                largest[window] = int(row)
        due = sorted(largest.values(), key=lambda r: (-dense[r, latent], r))[: SLOTS.top]
        assert slots_of(features[latent], "top") == due


def parts(values: np.ndarray) -> dict[str, np.ndarray]:
    """Mask of each interval's activations."""
    found, n = {}, SLOTS.intervals
    for i in range(n):
        low, high = (values.max().astype(np.float64) * j / n for j in (i, i + 1))
        found[f"interval {i + 1}"] = (values > low) & (values <= high)
    edges = [-np.inf, *(np.quantile(values, i / n, method="inverted_cdf") for i in range(1, n)), np.inf]
    for i in range(n):
        found[f"part {i + 1}"] = (values > edges[i]) & (values <= edges[i + 1])
    found["random"] = np.ones(len(values), bool)
    return found


def test_samples_are_those_of_smallest_priority(case):
    features, dense = case
    words = [int(word) for word in actshuffle.priorities(SEED, 0, ROWS)]
    full = 0
    for latent in range(LATENTS):
        rows = np.flatnonzero(dense[:, latent])
        if not len(rows):
            assert all(not slots_of(features[latent], kind) for kind in features.kinds if kind != "quiet")
            continue
        for kind, inside in parts(dense[rows, latent]).items():
            due = sorted(rows[inside].tolist(), key=lambda r: finalized(words[r] ^ mix(latent)))
            first, end = features.kinds[kind]
            assert slots_of(features[latent], kind) == due[: end - first], kind
            full += len(due) > end - first
    assert full > LATENTS


def test_quiet_rows(case):
    features, dense = case
    words = actshuffle.priorities(SEED, 0, ROWS)
    pool = np.argsort(words, kind="stable").tolist()
    for latent in range(LATENTS):
        begin = mix(latent) % len(pool)
        order = pool[begin:] + pool[:begin]
        assert slots_of(features[latent], "quiet") == [r for r in order if not dense[r, latent]][: SLOTS.quiet]


def test_contexts(case, acts):
    features, dense = case
    token, document = columns(acts)
    seen = 0
    for latent in range(LATENTS):
        for kind in features.kinds:
            for example in features[latent].examples(kind):
                row = example.row
                near = [r for r in range(max(row - 48, 0), min(row + 25, ROWS)) if document[r] == document[row]]
                active = [r for r in near if dense[r, latent]]
                kept = sorted(active, key=lambda r: (-dense[r, latent], r))[:CONTEXT]
                due = [dense[r, latent] if r in kept or r == row else 0 for r in near]
                assert example.tokens == tuple(token[near])
                assert example.at == near.index(row)
                assert example.activations.tolist() == due
                assert example.value == dense[row, latent]
                assert example.document == document[row]
                seen += len(active) > CONTEXT
    assert seen


def test_the_oracle_agrees_with_encode(built, acts):
    """The dense activations are those of the dictionary's own `encode`, but for rounding."""
    x = actshuffle.open_dataset(acts).read("x", 0, ROWS)
    for kind in KINDS:
        _, found, where = built[kind]
        due = saetrain.load(where).encode(torch.from_numpy(x)).numpy()
        assert np.abs(found - due).max() < 1e-4
        assert (found > 0).sum() == (due > 0).sum()


# --- Latents that are active together -----------------------------------------------------------


def test_latents_active_together(case, acts):
    """On all rows, which are fewer than the sample would hold."""
    features, dense = case
    _, document = columns(acts)
    on, n = dense > 0, on_rows(dense)
    some = 0
    for f in range(LATENTS):
        score = {}
        for g in range(LATENTS):
            both = int((on[:, f] & on[:, g]).sum())
            if g != f and both and both * ROWS > n[f] * n[g]:
                score[g] = math.log2(both * ROWS / (n[f] * n[g])) * math.sqrt(both)
        found = features[f].together
        assert len(found) == min(len(score), 16)
        least = min((score[c.latent] for c in found), default=0)
        assert all(s <= least + 1e-9 for g, s in score.items() if g not in {c.latent for c in found})
        assert [score[c.latent] for c in found] == sorted((score[c.latent] for c in found), reverse=True)
        for c in found:
            both = int((on[:, f] & on[:, c.latent]).sum())
            assert c.times == both
            assert c.expected == pytest.approx(n[f] * n[c.latent] / ROWS, rel=1e-6)
            assert c.share.value == pytest.approx(both / n[f], rel=1e-6)
            inside = {d: on[document == d, f].sum() for d in np.unique(document[on[:, f]])}
            if len(inside) > 1 and both < n[f]:
                p, d = both / n[f], len(inside)
                spread = sum(
                    ((on[document == k, f] & on[document == k, c.latent]).sum() - p * v) ** 2 for k, v in inside.items()
                )
                variance = d / (d - 1) * spread / n[f] ** 2
                worth = min(p * (1 - p) / variance, n[f]) if variance else n[f]
                centre, half = p + z2() / 2 / worth, math.sqrt(z2() * (p * (1 - p) / worth + z2() / 4 / worth**2))
                assert c.share.low == pytest.approx((centre - half) / (1 + z2() / worth), rel=1e-5, abs=1e-6)
                assert c.share.high == pytest.approx((centre + half) / (1 + z2() / worth), rel=1e-5)
                some += 1
    assert some > 20


def on_rows(dense: np.ndarray) -> list[int]:
    return [int(n) for n in (dense > 0).sum(axis=0)]


def test_hard_quiet_rows(case):
    """Sampled rows of the nearest latents on which the latent is quiet, in the order of both, each once."""
    features, dense = case
    found = 0
    for latent in range(LATENTS):
        f, due = features[latent], []
        for other in f.neighbours:
            for row in slots_of(features[other.latent], "random"):
                if not dense[row, latent] and row not in [r for r, _ in due]:
                    due.append((row, other.latent))
        due = due[:10]
        held = [(r, g) for r, g in zip(f.array("hard/row").tolist(), f.array("hard/latent").tolist(), strict=True)]
        assert held == due + [(-1, -1)] * (10 - len(due))
        examples = f.examples("hard")
        assert [e.row for e in examples] == [r for r, _ in due]
        assert all(e.value == 0 and e.tokens for e in examples)
        found += len(due)
    assert found > 5 * LATENTS
