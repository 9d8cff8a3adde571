"""Files that change behind a run's back: the source, the spill, the output, and the records of all three.

A run is stopped, one file is damaged, and the run starts again.  It may only end in the exact output, in a
typed error that says what to do, or in an output that `verify` rejects.  (test_verify.py damages finished
outputs.)
"""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

import actshuffle
from actshuffle.engine import leaves, totals
from actshuffle.engine import run as runs
from actshuffle.engine.scratch import scratch_place
from actshuffle.errors import ActshuffleError, ConservationError, FormatError
from actshuffle.storage.place import as_place
from actshuffle.testing import Faults, Killed, differences, leftovers, matching
from actshuffle.testing import run as serial_run
from actshuffle.testing.stories import new_process
from support.processes import PLAN, SEED, source

STOPS = [
    "put level1/blocks/c.3.0",
    "put level1/index/0.json",
    "put level2/blocks/c.2.0",
    "put level2/index/1.json",
    "put _actshuffle/receipts/0.json",
    "put _actshuffle/receipts/2.json",
    "put _actshuffle/digests/x/*",
]
PARENTS = 4  # buckets of level 1: a block has rows for each, and each is found out on its own
HARMS = ["flip", "truncate", "delete", "swap", "stale"]


class States:
    """Half-done runs, each stopped at another point, and the same runs under another seed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.src = source(folder / "src.zarr")
        self.dst = folder / "work" / "dst.zarr"
        self.scratch = Path(scratch_place(as_place(self.dst), None).url)
        self.dst.parent.mkdir()
        for seed in (SEED, SEED + 1):
            for number, stop in enumerate(STOPS):
                new_process()
                with Faults(matching(stop, "kill")), pytest.raises(Killed):
                    serial_run(self.src, self.dst, seed, **PLAN)
                self.dst.parent.rename(folder / f"state{seed}-{number}")
                self.dst.parent.mkdir()

    def restore(self, number: int) -> None:
        shutil.rmtree(self.dst.parent)
        shutil.copytree(self.folder / f"state{SEED}-{number}", self.dst.parent)

    def files(self) -> list[Path]:
        return [p for p in sorted(self.dst.parent.rglob("*")) if p.is_file() and "partial" not in p.name]

    def stale(self, path: Path) -> bytes | None:
        """The contents of the same file in runs of another seed, at any point of the run."""
        name = path.relative_to(self.dst.parent)
        for number in range(len(STOPS)):
            other = self.folder / f"state{SEED + 1}-{number}" / name
            if other.exists():
                return other.read_bytes()
        return None


@pytest.fixture(scope="session")
def states(tmp_path_factory):
    return States(tmp_path_factory.mktemp("states"))


def harm(dice: random.Random, states: States, how: str) -> list[Path]:
    """Damage one file, or swap two; returns the files that have changed."""
    files = [p for p in states.files() if p.stat().st_size]
    path = dice.choice(files)
    data = path.read_bytes()
    if how == "flip":
        bit = dice.randrange(8 * len(data))
        path.write_bytes(data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :])
    elif how == "truncate":
        path.write_bytes(data[: dice.randrange(len(data))])
    elif how == "delete":
        path.unlink()
    elif how == "swap":
        alike = [p for p in files if p.parent == path.parent and p != path] or [p for p in files if p != path]
        other = dice.choice(alike)
        path.write_bytes(other.read_bytes())
        other.write_bytes(data)
        return [p for p, was in ((path, data), (other, path.read_bytes())) if p.read_bytes() != was]
    else:
        stale = states.stale(path)
        if stale is None or stale == data:
            return []
        path.write_bytes(stale)
    return [path]


def resumed(states: States, seed: int) -> tuple[list[ActshuffleError], bool]:
    """Run again for as long as errors ask for it; returns the messages, and whether the run finished."""
    said: list[ActshuffleError] = []
    for _ in range(5):
        new_process()
        try:
            serial_run(states.src, states.dst, SEED, **PLAN)
            return said, True
        except ActshuffleError as err:
            said.append(err)
            if "overwrite=True" in str(err):
                return said, False
        except Exception as err:
            raise AssertionError(f"seed {seed}: {type(err).__name__}: {err}") from err
    raise AssertionError(f"seed {seed}: stuck: {said[-1]}")


def _named(name: str) -> str:
    """A file's key in its place, the name that errors use."""
    return name.split("/", 1)[1]


def campaign(states: States, how: str, seeds: range) -> dict[str, int]:
    """Count the damages that the run detected, that verify detected, and that did no harm."""
    found = {"by the run": 0, "by verify": 0, "harmless": 0}
    for seed in seeds:
        dice = random.Random(seed)
        states.restore(dice.randrange(len(STOPS)))
        harmed = harm(dice, states, how)
        names = [str(p.relative_to(states.dst.parent)) for p in harmed]
        said, finished = resumed(states, seed)
        if said:  # the first that is said names what was harmed
            claim = "run.json" in str(names) and "overwrite=True" in str(said[0])
            assert claim or any(_named(n) in str(said[0]) for n in names), (seed, names, said[0])
        assert len(said) <= PARENTS, (seed, names, said)
        if not finished:
            assert any("run.json" in n for n in names), (seed, names, said)
            found["by the run"] += 1
            continue
        assert leftovers(states.dst) == [], (seed, names)
        differ = differences(states.src, states.dst, SEED)
        report = actshuffle.verify(states.src, states.dst)
        if differ:
            assert not report.ok, (seed, names, differ)
        assert report.ok or all("scratch" not in n for n in names), (seed, names, str(report))
        kind = "by verify" if not report.ok else "by the run" if said else "harmless"
        if kind == "by verify":
            assert any(_named(n) in str(report) for n in names), (seed, names, str(report))
        found[kind] += 1
    return found


