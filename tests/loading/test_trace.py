"""Origins of rows and places of origins, against the order of the keys."""

from __future__ import annotations

import ast
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from actshuffle.building.joining import concat
from actshuffle.errors import FormatError, IncompleteStoreError, RequestError
from actshuffle.loading.dataset import open_dataset, write_view
from actshuffle.loading.ranks import Ranks, key_of
from actshuffle.loading.trace import Origin, came_from, where_is
from actshuffle.ordering.keys import Keys
from support.runs import run
from support.stores import group, values

LENGTHS = [40, 1, 7, 90, 12]  # of documents, in tokens
N = sum(LENGTHS)
DOCUMENT = np.repeat(np.arange(len(LENGTHS), dtype="<i4"), LENGTHS)
POSITION = np.concatenate([np.arange(n, dtype="<i4") for n in LENGTHS])
TOKEN = np.random.default_rng(3).integers(0, 5000, N).astype("<i4")


def text_store(path: Path, rows: slice = slice(None), **settings: object) -> Path:
    fields = {"token": TOKEN, "document": DOCUMENT, "position": POSITION, "act": values(N, (4,))}
    group(path, {name: data[rows] for name, data in fields.items()}, **settings)
    return path


@pytest.fixture
def stores(tmp_path: Path) -> tuple[Path, Path]:
    src, dst = text_store(tmp_path / "src.zarr"), tmp_path / "dst.zarr"
    run(src, dst, block_bytes=40 * 28, chunk_rows=8)
    return src, dst


def assert_traced(dst: Path, seed: int = 5, context: int = 3, **options: object) -> None:
    order = Keys(seed).order(N)
    np.testing.assert_array_equal(where_is(dst, range(N))[order], np.arange(N))
    for origin in came_from(dst, range(N), context, **options):  # type: ignore[arg-type]
        i = order[origin.row]
        assert origin.source_row == i
        near = [j for j in range(i - context, i + context + 1) if 0 <= j < N and DOCUMENT[j] == DOCUMENT[i]]
        assert origin.tokens == tuple(TOKEN[near])
        assert (origin.token, origin.tokens[origin.at]) == (TOKEN[i], TOKEN[i])
        assert (origin.document, origin.position) == (DOCUMENT[i], POSITION[i])


def test_every_row_both_ways(stores: tuple[Path, Path]) -> None:
    assert_traced(stores[1])


@pytest.mark.parametrize("settings", [{"codec": "zstd"}, {"source_row": False}, {"chunks_per_shard": 3}])
def test_coded_sharded_and_without_provenance(tmp_path: Path, settings: dict[str, object]) -> None:
    src, dst = text_store(tmp_path / "src.zarr"), tmp_path / "dst.zarr"
    run(src, dst, **settings)
    assert_traced(dst)


def test_where_the_source_is_gone_its_rows_are_found_in_the_output(stores: tuple[Path, Path]) -> None:
    src, dst = stores
    shutil.rmtree(src)
    assert_traced(dst)


def test_a_source_that_has_moved(stores: tuple[Path, Path], tmp_path: Path) -> None:
    src, bare = stores[0], tmp_path / "bare.zarr"
    run(src, bare, fields=("act",))
    shutil.move(src, tmp_path / "elsewhere.zarr")
    assert came_from(bare, [3])[0].token is None
    found = came_from(bare, [3], source=tmp_path / "elsewhere.zarr")[0]
    assert found.token == TOKEN[found.source_row]
    with pytest.raises(RequestError, match="cannot be read"):
        came_from(bare, [3], source=tmp_path / "nowhere.zarr")


def test_a_view_counts_its_own_rows_and_lacks_the_others(stores: tuple[Path, Path], tmp_path: Path) -> None:
    order = Keys(5).order(N)
    write_view(tmp_path / "view.zarr", stores[1], 30, 90)
    places = where_is(tmp_path / "view.zarr", range(N))
    np.testing.assert_array_equal(places[order[30:90]], np.arange(60))
    assert set(places[order[:30]]) | set(places[order[90:]]) == {-1}
    assert [o.source_row for o in came_from(tmp_path / "view.zarr", [0, 59])] == [order[30], order[89]]


def test_equal_key_words_are_told_apart(tmp_path: Path) -> None:
    src, dst = text_store(tmp_path / "src.zarr"), tmp_path / "dst.zarr"
    run(src, dst, key_bits=(3, 3))
    order = Keys(5, 3, 3).order(N)
    np.testing.assert_array_equal(where_is(dst, range(N))[order], np.arange(N))


