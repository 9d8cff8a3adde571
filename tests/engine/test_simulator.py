"""The simulator: a small shuffle under one seed, with a store that fails in every way, until it is done."""

from __future__ import annotations

import shutil

import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from actshuffle.errors import InfeasibleError, StorageError, StorageFullError
from actshuffle.storage.files import LocalObjects
from actshuffle.storage.objects import open_objects, wrapped
from actshuffle.storage.place import as_place
from actshuffle.testing import (
    DEADLY,
    HONEST,
    KINDS,
    Faults,
    Killed,
    SimulationError,
    at,
    differences,
    drawn,
    leftovers,
    matching,
    plans,
    run,
    simulate,
    stores,
)
from actshuffle.testing.stories import Dice, choose_plan, choose_store, new_process

# --- The simulator ------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(30))
def test_every_story_ends_well(seed, tmp_path):
    simulate(seed, tmp_path)


def test_stories_gather_too():
    told = [choose_plan(dice, choose_store(dice)).get("gather") for dice in map(Dice, range(50))]
    assert 0 < sum(map(bool, told)) < 25


def test_a_claim_torn_at_the_last_is_begun_again(tmp_path):
    """The error asks for --overwrite as late as in the last attempt."""
    assert len(simulate(5049, tmp_path, rate=0.35).attempts) == 10


@pytest.mark.parametrize("seed", range(1000, 1010))
def test_a_store_that_lies_is_caught(seed, tmp_path):
    """Some damage is harmless: half an object that is written again later, say."""
    simulate(seed, tmp_path, kinds=KINDS, rate=0.05)


@pytest.mark.soak
@pytest.mark.parametrize("block", range(20))
def test_every_story_ends_well_a_thousand_times(block, tmp_path):
    for seed in range(10_000 + 50 * block, 10_050 + 50 * block):
        simulate(seed, tmp_path / str(seed), rate=[0.01, 0.03, 0.1][seed % 3])
        shutil.rmtree(tmp_path / str(seed))


@pytest.mark.soak
@pytest.mark.parametrize("block", range(10))
def test_a_store_that_lies_is_caught_a_thousand_times(block, tmp_path):
    caught = 0
    for seed in range(50_000 + 100 * block, 50_100 + 100 * block):
        caught += simulate(seed, tmp_path / str(seed), kinds=("silent",), rate=0.02).caught
        shutil.rmtree(tmp_path / str(seed))
    assert caught > 0


@pytest.mark.parametrize("seed", [3, 17])
def test_same_seed_same_story(seed, tmp_path):
    first = simulate(seed, tmp_path / "a" / "x", rate=0.1)
    again = simulate(seed, tmp_path / "b" / "x", rate=0.1)
    assert first.operations == again.operations
    assert len(first.attempts) == len(again.attempts)
    assert any(fault for *_, fault in first.operations)


def test_seeds_tell_different_stories(tmp_path):
    told = {simulate(seed, tmp_path / str(seed), rate=0.1).operations for seed in range(4)}
    assert len(told) == 4


def test_seeds_meet_every_kind_of_fault(tmp_path):
    met = set()
    for seed in range(12):
        story = simulate(seed, tmp_path / str(seed), rate=0.2)
        met |= {fault for *_, fault in story.operations}
    assert met == {None, *HONEST}


# --- Controls: the simulator sees what is wrong --------------------------------------------------


def test_control_receipts_are_believed(tmp_path, monkeypatch):
    """An engine that does not look at the objects that a receipt names loses rows when power fails, and
    the simulator names the seed."""
    from actshuffle.engine import tasks
    from actshuffle.jobs.receipts import read_receipt

    monkeypatch.setattr(tasks, "is_done", lambda job, task: read_receipt(job, task) is not None)
    with pytest.raises(SimulationError, match=r"simulate\(\d+, folder, kinds="):
        for seed in range(200):
            simulate(seed, tmp_path / str(seed), kinds=("power",), rate=0.05)


def test_control_no_claim(tmp_path, monkeypatch):
    """An engine that does not record its request cannot resume."""
    from actshuffle.engine import manifest

    monkeypatch.setattr(manifest, "write_run", lambda job: None)
    with pytest.raises(SimulationError):
        for seed in range(50):
            simulate(seed, tmp_path / str(seed), kinds=("kill",), rate=0.05)


def test_control_marker_first(tmp_path, monkeypatch):
    """An engine that reports completion too early leaves an incomplete store."""
    from actshuffle.engine import manifest
    from actshuffle.engine import run as runs

    inner = runs._claim

    def hasty(job):
        inner(job)
        manifest.write_marker(job, {f.name: "0" * 32 for f in job.fields})

    monkeypatch.setattr(runs, "_claim", hasty)
    with pytest.raises(SimulationError):
        for seed in range(50):
            simulate(seed, tmp_path / str(seed), kinds=("kill",), rate=0.05)


# --- The wrapper --------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path):
    return as_place(tmp_path / "root")


def test_without_faults_nothing_changes(place):
    with Faults() as faults:
        objects = open_objects(place)
        objects.put("a/b", b"hello")
        assert objects.get("a/b") == b"hello"
        assert objects.size("a/b") == 5
        assert list(objects.list("")) == ["a/b"]
        assert list(objects.sizes("a")) == [("a/b", 5)]
        assert list(objects.names("")) == ["a"]
        objects.delete("a/b")
        assert objects.get("a/b") is None
    assert isinstance(open_objects(place), LocalObjects)
    names = [operation.name for operation, _ in faults.log]
    assert names == ["put", "get", "size", "list", "list", "names", "delete", "get"]


