"""Splits, heads, samples and concatenations against the oracle."""

from __future__ import annotations

import itertools
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from click.testing import CliRunner

from actshuffle import shuffle, verify
from actshuffle.building.growth import append
from actshuffle.building.joining import concat
from actshuffle.building.sampling import sample
from actshuffle.building.splitting import head, split
from actshuffle.checking.contents import first_rows
from actshuffle.cli.app import main
from actshuffle.errors import (
    DestinationExistsError,
    FormatError,
    IncompleteStoreError,
    MissingChunkError,
    RequestError,
    SourceError,
)
from actshuffle.loading.dataset import open_dataset
from actshuffle.loading.trace import came_from, where_is
from actshuffle.ordering.keys import Keys
from actshuffle.ordering.lots import shares
from support.executors import Stops
from support.runs import run
from support.stores import act_and_token, array, files, group, opened, rows_of, values

N = 150
FIELDS = act_and_token(N)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    group(tmp_path / "src.zarr", FIELDS)
    return tmp_path / "src.zarr"


@pytest.fixture
def shuffled(source: Path, tmp_path: Path) -> Path:
    run(source, tmp_path / "dst.zarr", block_bytes=24 * 40, chunk_rows=8)
    return tmp_path / "dst.zarr"


# --- Shares ---------------------------------------------------------------------------------------


