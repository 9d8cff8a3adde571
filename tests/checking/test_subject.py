"""verify knows what it is given: healthy stores of every kind raise no alarm, and damage to each is still told."""

from __future__ import annotations

import json
import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from click.testing import CliRunner

import actshuffle
from actshuffle import append, concat, head, import_store, sample, shuffle, split, verify
from actshuffle.checking.contents import info, info_text
from actshuffle.cli.app import main
from actshuffle.errors import FormatError, RequestError
from support.stores import act_and_token, group

N, CUT = 90, 60
MARKER = "_actshuffle/zarr.json"
FIELDS = act_and_token(N)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """acts and more, a shuffle of acts, views, a sample, a copy, a grown store and the concatenation of its sources."""
    folder = tmp_path_factory.mktemp("made")
    for name, (a, b) in {"acts": (0, CUT), "more": (CUT, N)}.items():
        group(folder / name, {k: data[a:b] for k, data in FIELDS.items()})
    shuffle(folder / "acts", folder / "s", seed=3, chunk_rows=8)
    split(folder / "s", {"train": 0.8, "val": "rest"}, folder=folder)
    head(folder / "train", 10, folder / "inner")
    head(folder / "s", 10, folder / "copy", copy=True)
    sample(folder / "acts", 10, folder / "sample", seed=3)
    append(folder / "s", folder / "more", folder / "grown")
    concat([folder / "acts", folder / "more"], folder / "both")
    head(folder / "grown", 30, folder / "part of grown")
    return folder


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "made"))


