"""Runs of `build_features`: the same bytes however the work is cut, repeated or killed; and what is refused."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
import subprocess
import sys
import tracemalloc
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from safetensors.torch import load_file, save_file

import actshuffle
import saetrain
from actshuffle.errors import (
    ConservationError,
    DestinationExistsError,
    InfeasibleError,
    RequestError,
    ResumeMismatchError,
    SourceError,
    StorageFullError,
)
from actshuffle.executors import Serial
from actshuffle.testing import Faults, Killed, Operation, matching
from saetrain.cli import main
from saetrain.compute import screen
from saetrain.describing.slots import Slots
from saetrain.errors import ConfigError, DataError, ExchangeError
from saetrain.features import codes, pipeline
from saetrain.features import collate as collating
from saetrain.features import dictionary as dictionaries
from saetrain.features import encode as encoding
from saetrain.features.collate import collate
from saetrain.features.dictionary import Dictionary
from saetrain.features.forecast import forecast, result_bytes
from saetrain.features.gathering import BYTES
from saetrain.foreign import read_foreign
from saetrain.tensors import TensorFile, sha256
from saetrain.training.train import fit
from support.executors import Watched
from support.features import LATENTS, TINY, content, dense, dictionary, store
from support.finished import finish
from support.sae import ARCHS, MemorySource, Planted, one_rank, small
from support.stores import group

ROWS = 300
KINDS = ("standard", "topk", "jumprelu")


@pytest.fixture(scope="module")
def acts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return store(tmp_path_factory.mktemp("store") / "acts.zarr", ROWS)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, acts: Path) -> dict[str, tuple[Path, Path]]:
    """For each kind: the dictionary, and a result of one shard and one block."""
    folder = tmp_path_factory.mktemp("whole")
    for kind in KINDS:
        build(dictionary(folder / kind, kind), acts, folder / f"{kind}.out")
    return {kind: (folder / kind, folder / f"{kind}.out") for kind in KINDS}


def build(where: Path, acts: Path, out: Path, **settings: Any) -> Any:
    return saetrain.build_features(where, acts, out, **{"fsync": False, **TINY, **settings})


# --- The same bytes -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("shards", "blocks", "most"), [(1, 3, 120), (2, 7, 300), (5, 1, 10**6), (5, 7, 48)])
def test_any_cut_gives_the_same_bytes(tmp_path, whole, acts, monkeypatch, kind, shards, blocks, most):
    monkeypatch.setattr(pipeline, "most_entries", lambda plan, memory: most)  # below what the tasks' memory asks for
    where, due = whole[kind]
    done = build(where, acts, tmp_path / "out", shards=shards, block_rows=-(-ROWS // blocks))
    assert done.tasks > shards * blocks
    assert content(tmp_path / "out") == content(due)


@pytest.mark.parametrize("kind", KINDS)
def test_any_type_of_the_rough_product_gives_the_same_bytes(tmp_path, whole, acts, monkeypatch, kind):
    where, due = whole[kind]
    monkeypatch.setattr(screen, "MANY", 0)  # so that bfloat16 is kept to
    narrow = []
    for dtype in screen.TYPES:
        monkeypatch.setattr(screen, "fastest_type", lambda d, dtype=dtype: dtype)
        dictionaries.shard_of.cache_clear()
        build(where, acts, tmp_path / str(dtype))
        assert content(tmp_path / str(dtype)) == content(due)
        found = dictionaries.shard_of(str(where), Dictionary(str(where)).digest, 0, LATENTS, "cpu", False)
        narrow.append(found.screen.rough.dtype)
    assert narrow == list(screen.TYPES), "each was used"
    dictionaries.shard_of.cache_clear()


def test_a_plain_product_as_on_a_gpu_gives_the_same_entries(tmp_path, whole, acts, monkeypatch):
    """Values differ by the rounding of sums; the rows and latents of this case do not."""
    of = dictionaries.shard_of
    monkeypatch.setattr(encoding, "shard_of", lambda *which: dataclasses.replace(of(*which), screen=None))
    for kind in KINDS:
        build(whole[kind][0], acts, tmp_path / "plain", keep_codes=True, overwrite=True)
        monkeypatch.setattr(encoding, "shard_of", of)
        build(whole[kind][0], acts, tmp_path / "screened", keep_codes=True, overwrite=True)
        plain, screened = (saetrain.open_features(tmp_path / name) for name in ("plain", "screened"))
        for latent in range(LATENTS):
            (rows, values), (due, others) = plain[latent].codes(), screened[latent].codes()
            assert rows.tolist() == due.tolist()
            assert values == pytest.approx(others, rel=1e-5, abs=1e-5)
        monkeypatch.setattr(encoding, "shard_of", lambda *which: dataclasses.replace(of(*which), screen=None))


def test_the_comparison_sees_another_seed_and_a_changed_byte(tmp_path, whole, acts):
    where, due = whole["topk"]
    build(where, acts, tmp_path / "other", seed=1)
    assert content(tmp_path / "other") != content(due)
    build(where, acts, tmp_path / "same")
    path = tmp_path / "same/stat/count/c/1"
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    assert content(tmp_path / "same") != content(due)


class Twice(Serial):
    """Does a share of the tasks a second time, from the start, whatever their receipts say; some of them late."""

    def __init__(self) -> None:
        self.dice, self.repeats = random.Random(2), 0

    def map(self, fn: Any, calls: Any) -> Any:
        late = []
        for call in calls:
            yield fn(*call)
            if self.dice.random() < 0.4:
                late.append(call)
            if late and self.dice.random() < 0.5:
                self.again(*late.pop())
        for call in late:
            self.again(*call)

    def again(self, job: Any, task: Any) -> None:
        self.repeats += 1
        job.step(task).do(job, task)


@pytest.mark.parametrize("kind", KINDS)
def test_tasks_that_run_twice_change_nothing(tmp_path, whole, acts, kind):
    where, due = whole[kind]
    executor = Twice()
    build(where, acts, tmp_path / "out", shards=5, block_rows=48, executor=executor)
    assert executor.repeats > 5
    assert content(tmp_path / "out") == content(due)


def test_dask_makes_the_same(tmp_path, whole, acts, cluster):
    where, due = whole["topk"]
    build(where, acts, tmp_path / "out", shards=2, block_rows=48, executor=cluster(2))
    assert content(tmp_path / "out") == content(due)


# --- Kills and damage ---------------------------------------------------------------------------


class On:
    """A schedule of faults by the number of the operation on one folder; the source store is left alone."""

    def __init__(self, folder: Path, faults: dict[int, str]) -> None:
        self.folder, self.faults, self.count = str(folder), faults, 0

    def __call__(self, operation: Operation) -> str | None:
        if operation.url != self.folder:
            return None
        self.count += 1
        return self.faults.get(self.count - 1)


def killed_at(where: Path, acts: Path, out: Path, due: Path, number: int, kind: str) -> None:
    settings = {"shards": 5, "block_rows": 112}
    with pytest.raises(Killed), Faults(On(out, {number: kind})):
        build(where, acts, out, **settings)
    build(where, acts, out, **settings)
    assert content(out) == content(due), (number, kind)


def operations(where: Path, acts: Path, out: Path) -> int:
    schedule = On(out, {})
    with Faults(schedule):
        build(where, acts, out, shards=5, block_rows=112)
    return schedule.count


def test_killed_at_some_operations_then_resumed(tmp_path, whole, acts):
    where, due = whole["topk"]
    total, dice = operations(where, acts, tmp_path / "out"), random.Random(4)
    assert total > 200
    for trial in range(10):
        number, kind = dice.randrange(total), dice.choice(["kill", "late", "torn"])
        killed_at(where, acts, tmp_path / f"out{trial}", due, number, kind)


CAMPAIGN = """
import os, random, shutil, signal, sys, time
from saetrain.describing.slots import Slots
from saetrain.features.pipeline import build_features

