"""Quality: uniform batches pass, clumped and too even ones fail, from stores, loaders and any pipeline."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actshuffle.checking.qualityreport import QualityReport
from actshuffle.checking.scores import _averages, quality
from actshuffle.errors import IncompleteStoreError, RequestError, SourceError
from actshuffle.loading.dataset import open_dataset, write_view
from actshuffle.loading.loader import Loader
from support.finished import collection, finish
from support.runs import run
from support.stores import group

ROWS, BATCH = 30_000, 256


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A store in document order, documents of uneven length, and its shuffle."""
    folder = tmp_path_factory.mktemp("quality")
    rng = np.random.default_rng(4)
    document = np.repeat(np.arange(ROWS), rng.geometric(1 / 40, ROWS))[:ROWS]
    counts = np.bincount(document)
    position = np.concatenate([np.arange(c) for c in counts])
    arrays = {"data": np.arange(ROWS, dtype="<f4"), "document": document, "position": position}
    group(folder / "c", arrays, chunks=(500,))
    finish(folder / "c", ROWS, list(arrays))
    run(folder / "c", folder / "s", chunk_rows=1000)
    return folder / "c", folder / "s"


def measure(report: QualityReport, name: str) -> Any:
    return next(m for m in report.measures if m.name.startswith(name))


