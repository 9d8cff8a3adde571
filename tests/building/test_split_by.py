"""Splits by a rule: the lot of a document or of a source row decides its part, before and after a store grows."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from scipy import stats as reference

from actshuffle import append, came_from, concat, info, open_dataset, shuffle, split, verify, where_is
from actshuffle.cli.app import main
from actshuffle.errors import ActshuffleError, DestinationExistsError, FormatError, RequestError
from actshuffle.loading.loader import Loader
from actshuffle.ordering.lots import edges, in_share, lots
from support.stores import group, rows_of, values

N, DOCUMENTS = 900, 60
SHARES = {"train": 0.7, "val": 0.2, "test": "rest"}
CUTS = {"train": (0.0, 0.7), "val": (0.7, 0.9), "test": (0.9, 1.0)}


def fields(seed: int, documents: int = DOCUMENTS) -> dict[str, np.ndarray[Any, Any]]:
    owner = np.sort(np.random.default_rng(seed).integers(0, documents, N)).astype("<i4")
    return {"act": values(N, (6,), seed=seed), "document": owner}


def lot(seed: int, number: int) -> float:
    """The definition, by numpy's own generator."""
    philox = np.random.Philox(np.random.SeedSequence(seed, spawn_key=(6,)))
    return int(philox.random_raw(number + 1)[number]) / 2**64


def part_of(seed: int, numbers: Any, cuts: Any = None) -> np.ndarray[Any, Any]:
    drawn = {n: lot(seed, int(n)) for n in np.unique(numbers)}
    cuts = cuts or CUTS
    return np.array([next(k for k, (a, b) in cuts.items() if a <= drawn[n] < b) for n in numbers])


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    group(home / "monday", fields(1))
    group(home / "tuesday", fields(2))
    shuffle(home / "monday", home / "s", seed=3)
    append(home / "s", home / "tuesday", home / "grown")
    return home


# --- The rule -------------------------------------------------------------------------------------


def test_lots_are_the_words_of_their_own_stream() -> None:
    numbers = np.array([5, 0, 3, 5, 1000])
    np.testing.assert_allclose(lots(7, numbers) / 2.0**64, [lot(7, n) for n in numbers], rtol=1e-12)
    assert lots(7, np.array([-1], "<i4")) == lots(7, np.array([2**64 - 1], "<u8"))


def test_shares_of_lots_are_even_under_many_seeds() -> None:
    """Two-sided: neither too uneven nor too even."""
    seen = np.array([in_share(lots(seed, np.arange(500)), 0.2, 0.5).sum() for seed in range(400)])
    spread = ((seen - 150) ** 2 / (500 * 0.3 * 0.7)).sum()
    assert 1e-4 < reference.chi2(400).cdf(spread) < 1 - 1e-4


