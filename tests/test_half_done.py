"""Runs that version 0.1.0 left half-done resume, task by task, and end in the exact output."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

import actshuffle
from actshuffle.engine import scratch
from actshuffle.errors import ResumeMismatchError
from make_half_done import CASES, HERE, PLAN, ROWS, SEED, WORDS, packed, stop, unpack, values, write_sources


class Watching:
    """Counts the tasks that a run finds done, and the bytes of rows that it moves in the others."""

    def __init__(self) -> None:
        self.found = self.moved = 0

    def begin(self, stage: str, tasks: int, nbytes: int) -> None: ...

    def advance(self, nbytes: int, fresh: bool) -> None:
        self.found, self.moved = self.found + (not fresh), self.moved + nbytes * fresh

    def end(self) -> None: ...


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The half-done runs, unpacked in the current folder, with a folder in place of the machine's memory."""
    unpack(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(scratch, "MEMORY_FOLDER", tmp_path / "memory")
    for kept in (tmp_path / "memory").iterdir():
        kept.chmod(0o700)
        kept.rename(kept.with_name(f"actshuffle-{os.geteuid()}-{kept.name}"))
    return tmp_path


def records(folder: Path, name: str) -> set[str]:
    """The files that only a half-done run of a name has: its records, its scratch, and half-written files."""
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    marks = ("/run.json", "/receipts/", ".scratch-", ".actshuffle-partial")
    return {key for key in found if key.startswith(f"{name}.") and any(mark in key for mark in marks)}


@pytest.mark.parametrize("name", CASES)
def test_run_of_an_earlier_version_resumes(name: str, here: Path) -> None:
    case = CASES[name]
    if name == "collect":
        pytest.importorskip("torch")
        pytest.importorskip("transformers")
    assert records(here, name)
    seen = Watching()
    case.start(progress=seen)
    assert seen.found == case.found
    assert (seen.moved > 0) == (name != "cut")  # whose only leaf was written: it is looked at once, and published
    group = zarr.open_group(here / f"{name}.zarr", mode="r")
    expected = values() if name != "collect" else tokens()
    for field, data in expected.items():
        np.testing.assert_array_equal(group[field][:], data[case.rows()], err_msg=field)
    if "source_row" in group:
        np.testing.assert_array_equal(group["source_row"][:], case.rows())
    assert not records(here, name)
    beside = {path.name for path in here.iterdir() if path.name.startswith(f"{name}.")}
    assert beside == {f"{name}.zarr"}
    assert actshuffle.status(HERE / f"{name}.zarr")["state"] == "complete"


def tokens() -> dict[str, Any]:
    """The columns of the collected rows that do not depend on how a machine adds."""
    return {
        "token": 1 + np.arange(ROWS) % (len(WORDS) - 1),
        "document": np.zeros(ROWS, int),
        "position": np.arange(ROWS),
    }


def test_finished_part_of_a_collection_stays(here: Path) -> None:
    """Values depend on the machine in their last bit, so those that existed before must be unchanged."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    before = np.frombuffer((here / "collect.zarr/layer_1/c.0.0").read_bytes(), "<f4").reshape(-1, 2)
    CASES["collect"].start()
    found = zarr.open_group(here / "collect.zarr", mode="r")["layer_1"][:]
    np.testing.assert_array_equal(found[: len(before)], before)
    assert np.isfinite(found).all()
    assert np.abs(found).min() > 0


def differing(found: dict[str, bytes], kept: dict[str, bytes]) -> list[str]:
    """Files that only one of two folders has, and files that differ."""
    return sorted(key for key in {*found, *kept} if found.get(key) != kept.get(key))


def test_runs_that_stop_today_leave_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All records, spills, outputs and finished sources.  Whoever changes one on purpose keeps this fixture for the
    tests above, and makes another for this test."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "memory").mkdir()
    monkeypatch.setattr(scratch, "MEMORY_FOLDER", tmp_path / "memory")
    write_sources(tmp_path)
    for name, case in CASES.items():
        if name != "collect":
            stop(case, **({"renumber": False} if name.startswith("append") else {}))  # as version 0.1.0 did
    found = {str(path.relative_to(tmp_path)): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    found = {re.sub(r"^memory/actshuffle-\d+-", "memory/", key): data for key, data in found.items()}
    kept = {key: data for key, data in packed().items() if not key.startswith(("collect.", "model/"))}
    # A gather finds its rows by keys in scratch, where that of version 0.1.0 had boundaries between leaves.
    found, kept = (
        {key: data for key, data in f.items() if not re.match(r"gather\.zarr\.scratch-\w+/(keys/|bounds)", key)}
        for f in (found, kept)
    )
    version = f'"version": "{actshuffle.__version__}"'.encode()
    found = {key: data.replace(version, b'"version": "0.1.0"') for key, data in found.items()}
    if actshuffle.__version__ != "0.1.0":  # the digest of a marker is one of its version, too
        found, kept = ({k: v for k, v in f.items() if not k.endswith("_actshuffle/zarr.json")} for f in (found, kept))
    assert len(found) > 300
    assert differing(found, kept) == []


def test_spill_that_went_with_the_memory_is_made_again(here: Path) -> None:
    shutil.rmtree(here / "memory")
    (here / "memory").mkdir()
    seen = Watching()
    CASES["spill_memory"].start(progress=seen)
    assert seen.found == 1
    found = zarr.open_group(here / "spill_memory.zarr", mode="r")["x"][:]
    np.testing.assert_array_equal(found, values()["x"][CASES["spill_memory"].rows()])


def test_status_of_a_run_of_an_earlier_version(here: Path) -> None:
    state = actshuffle.status(HERE / "level_2.zarr")
    assert state["state"] != "complete"
    assert [level["done"] for level in state["levels"]] == [3, 1]
    assert state["request"] == {"seed": SEED, "levels": 2, **PLAN}


# --- Negative controls ----------------------------------------------------------------------------------------


def test_control_a_changed_source_makes_another_job(here: Path) -> None:
    zarr.open_group(here / "all.zarr").attrs["model"] = "another"
    with pytest.raises(ResumeMismatchError, match="begun otherwise: SRC has other attributes; over"):
        CASES["level_1"].start()


def test_control_receipts_of_another_job_count_for_nothing(here: Path) -> None:
    for path in here.glob("level_1.zarr.scratch-*/level1/receipts/*.json"):
        body = json.loads(path.read_text())["body"] | {"job": "0" * 32}
        seal = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        path.write_text(json.dumps({"sha256": seal, "body": body}))
    seen = Watching()
    CASES["level_1"].start(progress=seen)
    assert seen.found == 0


def test_control_another_place_is_another_job(here: Path) -> None:
    """The identity is a digest of the places: a run that was moved does not resume."""
    (here / "level_1.zarr").rename(here / "moved.zarr")
    with pytest.raises(ResumeMismatchError, match="otherwise: DST was another path, scratch was another path; over"):
        actshuffle.shuffle(HERE / "all.zarr", HERE / "moved.zarr", seed=SEED, levels=2, **PLAN)


def test_control_a_changed_byte_is_seen() -> None:
    kept = packed()
    key = "level_1.zarr/_actshuffle/run.json"
    assert differing(kept | {key: kept[key].replace(b"24", b"25", 1)}, kept) == [key]
    assert differing(kept | {"level_1.zarr/zarr.json": b"{}"}, kept) == ["level_1.zarr/zarr.json"]