def test_a_shuffled_store_passes(stores: tuple[Path, Path]) -> None:
    report = quality(stores[1], BATCH)
    assert report.passed, str(report)
    assert report.mixing is not None
    assert report.provenance == "'source_row'"
    assert abs(report.coverage - 1) < 0.01
    assert (report.rows, report.batches) == (ROWS, ROWS // BATCH)


def test_a_store_in_document_order_fails(stores: tuple[Path, Path]) -> None:
    report = quality(stores[0], BATCH)
    assert not report.passed
    assert report.coverage < 0.1
    assert measure(report, "neighbours").found > 0.9
    assert report.mixing is not None
    assert not report.mixing.passed
    assert report.provenance == "'document' and 'position'"
    assert "FAIL: a batch holds" in report.verdict()


def test_more_buffer_is_better_and_all_of_it_is_enough(stores: tuple[Path, Path]) -> None:
    found = [quality(Loader(stores[0], BATCH, buffer_rows=n)) for n in (300, 3000, ROWS)]
    assert found[0].coverage < found[1].coverage < 0.95
    assert [r.passed for r in found] == [False, False, True], str(found[2])


def test_later_epochs_of_a_shuffled_store_pass(stores: tuple[Path, Path]) -> None:
    assert quality(Loader(stores[1], BATCH), epoch=3).passed


def test_a_view_is_tested_by_the_ranks_of_its_rows(stores: tuple[Path, Path], tmp_path: Path) -> None:
    view = write_view(tmp_path / "v", stores[1], 3000, 25_000)
    report = quality(view, BATCH)
    assert report.passed, str(report)
    assert report.mixing is not None


def _pipeline(order: np.ndarray, document: np.ndarray, **fields: np.ndarray) -> Iterator[dict[str, np.ndarray]]:
    for a in range(0, ROWS, BATCH):
        rows = order[a : a + BATCH]
        yield {"document": document[rows], **{k: v[rows] for k, v in fields.items()}}


def test_any_pipeline_can_be_scored(stores: tuple[Path, Path]) -> None:
    document = open_dataset(stores[0]).read("document", 0, ROWS)
    rng = np.random.default_rng(8)
    uniform = quality(_pipeline(rng.permutation(ROWS), document, source_row=np.arange(ROWS)))
    assert uniform.passed, str(uniform)
    assert uniform.mixing is not None
    # Many pipelines do this: documents in random order, and a buffer of some of them.
    buffered = np.concatenate([rng.permutation(part) for part in np.array_split(np.arange(ROWS), 20)])
    found = quality(_pipeline(buffered, document))
    assert not found.passed
    assert found.mixing is None
    assert found.coverage < 0.7
    blocks = quality(
        {"source_row": b["source_row"]} for b in _pipeline(rng.permutation(ROWS), document, source_row=np.arange(ROWS))
    )
    assert blocks.passed
    assert "blocks of 128" in blocks.grouping


def test_a_loader_or_its_batches_are_scored_alike(stores: tuple[Path, Path]) -> None:
    for path, settings in ((stores[1], {}), (stores[0], {"buffer_rows": 2000})):
        loader = Loader(path, BATCH, **settings)  # type: ignore[arg-type]
        assert quality(loader).measures == quality(iter(loader)).measures


def test_batches_of_tensors(stores: tuple[Path, Path]) -> None:
    data = pytest.importorskip("torch.utils.data")
    loader = Loader(stores[1], BATCH, fields=["document", "source_row"])
    assert quality(data.DataLoader(loader.torch(), batch_size=None)).passed


def test_too_even_batches_fail_too(stores: tuple[Path, Path]) -> None:
    """Every batch a slice through all documents: more of them than chance would give."""
    document = open_dataset(stores[0]).read("document", 0, ROWS)
    whole = ROWS // BATCH * BATCH
    dealt = np.arange(whole).reshape(BATCH, -1).T.reshape(-1)
    order = np.concatenate([dealt, np.arange(whole, ROWS)])
    report = quality(_pipeline(order, document))
    assert not report.passed
    assert measure(report, "documents").direction == "too many"
    assert report.coverage > 1


def test_uniform_orders_rarely_fail() -> None:
    """The false alarms of 80 uniform orders at 5 % are 11 at most: more would be rarer than 1 in 1000."""
    rng, alarms = np.random.default_rng(2), 0
    document = np.arange(2000) // 8
    for seed in range(80):
        order = rng.permutation(2000)
        batches = ({"document": document[order[a : a + 100]]} for a in range(0, 2000, 100))
        report = quality(batches, alpha=0.05, seed=seed)
        alarms += bool(report.rejected)
    assert alarms <= 11


def test_what_a_batch_holds_is_counted_right() -> None:
    coverage, entropy, neighbours = _averages(np.array([[3, 3, 1, 2], [5, 5, 5, 5]]))
    assert coverage == 2.0
    assert entropy == pytest.approx((1.5 + 0) / 2)
    assert neighbours == pytest.approx(4 / 6)


def test_rows_that_are_their_own_documents(tmp_path: Path) -> None:
    """Every batch of every order has as many documents as rows: nothing to test, nothing to reject."""
    group(tmp_path / "c", {"document": np.arange(5000)}, chunks=(100,))
    finish(tmp_path / "c", 5000, ["document"])
    report = quality(tmp_path / "c", 100)
    assert measure(report, "documents").p_value == 1
    assert report.mixing is not None
    assert not report.passed
    assert report.verdict() == "FAIL: the order is not that of a uniform shuffle"


def test_it_shows_itself(stores: tuple[Path, Path]) -> None:
    for path in stores:
        report = quality(path, BATCH)
        assert "sigmas" in str(report)
        assert "<table" in report._repr_html_()
        body = json.loads(json.dumps(report.as_dict(), allow_nan=False))
        assert body["passed"] == report.passed


def test_bad_input_is_refused(stores: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no such"):
        quality(tmp_path / "nowhere")
    with pytest.raises(RequestError, match="two are needed"):
        quality(stores[1], 20_000)
    with pytest.raises(RequestError, match="two are needed"):
        quality(iter([]))
    with pytest.raises(RequestError, match=r"these have \['data'\]"):
        quality(iter([{"data": np.zeros(5)}]))
    with pytest.raises(RequestError, match="unequal size"):
        quality(iter([{"document": np.zeros(n)} for n in (5, 4, 5)]))
    with pytest.raises(RequestError, match="differ in which fields"):
        quality(iter([{"document": np.zeros(5)}, {"source_row": np.zeros(5)}]))
    with pytest.raises(RequestError, match="not one integer a row"):
        quality(stores[1], BATCH, documents="data")
    with pytest.raises(RequestError, match="no array named 'nope'"):
        quality(stores[1], BATCH, documents="nope")
    bare = collection(tmp_path / "c", 1000)
    run(bare, tmp_path / "b", fields=("data",), source_row=False)
    with pytest.raises(RequestError, match="nothing tells its rows apart"):
        quality(tmp_path / "b", 100)
    (tmp_path / "b" / "_actshuffle" / "zarr.json").unlink()
    with pytest.raises(IncompleteStoreError):
        quality(tmp_path / "b", 100)
