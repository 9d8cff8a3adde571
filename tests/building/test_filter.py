"""Filtered stores hold the rows that numpy chooses, in their order, however the work is cut and stopped."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from click.testing import CliRunner

from actshuffle import concat, filter_rows, info, shuffle, split, status
from actshuffle.building import rowfilter
from actshuffle.building.rowfilter import median
from actshuffle.checking.contents import info_text
from actshuffle.cli.app import main
from actshuffle.errors import DestinationExistsError, RequestError, ResumeMismatchError, SourceError
from actshuffle.executors import Serial
from actshuffle.loading.dataset import open_dataset
from support.executors import Stops
from support.stores import files, group

N, CONTEXT = 300, 10
FAR = [3, 50, 51, 299]  # rows whose vectors are long in one array or the other
FOUND = "grad_layer_1", "layer_1", "layer_2", "token", "window_position"


def arrays() -> dict[str, np.ndarray]:
    """Two arrays of vectors, some of which are long; gradients, tokens, and their places in windows."""
    rng = np.random.default_rng(4)
    found = {
        "layer_1": rng.standard_normal((N, 6)).astype("<f4"),
        "layer_2": rng.standard_normal((N, 2, 4)).astype("<f2"),
        "grad_layer_1": rng.standard_cauchy((N, 6)).astype("<f4"),
        "token": rng.integers(0, 20, N, np.int32),
        "window_position": np.arange(N, dtype="<i4") % CONTEXT,
    }
    found["layer_1"][FAR[:3]] *= 100
    found["layer_2"][FAR[2:]] *= 100
    return found


def passing(found: dict[str, np.ndarray], skip: int = 0, tokens: Any = (), multiple: float = math.inf) -> np.ndarray:
    """The rows that are left, by numpy."""
    left = (found["window_position"] >= skip) & ~np.isin(found["token"], tokens)
    for name in ("layer_1", "layer_2"):
        norms = np.linalg.norm(found[name].astype("f8").reshape(N, -1), axis=1)
        left &= norms <= multiple * np.median(norms)
    return np.flatnonzero(left)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    group(tmp_path / "src.zarr", arrays())
    return tmp_path / "src.zarr"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many tasks and many pieces."""
    monkeypatch.setattr(rowfilter, "TASK_BYTES", 40 * 24)
    monkeypatch.setattr(rowfilter, "PIECE_BYTES", 9 * 24)


def assert_holds(path: Path, found: dict[str, np.ndarray], rows: np.ndarray) -> None:
    """The store is finished, and holds these rows of all arrays."""
    data = open_dataset(path)
    assert (data.kind, data.rows) == ("collection", len(rows))
    assert set(data.fields) == set(found)
    for name, values in found.items():
        np.testing.assert_array_equal(data.read(name, 0, data.rows), values[rows], err_msg=name)


def beside(path: Path) -> set[str]:
    return {entry.name for entry in path.parent.iterdir() if entry.name.startswith(path.name)}


RULES: list[dict[str, Any]] = [
    {"drop_norm": 10},
    {"skip_first": 1},
    {"drop_tokens": [7, 3]},
    {"drop_norm": 1.5, "skip_first": 2, "drop_tokens": [3]},
]


@pytest.mark.parametrize("rules", RULES, ids=str)
def test_rows_are_those_that_numpy_chooses(source: Path, tmp_path: Path, small: None, rules: dict[str, Any]) -> None:
    out, found = tmp_path / "out.zarr", arrays()
    done = filter_rows(source, out, chunk_rows=16, fsync=False, **rules)
    tokens = rules.get("drop_tokens", [])
    rows = passing(found, rules.get("skip_first", 0), tokens, rules.get("drop_norm", math.inf))
    assert 0 < len(rows) < N
    if rules == RULES[0]:
        np.testing.assert_array_equal(np.setdiff1d(np.arange(N), rows), FAR)
        assert done.beyond == {"layer_1": 3, "layer_2": 2}
    assert_holds(out, found, rows)
    assert sum(done.dropped.values()) == N - len(rows)
    for name, middle in done.medians.items():
        assert middle == np.median(np.linalg.norm(found[name].astype("f8").reshape(N, -1), axis=1))
    told = open_dataset(out).attributes
    assert told["dropped_rows"] == done.dropped
    assert (told["model"], told["filtered"][0]["rules"]["drop_tokens"]) == ("tiny", sorted(tokens))
    assert "rows dropped: " in info_text(info(out))
    assert "rows dropped: " in str(done)
    assert beside(out) == {"out.zarr"}


def test_a_row_counts_once_by_the_first_rule_that_it_breaks(source: Path, tmp_path: Path) -> None:
    found = arrays()
    done = filter_rows(source, tmp_path / "out.zarr", fsync=False, drop_norm=10, skip_first=1, drop_tokens=[3])
    early = found["window_position"] < 1
    named = ~early & (found["token"] == 3)
    far = ~early & ~named & np.isin(np.arange(N), FAR)
    assert done.dropped == {"skip_first": early.sum(), "drop_tokens": named.sum(), "drop_norm": far.sum()}
    assert 0 < far.sum() < len(FAR)


