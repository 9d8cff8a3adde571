"""Stores joined or grown keep their documents apart: by document they equal what collecting all at once gives."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from click.testing import CliRunner

from actshuffle import append, came_from, concat, head, quality, shuffle, verify
from actshuffle.arrays import virtual
from actshuffle.checking.contents import info, info_text
from actshuffle.cli.app import main
from actshuffle.errors import RequestError
from actshuffle.storage.place import as_place
from support.stores import files, group, values

LENGTHS = [40, 3, 25, 1, 60, 17, 9, 30, 44, 2, 35, 51]  # of documents, in rows
PARTS = ((0, 5), (5, 9), (9, 12))  # documents of three stores
N = sum(LENGTHS)
DOCUMENT = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
POSITION = np.concatenate([np.arange(n) for n in LENGTHS])
FIELDS = {"act": values(N, (4,)), "token": values(N, (), "<i4", seed=2), "position": POSITION.astype("<i4")}


def store(path: Path, first: int, stop: int, dtype: str = "<i4", name: str = "document", listed: str = "files") -> Path:
    """Documents ``[first, stop)`` collected by themselves, so that their numbers begin at 0."""
    rows = slice(int(np.searchsorted(DOCUMENT, first)), int(np.searchsorted(DOCUMENT, stop)))
    fields = {k: data[rows] for k, data in FIELDS.items()} | {name: (DOCUMENT[rows] - first).astype(dtype)}
    group(path, fields)
    names = [f"{i}.txt" for i in range(first, stop)]
    entries = [{"file": n, "first": i, "count": 1} for i, n in enumerate(names)]
    if listed:
        zarr.open_group(path, mode="r+").attrs["documents"] = entries if listed == "files" else names
    return path


@pytest.fixture
def made(tmp_path: Path) -> Path:
    for name, part in zip(("a", "b", "c"), PARTS, strict=True):
        store(tmp_path / name, *part)
    store(tmp_path / "all", 0, len(LENGTHS))
    shuffle(tmp_path / "all", tmp_path / "all-shuffled", seed=3, chunk_rows=50)
    shuffle(tmp_path / "a", tmp_path / "s", seed=3, chunk_rows=50)
    return tmp_path


def sources_in(path: Path) -> list[Any]:
    marker = json.loads((path / "_actshuffle/zarr.json").read_text())["attributes"]["actshuffle"]
    return [marker["parts"], marker["source_identity"], marker["fields"]]


def column(path: Path, name: str = "document") -> np.ndarray:
    return np.asarray(zarr.open_group(path, mode="r")[name][:])


def test_figures_of_a_grown_store_equal_those_of_collecting_all_at_once(made: Path) -> None:
    grown, whole = made / "s", made / "all-shuffled"
    append(grown, made / "b")
    append(grown, made / "c")
    for name in (*FIELDS, "document", "source_row"):
        assert column(grown, name).tobytes() == column(whole, name).tobytes(), name
    assert np.bincount(column(grown)).tolist() == LENGTHS
    ours, theirs = (quality(path, 32).as_dict() for path in (grown, whole))
    assert ours.pop("what") != theirs.pop("what")
    assert ours == theirs
    attributes = [zarr.open_group(path, mode="r").attrs.asdict()["documents"] for path in (grown, whole)]
    assert attributes[0] == attributes[1]
    for ours_, theirs_ in zip(came_from(grown, range(0, N, 5)), came_from(whole, range(0, N, 5)), strict=True):
        for what in ("document", "document_name", "position", "tokens", "source_row"):
            assert getattr(ours_, what) == getattr(theirs_, what), what
        assert type(ours_.document) is int
        assert ours_.document_name == f"{DOCUMENT[ours_.source_row]}.txt"


def test_without_numbering_on_documents_collide_and_figures_differ(made: Path) -> None:
    append(made / "s", made / "b", made / "collided", renumber=False)
    append(made / "s", made / "b", made / "apart")
    counts = [len(np.unique(column(made / name))) for name in ("collided", "apart")]
    assert counts == [5, 9]
    entropies = [quality(made / name, 32).as_dict()["measures"] for name in ("collided", "apart")]
    assert entropies[0] != entropies[1]


def test_origins_are_the_same_when_the_sources_are_gone(made: Path) -> None:
    append(made / "s", made / "b")
    before = came_from(made / "s", range(0, 200, 3))
    assert {origin.source for origin in before} == {str(made / "a"), str(made / "b")}
    shutil.rmtree(made / "a")
    shutil.rmtree(made / "b")
    assert came_from(made / "s", range(0, 200, 3)) == before


@pytest.mark.parametrize("listed", ["names", ""])
def test_however_they_are_joined_the_bytes_are_the_same(tmp_path: Path, listed: str) -> None:
    a, b, c = (store(tmp_path / n, *p, listed=listed) for n, p in zip("abc", PARTS, strict=True))
    concat([a, b, c], tmp_path / "flat")
    concat([a, b], tmp_path / "inner")
    concat([tmp_path / "inner", c], tmp_path / "nested")
    shuffle(a, tmp_path / "s", seed=3, chunk_rows=50)
    append(tmp_path / "s", b)
    append(tmp_path / "s", c)
    concat([b, c], tmp_path / "new")
    shuffle(a, tmp_path / "t", seed=3, chunk_rows=50)
    append(tmp_path / "t", tmp_path / "new")
    for name in ("flat", "nested"):
        shuffle(tmp_path / name, tmp_path / f"{name}-shuffled", seed=3, chunk_rows=50)
        assert verify(tmp_path / name, tmp_path / "s").ok
    expected, sources = files(tmp_path / "flat-shuffled"), sources_in(tmp_path / "flat-shuffled")
    for name in ("nested-shuffled", "s", "t"):
        assert files(tmp_path / name) == expected
        assert sources_in(tmp_path / name) == sources
    assert column(tmp_path / "s").tobytes() == DOCUMENT[column(tmp_path / "s", "source_row")].astype("<i4").tobytes()


def test_documents_without_rows_keep_their_numbers(made: Path) -> None:
    last = store(made / "short", 0, 4)  # the files of five documents, of which the last has no row
    zarr.open_group(last, mode="r+").attrs["documents"] = [
        {"file": f"{i}.txt", "first": i, "count": 1} for i in range(5)
    ]
    concat([last, made / "b"], made / "both")
    shuffle(made / "both", made / "both-shuffled", seed=1)
    assert np.unique(column(made / "both-shuffled")).tolist() == [0, 1, 2, 3, 5, 6, 7, 8]
    assert {o.document_name for o in came_from(made / "both-shuffled", range(60)) if o.document == 5} == {"5.txt"}


def test_parts_of_stores_and_other_names_and_types(made: Path) -> None:
    for dtype, name in (("<u2", "doc_id"), (">i8", "documents"), ("<u8", "doc_ids"), ("|i1", "doc")):
        folder = made / name
        folder.mkdir()
        a, b = (store(folder / n, *p, dtype=dtype, name=name) for n, p in zip("ab", PARTS, strict=False))
        concat([a, b], folder / "both")
        shuffle(folder / "both", folder / "s", seed=3, chunk_rows=50)
        rows = column(folder / "s", "source_row")
        assert column(folder / "s", name).tolist() == DOCUMENT[rows].tolist()
    head(made / "s", 60, made / "some", copy=False)
    concat([made / "some", made / "some"], made / "twice", fields=["act", "document"])
    shuffle(made / "twice", made / "twice-shuffled", seed=3)
    some = column(made / "s")[:60]
    expected = np.concatenate([some, some + 5])[column(made / "twice-shuffled", "source_row").astype(int)]
    assert column(made / "twice-shuffled").tolist() == expected.tolist()


def test_rows_of_no_document_stay_so(tmp_path: Path) -> None:
    document = np.array([0, -1, 1, 1, -7], "<i2")
    group(tmp_path / "a", {"x": values(5, (2,)), "document": document})
    concat([tmp_path / "a", tmp_path / "a"], tmp_path / "both")
    shuffle(tmp_path / "both", tmp_path / "s", seed=3)
    expected = np.array([0, -1, 1, 1, -7, 2, -1, 3, 3, -7])
    assert column(tmp_path / "s").tolist() == expected[column(tmp_path / "s", "source_row").astype(int)].tolist()


def test_arrays_that_are_no_numbers_of_documents_stay_as_they_are(tmp_path: Path) -> None:
    for name, data in (
        ("document", values(5, (2,), "<i4")),
        ("doc", values(5, (), "<f4")),
        ("doc_id", values(5, (), "S4")),
    ):
        group(tmp_path / name, {"x": values(5, (2,)), name: data})
        concat([tmp_path / name, tmp_path / name], tmp_path / f"two {name}")
        shuffle(tmp_path / f"two {name}", tmp_path / f"s {name}", seed=3)
        expected = np.concatenate([data, data])[column(tmp_path / f"s {name}", "source_row").astype(int)]
        assert column(tmp_path / f"s {name}", name).tobytes() == expected.tobytes()


@pytest.mark.parametrize("command", ["concat", "append"])
def test_numbers_that_do_not_fit_are_refused(tmp_path: Path, command: str) -> None:
    group(tmp_path / "a", {"x": values(4, (2,)), "document": np.array([0, 1, 2, 99], "|i1")})
    shuffle(tmp_path / "a", tmp_path / "s", seed=3)
    before = sorted(p.name for p in tmp_path.iterdir())
    calls: dict[str, Callable[..., Any]] = {
        "concat": lambda **how: concat([tmp_path / "a", tmp_path / "a"], tmp_path / "both", **how),
        "append": lambda **how: append(tmp_path / "s", tmp_path / "a", tmp_path / "both", again=True, **how),
    }
    with pytest.raises(RequestError, match=r"numbered up to 199, and 'document' holds int8 up to 127.*renumber=False"):
        calls[command]()
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    calls[command](renumber=False)


def test_numbers_may_stay_as_earlier_versions_left_them(made: Path) -> None:
    """Without numbering on, files are those of earlier versions, which are still read, verified and grown."""
    concat([made / "a", made / "b"], made / "both", renumber=False)
    described = virtual.describe(as_place(made / "both"))
    assert described is not None
    assert described["reader"] == "concat"
    assert "numbered_from" not in json.dumps(described)
    shuffle(made / "both", made / "old", seed=3, chunk_rows=50)
    assert "numbered_from" not in json.dumps(info(made / "old"))
    rows = column(made / "old", "source_row").astype(int)
    cut = int(np.searchsorted(DOCUMENT, 5))
    assert column(made / "old").tolist() == np.where(rows < cut, DOCUMENT[rows], DOCUMENT[rows] - 5).tolist()
    result = CliRunner().invoke(main, ["verify", str(made / "a"), str(made / "old")])
    assert result.exit_code == 2
    assert "--out ALL --no-renumber" in result.output
    append(made / "old", made / "c")
    concat([made / "both", made / "c"], made / "more")
    assert verify(made / "more", made / "old").ok
    concat([made / "a", made / "b", made / "c"], made / "anew")
    assert not verify(made / "anew", made / "old").ok  # documents of b have other numbers there


def test_info_tells_from_where_documents_are_numbered(made: Path) -> None:
    result = CliRunner().invoke(main, ["append", str(made / "s"), str(made / "b")])
    assert result.exit_code == 0, result.output
    assert f"{made / 'b'}: 100 rows, document from 5 on" in info_text(info(made / "s"))
    result = CliRunner().invoke(
        main, ["concat", str(made / "a"), str(made / "b"), "--out", str(made / "x"), "--no-renumber"]
    )
    assert result.exit_code == 0, result.output
    assert virtual.describe(as_place(made / "x"))["reader"] == "concat"  # type: ignore[index]