def test_every_lot_is_in_one_share() -> None:
    words = np.array([0, 1, 2**63 - 1, 2**63, 2**64 - 1], np.uint64)
    cuts = edges({"a": 0.5, "b": 0.25, "c": 0.25})
    assert sum(in_share(words, *cut).astype(int) for cut in cuts.values()).tolist() == [1] * 5
    assert in_share(words, *cuts["a"]).tolist() == [True, True, True, False, False]
    assert edges({f"p{i}": 0.1 for i in range(10)})["p9"][1] == 1.0


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({}, "at least one"),
        ({"a": 10}, "the store grows; got 10"),
        ({"a": 0.0}, "fractions above 0"),
        ({"a": 1.5}, "fractions above 0"),
        ({"a": math.nan}, "fractions above 0"),
        ({"a": 0.7, "b": 0.7}, "add up to 1.4"),
        ({"a": 1.0, "b": "rest"}, "no rest is left"),
        ({"a": "rest", "b": "rest"}, "only one"),
    ],
)
def test_bad_shares_of_a_rule(parts: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        edges(parts)


# --- A collection ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("by", "copy"), [("document", False), ("document", True), ("row", False), ("row", True)])
def test_a_collection_is_split_by_the_rule(home: Path, tmp_path: Path, by: str, copy: bool) -> None:
    data = fields(1)
    made = split(home / "monday", SHARES, by=by, seed=4, folder=tmp_path, copy=copy)
    owner = part_of(4, data["document"] if by == "document" else np.arange(N))
    for name, part in made.items():
        for field, whole in data.items():
            np.testing.assert_array_equal(rows_of(part.read(field, 0, part.rows)), rows_of(whole[owner == name]))
        assert (part.marker is not None) == copy
        assert part.attributes["split"][0]["from"] == CUTS[name][0]
        again = shuffle(tmp_path / name, tmp_path / f"{name}.s", seed=8)
        assert verify(tmp_path / name, again.destination).ok
    assert "part of a split by" in CliRunner().invoke(main, ["info", str(tmp_path / "val.s")]).output


def test_parts_of_days_grow_apart(home: Path, tmp_path: Path) -> None:
    """Each day is split alone; a train store grows by train rows, and is what shuffling all train rows gives."""
    for day in ("monday", "tuesday"):
        split(home / day, {f"{day}-train": 0.7, f"{day}-val": "rest"}, by="document", folder=tmp_path)
    shuffle(tmp_path / "monday-train", tmp_path / "train", seed=5)
    append(tmp_path / "train", tmp_path / "tuesday-train")
    concat([tmp_path / "monday-train", tmp_path / "tuesday-train"], tmp_path / "both")
    assert verify(tmp_path / "both", tmp_path / "train").ok
    origin = came_from(tmp_path / "train", [0])[0]
    assert origin.source.endswith("-train")


# --- A shuffled store, before and after it grows --------------------------------------------------


@pytest.mark.parametrize("by", ["document", "row"])
def test_a_shuffled_store_is_split_by_the_rule_and_stays_so_when_it_grows(home: Path, tmp_path: Path, by: str) -> None:
    whole = open_dataset(home / "s")
    before = split(home / "s", SHARES, by=by, folder=tmp_path / "before", copy=True)
    number = whole.read("document" if by == "document" else "source_row", 0, N)
    owner, rows = part_of(0, number), whole.read("source_row", 0, N)
    for name, part in before.items():
        np.testing.assert_array_equal(part.read("source_row", 0, part.rows), rows[owner == name])
        np.testing.assert_array_equal(
            rows_of(part.read("act", 0, part.rows)), rows_of(whole.read("act", 0, N)[owner == name])
        )
        assert part.shuffled
        assert part.order != whole.order
        places = where_is(part, rows)
        np.testing.assert_array_equal(places[owner == name], np.arange(part.rows))
        assert (places[owner != name] == -1).all()
        assert Loader(part.path, 50).mixing().passed
    after = split(home / "grown", SHARES, by=by, folder=tmp_path / "after", copy=True)
    for name, part in after.items():
        old = part.read("source_row", 0, part.rows)
        np.testing.assert_array_equal(old[old < N], before[name].read("source_row", 0, before[name].rows))
    kept = [set(part.read("document" if by == "document" else "source_row", 0, part.rows)) for part in after.values()]
    assert not kept[0] & kept[1]
    assert not kept[1] & kept[2]


def test_ranges_of_a_grown_store_leak_and_it_is_said(home: Path, tmp_path: Path) -> None:
    """The control of the test above: rows that a range held out are trained on after the store has grown."""
    cut = {"train": 0.7, "val": "rest"}
    before, after = (split(home / s, cut, folder=tmp_path / s) for s in ("s", "grown"))
    held_out = set(before["val"].read("source_row", 0, before["val"].rows))
    assert held_out & set(after["train"].read("source_row", 0, after["train"].rows))
    said = CliRunner().invoke(main, ["split", str(home / "grown"), f"{tmp_path}/x=0.5"])
    assert "note: an append has made 1,800 rows of 2 sources" in said.output
    concat([home / "monday", home / "tuesday"], tmp_path / "both")
    shuffle(tmp_path / "both", tmp_path / "shuffled", seed=3, fsync=False)
    assert len(open_dataset(tmp_path / "shuffled").marker["parts"]) == 2
    assert "note" not in CliRunner().invoke(main, ["split", str(tmp_path / "shuffled"), f"{tmp_path}/z=0.5"]).output
    quiet = CliRunner().invoke(main, ["split", str(home / "s"), f"{tmp_path}/y=0.5"])
    assert "note" not in quiet.output


def test_a_part_is_its_own_store_when_the_whole_grows_in_place(home: Path, tmp_path: Path) -> None:
    shuffle(home / "monday", tmp_path / "s", seed=3)
    split(tmp_path / "s", {"v": 0.5}, folder=tmp_path)
    train = split(tmp_path / "s", {"t": 0.7}, by="document", folder=tmp_path, copy=True)["t"]
    loader = Loader(train.path, 100)
    next(iter(loader))
    state = json.loads(json.dumps(loader.state_dict()))
    append(tmp_path / "s", home / "tuesday")
    with pytest.raises(FormatError, match=r"which an append has since made 1,800 rows.*--by document --copy"):
        open_dataset(tmp_path / "v")
    resumed = Loader(tmp_path / "t", 100)
    resumed.load_state_dict(state)
    np.testing.assert_array_equal(next(iter(resumed))["source_row"], train.read("source_row", 100, 200))


def test_another_change_of_the_store_of_a_view_is_no_append(home: Path, tmp_path: Path) -> None:
    shuffle(home / "monday", tmp_path / "s", seed=3)
    split(tmp_path / "s", {"v": 0.5}, folder=tmp_path)
    shuffle(home / "monday", tmp_path / "s", seed=4, overwrite=True)
    with pytest.raises(FormatError, match="it is not the store it was"):
        open_dataset(tmp_path / "v")


# --- Again, and refusals --------------------------------------------------------------------------


@pytest.mark.parametrize(("store", "copy"), [("monday", False), ("monday", True), ("s", True)])
def test_the_same_split_again_changes_nothing(home: Path, tmp_path: Path, store: str, copy: bool) -> None:
    def cut(**other: Any) -> Any:
        options = {"by": "document", "folder": tmp_path, "copy": copy, **other}
        return split(home / store, {"a": 0.5, "b": "rest"}, **options)

    rows = [part.rows for part in cut().values()]
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    assert [part.rows for part in cut().values()] == rows
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before
    with pytest.raises(DestinationExistsError, match="exists already"):
        cut(seed=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_a_stopped_split_by_a_rule_resumes(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from actshuffle.building import splitting

    copy_through, calls = splitting.copy_through, []

    def dies(*args: Any, **options: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return copy_through(*args, **options)

    cut: dict[str, Any] = {"by": "row", "folder": tmp_path, "copy": True}
    monkeypatch.setattr(splitting, "copy_through", dies)
    with pytest.raises(KeyboardInterrupt):
        split(home / "s", SHARES, **cut)
    made = split(home / "s", SHARES, **cut)
    assert sum(part.rows for part in made.values()) == N
    assert sorted(p.name for p in tmp_path.iterdir()) == ["test", "train", "val"]


@pytest.mark.parametrize(
    ("store", "options", "words"),
    [
        ("s", {"by": "document"}, "give copy=True"),
        ("s", {"by": "token", "copy": True}, "by 'document' or 'row'"),
        ("s", {"seed": 3}, "a seed belongs"),
        ("monday", {"by": "document", "ordered": True}, "ordered=True is for ranges"),
        ("bare", {"by": "document"}, "no array of document numbers"),
        ("nothing", {"by": "row"}, "no such source"),
        (
            "few",
            {"by": "document"},
            'falls into b: the store has 1 document, and a share of 0.5 takes 0.5 of it on average; give by="row", '
            "which cuts its 9 rows, that part a larger share or none, or another seed$",
        ),
        ("part", {"by": "document"}, "give another seed"),
    ],
)
def test_refused_splits_by_a_rule_write_nothing(
    home: Path, tmp_path: Path, store: str, options: dict[str, Any], words: str
) -> None:
    group(tmp_path / "bare", {"act": values(9, (6,))})
    group(tmp_path / "few", {"act": values(9, (6,)), "document": np.zeros(9, "<i4")})
    split(home / "monday", {"part": 0.5}, by="document", folder=tmp_path)
    (tmp_path / "s").symlink_to(home / "s")
    (tmp_path / "monday").symlink_to(home / "monday")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ActshuffleError, match=words):
        split(tmp_path / store, {"a": 0.5, "b": "rest"}, folder=tmp_path, **options)
    assert sorted(tmp_path.rglob("*")) == before


def test_verify_says_that_a_part_is_one(home: Path, tmp_path: Path) -> None:
    part = split(home / "s", {"a": 0.5}, by="document", folder=tmp_path, copy=True)["a"]
    with pytest.raises(RequestError, match="a part of a shuffle, by document"):
        verify(home / "monday", part.path)
    assert info(part.path)["rows"] == part.rows