def test_shares_are_contiguous_and_exact() -> None:
    dice = random.Random(0)
    for _ in range(300):
        rows = dice.randrange(1, 2000)
        names = [f"p{i}" for i in range(dice.randrange(1, 6))]
        weights = [dice.random() for _ in names]
        parts: dict[str, Any] = {k: w / sum(weights) for k, w in zip(names, weights, strict=True)}
        found = list(shares(rows, parts).values())
        assert found[0][0] == 0
        assert found[-1][1] == rows
        assert all(a[1] == b[0] for a, b in itertools.pairwise(found))
        for (start, stop), share in zip(found, parts.values(), strict=True):
            assert abs(stop - start - share * rows) <= 1
        count = dice.randrange(rows)
        mixed = shares(rows, {"a": 0.5 * (rows - count) / rows, "n": count, "rest": "rest"})
        assert mixed["n"][1] - mixed["n"][0] == count
        assert mixed["rest"][1] == rows


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({}, "at least one"),
        ({"a": 1.5}, "at most 1"),
        ({"a": -1}, "no number"),
        ({"a": float("nan")}, "no number"),
        ({"a": "most"}, "no number"),
        ({"a": 100, "b": 0.5}, "175 rows are asked for"),
        ({"a": "rest", "b": "rest"}, "only one"),
    ],
)
def test_bad_shares(parts: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        shares(N, parts)


# --- Split and head -------------------------------------------------------------------------------


@pytest.mark.parametrize("copy", [False, True])
def test_split_is_the_oracle_in_pieces(shuffled: Path, tmp_path: Path, copy: bool) -> None:
    order = Keys(5).order(N)
    made = split(shuffled, {"train.zarr": 0.8, "val.zarr": 15, "test.zarr": "rest"}, folder=tmp_path, copy=copy)
    found = {name: [part.read(name, 0, part.rows) for part in made.values()] for name in FIELDS}
    assert [part.rows for part in made.values()] == [120, 15, 15]
    for name, data in FIELDS.items():
        np.testing.assert_array_equal(rows_of(np.concatenate(found[name])), rows_of(data[order]))
    assert (tmp_path / "val.zarr/act/c.0.0").exists() == copy
    for part, (start, stop) in zip(made.values(), [(0, 120), (120, 135), (135, 150)], strict=True):
        assert part.order == (*open_dataset(shuffled).order[:-2], start, stop - start)
        places = where_is(part, range(N))
        np.testing.assert_array_equal(places[order[start:stop]], np.arange(stop - start))
        assert np.count_nonzero(places == -1) == N - (stop - start)


@pytest.mark.parametrize("parts", [{"val": 0.003, "train": "rest"}, {"train": 1.0, "val": "rest"}])
def test_a_share_of_no_row_is_refused(parts: dict[str, Any], shuffled: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(
        RequestError, match=r"part val: (0.003|rest) of the 150 rows of .* is no row: leave that part out"
    ):
        split(shuffled, parts, folder=tmp_path)
    assert sorted(tmp_path.rglob("*")) == before
    assert split(shuffled, {"val": 0.004, "train": "rest"}, folder=tmp_path)["val"].rows == 1


def test_copies_of_codecs_and_without_provenance(source: Path, tmp_path: Path) -> None:
    order = Keys(5).order(N)
    for number, request in enumerate([{"codec": "zstd", "chunk_rows": 8}, {"source_row": False}]):
        run(source, dst := tmp_path / f"{number}.zarr", **request)
        part = head(dst, 50, tmp_path / f"{number}.head", copy=True)
        np.testing.assert_array_equal(rows_of(part.read("act", 0, 50)), rows_of(FIELDS["act"][order[:50]]))
        np.testing.assert_array_equal(where_is(part, order[:50]), np.arange(50))
        assert part.marker is not None
        assert part.marker["rows"] == 50


def test_a_copied_view_of_a_copy(shuffled: Path, tmp_path: Path) -> None:
    order = Keys(5).order(N)
    half = split(shuffled, {"a": 75, "b": 75}, folder=tmp_path, copy=True)["b"]
    quarter = split(half.path, {"c": 0.5, "d": 0.5}, folder=tmp_path)["d"]
    again = head(quarter.path, 20, tmp_path / "e", copy=True)
    np.testing.assert_array_equal(again.read("source_row", 0, 20), order[75 + 38 : 75 + 58])
    assert where_is(again, [order[75 + 40]])[0] == 2


def test_what_is_in_the_way_of_one_part_stops_all(shuffled: Path, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b/mine.txt").write_text("keep")
    with pytest.raises(DestinationExistsError, match="b exists already; nothing was cut"):
        split(shuffled, {"a": 0.5, "b": "rest"}, folder=tmp_path)
    assert not (tmp_path / "a").exists()


def test_a_split_into_copies_resumes(shuffled: Path, tmp_path: Path) -> None:
    shares_of = {"a": 0.5, "b": "rest"}
    made = split(shuffled, shares_of, folder=tmp_path, copy=True)
    before = files(tmp_path / "b")
    stamp = (tmp_path / "a/zarr.json").stat().st_mtime_ns
    again = split(shuffled, shares_of, folder=tmp_path, copy=True)  # already finished
    assert {name: store.rows for name, store in again.items()} == {name: store.rows for name, store in made.items()}
    assert files(tmp_path / "b") == before
    shutil.rmtree(tmp_path / "b")
    with pytest.raises(DestinationExistsError):  # "a" is not these rows
        split(shuffled, {"a": 0.4, "b": "rest"}, folder=tmp_path, copy=True)
    assert not (tmp_path / "b").exists()
    again = split(shuffled, shares_of, folder=tmp_path, copy=True)
    assert {k: d.identity for k, d in again.items()} == {k: d.identity for k, d in made.items()}
    assert files(tmp_path / "b") == before
    assert (tmp_path / "a/zarr.json").stat().st_mtime_ns == stamp


def test_no_more_rows_are_shown_than_one_can_read(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actshuffle.checking.contents.SHOWN_ROWS", N - 1)
    assert len(first_rows(source, N - 1)["token"]) == N - 1
    with pytest.raises(RequestError, match="name a store to write them to"):
        first_rows(source, 10**12)


def test_unshuffled_stores_are_split_only_on_request(source: Path, tmp_path: Path) -> None:
    from actshuffle.building.joining import layout_of

    with pytest.raises(IncompleteStoreError):
        head(source, 10, tmp_path / "x")
    run(source, tmp_path / "dst.zarr")
    marker = tmp_path / "dst.zarr/_actshuffle/zarr.json"
    body = json.loads(marker.read_text())
    body["attributes"]["actshuffle"]["kind"] = "collection"
    marker.write_text(json.dumps(body))
    with pytest.raises(RequestError, match="not shuffled"):
        head(tmp_path / "dst.zarr", 10, tmp_path / "x")
    assert list(first_rows(source, 2)["token"]) == [str(t) for t in FIELDS["token"][:2]]
    part = head(tmp_path / "dst.zarr", 10, tmp_path / "x", ordered=True, copy=True)
    assert part.kind == "collection"
    assert not part.shuffled
    np.testing.assert_array_equal(rows_of(part.read("token", 0, 10)), rows_of(FIELDS["token"][Keys(5).order(N)[:10]]))
    marker.unlink()
    with pytest.raises(IncompleteStoreError, match="may be half written"):
        first_rows(tmp_path / "dst.zarr", 2)
    assert layout_of(part)["codec"] is None


# --- Sample ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 2, 63, 149, 150])
@pytest.mark.parametrize("levels", [1, 2])
def test_a_sample_is_the_head_of_the_full_shuffle(source: Path, tmp_path: Path, rows: int, levels: int) -> None:
    order = Keys(11).order(N)[:rows]
    shape = {"block_bytes": max(24 * 24, rows * 8), "run_bytes": 1, "chunk_rows": 4} if levels > 1 else {}
    done = sample(source, rows, tmp_path / "s.zarr", seed=11, fsync=False, **shape)
    assert done.plan.rows == rows
    assert (done.plan.levels > 1) == (levels > 1 and rows > 24)
    _, found = opened(tmp_path / "s.zarr")
    for name, data in FIELDS.items():
        np.testing.assert_array_equal(rows_of(found[name][:]), rows_of(data[order]))
    np.testing.assert_array_equal(found["source_row"][:], order)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.zarr", "src.zarr"]
    places = where_is(tmp_path / "s.zarr", range(N))
    np.testing.assert_array_equal(places[order], np.arange(rows))
    assert np.count_nonzero(places == -1) == N - rows


@pytest.mark.parametrize("kind", ["mixed_group", "sharded_cut_zstd", "fortran_v2", "row_chunks"])
def test_samples_of_stores_of_all_kinds(sources: Callable[[str, int], Path], tmp_path: Path, kind: str) -> None:
    sample(sources(kind, 150), 40, tmp_path / "s.zarr", seed=5, fsync=False)
    order = Keys(5).order(150)[:40]
    (_, before), (_, after) = opened(sources(kind, 150)), opened(tmp_path / "s.zarr")
    for name, data in before.items():
        np.testing.assert_array_equal(rows_of(after[name][:]), rows_of(data[:])[order])


def test_a_sample_with_ties(source: Path, tmp_path: Path) -> None:
    for rows in (3, 40, 90):
        sample(source, rows, dst := tmp_path / f"{rows}.zarr", seed=2, key_bits=(3, 2), fsync=False)
        order = Keys(2, 3, 2).order(N)[:rows]
        np.testing.assert_array_equal(zarr.open(dst, mode="r")["source_row"][:], order)


def test_a_sample_resumes_with_the_seed_it_drew(source: Path, tmp_path: Path) -> None:
    dst, shape = tmp_path / "s.zarr", {"block_bytes": 24 * 24, "run_bytes": 1, "chunk_rows": 4}
    with pytest.raises(KeyboardInterrupt):
        sample(source, 100, dst, executor=Stops(9), fsync=False, **shape)
    seed = json.loads((tmp_path / "s.zarr.chosen/_actshuffle/virtual.json").read_text())["settings"]["seed"]
    done = sample(source, 100, dst, fsync=False, **shape)
    assert (done.seed, done.resumed > 0) == (seed, True)
    np.testing.assert_array_equal(zarr.open(dst, mode="r")["source_row"][:], Keys(seed).order(N)[:100])
    before = files(tmp_path)
    assert sample(source, 100, dst, fsync=False, **shape).already_finished
    for other in ({"rows": 99}, {"seed": seed + 1}, {"codec": "zstd"}):
        with pytest.raises(DestinationExistsError, match="overwrite=True"):
            sample(source, dst=dst, fsync=False, **({"rows": 100} | shape | other))
    assert files(tmp_path) == before
    sample(source, 10, dst, seed=3, overwrite=True, fsync=False)
    assert open_dataset(dst).rows == 10


@pytest.mark.parametrize("rows", [0, N + 1])
def test_a_sample_of_more_than_all(source: Path, tmp_path: Path, rows: int) -> None:
    with pytest.raises(RequestError, match="cannot take"):
        sample(source, rows, tmp_path / "s.zarr")


# --- Concat ---------------------------------------------------------------------------------------


def in_parts(folder: Path, dice: random.Random) -> list[Path]:
    """The rows of `FIELDS` in a few stores with chunks and codecs of all sorts."""
    cuts, parts = sorted({0, N, *(dice.randrange(1, N) for _ in range(3))}), []
    for number, (a, b) in enumerate(itertools.pairwise(cuts)):
        parts.append(folder / f"{number}.zarr")
        zarr.create_group(parts[-1], attributes={"part": number})
        for name, data in FIELDS.items():
            rows = dice.randrange(1, 30)
            settings = dice.choice([{"compressors": "auto"}, {}, {"shards": (3 * rows, *data.shape[1:])}])
            array(parts[-1], data[a:b], name, chunks=(rows, *data.shape[1:]), **settings)
    return parts


@pytest.mark.parametrize("seed", range(3))
def test_concatenations_shuffle_as_the_whole_would(tmp_path: Path, seed: int) -> None:
    group(tmp_path / "all.zarr", FIELDS)
    both = concat(in_parts(tmp_path, random.Random(seed)), tmp_path / "both")
    assert both.rows == N
    np.testing.assert_array_equal(rows_of(both.read("act", 13, 99)), rows_of(FIELDS["act"][13:99]))
    run(tmp_path / "both", dst := tmp_path / "dst.zarr", block_bytes=24 * 40, chunk_rows=8)
    _, found = opened(dst)
    for name, data in FIELDS.items():
        np.testing.assert_array_equal(rows_of(found[name][:]), rows_of(data[Keys(5).order(N)]))
    assert opened(dst)[0] == {"part": 0}
    report = verify(tmp_path / "both", dst)
    assert report.ok, report
    assert not report.notes


def test_concatenations_of_one_array_of_views_and_of_concatenations(shuffled: Path, tmp_path: Path) -> None:
    array(tmp_path / "x.zarr", FIELDS["act"])
    once = concat([tmp_path / "x.zarr", tmp_path / "x.zarr"], tmp_path / "twice")
    both = concat([once.path, tmp_path / "x.zarr"], tmp_path / "thrice")
    np.testing.assert_array_equal(
        rows_of(both.read("data", 140, 320)), rows_of(np.concatenate([FIELDS["act"]] * 3)[140:320])
    )
    view = split(shuffled, {"v": 60}, folder=tmp_path)["v"]
    pair = concat([view.path, shuffled], tmp_path / "pair", fields=["token"])
    expected = FIELDS["token"][Keys(5).order(N)]
    np.testing.assert_array_equal(pair.read("token", 0, 60 + N), [*expected[:60], *expected])


def test_a_concatenation_is_not_a_store_to_others(source: Path, tmp_path: Path) -> None:
    concat([source, source], tmp_path / "both")
    with pytest.raises(FileNotFoundError):
        zarr.open(tmp_path / "both", mode="r")


def test_parts_that_changed_or_lost_a_chunk(source: Path, tmp_path: Path) -> None:
    concat([source, source], tmp_path / "both")
    chunk = source / "act/c/3/0"
    kept = chunk.read_bytes()
    chunk.unlink()
    with pytest.raises(MissingChunkError, match="act/c/3/0"):
        run(tmp_path / "both", tmp_path / "dst.zarr")
    with pytest.raises(RequestError, match="no chunks of its own"):
        run(tmp_path / "both", tmp_path / "dst.zarr", fill_missing=True)
    chunk.write_bytes(kept)
    run(tmp_path / "both", tmp_path / "dst.zarr")
    for name in FIELDS:
        zarr.open(source, mode="r+")[name].resize((N - 1, *FIELDS[name].shape[1:]))
    with pytest.raises(SourceError, match="has 149 rows, and had 150"):
        run(tmp_path / "both", tmp_path / "other.zarr")


def test_what_cannot_be_put_together(source: Path, tmp_path: Path) -> None:
    group(tmp_path / "wide.zarr", {"act": values(9, (6,)), "token": values(9, (), "<i4")})
    group(tmp_path / "typed.zarr", {"act": values(9, (5,), "<f8"), "token": values(9, (), "<i4")})
    group(tmp_path / "named.zarr", {"acts": values(9, (5,)), "token": values(9, (), "<i4")})
    for other, words in [("wide", "shape \\(6,\\)"), ("typed", "float64"), ("named", "arrays \\['acts'")]:
        with pytest.raises(SourceError, match=words):
            concat([source, tmp_path / f"{other}.zarr"], tmp_path / "x")
    assert concat([source, tmp_path / "named.zarr"], tmp_path / "x", fields=["token"]).rows == N + 9
    with pytest.raises(DestinationExistsError):
        concat([source], tmp_path / "x")
    with pytest.raises(RequestError, match="at least one"):
        concat([], tmp_path / "y")


def test_a_description_that_names_other_code_is_refused(source: Path, tmp_path: Path) -> None:
    concat([source], tmp_path / "x")
    text = (key := tmp_path / "x/_actshuffle/virtual.json").read_text()
    for was, now in [('"concat"', '"os"'), ('"format": 1', '"format": 2'), ("{", "")]:
        key.write_text(text.replace(was, now, 1))
        with pytest.raises(FormatError):
            run(tmp_path / "x", tmp_path / "dst.zarr")


# --- The commands ---------------------------------------------------------------------------------


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Run a command in the temporary folder; returns its output, parsed if it is JSON."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str, code: int = 0) -> Any:
        done = CliRunner().invoke(main, arguments)
        assert done.exit_code == code, done.output
        return json.loads(done.stdout) if "--json" in arguments else done.output

    return call


def test_commands_from_import_to_trace(tmp_path: Path, command: Callable[..., Any]) -> None:
    for number, (a, b) in enumerate([(0, 100), (100, N)]):
        np.save(tmp_path / f"act{number}.npy", FIELDS["act"][a:b])
        np.save(tmp_path / f"tok{number}.npy", FIELDS["token"][a:b])
        names = [f"--name=act{number}=act", f"--name=tok{number}=token"]
        text = command("import", f"act{number}.npy", f"tok{number}.npy", "--out", f"{number}.zarr", *names)
        assert f"token: scalar int32 from 'tok{number}', 1 file: one row per item" in text
    assert command("concat", "0.zarr", "1.zarr", "--out", "both", "--json")["rows"] == N
    assert "collection: complete" in command("info", "0.zarr")
    command("run", "0.zarr", "s.zarr", "--seed", "5", "--quiet", "--workers", "0")
    assert command("append", "s.zarr", "1.zarr", "--json", "--workers", "0")["rows"] == N
    command("verify", "both", "s.zarr", "--quiet", "--workers", "0")
    order = Keys(5).order(N)
    origin = command("came-from", "s.zarr", "7", "--json")["rows"][0]
    assert (origin["source_row"], origin["token"]) == (order[7], FIELDS["token"][order[7]])
    assert command("where-is", "s.zarr", str(order[7]), "--json") == {"rows": [7]}
    parts = command("split", "s.zarr", "train=90%", "val=rest", "--json")["parts"]
    assert [part["rows"] for part in parts.values()] == [135, 15]
    assert command("where-is", "val", str(order[7]), "--json") == {"rows": [None]}
    assert "not in this store" in command("where-is", "val", str(order[7]))
    assert command("info", "val", "--json")["arrays"]["act"]["shape"] == [15, 5]
    assert "view: rows 135 to 150 of s.zarr" in command("info", "val").replace("../", "")
    command("sample", "both", "1e1", "few.zarr", "--seed", "5", "--quiet", "--workers", "0")
    assert command("head", "few.zarr", "10", "--json") == command("head", "s.zarr", "1e1", "--json")
    assert "10 of 150 rows" in command("info", "few.zarr")
    assert command("head", "s.zarr", "20", "h.zarr", "--json")["rows"] == 20
    assert command("verify", "both", "few.zarr", "--json", code=2)["error"] == "bad-request"


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["split", "src.zarr", "a=0.5"], "incomplete"),
        (["split", "dst.zarr", "a"], "bad-request"),
        (["split", "dst.zarr", "a=most"], "bad-request"),
        (["split", "dst.zarr", "a=0.5", "a=0.5"], "bad-request"),
        (["came-from", "dst.zarr", "150"], "bad-request"),
        (["came-from", "src.zarr", "1"], "incomplete"),
        (["sample", "src.zarr", "151", "x.zarr"], "bad-request"),
        (["append", "dst.zarr", "absent.zarr"], "bad-source"),
        (["append", "src.zarr", "src.zarr"], "incomplete"),
        (["import", "absent.npy", "--out", "x.zarr"], "bad-source"),
        (["import", "src.zarr", "--out", "x.zarr", "--row-shape", "a"], "bad-request"),
        (["collect", "--model", "m", "--text", "t", "--out", "x", "--part", "1"], "bad-request"),
        (["concat", "src.zarr", "--out", "dst.zarr"], "exists"),
    ],
)
def test_commands_say_what_is_wrong(
    shuffled: Path, command: Callable[..., Any], arguments: list[str], error: str
) -> None:
    assert command(*arguments, "--json", code=2)["error"] == error


def test_a_part_is_not_overwritten_by_what_is_made_of_it(source: Path, tmp_path: Path) -> None:
    group(tmp_path / "more.zarr", FIELDS)
    concat([source, tmp_path / "more.zarr"], tmp_path / "both")
    concat([tmp_path / "both", source], tmp_path / "thrice")
    for virtual in ("both", "thrice"):
        with pytest.raises(RequestError, match="must not lie inside"):
            shuffle(tmp_path / virtual, tmp_path / "more.zarr", overwrite=True)
    with pytest.raises(RequestError, match="must not lie inside"):
        sample(source, 5, source, overwrite=True)
    run(source, dst := tmp_path / "dst.zarr")
    for target in (tmp_path / "more.zarr", dst):
        with pytest.raises(RequestError, match="must not lie inside"):
            append(dst, tmp_path / "more.zarr", target, overwrite=True)
    assert verify(source, dst).ok
    assert not verify(source, dst).notes


def test_nested_concatenations_are_flat_to_those_who_trace(source: Path, tmp_path: Path) -> None:
    concat([source, source], tmp_path / "both")
    concat([tmp_path / "both", source], tmp_path / "thrice")
    run(tmp_path / "thrice", dst := tmp_path / "dst.zarr")
    origin = came_from(dst, where_is(dst, [N + 3, 2 * N + 4]))
    assert [(o.source, o.row_in_source) for o in origin] == [(str(source), 3), (str(source), 4)]