def altered(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    body = json.loads(path.read_text())
    change(body)
    path.write_text(json.dumps(body, indent=2))


def marker_of(body: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = body["attributes"]["actshuffle"]
    return found


def consolidate(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        zarr.consolidate_metadata(path)


HEALTHY = [
    ("acts", "s"),
    ("acts", "train"),
    ("acts", "val"),
    ("acts", "inner"),
    ("both", "grown"),
    ("both", "part of grown"),
]


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize(("src", "dst"), HEALTHY)
def test_healthy_stores_raise_no_alarm(made: Path, src: str, dst: str, quick: bool) -> None:
    report = verify(made / src, made / dst, quick=quick, sample_rows=32)
    assert report.ok, str(report)
    assert any("is a view, rows" in note for note in report.notes) == (dst not in ("s", "grown"))


REFUSED = [
    ("s", "train", r"train is a view of \S*s, .*/acts$"),
    ("acts", "grown", r"90 rows of 2 sources.*actshuffle concat \S*acts \S*more --out ALL"),
    ("more", "grown", "of 2 sources"),
    ("acts", "part of grown", "of 2 sources"),
    ("acts", "sample", "a sample, 10 of 60 rows, .*--seed 3"),
    ("acts", "copy", "a copied part of a shuffle, 10 of 60 rows; verify the store from"),
    ("both", "both", "holds no rows"),
    ("s", "s", "is given twice"),
]


@pytest.mark.parametrize(("src", "dst", "said"), REFUSED)
def test_what_cannot_be_answered_is_refused_and_no_damage(made: Path, src: str, dst: str, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        verify(made / src, made / dst)
    result = CliRunner().invoke(main, ["verify", str(made / src), str(made / dst)])
    assert result.exit_code == 2
    assert "NOT" not in result.output


def test_collections_are_refused_and_damage_to_them_is_told(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", FIELDS["act"])
    import_store([tmp_path / "x.npy"], tmp_path / "c")
    group(tmp_path / "acts", {"data": FIELDS["act"]})
    with pytest.raises(RequestError, match=r"is a collection.*actshuffle stats"):
        verify(tmp_path / "acts", tmp_path / "c")
    altered(tmp_path / "c/zarr.json", lambda body: body["attributes"].update(x=1))
    assert not verify(tmp_path / "acts", tmp_path / "c").ok


# --- Negative controls: damage is told ----------------------------------------------------------


def shifted(body: dict[str, Any]) -> None:
    marker = marker_of(body)
    marker["start"], marker["stop"] = marker["start"] + 1, marker["stop"] + 1


def test_a_damaged_view_is_told(copied: Path) -> None:
    harms: dict[str, Callable[[], Any]] = {
        "a shifted range": lambda: altered(copied / "train" / MARKER, shifted),
        "other attributes": lambda: altered(copied / "train/zarr.json", lambda b: b["attributes"].update(x=1)),
        "no attributes": lambda: (copied / "train/zarr.json").unlink(),
        "damaged rows": lambda: flip(copied / "s/act/c.3.0", 9),
        "no rows": lambda: (copied / "s/act/c.3.0").unlink(),
        "no store": lambda: shutil.rmtree(copied / "s"),
        "another store": lambda: (shutil.rmtree(copied / "s"), shutil.move(copied / "grown", copied / "s")),
    }
    whole = copied.parent / "whole"
    shutil.copytree(copied, whole)
    for name, harm in harms.items():
        harm()
        result = CliRunner().invoke(main, ["verify", str(copied / "acts"), str(copied / "train")])
        assert (result.exit_code, "NOT the shuffle" in result.output) == (1, True), f"{name}: {result.output}"
        shutil.rmtree(copied)
        shutil.copytree(whole, copied)
        assert verify(copied / "acts", copied / "train").ok


def test_any_flipped_bit_of_a_view_is_told(copied: Path) -> None:
    rng, files = random.Random(4), [copied / "val" / MARKER, copied / "val/zarr.json"]
    for _ in range(60):
        path = rng.choice(files)
        before = path.read_bytes()
        flip(path, rng.randrange(8 * len(before)))
        try:
            assert not verify(copied / "acts", copied / "val", quick=True, sample_rows=16).ok
        except FormatError:  # the marker cannot be read
            assert path == files[0]
        path.write_bytes(before)


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def test_views_of_earlier_versions_are_read_with_a_note(copied: Path) -> None:
    def unsealed(body: dict[str, Any]) -> None:
        del marker_of(body)["sha256"], marker_of(body)["files"]

    before = actshuffle.open_dataset(copied / "train").read("act", 0, 5)
    altered(copied / "train" / MARKER, unsealed)
    report = verify(copied / "acts", copied / "train")
    assert report.ok
    assert any("earlier version" in note for note in report.notes)
    assert actshuffle.open_dataset(copied / "train").read("act", 0, 5).tobytes() == before.tobytes()
    altered(copied / "s" / "zarr.json", lambda body: body["attributes"].update(x=1))
    assert not verify(copied / "acts", copied / "train").ok


def test_a_damaged_grown_store_is_told_whatever_it_is_compared_with(copied: Path) -> None:
    altered(copied / "grown/zarr.json", lambda body: body["attributes"].update(x=1))
    for source in ("acts", "both"):
        assert not verify(copied / source, copied / "grown").ok
    shutil.copy(copied / "s/act/c.0.0", copied / "s/act/c.1.0")
    assert not verify(copied / "acts", copied / "s").ok


def test_a_source_of_other_rows_is_told_where_there_is_one_source(made: Path) -> None:
    report = verify(made / "more", made / "s")
    assert "shape" in str(report)
    assert not report.ok


# --- Consolidated metadata ----------------------------------------------------------------------


@pytest.mark.parametrize(("src", "dst"), [("acts", "s"), ("both", "grown"), ("acts", "val")])
def test_consolidated_metadata_is_no_damage(copied: Path, src: str, dst: str) -> None:
    before = verify(copied / src, copied / dst)
    consolidate(copied / dst)
    assert "consolidated_metadata" in (copied / dst / "zarr.json").read_text()
    report = verify(copied / src, copied / dst)
    assert report.ok, str(report)
    assert report.checked == before.checked
    if dst == "s":  # what is finished is still known to be
        assert "finished" in str(shuffle(copied / src, copied / dst, seed=3, chunk_rows=8)).lower()


def test_consolidated_metadata_hides_no_damage(copied: Path) -> None:
    consolidate(copied / "s")
    path = copied / "s/zarr.json"
    whole = path.read_text()
    harms: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
        (lambda b: b["attributes"].update(x=1), "not what was written"),
        (lambda b: b.update(extra=1), "not what was written"),
        (lambda b: b.update(consolidated_metadata=None), "not what was written"),
        (lambda b: b.update(consolidated_metadata={"metadata": [1]}), "not what was written"),
        (lambda b: b["consolidated_metadata"]["metadata"]["act"].update(shape=[30, 5]), "metadata of act is not"),
        (lambda b: b["consolidated_metadata"]["metadata"].update(gone={"shape": [1]}), "metadata of gone is not"),
    ]
    for harm, said in harms:
        altered(path, harm)
        report = verify(copied / "acts", copied / "s")
        assert any(p.where == "zarr.json" and said in p.detail for p in report.problems), str(report)
        path.write_text(whole)
    assert verify(copied / "acts", copied / "s").ok


# --- info ---------------------------------------------------------------------------------------


def test_info_lists_all_sources_of_a_grown_store(made: Path) -> None:
    text = info_text(info(made / "grown"))
    assert "from 2 sources" in text
    assert f"\n  {made / 'acts'}: 60 rows" in text
    assert f"\n  {made / 'more'}: 30 rows" in text
    assert "sources" not in info_text(info(made / "s"))
    assert np.all([part["rows"] for part in info(made / "grown")["shuffled"]["parts"]] == [CUT, N - CUT])