def test_the_median_is_of_all_rows_of_the_source(source: Path, tmp_path: Path) -> None:
    """Not of those that other rules leave: the same rows are beyond, whatever else is dropped."""
    both = filter_rows(source, tmp_path / "a.zarr", fsync=False, drop_norm=10, drop_tokens=[3])
    alone = filter_rows(source, tmp_path / "b.zarr", fsync=False, drop_norm=10)
    assert both.medians == alone.medians


@pytest.mark.parametrize("count", [1, 2, 7, 100, 101])
def test_medians_are_those_of_numpy(count: int) -> None:
    rng = np.random.default_rng(count)
    for values in (
        rng.random(count),
        np.exp(200 * rng.standard_normal(count)),
        rng.integers(0, 3, count).astype("f8"),
        np.zeros(count),
        np.full(count, 5e-324),
    ):
        parts = np.array_split(values, 3)
        assert median(lambda parts=parts: iter(parts), count) == np.median(values)  # type: ignore[misc]


def test_the_result_does_not_depend_on_how_the_work_is_cut(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Backwards(Serial):
        def map(self, fn: Any, calls: Any) -> Any:
            return super().map(fn, reversed(list(calls)))

    options: dict[str, Any] = {"drop_norm": 1.2, "chunk_rows": 16, "fsync": False}
    found = []
    for name, size in (("a", 1 << 20), ("b", 24 * 64), ("c", 24 * 9)):
        monkeypatch.setattr(rowfilter, "TASK_BYTES", size)
        monkeypatch.setattr(rowfilter, "PIECE_BYTES", size // 2 + 24)
        out = tmp_path / name / "out.zarr"
        out.parent.mkdir()
        filter_rows(source, out, executor=Backwards(), **options)
        found.append(files(out))
    assert found[0] == found[1] == found[2]


# --- Sources of all kinds ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["compressed", "shuffled", "view", "concat"])
def test_stores_of_every_kind(source: Path, tmp_path: Path, small: None, kind: str) -> None:
    out, found = tmp_path / "out.zarr", arrays()
    if kind == "compressed":
        group(source := tmp_path / "z.zarr", found, compressors="auto")
    elif kind in ("shuffled", "view"):
        shuffle(source, tmp_path / "s.zarr", seed=1, fsync=False)
        source, data = tmp_path / "s.zarr", open_dataset(tmp_path / "s.zarr")
        found = {name: data.read(name, 0, N) for name in data.fields}
        if kind == "view":
            split(source, {"first.zarr": 100, "view.zarr": "rest"}, folder=tmp_path)
            source = tmp_path / "view.zarr"
    else:
        concat([source, source], tmp_path / "both")
        source = tmp_path / "both"
    filter_rows(source, out, chunk_rows=16, fsync=False, drop_norm=10)
    rows = passing(found, multiple=10)
    if kind == "view":
        assert (rows < 100).sum() > 0
        rows = rows[rows >= 100]  # the medians of all rows and of these drop the same
    elif kind == "concat":
        found = {name: np.concatenate([values, values]) for name, values in found.items()}
        rows = np.concatenate([rows, N + rows])
    assert_holds(out, found, rows)


def test_other_names_and_a_second_filter(tmp_path: Path) -> None:
    found = arrays()
    renamed = {"x": found["layer_1"], "input_ids": found["token"], "place": found["window_position"]}
    group(tmp_path / "src.zarr", renamed)
    filter_rows(tmp_path / "src.zarr", tmp_path / "a.zarr", fsync=False, skip_first=1, position="place")
    filter_rows(tmp_path / "a.zarr", tmp_path / "b.zarr", fsync=False, drop_tokens=[3])
    assert_holds(tmp_path / "b.zarr", renamed, passing(found, 1, [3]))
    told = open_dataset(tmp_path / "b.zarr").attributes
    assert [len(entry["rules"]["drop_tokens"]) for entry in told["filtered"]] == [0, 1]
    assert told["dropped_rows"]["skip_first"] == N // CONTEXT
    assert sum(told["dropped_rows"].values()) == N - open_dataset(tmp_path / "b.zarr").rows


def test_arrays_that_count_are_chosen(source: Path, tmp_path: Path) -> None:
    for names, rows in ((["layer_1"], FAR[:3]), (["layer_2"], FAR[2:])):
        done = filter_rows(source, tmp_path / names[0], fsync=False, drop_norm=10, arrays=names)
        assert done.dropped["drop_norm"] == len(rows)
    zeros = arrays()
    zeros["layer_1"][: N // 2 + 1] = 0
    group(tmp_path / "zeros.zarr", zeros)
    done = filter_rows(tmp_path / "zeros.zarr", tmp_path / "x", fsync=False, drop_norm=10)
    assert (done.medians["layer_1"], done.beyond) == (0.0, {"layer_1": 0, "layer_2": 2})


# --- Stops, and what is in the way ------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [0, 1, 7, 9, 12, 17, 20])
def test_a_stopped_filter_resumes(source: Path, tmp_path: Path, small: None, after: int) -> None:
    """Norms, medians, choosing: 8, 2 and 8 tasks; then those of the copy."""
    out, options = tmp_path / "out.zarr", {"drop_norm": 10, "chunk_rows": 8, "block_bytes": 5000, "fsync": False}
    whole = Stops()
    filter_rows(source, tmp_path / "whole.zarr", executor=whole, **options)  # type: ignore[arg-type]
    assert whole.seen.count(True) > 20
    with pytest.raises(KeyboardInterrupt):
        filter_rows(source, out, executor=Stops(after), **options)  # type: ignore[arg-type]
    again = Stops()
    filter_rows(source, out, executor=again, **options)  # type: ignore[arg-type]
    assert again.seen.count(True) == whole.seen.count(True) - after
    assert files(out) == files(tmp_path / "whole.zarr")
    assert beside(out) == {"out.zarr"}
    assert status(out)["state"] == "complete"


def test_the_same_filter_again_and_another(source: Path, tmp_path: Path, small: None) -> None:
    out, half = tmp_path / "out.zarr", tmp_path / "half.zarr"
    made = filter_rows(source, out, fsync=False, drop_norm=10)
    before = files(out)
    again = filter_rows(source, out, fsync=False, drop_norm=10)
    assert (again.rows, again.dropped, again.seconds) == (made.rows, made.dropped, 0.0)
    assert "already finished" in str(again)
    others: list[dict[str, Any]] = [{"drop_norm": 11}, {"skip_first": 1}]
    for other in others:
        with pytest.raises(DestinationExistsError, match="finished with other arguments"):
            filter_rows(source, out, fsync=False, **other)
    assert files(out) == before
    assert filter_rows(source, out, fsync=False, skip_first=1, overwrite=True).dropped["skip_first"] == N // CONTEXT
    blocks = {"chunk_rows": 8, "block_bytes": 5000}
    with pytest.raises(KeyboardInterrupt):
        filter_rows(source, half, executor=Stops(8 + 2 + 8 + 1), fsync=False, drop_norm=10, **blocks)
    with pytest.raises(ResumeMismatchError, match="half done with another filter"):
        filter_rows(source, half, fsync=False, drop_norm=12, **blocks)


def test_filters_that_make_no_sense(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.zarr"

    def assert_refused(words: str, error: type[Exception] = RequestError, src: Path = source, **options: Any) -> None:
        with pytest.raises(error, match=words):
            filter_rows(src, out, fsync=False, **options)
        assert beside(out) == set()

    assert_refused("no filter is given")
    for value in (1, 0.5, -3, True, "10", None):
        assert_refused("drop_norm is a multiple", drop_norm=value)
    for value in (math.inf, math.nan):
        assert_refused("drop_norm must be finite", drop_norm=value)
    for value in (-1, 1.5, True):
        assert_refused("skip_first must be a whole number", skip_first=value)
        assert_refused("drop_tokens must be a whole number", drop_tokens=[value])
    assert_refused("drop_tokens must be a list", drop_tokens="12")
    assert_refused("no array 'layer_9' of vectors", drop_norm=10, arrays=["layer_9"])
    assert_refused("no array 'token' of vectors", drop_norm=10, arrays=["token"])
    assert_refused("no array 'layer_1' of whole numbers with the place", skip_first=1, position="layer_1")
    assert_refused("no array 'pos' of whole numbers with the place.*position", skip_first=1, position="pos")
    assert_refused("no array 'ids' of whole numbers with the token.*token", drop_tokens=[1], token="ids")
    assert_refused("no row of .* is left", SourceError, skip_first=CONTEXT)
    assert_refused("no such source", SourceError, src=tmp_path / "absent.zarr", drop_norm=10)
    bad = arrays()
    bad["layer_1"][77, 2] = np.nan
    group(tmp_path / "bad.zarr", bad)
    assert_refused("row 77 of 'layer_1' has no finite norm", SourceError, src=tmp_path / "bad.zarr", drop_norm=10)
    group(tmp_path / "scalars.zarr", {"token": bad["token"]})
    assert_refused("drop_norm needs an array of vectors", src=tmp_path / "scalars.zarr", drop_norm=10)
    with pytest.raises(RequestError, match="must not lie inside each other"):
        filter_rows(source, source, drop_norm=10)
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    with pytest.raises(DestinationExistsError):
        filter_rows(source, out, drop_norm=10)
    assert beside(out) == {"out.zarr"}


def test_the_command(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.zarr"
    command = ["filter", str(source), str(out), "--drop-norm", "10", "--drop-tokens", "3,7", "--skip-first", "1"]
    done = CliRunner().invoke(main, [*command, "--workers", "0", "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    rows = passing(arrays(), 1, [3, 7], 10)
    assert told["rows"] == len(rows) == N - sum(told["dropped"].values())
    assert zarr.open_group(out, mode="r")["layer_1"].shape[0] == len(rows)
    refused = CliRunner().invoke(main, ["filter", str(source), str(tmp_path / "b"), "--drop-norm", "0.5", "--json"])
    assert (refused.exit_code, json.loads(refused.stdout)["error"]) == (2, "bad-request")
    assert beside(tmp_path / "b") == set()
