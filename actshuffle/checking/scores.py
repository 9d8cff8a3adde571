"""The view of a training step: how well the batches of a store, a loader or any pipeline are mixed.

A batch of a uniform shuffle is a uniform sample without replacement.  So for batches spread over the
epoch: how many documents does a batch hold (*coverage*), how evenly (*entropy*, in bits), and how often
are two rows next to each other of one document (*neighbours*)?  The same is measured of simulated
uniform shuffles of the same documents, and the difference is given in their standard deviations.  Two
sided: batches that are more even than chance are no random samples either.

Then the order itself goes through the tests of `actshuffle.ordering.mixing`, as far as rows say where they came
from: by ``source_row``, else by document and position, else a stored row is its own source.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actshuffle.arrays.names import SOURCE_ROW
from actshuffle.arraytypes import I64
from actshuffle.checking.qualityreport import Measure, QualityReport
from actshuffle.errors import RequestError
from actshuffle.loading.columns import widest
from actshuffle.loading.dataset import Dataset, open_finished_or_plain
from actshuffle.loading.loader import Loader
from actshuffle.ordering.mixing import report
from actshuffle.units import counted

SCORED_ROWS = 1 << 18  # of batches spread over the epoch
SIMULATED = 100  # shuffles
BLOCK = 128  # source rows that stand in for a document where there are none
DOCUMENTS = "document"  # what that array is usually called; where it is not there, blocks will do
MOST_ROWS = 1 << 26  # whose provenance is held in memory, about 40 bytes a row


def quality(
    source: str | Path | Dataset | Loader | Iterable[Mapping[str, Any]],
    batch_size: int = 4096,
    *,
    documents: str = DOCUMENTS,
    positions: str = "position",
    epoch: int = 0,
    alpha: float = 0.01,
    seed: int = 0,
    incomplete: bool = False,
    storage_options: dict[str, Any] | None = None,
) -> QualityReport:
    """Score the batches that something yields against those of a uniform shuffle.

    ``source`` is a store, whose rows are taken in stored order, ``batch_size`` at a time; a `Loader`,
    by its own batches of one ``epoch`` over all ranks (no row data is read); or any iterable of batches,
    each a dict with ``documents``, or with ``source_row``, which is read to its end: what passes by
    counts as the whole population.

    Without an array named ``documents``, blocks of 128 source rows stand in.  ``seed`` is of the
    simulation.

    Raises
    ------
    RequestError : there is nothing to tell rows apart by, or less than two batches.
    """
    if isinstance(source, str | Path | Dataset):
        dataset = open_finished_or_plain(source, incomplete=incomplete, storage_options=storage_options)
        source = Loader(dataset, batch_size, buffer_rows=None if dataset.shuffled else 0)
        what = dataset.path
    elif isinstance(source, Loader):
        what = ", ".join(d.path for d in source.datasets.values())
        if source.order.buffer_rows:
            what += f", through a buffer of {counted(source.order.buffer_rows, 'row')}"
    else:
        if not isinstance(source, Iterable) or isinstance(source, bytes):
            raise RequestError(f"quality takes a store, a Loader or batches, got {type(source).__name__}")
        return _of_batches(source, documents, positions, alpha, seed)
    return _of_loader(source, what, documents, positions, epoch, alpha, seed)


def _of_loader(
    loader: Loader, what: str, documents: str, positions: str, epoch: int, alpha: float, seed: int
) -> QualityReport:
    dataset = next((d for d in loader.datasets.values() if documents in d.fields), None)
    grouped = dataset is not None
    if not grouped and documents != DOCUMENTS:
        known = sorted({name for d in loader.datasets.values() for name in d.fields})
        raise RequestError(f"no array named {documents!r}; there are {known}")
    dataset = dataset or next(iter(loader.datasets.values()))
    if loader.rows > MOST_ROWS:
        raise RequestError(
            f"{counted(loader.rows, 'row')}; quality holds what is known of {MOST_ROWS:,} at most: take a view"
        )
    origin, provenance, notes = _origin(dataset, documents, positions)
    if grouped:
        groups, grouping = _compact(_integers(dataset, documents)), f"{documents!r}"
    elif provenance == "row number" and dataset.shuffled:
        raise RequestError(f"{dataset.path} has neither {documents!r} nor {SOURCE_ROW!r}: nothing tells its rows apart")
    else:
        groups, grouping = origin // BLOCK, f"blocks of {BLOCK} source rows"
    batch = loader.batch_size
    scored = [groups[loader.order.rows_at(epoch, a, a + batch)] for a in _spread(loader.rows, batch)]
    mixing = None
    if not (provenance == "row number" and dataset.shuffled):
        order = origin[loader.order.rows_at(epoch, 0, loader.rows)]
        chunk = widest([dataset]).object_rows
        mixing = report(order, src_chunk_rows=chunk, dst_chunk_rows=batch, alpha=alpha)
    return _report(what, scored, groups, grouping, seed, mixing=mixing, provenance=provenance, alpha=alpha, notes=notes)


def _of_batches(
    batches: Iterable[Mapping[str, Any]], documents: str, positions: str, alpha: float, seed: int
) -> QualityReport:
    found: dict[str, list[NDArray[Any]]] = {}
    sizes: list[int] = []
    for batch in batches:
        known = {k: np.asarray(batch[k]).reshape(-1) for k in (documents, positions, SOURCE_ROW) if k in batch}
        if documents not in known and SOURCE_ROW not in known:
            raise RequestError(
                f"batches need {documents!r} or {SOURCE_ROW!r} to be told apart; these have {sorted(batch)}"
            )
        for name, values in known.items():
            found.setdefault(name, []).append(values)
        sizes.append(len(next(iter(known.values()))))
    whole = {name: np.concatenate(parts) for name, parts in found.items()}
    rows, size = sum(sizes), max(sizes, default=0)
    if any(len(values) != rows for values in whole.values()):
        raise RequestError("batches differ in which fields they have")
    if any(s != size for s in sizes[:-1]):
        raise RequestError(f"batches of unequal size ({min(sizes):,} to {counted(size, 'row')}) cannot be compared")
    starts = _spread(rows, max(1, size))
    origin, provenance = _ranked(whole, documents, positions)
    if documents in whole:
        groups, grouping = _compact(whole[documents]), f"{documents!r}"
    else:
        groups, grouping = origin // BLOCK, f"blocks of {BLOCK} source rows"
    scored = [groups[a : a + size] for a in starts]
    mixing = None
    if provenance != "row number":
        mixing = report(origin, src_chunk_rows=min(rows, 1 << 15), dst_chunk_rows=size, alpha=alpha)
    notes = ("the population is what passed by",)
    return _report(
        "batches", scored, groups, grouping, seed, mixing=mixing, provenance=provenance, alpha=alpha, notes=notes
    )


def _report(what: str, scored: list[I64], groups: I64, grouping: str, seed: int, **found: Any) -> QualityReport:
    """The report of some batches, given by the group of each row, beside the groups of all rows."""
    return QualityReport(
        what=what,
        rows=len(groups),
        batch_size=len(scored[0]),
        batches=len(scored),
        grouping=grouping,
        documents=int(groups.max()) + 1,
        measures=_measures(np.stack(scored), np.bincount(groups), seed),
        **found,
    )


# --- Where rows came from -----------------------------------------------------------------------


def _origin(dataset: Dataset, documents: str, positions: str) -> tuple[I64, str, tuple[str, ...]]:
    """The place of every stored row in the source's order, by what the store knows."""
    names = [n for n in (SOURCE_ROW, documents, positions) if n in dataset.fields]
    if SOURCE_ROW not in names and {documents, positions} - set(names):
        notes = () if dataset.shuffled else ("the store is in the order in which it was made",)
        return np.arange(dataset.rows), "row number", notes
    known = {n: _integers(dataset, n) for n in (names[:1] if SOURCE_ROW in names else names)}
    return *_ranked(known, documents, positions), ()