@pytest.mark.parametrize("how", HARMS)
def test_harm_to_a_half_done_run(how, states):
    found = campaign(states, how, range(8))
    assert sum(found.values()) == 8


def test_control_sums_that_are_not_compared(states, monkeypatch):
    """An engine that does not check that rows arrived writes damaged ones, and the campaign detects them."""
    for module in (totals, leaves):
        monkeypatch.setattr(module, "check_conserved", lambda *args: None)
    with pytest.raises(AssertionError, match="NOT the shuffle"):
        campaign(states, "flip", range(40))


def test_control_a_run_that_does_not_clear_away(states, monkeypatch):
    monkeypatch.setattr(runs, "_clear", lambda *_: None)
    with pytest.raises(AssertionError, match=r"receipts|DestinationExists|finished"):
        campaign(states, "delete", range(10))


def test_records_of_other_kinds_are_not_taken_for_the_claim(states):
    """A receipt has a valid seal, but it is not a run.json."""
    states.restore(4)
    shutil.copy(states.scratch / "level2/receipts/0.json", states.dst / "_actshuffle/run.json")
    with pytest.raises(FormatError, match="overwrite=True"):
        serial_run(states.src, states.dst, SEED, **PLAN)


@pytest.mark.parametrize("table", ["runs", "sums"])
def test_tables_of_other_buckets_and_runs_are_not_believed(table, states):
    """Such tables are well-formed, but point to places without rows."""
    for other in ("swapped", "stale"):
        states.restore(4)
        paths = [states.scratch / f"level2/{table}/c.{n}.0.0" for n in (2, 3)]
        if other == "swapped":
            paths[0].rename(paths[0].with_suffix(".t"))
            paths[1].rename(paths[0])
            paths[0].with_suffix(".t").rename(paths[1])
        else:
            paths[0].write_bytes(states.stale(paths[0]))
        new_process()
        with pytest.raises(FormatError, match=f"level2/{table}/c.2.0.0.*checksum"):
            serial_run(states.src, states.dst, SEED, **PLAN)
        assert resumed(states, 0)[1]
        assert differences(states.src, states.dst, SEED) == []


@pytest.mark.soak
@pytest.mark.parametrize("how", HARMS)
@pytest.mark.parametrize("block", range(2))
def test_harm_to_a_half_done_run_by_the_hundred(how, block, states):
    count = 200 if how == "flip" else 75
    found = campaign(states, how, range(1000 + block * count, 1000 + (block + 1) * count))
    assert found["by the run"] + found["by verify"] > 0


@pytest.mark.parametrize("level", [1, 2])
def test_flipped_bit_in_any_column_of_the_spill_is_found_and_named(level, states):
    """Damage to keys, source rows and each field: the run names the block, and redoes it."""
    for seed in range(8):
        states.restore(1 if level == 1 else 3)
        path = states.scratch / f"level{level}/blocks/c.{seed % 3}.0"
        data = bytearray(path.read_bytes())
        data[(len(data) - 1) * seed // 8] ^= 16
        path.write_bytes(data)
        new_process()
        with pytest.raises(ConservationError, match=f"level{level}/blocks/c.{seed % 3}.0"):
            serial_run(states.src, states.dst, SEED, **PLAN)
        said, finished = resumed(states, seed)
        assert (said, finished) == ([], True)
        assert differences(states.src, states.dst, SEED) == []


# --- The source -------------------------------------------------------------------------------------


def harm_source(dice: random.Random, src: Path, how: str) -> None:
    files = [p for p in sorted(src.rglob("*")) if p.is_file()]
    path = dice.choice(files)
    data = bytearray(path.read_bytes())
    if how == "flip":
        data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
        path.write_bytes(data)
    elif how == "truncate":
        path.write_bytes(data[: dice.randrange(len(data))])
    elif how == "delete":
        path.unlink()
    else:
        other = dice.choice([p for p in files if p != path and p.parent.parent == path.parent.parent] or files)
        path.write_bytes(other.read_bytes())
        other.write_bytes(data)


def source_campaign(states: States, how: str, seeds: range, folder: Path) -> None:
    """The source is damaged while a run is half done.

    The run refuses a change of size or metadata.  A change of neither goes unnoticed: the output is the
    shuffle of the changed source, or, if rows were read before, verify rejects it.
    """
    for seed in seeds:
        dice = random.Random(seed)
        src, dst = folder / "src.zarr", folder / "dst.zarr"
        for path in (src, dst, Path(scratch_place(as_place(dst), None).url)):
            shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(states.src, src)
        new_process()
        with Faults(matching(dice.choice(STOPS), "kill")), pytest.raises(Killed):
            serial_run(src, dst, SEED, **PLAN)
        harm_source(dice, src, how)
        new_process()
        try:
            serial_run(src, dst, SEED, **PLAN)
        except ActshuffleError:
            continue
        except Exception as err:
            raise AssertionError(f"seed {seed}: {type(err).__name__}: {err}") from err
        if differences(src, dst, SEED):
            assert not actshuffle.verify(src, dst).ok, seed


@pytest.mark.parametrize("how", ["flip", "truncate", "delete", "swap"])
def test_harm_to_the_source_between_runs(how, states, tmp_path):
    source_campaign(states, how, range(8), tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize("how", ["flip", "truncate", "delete", "swap"])
def test_harm_to_the_source_between_runs_by_the_hundred(how, states, tmp_path):
    source_campaign(states, how, range(1000, 1050), tmp_path)