@pytest.mark.parametrize(
    ("kind", "error", "there"),
    [
        ("error", StorageError, None),
        ("full", StorageFullError, None),
        ("lost", StorageError, b"hello"),
        ("kill", Killed, None),
        ("late", Killed, b"hello"),
    ],
)
def test_a_put_that_fails(kind, error, there, place):
    with Faults(at({0: kind})), pytest.raises(error):
        open_objects(place).put("k", b"hello")
    assert open_objects(place).get("k") == there


@pytest.mark.parametrize(("kind", "dies"), [("torn", True), ("silent", False)])
def test_a_put_that_is_torn(kind, dies, place):
    faults = Faults(at({0: kind}), seed=1)
    with faults:
        if dies:
            with pytest.raises(Killed):
                open_objects(place).put("k", b"hello")
        else:
            open_objects(place).put("k", b"hello")
    left = open_objects(place).get("k")
    assert left is not None
    assert b"hello".startswith(left)
    assert len(left) < 5


@pytest.mark.parametrize("kind", ["kill", "power"])
def test_a_killed_writer_leaves_half_a_file(kind, place, tmp_path):
    with Faults(at({0: kind})), pytest.raises(Killed):
        open_objects(place).put("k", b"hello")
    assert [p.suffix for p in (tmp_path / "root").iterdir()] == [".actshuffle-partial"]
    assert list(open_objects(place).list("")) == []


def test_a_dead_process_does_nothing_more(place):
    with Faults(at({1: "kill"})):
        objects = open_objects(place)
        objects.put("a", b"1")
        for call in (
            lambda: objects.put("b", b"2"),
            lambda: objects.get("a"),
            lambda: objects.delete("a"),
            lambda: objects.delete_prefix(""),
        ):
            with pytest.raises(Killed, match="operation 1"):
                call()
    assert open_objects(place).get("a") == b"1"


def test_a_stale_read_sees_the_past(place):
    with Faults(matching("get k", "stale")):
        objects = open_objects(place)
        objects.put("k", b"old")
        objects.put("k", b"new")
        assert objects.get("k") == b"old"
        assert objects.get("k") == b"new"
    with Faults(matching("size n", "stale")):
        objects = open_objects(place)
        objects.put("n", b"1")
        assert objects.size("n") is None


def test_power_failure_undoes_what_was_not_settled(place):
    lost = kept = 0
    for seed in range(20):
        with Faults(matching("get now", "power"), seed=seed):
            objects = open_objects(place)
            objects.put("settled", b"1")
            objects.settle([""])
            objects.put("k", b"2")
            objects.delete("settled")
            with pytest.raises(Killed):
                objects.get("now")
        objects = open_objects(place)
        lost += objects.get("k") is None
        kept += objects.get("settled") == b"1"
        objects.delete_prefix("")
    assert 0 < lost < 20
    assert 0 < kept < 20


def test_slow_calls_take_their_time(place):
    import time

    with Faults(at({0: "slow"}), seconds=0.2):
        started = time.monotonic()
        open_objects(place).put("k", b"1")
    assert time.monotonic() - started >= 0.2
    assert open_objects(place).get("k") == b"1"


def test_schedules():
    from actshuffle.testing import Operation

    assert at({3: "kill"})(Operation(3, "get", "", "k")) == "kill"
    assert at({3: "kill"})(Operation(4, "get", "", "k")) is None
    twice = matching("put x/*", "error", times=2)
    told = [twice(Operation(i, "put", "", f"{k}/c")) for i, k in enumerate("axxx")]
    assert told == [None, "error", "error", None]
    first, again = ([drawn(7, 0.3)(Operation(i, "get", "", "")) for i in range(100)] for _ in "ab")
    dice = drawn(7, 0.3)
    drawn_here = [dice(Operation(i, "get", "", "")) for i in range(1000)]
    assert 200 < sum(kind is not None for kind in drawn_here) < 400
    assert first == again
    assert set(DEADLY) < set(HONEST) < set(KINDS)


def test_wrapping_ends_with_the_block(place):
    with wrapped(lambda objects, place: "mine"):
        assert open_objects(place) == "mine"
    assert isinstance(open_objects(place), LocalObjects)


# --- Strategies ---------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_store_under_any_plan(data, tmp_path):
    store = data.draw(stores())
    plan = data.draw(plans(store))
    folder = tmp_path / "case"
    shutil.rmtree(folder, ignore_errors=True)
    src, dst = folder / "src.zarr", folder / "dst.zarr"
    store.write(src)
    new_process()
    try:
        run(src, dst, 1, **plan)
    except InfeasibleError:
        assert not dst.exists()
        return
    assert differences(src, dst, 1) == []
    assert leftovers(dst) == []


def test_the_check_sees_a_flipped_bit(tmp_path):
    store = choose_store(Dice(4))
    src, dst = tmp_path / "src.zarr", tmp_path / "dst.zarr"
    store.write(src)
    run(src, dst, 1)
    assert differences(src, dst, 1) == []
    assert differences(src, dst, 2) != []
    array = zarr.open_array(dst / store.arrays[0].name, mode="r+")
    before = array[...]
    array[...] = before[::-1]
    assert differences(src, dst, 1) == [f"array {store.arrays[0].name} differs"]
    shutil.rmtree(dst / store.arrays[0].name)
    assert differences(src, dst, 1) == [f"array {store.arrays[0].name} is absent"]