where, acts, out, kills, seed = *sys.argv[1:4], int(sys.argv[4]), int(sys.argv[5])
settings = {"tile_rows": 16, "tile_latents": 8, "granule": 4, "chunk": 16, "slots": Slots(4, 3, 2, 3, 3)}
dice, hit, longest = random.Random(seed), 0, 1.0
for trial in range(kills):
    began = time.monotonic()
    child = os.fork()
    if not child:
        build_features(where, acts, out, shards=5, block_rows=112, fsync=False, **settings)
        os._exit(0)
    time.sleep(dice.random() * longest)
    os.kill(child, signal.SIGKILL)
    killed = os.waitpid(child, 0)[1] == signal.SIGKILL
    hit += killed
    if not killed:  # it was through: begin anew
        longest = min(longest, time.monotonic() - began)
        shutil.rmtree(out)
build_features(where, acts, out, shards=5, block_rows=112, fsync=False, **settings)
print(hit)
"""


@pytest.mark.soak
@pytest.mark.parametrize("kind", KINDS)
def test_a_hundred_processes_are_killed_at_random(tmp_path, whole, acts, kind):
    """SIGKILL at random moments; the next process goes on where the last one died, and locks die with it."""
    where, due = whole[kind]
    words = [sys.executable, "-c", CAMPAIGN, where, acts, tmp_path / "out", "100", "1"]
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 30
    assert content(tmp_path / "out") == content(due)


@pytest.mark.soak
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("death", ["kill", "late", "torn"])
@pytest.mark.parametrize("part", range(12))
def test_killed_at_any_operation_then_resumed(tmp_path, whole, acts, kind, death, part):
    where, due = whole[kind]
    for number in range(part, operations(where, acts, tmp_path / "out"), 12):
        killed_at(where, acts, tmp_path / "killed", due, number, death)
        shutil.rmtree(tmp_path / "killed")


def half_done(where: Path, acts: Path, out: Path) -> None:
    """A run that dies as collating begins, with all codes written."""
    with pytest.raises(Killed), Faults(matching("put stat/count/*", "kill")):
        build(where, acts, out, shards=2, block_rows=112)


@pytest.mark.parametrize("place", ["counts", "values", "rows", "offsets"])
def test_damaged_codes_are_located(tmp_path, whole, acts, place):
    where, due = whole["standard"]
    out = tmp_path / "out"
    half_done(where, acts, out)
    path = out / "work/codes/1-0.bin"  # latents 0 to 15: 4 granules
    data = bytearray(path.read_bytes())
    n = int.from_bytes(data[32:40], "little")
    values = 5 * 8 + 4 * 4 + 16 * 4
    at = {"offsets": 8, "counts": 5 * 8 + 4 * 4 + 4 * 5, "values": values, "rows": values + 4 * n + 2 * (n - 1)}[place]
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(ConservationError, match=r"codes/1-0\.bin is damaged: .*latents \d+ to \d+ in block 1 "):
        build(where, acts, out, shards=2, block_rows=112)
    path.unlink()
    build(where, acts, out, shards=2, block_rows=112)
    assert content(out) == content(due)


def test_a_full_disk_is_said_and_resumed(tmp_path, whole, acts):
    where, due = whole["topk"]
    with pytest.raises(StorageFullError, match="no space left"), Faults(matching("put work/codes/2-*", "full")):
        build(where, acts, tmp_path / "out", block_rows=112)
    assert build(where, acts, tmp_path / "out", block_rows=112).resumed >= 2
    assert content(tmp_path / "out") == content(due)


# --- Bad input ----------------------------------------------------------------------------------


def test_a_shuffled_store_is_refused_with_the_way_out(tmp_path, whole, acts):
    actshuffle.shuffle(acts, tmp_path / "shuffled.zarr", seed=1, fsync=False)
    with pytest.raises(DataError, match=r"is shuffled.*actshuffle collect"):
        build(whole["topk"][0], tmp_path / "shuffled.zarr", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_wrong_width_is_refused(tmp_path, acts):
    with pytest.raises(DataError, match=r"'x' in .* have 12 numbers, and the dictionary .* takes 10"):
        build(dictionary(tmp_path / "d", "topk", width=10), acts, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_row_with_nan_is_named(tmp_path, whole):
    x = np.zeros((40, 12), "<f4")
    x[33, 4] = np.nan
    group(tmp_path / "nan.zarr", {"x": x})
    finish(tmp_path / "nan.zarr", 40, ["x"])
    with pytest.raises(DataError, match="row 33, column 4 is nan"):
        build(whole["topk"][0], tmp_path / "nan.zarr", tmp_path / "out")


def test_a_store_that_changes_meanwhile_gives_no_result(tmp_path, whole, acts):
    shutil.copytree(acts, changing := tmp_path / "acts.zarr")
    rows = zarr.open_group(changing)["x"]
    seen = []

    def look(fn: Any, call: Any) -> None:
        seen.append(call)
        if len(seen) == 2:
            rows[:] = -rows[:]

    out = tmp_path / "out"
    with pytest.raises(SourceError, match="changed while it was read"):
        build(whole["topk"][0], changing, out, block_rows=100, executor=Watched(look))
    assert not (out / "done.json").exists()
    build(whole["topk"][0], changing, out, block_rows=100)
    build(whole["topk"][0], changing, due := tmp_path / "due")
    assert content(out) == content(due)
    build(whole["topk"][0], changing, tmp_path / "same", executor=Watched(lambda fn, call: None))


def test_a_store_of_activations_alone_works_without_text(tmp_path, whole):
    bare = store(tmp_path / "bare.zarr", 150, token=False, document=False)
    build(whole["topk"][0], bare, tmp_path / "out")
    features = saetrain.open_features(tmp_path / "out")
    example = features[5].top(1)[0]
    assert example.tokens == ()
    assert example.text is None
    assert example.value == features[5].max
    assert features[5].top_tokens == []
    assert np.isnan(features[5].density.low)  # one document gives no interval
    assert "latent 5" in repr(features[5])
    assert "latent 5" in features[5]._repr_html_()


def test_unfinished_stores_and_results_are_refused(tmp_path, whole, acts):
    group(tmp_path / "plain.zarr", {"x": np.ones((20, 12), "<f4")})
    with pytest.raises(DataError, match="has no completion marker"):
        build(whole["topk"][0], tmp_path / "plain.zarr", tmp_path / "out")
    half_done(whole["topk"][0], acts, tmp_path / "half")
    with pytest.raises(DataError, match=r"no finished result.*the same command resumes"):
        saetrain.open_features(tmp_path / "half")
    with pytest.raises(ResumeMismatchError, match="seed was 0, now 3"):
        build(whole["topk"][0], acts, tmp_path / "half", seed=3, shards=2, block_rows=112)
    with pytest.raises(DestinationExistsError, match="finished with other settings"):
        build(whole["topk"][0], acts, whole["topk"][1], seed=3)


def test_settings_that_do_not_fit_are_refused(tmp_path, whole, acts):
    with pytest.raises(ConfigError, match="shards must be 1 to 5"):
        build(whole["topk"][0], acts, tmp_path / "out", shards=6)
    with pytest.raises(RequestError, match=r"no examples of kind 'best'; there are top, interval 1"):
        saetrain.open_features(whole["topk"][1])[0].examples("best")
    with pytest.raises(IndexError, match="latent 40 of 40"):
        saetrain.open_features(whole["topk"][1])[40]


# --- Dictionaries, and the command --------------------------------------------------------------


def test_a_run_of_ours_and_its_export_give_the_same(tmp_path, acts):
    from saetrain.exchange import folders as exchange

    exchange.bring(dictionary(tmp_path / "foreign", "topk"), tmp_path / "run")
    build(tmp_path / "foreign", acts, tmp_path / "a")
    build(tmp_path / "run", acts, tmp_path / "b")
    a, b = (saetrain.open_features(tmp_path / name) for name in "ab")
    assert a.array("stat/count").tolist() == b.array("stat/count").tolist()
    assert np.allclose(a.array("stat/sum"), b.array("stat/sum"), rtol=1e-5)


def test_stores_and_results_may_be_urls(tmp_path, whole, acts, monkeypatch):
    """A URL stays as it is: as a path it would lose a slash, and lie in the working folder."""
    monkeypatch.chdir(tmp_path)
    where, result = whole["topk"]
    urls = [f"file://{place}" for place in (acts, tmp_path / "out")]
    assert main(["features", str(where), *urls]) == 0
    found = saetrain.open_features(urls[1])
    assert len(found) == len(saetrain.open_features(result))
    assert found.facts["store"] == urls[0]
    words = ["export-features", urls[1], "shared", "--format", "graph", "--model-id", "m", "--layer", "1", "--set", "s"]
    assert main([*words, "--store", urls[0]]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "shared"]


def test_the_command(tmp_path, whole, acts, capsys):
    out = tmp_path / "out"
    words = ["features", str(whole["topk"][0]), str(acts), str(out), "--json", "--memory", "64MB"]
    assert main(words) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["tasks"] == 7
    assert not told["already_finished"]
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["already_finished"]
    found = saetrain.open_features(out)
    due = saetrain.open_features(whole["topk"][1])
    assert found.array("stat/count").tolist() == due.array("stat/count").tolist()
    assert main(["features", str(whole["topk"][0]), str(tmp_path / "none"), str(out)]) == 2


# --- Codes that are kept ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["topk", "jumprelu"])
def test_kept_codes_are_the_dense_activations(tmp_path, whole, acts, monkeypatch, kind):
    where, due = whole[kind]
    monkeypatch.setattr(pipeline, "most_entries", lambda plan, memory: 50)
    build(where, acts, tmp_path / "out", keep_codes=True, shards=2, block_rows=112)
    features = saetrain.open_features(tmp_path / "out")
    x = actshuffle.open_dataset(acts).read("x", 0, ROWS)
    found = dense(where, x)
    for latent, f in enumerate(features):
        rows, values = f.codes()
        assert rows.tolist() == np.flatnonzero(found[:, latent]).tolist()
        assert values.tolist() == found[rows, latent].tolist()
    for start, stop in [(0, ROWS), (100, 130), (112, 112), (290, 300)]:
        counts, latent, value = features.codes(start, stop)
        rows, due_latent = np.nonzero(found[start:stop])
        assert np.repeat(np.arange(stop - start), counts).tolist() == rows.tolist()
        assert latent.tolist() == due_latent.tolist()
        assert value.tolist() == found[start:stop][rows, due_latent].tolist()
    same = {name: data for name, data in content(tmp_path / "out").items() if not name.startswith("codes/")}
    assert {n: d for n, d in same.items() if n != "zarr.json"} == {
        n: d for n, d in content(due).items() if n != "zarr.json"
    }
    with pytest.raises(RequestError, match="keeps no codes"):
        saetrain.open_features(due)[0].codes()


# --- Plans and memory ---------------------------------------------------------------------------


def test_a_plan_says_what_a_run_takes_and_writes_nothing(tmp_path, whole, acts, capsys):
    words = ["features", str(whole["topk"][0]), str(acts), str(tmp_path / "out"), "--plan"]
    assert main([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["entries"] == 5 * ROWS
    assert told["operations"] == 2 * ROWS * 40 * 12
    assert main(words) == 0
    assert "5 a row" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_the_expected_entries_are_near_those_found(tmp_path, whole, acts):
    for kind in KINDS:
        plan = pipeline.plan_features(whole[kind][0], acts, **TINY)
        found = saetrain.open_features(whole[kind][1]).facts["entries"]
        assert forecast(plan, 1 << 30).entries == pytest.approx(found, rel=0.2)


def test_what_cannot_fit_is_refused_with_the_arithmetic(tmp_path, whole, acts, monkeypatch):
    with pytest.raises(InfeasibleError, match=r"memory=.10 KB. is less than .*: a chunk of 16 latents takes"):
        build(whole["topk"][0], acts, tmp_path / "out", memory=10_000)
    with pytest.raises(InfeasibleError, match=r"of an encode task: 40 latents of 12 numbers in 1 part"):
        build(whole["standard"][0], acts, tmp_path / "out", memory=80_000, shards=1)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(InfeasibleError, match=r"has room for 1 KB, and the run needs about"):
        build(whole["topk"][0], acts, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_memory_settles_the_shards(whole, acts):
    needs = [pipeline.plan_features(whole["topk"][0], acts, memory=m, **TINY).shards for m in (10**6, 14_000, 1)]
    assert needs[0] == 1
    assert 1 < needs[1] <= 5
    assert needs[2] == 5


def test_codes_are_read_about_once_however_little_fits(tmp_path, monkeypatch):
    """Granules have the fewer latents the more rows there are; a task that holds less reads a granule for each part."""
    where, acts = dictionary(tmp_path / "d", "topk"), store(tmp_path / "acts.zarr", 6000)
    monkeypatch.setattr(pipeline, "most_entries", lambda plan, memory: 6000)
    monkeypatch.setattr(pipeline, "GRANULE_ENTRIES", 1500)
    some, read = codes._some, []

    def counted(job: Any, key: str, dtype: str, at: int, count: int) -> Any:
        read[-1] += count * np.dtype(dtype).itemsize
        return some(job, key, dtype, at, count)

    monkeypatch.setattr(codes, "_some", counted)
    for name, granule in (("ours", 0), ("large", 16)):
        read.append(0)
        build(where, acts, tmp_path / name, granule=granule, near=0, block_rows=1024)
    assert content(tmp_path / "ours") == content(tmp_path / "large")
    entries = 6 * saetrain.open_features(tmp_path / "ours").facts["entries"]  # bytes of a value and a row each
    assert read[0] < 2.5 * entries  # of `draw` and `collate`, and tables
    assert read[1] > 3.5 * entries


def test_granules_have_the_fewer_latents_the_more_rows_there_are(whole, acts, monkeypatch):
    settings = {name: value for name, value in TINY.items() if name != "granule"}
    found = []
    for most in (1 << 20, 3000, 600, 1):
        monkeypatch.setattr(pipeline, "GRANULE_ENTRIES", most)
        found.append(pipeline.plan_features(whole["topk"][0], acts, **settings).granule)  # 5 * 300 / 40 = 37.5 each
    assert found == [256, 64, 16, 1]


def traced(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The peaks of what numpy allocates in collate tasks from now on."""
    peaks = []

    def measured(job: Any, task: Any, **how: Any) -> Any:
        tracemalloc.start()
        try:
            return collate(job, task, **how)
        finally:
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()

    monkeypatch.setattr(pipeline, "collate_in", lambda most: partial(measured, most=most))
    return peaks


