"""Stores of earlier versions still open, and their half-done runs still resume or are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import fsspec
import pytest

import actshuffle
from actshuffle.arrays.names import FORMAT
from actshuffle.errors import FormatError, IncompleteStoreError
from actshuffle.testing import Faults, differences
from actshuffle.testing.stories import new_process
from make_fixture import PLAN, ROWS, SEED, URL, download, upload

FIXTURES = Path(__file__).parents[1] / "fixtures"
FOLDER = FIXTURES / f"format{FORMAT}"


def test_every_format_has_its_fixture():
    assert FOLDER.is_dir(), "python tests/make_fixture.py"
    size = sum(p.stat().st_size for p in FOLDER.rglob("*") if p.is_file())
    assert size < 60_000


@pytest.mark.parametrize("folder", sorted(FIXTURES.glob("format*")), ids=lambda p: p.name)
def test_finished_store_opens(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "f")
    src, dst = tmp_path / "f" / "src", tmp_path / "f" / "finished"
    assert differences(src, dst, SEED) == []
    assert actshuffle.verify(src, dst).ok
    assert actshuffle.verify(src, dst, quick=True).ok
    found = actshuffle.info(dst)
    assert found["rows"] == ROWS
    assert found["attributes"] == {"model": "tiny", "layer": 3}
    assert found["shuffled"]["seed"] == SEED
    assert actshuffle.status(dst)["state"] == "complete"


@pytest.mark.parametrize("folder", sorted(FIXTURES.glob("format*")), ids=lambda p: p.name)
def test_half_done_run_resumes(folder, tmp_path):
    files = fsspec.filesystem("memory")
    if files.exists(URL):
        files.rm(URL, recursive=True)
    upload(folder, URL)
    new_process()
    with pytest.raises(IncompleteStoreError):
        actshuffle.verify(f"{URL}/src", f"{URL}/half_done")
    state = actshuffle.status(f"{URL}/half_done")
    assert [level["done"] > 0 for level in state["levels"]] == [True, True, True]
    assert state["request"] == {"seed": SEED, **PLAN}
    log = Faults()
    with log:
        result = actshuffle.shuffle(f"{URL}/src", f"{URL}/half_done", seed=SEED, **PLAN)
    assert result.resumed == 2
    written = {o.key for o, _ in log.log if o.name == "put"}
    assert not [key for key in written if "blocks" in key or key.endswith("receipts/1.json")]
    download(URL, tmp_path)
    assert differences(folder / "src", tmp_path / "half_done", SEED) == []
    ours = {p.relative_to(tmp_path / "half_done") for p in (tmp_path / "half_done").rglob("*")}
    assert Path("_actshuffle/run.json") not in ours
    assert not list(tmp_path.glob("*scratch*"))


def test_fixture_names_no_machine():
    text = b"".join(p.read_bytes() for p in FOLDER.rglob("*.json"))
    for name in (b"/home", b"/tmp", b"/root", b"/work", b"/Users"):
        assert name not in text


def test_every_file_of_ours_names_its_format():
    """Or is a Zarr document, whose format has its own name."""
    for path in FOLDER.rglob("*.json"):
        document = json.loads(path.read_bytes())
        if "sha256" in document:
            assert document["body"]["format"] == FORMAT, path
        else:
            assert document["zarr_format"] == 3, path
    marker = json.loads((FOLDER / "finished/_actshuffle/zarr.json").read_bytes())
    assert marker["attributes"]["actshuffle"]["format"] == FORMAT


@pytest.mark.parametrize("number", [0, 2, 99, "1", None])
def test_other_formats_are_refused(number, tmp_path):
    shutil.copytree(FOLDER, tmp_path / "f")
    path = tmp_path / "f/finished/_actshuffle/zarr.json"
    document = json.loads(path.read_bytes())
    document["attributes"]["actshuffle"]["format"] = number
    path.write_text(json.dumps(document))
    for call in (
        lambda: actshuffle.verify(tmp_path / "f/src", tmp_path / "f/finished"),
        lambda: actshuffle.info(tmp_path / "f/finished"),
        lambda: actshuffle.shuffle(tmp_path / "f/src", tmp_path / "f/finished", seed=SEED),
    ):
        with pytest.raises(FormatError, match=f"format {number}"):
            call()