def test_rows_of_a_concatenation_name_their_part(tmp_path: Path) -> None:
    for name, rows in (("a", slice(0, 60)), ("b", slice(60, N))):
        text_store(tmp_path / f"{name}.zarr", rows)
    concat([tmp_path / "a.zarr", tmp_path / "b.zarr"], tmp_path / "both")
    run(tmp_path / "both", tmp_path / "dst.zarr")
    for origin in came_from(tmp_path / "dst.zarr", range(N), 0):
        part, start = ("a", 0) if origin.source_row < 60 else ("b", 60)
        assert origin.source == str(tmp_path / f"{part}.zarr")
        assert origin.row_in_source == origin.source_row - start
        assert origin.token == TOKEN[origin.source_row]


def test_document_names_and_text(stores: tuple[Path, Path]) -> None:
    data = open_dataset(stores[1])
    data.attributes["documents"] = [
        {"file": "a.txt", "first": 0, "count": 1},
        {"file": "b.jsonl", "first": 1, "count": 4},
    ]
    names = {o.document: o.document_name for o in came_from(data, range(N))}
    assert names == {0: "a.txt", **{d: f"b.jsonl:{d}" for d in range(1, 5)}}
    data.attributes["documents"] = [f"{d}.py" for d in range(5)]
    assert "(2.py)" in str(came_from(data, where_is(data, [45]))[0])


def test_few_looks_find_a_row_among_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    n = 200_000
    group(tmp_path / "src.zarr", {"x": np.zeros(n, "<i1")}, chunks=(50_000,))
    run(tmp_path / "src.zarr", tmp_path / "dst.zarr")
    ranks, looks = Ranks(open_dataset(tmp_path / "dst.zarr")), []
    look: Callable[..., object] = ranks._look
    monkeypatch.setattr(ranks, "_look", lambda *a: looks.append(a) or look(*a))
    order, some = Keys(5).order(n), range(0, n, 997)
    assert [ranks.rank(key_of(ranks.keys, int(order[r]))) for r in some] == list(some)
    assert len(looks) < 4 * len(some)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda s, d: came_from(d, [N]), RequestError, f"no row {N} among the {N}"),
        (lambda s, d: where_is(d, [-1]), RequestError, "no row -1"),
        (lambda s, d: came_from(d, [1], context=-1), RequestError, "context must be"),
        (lambda s, d: came_from(s, [1]), IncompleteStoreError, "no completion marker"),
    ],
)
def test_bad_requests(stores, call, error, words) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=words):
        call(*stores)


def test_provenance_that_contradicts_the_keys_is_an_error(stores: tuple[Path, Path]) -> None:
    chunk = next((stores[1] / "source_row").glob("c.0*"))
    data = np.frombuffer(chunk.read_bytes(), "<u8").copy()
    row, data[2] = int(data[2]), data[3]
    chunk.write_bytes(data.tobytes())
    with pytest.raises(FormatError, match="source_row is damaged"):
        where_is(stores[1], [row])


def test_text_is_one_line_with_the_token_marked() -> None:
    text = Origin(3, 9, "a.zarr", 9, token=7, tokens=(5, 7, 6), at=1, text=("for", " x\n", "\x1b[2J in"))
    assert str(text) == 'row 3: row 9 of a.zarr, token 7: "for[[ x\\n]]\\x1b[2J in"'
    assert str(replace(text, text=None)) == "row 3: row 9 of a.zarr, token 7: 5 [[7]] 6"
    assert "for[[ x\\n]]" in text._repr_html_()


@pytest.mark.parametrize(
    ("pieces", "shown"),
    [
        (("say", ' "', "hi"), """'say[[ "]]hi'"""),
        (("it's", ' "', "hi"), r'''"it's[[ \"]]hi"'''),
        (("it's", " so", ""), '''"it's[[ so]]"'''),
        (("a\\n", "\n", ""), r'''"a\\n[[\n]]"'''),
    ],
)
def test_quotes_and_backslashes_of_the_text_are_told_from_those_around_it(pieces: tuple[str, ...], shown: str) -> None:
    origin = Origin(3, 9, "a.zarr", 9, token=7, tokens=(5, 7, 6), at=1, text=pieces)
    assert str(origin).endswith(f"token 7: {shown}")
    assert ast.literal_eval(shown.replace("[[", "").replace("]]", "")) == "".join(pieces)  # Python reads it back