def test_many_latents_of_few_entries_stay_within_the_memory_too(tmp_path, monkeypatch):
    """Describing latents takes as much as their arrays, twice over: all of a chunk together would be too many."""
    acts, where = store(tmp_path / "acts.zarr", 300), dictionary(tmp_path / "d", "topk", latents=8000)
    slots = {"chunk": 8000, "slots": Slots()}
    arrays = result_bytes(pipeline.plan_features(where, acts, **TINY | slots), 8000)
    peaks, most = traced(monkeypatch), arrays // 4 // BYTES
    monkeypatch.setattr(pipeline, "most_entries", lambda plan, memory: most)
    for name, own in (("ours", collating.OWN), ("control", 0)):
        monkeypatch.setattr(collating, "OWN", own)
        build(where, acts, tmp_path / name, near=0, **slots)
    assert content(tmp_path / "ours") == content(tmp_path / "control")
    ours, control = peaks
    assert ours < arrays + BYTES * most + 1_000_000
    assert control > arrays + 2 * BYTES * most


@pytest.mark.parametrize(("most", "gradient"), [(20_000, False), (60_000, True)])
def test_collating_stays_within_its_memory(tmp_path, monkeypatch, most, gradient):
    """The peak of what numpy allocates, beside the arrays of the chunk, is at most `BYTES` an entry."""
    rows = 6000
    acts = store(tmp_path / "acts.zarr", rows, gradient=gradient)
    where = dictionary(tmp_path / "d", "standard")
    monkeypatch.setattr(pipeline, "most_entries", lambda plan, memory: most)
    peaks = traced(monkeypatch)
    build(where, acts, tmp_path / "out", chunk=40, block_rows=1024)
    assert saetrain.open_features(tmp_path / "out").facts["entries"] > 90_000
    assert max(peaks) < BYTES * most + 1_000_000
    assert max(peaks) > BYTES * most * 0.4  # the constant is no fantasy