def _ranked(known: Mapping[str, NDArray[Any]], documents: str, positions: str) -> tuple[I64, str]:
    """Ranks 0 .. n - 1 of rows in source order.  Of a part of a source these are what can be tested."""
    if SOURCE_ROW in known:
        order, by = np.argsort(known[SOURCE_ROW], kind="stable"), f"{SOURCE_ROW!r}"
    elif documents in known and positions in known:
        order = np.lexsort((known[positions], known[documents]))
        by = f"{documents!r} and {positions!r}"
    else:
        return np.arange(len(next(iter(known.values()), ()))), "row number"
    ranks = np.empty(len(order), np.int64)
    ranks[order] = np.arange(len(order))
    return ranks, by


def _integers(dataset: Dataset, name: str) -> NDArray[Any]:
    info = dataset.fields[name]
    if info.row_shape or info.bfloat16 or info.dtype.kind not in "iu":
        raise RequestError(f"{name!r} of {dataset.path} is {info.dtype_name} {info.row_shape}, not one integer a row")
    return dataset.read(name, 0, dataset.rows)


def _compact(values: NDArray[Any]) -> I64:
    """Documents numbered 0, 1, ..."""
    return np.unique(values, return_inverse=True)[1].astype(np.int64)


def _spread(rows: int, batch: int) -> list[int]:
    """Starts of whole batches, spread evenly over the epoch."""
    whole = rows // batch
    if whole < 2:
        raise RequestError(
            f"{counted(rows, 'row')} hold {whole} whole batch{'es' * (whole != 1)} of {batch:,}, and two are needed"
            + (f": give --batch-size {rows // 2} or less" if rows > 1 else "")
        )
    count = min(whole, max(2, SCORED_ROWS // batch))
    return [whole * i // count * batch for i in range(count)]


# --- The content of a batch ----------------------------------------------------------------------

_NAMES = (
    ("documents", ("too few", "too many")),
    ("entropy over documents (bits)", ("too clumped", "too balanced")),
    ("neighbours of one document (share)", ("too balanced", "too clumped")),
)


def _measures(scored: I64, sizes: I64, seed: int) -> tuple[Measure, ...]:
    """The averages over batches, beside those of simulated samples of as many rows."""
    rng, rows = np.random.default_rng(seed), int(sizes.sum())
    edges = np.cumsum(sizes)
    found = _averages(scored)
    samples = (rng.choice(rows, scored.size, replace=False) for _ in range(SIMULATED))
    simulated = np.array(
        [_averages(np.searchsorted(edges, rows_of, side="right").reshape(scored.shape)) for rows_of in samples]
    )
    measures = []
    for (name, words), value, others in zip(_NAMES, found, simulated.T, strict=True):
        mean, sd = float(others.mean()), float(others.std(ddof=1)) * math.sqrt(1 + 1 / SIMULATED)
        if sd <= 1e-12 * max(1.0, abs(mean)):  # the same in every sample
            mean, sd = (value, 0.0) if math.isclose(value, mean, rel_tol=1e-9) else (mean, 0.0)
        p = _two_sided((value - mean) / sd) if sd else float(value == mean)
        measures.append(Measure(name, float(value), mean, sd, p, words[value > mean]))
    return tuple(measures)


def _averages(groups: I64) -> tuple[float, float, float]:
    """Coverage, entropy and share of equal neighbours, averaged over batches (the rows of ``groups``)."""
    batches, size = groups.shape
    neighbours = float(np.mean(groups[:, 1:] == groups[:, :-1])) if size > 1 else 0.0
    ordered = np.sort(groups, axis=1)
    first = np.ones(groups.shape, bool)
    first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    starts = np.flatnonzero(first)  # no run goes from one batch into the next
    counts = np.diff(np.append(starts, groups.size))
    entropy = math.log2(size) - float((counts * np.log2(counts)).sum()) / groups.size
    return len(starts) / batches, entropy, neighbours


def _two_sided(t: float) -> float:
    """By Student's law with SIMULATED - 1 degrees of freedom (Abramowitz and Stegun 26.7.8)."""
    nu = SIMULATED - 1
    z = abs(t) * (1 - 1 / (4 * nu)) / math.sqrt(1 + t * t / (2 * nu))
    return math.erfc(z / math.sqrt(2))