@pytest.mark.parametrize("arch", ARCHS)
def test_every_variant_of_a_run(tmp_path, arch):
    """Counts and sums are those of the loaded autoencoder's own activations."""
    planted = Planted.make(2048, 16, 24)
    with one_rank() as mesh:
        source = MemorySource(planted.rows, planted.documents)
        fit(source, {tmp_path / "run": small(arch, steps=8, eval_every=8, log_every=8)}, mesh)
    x = planted.rows[:400].numpy().astype("<f4")
    group(tmp_path / "acts.zarr", {"x": x, "document": planted.documents[:400].numpy()})
    build(tmp_path / "run", tmp_path / "acts.zarr", tmp_path / "out", incomplete=True, shards=2, block_rows=128)
    features = saetrain.open_features(tmp_path / "out")
    due = saetrain.load(tmp_path / "run").encode(x.astype(np.float64))
    assert (due > 0).sum() > 100
    assert abs(features.array("stat/count") - (due > 0).sum(axis=0)).sum() <= 2  # rounding may decide a borderline
    assert np.allclose(features.array("stat/sum"), due.sum(axis=0), rtol=1e-3, atol=1e-2)
    top = int(np.argmax(due.max(axis=0)))
    assert features[top].top(1)[0].row == int(np.argmax(due[:, top]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_dictionary_of_other_tools_stays_in_its_file(whole, monkeypatch, kind):
    """Whole in memory, a million latents 384 wide took six times the memory that a worker was given."""
    path = whole[kind][0]
    before, due, read = digests(path), read_foreign(path), []
    monkeypatch.setattr(TensorFile, "read", lambda file, name, *rows: read.append(name))
    found = Dictionary(str(path))
    for lo, hi in ((0, LATENTS), (7, 20)):
        part = found.rows(lo, hi)
        for name in ("W_enc", "b_enc", "W_dec"):
            assert torch.equal(part[name], getattr(due, name)[lo:hi])
        assert torch.equal(part["threshold"], torch.zeros(hi - lo) if due.threshold is None else due.threshold[lo:hi])
    assert not read
    found.rows(0, 3)["W_dec"].zero_()  # changes pages of its own
    assert digests(path) == before
    assert not torch.equal(found.rows(0, 3)["W_dec"], due.W_dec[:3])  # the control: it is the same memory


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["W_enc", "W_dec", "b_dec"])
def test_a_dictionary_with_a_nan_is_refused_before_anything_is_written(tmp_path, whole, acts, kind, name):
    where = shutil.copytree(whole[kind][0], tmp_path / "sae")
    build(where, acts, tmp_path / "before")  # the control: as it was
    weights = where / "sae_weights.safetensors"
    tensors = load_file(weights)
    tensors[name].view(-1)[-1] = torch.nan
    save_file(tensors, weights)
    with pytest.raises(ExchangeError, match=f"{name} holds numbers that are not finite"):
        build(where, acts, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def digests(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path) for path in folder.iterdir()}
