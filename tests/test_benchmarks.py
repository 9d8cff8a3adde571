"""The benchmarks in miniature: every command runs, and the measuring code is tested in turn."""

from __future__ import annotations

import dataclasses
import json
import time
from importlib.util import find_spec
from itertools import product

import click
import numpy as np
import pytest
import torch

from actshuffle.executors import Serial
from actshuffle.ordering.digest import RowHash
from actshuffle.planning.planner import make_plan
from benchmarks import cache, calibrate, costs, growth, measure, revisions, shuffle, sources, strategies
from benchmarks.__main__ import main
from benchmarks.peers import PEERS, Work, driver, formats
from benchmarks.phases import OUTSIDE, PHASES
from benchmarks.results import command_line, spread, table
from benchmarks.sae import large, pieces, quality
from benchmarks.sae.describe import make_dictionary
from benchmarks.sae.peers import RATES
from saetrain import open_features
from saetrain.cli import main as saetrain
from saetrain.compute.kernels import Codes, Encoder
from saetrain.training.optim import Optimizer
from saetrain.variants.topk import TopK
from support.sae import one_rank
from support.stores import group


def miniature(tmp_path, *words, drawn=True):
    """Run a command and check that all its files exist, plots if it is ``drawn``; returns its figures."""
    out = tmp_path / "results"
    main([*words, "--tiny", "--out", str(out), "--work", str(tmp_path / "work")], standalone_mode=False)
    document = json.loads((out / "results.json").read_text())
    page = (out / "README.md").read_text()
    assert document["machine"]["cores"] >= 1
    assert "figures mean nothing" in page
    images = {p.name for p in out.glob("*.png")}
    assert images == ({n for n in images if f"]({n})" in page} if find_spec("matplotlib") else set())
    assert bool(images) == (drawn and bool(find_spec("matplotlib")))
    assert not list((tmp_path / "work").glob("*/*")), "data is left behind"
    return document["figures"]


# --- Every command ------------------------------------------------------------------------------


def test_floor(tmp_path):
    rows = miniature(tmp_path, "floor")["summary"]
    assert {r["what"] for r in rows} == {"memcpy", "read", "write", "copy", "copy, one buffer", "plain copy"}
    assert all(r["rate"]["low"] > 0 for r in rows)
    assert all(r["cached"] in (-1, 1) for r in rows if r["mode"] == "cached")


def test_shuffle(tmp_path):
    found = miniature(tmp_path, "shuffle")
    ran = {(r["workers"], r["levels"]) for r in found["summary"]}
    assert ran == set(product((0, 1), (0, 1, 2, 3)))
    commands = {r["tool"]: r for r in found["commands"]}
    assert list(commands) == ["command", "copy", "numpy", "duckdb"]
    assert commands["command"]["verdict"] == commands["numpy"]["verdict"] == "pass"
    assert commands["copy"]["verdict"] == "FAIL", "its rows are in order"
    assert commands["numpy"]["of_numpy"]["median"] == 1
    assert commands["command"]["of_numpy"]["median"] > 0
    assert commands["duckdb"]["outcome"] in ("done", "not installed")
    for one in found["rounds"]:
        assert (one["phases"] is None) == (one["levels"] == 0)
        if one["phases"] is None:
            continue
        spent = one["phases"]
        workers = max(1, one["workers"])
        assert sum(spent[p] for p in (*PHASES, *OUTSIDE)) == pytest.approx(one["seconds"] * workers, rel=0.01)
        assert min(spent.values()) > -0.01, "phases overlap"
        assert spent["read"] > 0
        assert spent["hash"] > 0
        assert spent["gather"] > 0
        assert spent["write"] > 0
        assert spent["clearing"] > 0
        assert 0 < one["published"] < one["seconds"]


def test_shuffle_the_engine_alone(tmp_path):
    found = miniature(tmp_path, "shuffle", "--engine-only", "--workers", "1", "--levels", "2")
    assert found["whole"] == found["commands"] == []
    assert found["summary"]


def test_shuffle_without_digests(tmp_path):
    found = miniature(tmp_path, "shuffle", "--engine-only", "--unchecked", "--levels", "0")
    assert {r["levels"] for r in found["summary"] if r["checked"]} == {0, 1, 2, 3}
    assert {r["levels"] for r in found["summary"] if not r["checked"]} == {0}
    assert "default, no digests" in (tmp_path / "results/README.md").read_text()


def test_each_way_is_first_in_a_round():
    orders = [strategies.turned(["a", "b", "c"], number) for number in range(4)]
    assert orders == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"], ["a", "b", "c"]]


def test_strategies(tmp_path):
    rows = {r["way"]: r for r in miniature(tmp_path, "strategies", drawn=False)["summary"]}
    assert {"chosen", "gather", "2 levels", "3 levels"} < set(rows)
    assert all(r["outcome"] == "done" and r["of_fastest"] > 0 for r in rows.values()), rows
    assert [rows[way]["plan"]["levels"] for way in ("gather", "2 levels", "3 levels")] == [1, 2, 3]


def test_a_chosen_way_that_is_not_the_fastest_is_told():
    def one(way, seconds, size=1):
        return {"way": way, "size": size, "outcome": "done", "message": "", "seconds": seconds, "plan": {"levels": 2}}

    good = [one("chosen", 10.5), one("gather", 12), one("2 levels", 10)]
    assert strategies.holds(strategies.summary(good))
    assert "is within" in next(strategies.page(strategies.summary(good), 1, False))
    for worse in (one("chosen", 11.5), one("chosen", 9) | {"outcome": "failed"}):
        rows = strategies.summary([worse, *good[1:]])
        assert not strategies.holds(rows)
        assert "is NOT within" in next(strategies.page(rows, 1, False))
    elsewhere = [*good, one("chosen", 20, 2), one("2 levels", 10, 2)]
    assert not strategies.holds(strategies.summary(elsewhere)), "at all sizes"


def test_revisions(tmp_path):
    rows = miniature(tmp_path, "revisions", "--other", str(tmp_path), drawn=False)["summary"]
    assert {r["case"]["what"] for r in rows} > {"loader", "stats"}
    assert all(r["benchmark"] == "loader" and r["ratio"]["rounds"] == 1 for r in rows)


def test_a_slower_revision_shows_in_the_ratio_of_each_round():
    def one(side, seconds, number):
        return {
            "benchmark": "b",
            "case": {"levels": 2},
            "side": side,
            "round": number,
            "seconds": seconds,
            "bytes": 1e9,
        }

    found = [one("new", 2, 0), one("old", 1, 0), one("old", 4, 1), one("new", 8, 1)]
    (row,) = revisions.summary(found)
    assert row["ratio"] == {"median": 0.5, "low": 0.5, "high": 0.5, "rounds": 2}
    assert row["new"]["high"] == 0.5
    assert row["old"]["high"] == 1
    assert "levels 2" in list(revisions.page([row], {"new": "a", "old": "b"}, 1, []))[-1]


def test_a_revision_without_an_environment_is_refused(tmp_path):
    with pytest.raises(click.ClickException, match=r"has no environment: run `make .venv/test.done` there"):
        main(
            ["revisions", "--other", str(tmp_path), "--out", str(tmp_path / "r"), "--work", str(tmp_path / "w")],
            standalone_mode=False,
        )


def test_loader(tmp_path):
    rows = miniature(tmp_path, "loader")["summary"]
    assert {(r["mode"], r["threads"]) for r in rows} == {
        (mode, threads) for mode in ("cached", "disk") for threads in (1, 2)
    }
    assert {"loader", "loader, later epoch", "read, small buffer", "stats"} <= {r["what"] for r in rows}
    assert all(r["of_plain"]["low"] > 0 for r in rows)


def test_verify(tmp_path):
    rows = miniature(tmp_path, "verify")["summary"]
    cases = {(r["mode"], r["threads"], r["what"]) for r in rows}
    assert cases == set(product(("cached", "disk"), (1, 2), ("full", "with mixing")))
    assert all(r["of_read"]["low"] > 0 for r in rows)


def test_growth(tmp_path):
    rows = miniature(tmp_path, "growth")["summary"]
    assert [r["factor"] for r in rows] == [1, 4]
    assert all(r["memory"]["median"] > 10e6 for r in rows)


def test_costs(tmp_path):
    found = miniature(tmp_path, "costs")
    assert len(found["summary"]) == 4
    assert all(r["ratio"]["low"] > 0 for r in found["summary"])
    assert 0 < found["receipts"] < 1


def test_unchecked_rows_hash_to_nothing_for_a_while_only():
    rows, numbers = np.ones((3, 8), np.uint8), np.arange(3, dtype=np.uint64)
    with costs.unchecked():
        assert not RowHash(1, 0, 8).hashes(rows, numbers).any()
        assert not RowHash(1, 0, 8).total_of_parts(iter([(0, rows)]), numbers).any()
        assert rows.all(), "parts are left alone, but asked for"
    assert RowHash(1, 0, 8).hashes(rows, numbers).all()
    assert RowHash(1, 0, 8).total_of_parts(iter([(0, rows)]), numbers).all()


def test_scheduler(tmp_path):
    found = miniature(tmp_path, "scheduler")
    assert found["summary"]["tasks"] == found["samples"][-1]["tasks"] == 300
    assert found["summary"]["memory_last"]["scheduler"] > 10e6


def test_s3(tmp_path):
    pytest.importorskip("moto")
    pytest.importorskip("obstore")
    from support.s3 import SECRET, serve

    with serve(tmp_path) as endpoint:
        url = endpoint.bucket("benchmark")
        words = ("--url", f"{url}/here", "--storage-options", json.dumps(endpoint.options()))
        (one,) = miniature(tmp_path, "s3", *words)["summary"]
        assert endpoint.keys(url) == []
    assert min(one[name]["low"] for name in ("of_copy", "verify_of_read", "cpu_shuffle", "cpu_copy", "cpu_verify")) > 0
    assert one["requests"]["get"] > one["requests"]["put"] > 0
    told = [path.read_text() for path in (tmp_path / "results").iterdir() if path.suffix in (".json", ".md")]
    assert SECRET not in "".join(told)


def test_calibrate(tmp_path):
    found = miniature(tmp_path, "calibrate")
    assert set(found["constants"]) == {"0", "1"}
    assert [r["known"] for r in found["runs"] if not r["workers"]] == [True, True, False]
    assert all(r["foretold"] > 0 for r in found["runs"])


def test_constants_are_those_of_the_mean_run():
    """Between two runs that should take equally long, the fit is not nearer to the quick one, as it would be with
    errors relative to each measurement."""
    assert calibrate._solve([([1.0], 0.5), ([1.0], 1.5)]) == pytest.approx([1.0])
    assert calibrate._solve([([1.0, 1.0], 1.0), ([1.0, 2.0], 0.5)])[1] == 0  # no byte takes less than no time


def test_constants_are_found_again(tmp_path):
    """A fit to times computed from known constants returns these, and predicts a run with them."""
    true = calibrate.Constants(0.01, 2e-9, 3e-9, 0.2, 0.001, 5e-10)
    plans = [
        make_plan(size // 8192, 8192, memory=memory, levels=levels, run_bytes=32 << 10)
        for size in (10**8, 3 * 10**8)
        for memory in (48 << 20, 96 << 20)
        for levels in (2, 3)
    ]

    def measured(plan):
        walls = [
            plan.task_count(n) * 0.01 + plan.level_bytes(n)[0] * (2e-9 if n < plan.levels else 3e-9)
            for n in range(1, plan.levels + 1)
        ]
        tasks = sum(plan.task_count(n) for n in range(1, plan.levels + 1))
        spilled = sum(plan.level_bytes(n)[1] for n in range(1, plan.levels))
        return {"walls": walls, "seconds": sum(walls) + 0.2 + 0.001 * tasks + 5e-10 * spilled}

    found = calibrate.fit([(plan, measured(plan)) for plan in plans], 1)
    assert found.split_cpu == pytest.approx(true.split_cpu, rel=1e-3)
    assert found.overhead == pytest.approx(true.overhead, rel=1e-2)
    assert found.clear == pytest.approx(true.clear, rel=1e-2)
    other = make_plan(10**9 // 8192, 8192, memory=64 << 20, levels=3, run_bytes=32 << 10)
    assert calibrate.foretell(other, found, 1) == pytest.approx(measured(other)["seconds"], rel=0.03)
    # Negative control: with a constant that is wrong by half it would not.
    wrong = dataclasses.replace(found, leaf_cpu=found.leaf_cpu / 2)
    assert calibrate.foretell(other, wrong, 1) < 0.9 * measured(other)["seconds"]
    wrong = dataclasses.replace(found, clear=0.0)
    assert calibrate.foretell(other, wrong, 1) < 0.95 * measured(other)["seconds"]


def test_peers(tmp_path):
    rows = miniature(tmp_path, "peers", "--only", "actshuffle,actshuffle-memory,numpy,zarr,k-jobs,dask-take")["summary"]
    assert {r["peer"] for r in rows} == {"actshuffle", "actshuffle-memory", "numpy", "zarr", "k-jobs", "dask-take"}
    for row in rows:
        assert row["outcome"] == "done", row
        assert row["verdict"] == "pass", row
        assert all(row["versions"].values())


@pytest.mark.parametrize("name", ["ray", "huggingface", "duckdb", "polars", "spark", "mosaicml", "annbatch"])
def test_peer_where_installed(tmp_path, name):
    if "message" in driver.versions_of(name, None):
        pytest.skip("not installed")
    (row,) = miniature(tmp_path, "peers", "--only", name)["summary"]
    assert row["outcome"] in ("done", "out of time"), row


def test_sae_peers(tmp_path):
    found = miniature(tmp_path, "sae-peers")
    assert {line["tool"] for line in found["speed"]} >= {"saetrain"}
    assert {line["lr"] for line in found["quality"]} == {"default", *RATES}
    assert all(0 < line["fvu"] < 2 and line["l0"] <= 4 for line in found["quality"])
    assert all(0.2 < line["mean_max_cosine"] < 1 for line in found["planted"])


def test_sae_quality(tmp_path):
    found = miniature(tmp_path, "sae-quality")
    rows = {row["name"]: row for row in found["summary"]}
    assert list(rows) == ["our default", "AuxK over the residual's variance", "resampling without AuxK"]
    assert all(row["seeds"] == 2 and 0 < row["fvu"][0] < 1.5 for row in rows.values()), rows
    assert rows["our default"]["fvu_less"] == [0, 0]
    assert any(row["fvu_less"][0] != 0 for row in rows.values()), "the forms train alike"
    seeds = [line["fvu"] for line in found["cases"][0]["lines"]]
    assert len(set(seeds)) == 2


def test_interval_over_seeds():
    assert quality.interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 4.303 / 3**0.5), rel=1e-3)


def test_sae_order(tmp_path):
    rows = miniature(tmp_path, "sae-order")["summary"]
    assert [r["rows"] for r in rows] == ["shuffled", "buffer of 512", "order of the harvest"]
    entropy = {r["rows"]: r["document_entropy"] for r in rows}
    assert entropy["shuffled"] > entropy["buffer of 512"] > entropy["order of the harvest"]


def test_sae_speed(tmp_path):
    for one in miniature(tmp_path, "sae-speed")["summary"]:
        parts = one["pieces"]
        assert sum(part["seconds"] for part in parts.values()) == pytest.approx(one["clocked"])
        assert parts["encoder product"]["seconds"] > 0
        assert parts["encoder product"]["operations"] == pytest.approx(2 * 64 * 64 * 16 / one["peak"])
        dense = one["arch"] == "jumprelu"
        assert (parts["decoding"]["operations"] > 0) != dense
        assert (parts["other products"]["operations"] > 0) == dense
        assert 0 < one["mfu"] < 1


def test_clocks_see_a_slow_piece_alone_and_leave_nothing_behind(monkeypatch):
    before = {owner: dict(owner.__dict__) for owner in (Codes, Encoder, Optimizer, TopK)}
    dots = Codes.dots
    monkeypatch.setattr(Codes, "dots", lambda *args: time.sleep(0.3) or dots(*args))
    with one_rank() as mesh:
        found = pieces._one("topk", 16, 64, 4, 64, 2, mesh)["pieces"]
    monkeypatch.undo()
    assert found["gradient of activations"]["seconds"] >= 0.3
    assert found["encoder product"]["seconds"] < 0.3
    assert {owner: dict(owner.__dict__) for owner in before} == before


def test_sae_ranks(tmp_path):
    rows = miniature(tmp_path, "sae-ranks")["summary"]
    assert [r["ranks"] for r in rows] == [1, 2]
    for row in rows:
        assert row["sent"] == pytest.approx(row["stated"]), "bytes sent are not those in the documentation"


def test_features(tmp_path):
    figures = miniature(tmp_path, "features")
    (row,) = figures["summary"]
    assert row["latents"] == 64
    assert 1e8 < figures["start"] < 4e8, "torch alone takes a hundred megabytes"
    assert row["of_product"] == row["seconds"] / (sum(row["product"]) / 2)
    assert min(row["product"]) > 0


def test_features_peers(tmp_path):
    ours, loop, dashboard, delphi = miniature(tmp_path, "features-peers")["summary"]
    assert ours["of_product"] > 0
    assert loop["same"] > 0.99
    assert loop["apart"] < 1e-4
    assert "give --dashboard" in dashboard["why"]
    assert "give --delphi" in delphi["why"]


def test_sae_memory(tmp_path):
    for one in miniature(tmp_path, "sae-memory", drawn=False)["summary"]:
        assert one["resident"] > one["base"]
        # Of so little memory, libraries and the loader are a large part.
        assert one["measured"] > one["planned"]["parameters"] + one["planned"]["moments"]


def test_features_growth(tmp_path):
    figures = miniature(tmp_path, "features-growth")
    grown = figures["summary"]
    assert [(one["rows"], one["latents"]) for one in grown] == [(1000, 256), (4000, 256), (1000, 256)]
    assert all(figures["idle"] < one["largest"] for one in grown)


def test_features_large(tmp_path):
    found = miniature(tmp_path, "features-large", drawn=False)["summary"]
    assert 0 < found["alive"] <= found["latents"] == 2048
    assert 32 <= found["again"]["latents"] <= 64
    assert found["again"]["count"] > 0.9
    assert found["again"]["largest_apart"] < 1e-4
    assert found["again"]["near"] > 0.98


def test_a_look_into_a_large_run_notices_another_dictionary(tmp_path):
    x = torch.randn(64, 8)
    group(tmp_path / "x.zarr", {"x": x.numpy(), "token": np.arange(64, dtype="<i4"), "document": np.arange(64) // 9})
    dictionary = make_dictionary(128, 8, 4)
    dictionary.save(tmp_path / "sae")
    words = [str(tmp_path / name) for name in ("sae", "x.zarr", "out")]
    assert saetrain(["features", *words, "--incomplete", "--near", "4"]) == 0
    found, weight = open_features(tmp_path / "out"), dictionary.W_dec.detach()
    mine = large.compare(found, x, weight, 4, 4, 128)
    other = large.compare(found, x, weight.roll(1, 0), 4, 4, 128)
    assert mine["latents"] >= mine["active"] > 20
    assert mine["count"] == mine["near"] == 1
    assert mine["largest_apart"] < 1e-5
    assert other["count"] < 0.9
    assert other["largest_apart"] > 0.1
    assert other["near"] < 0.1


def test_features_forecast(tmp_path):
    found = miniature(tmp_path, "features-forecast")
    (one,) = found["held_out"]
    assert set(one["predicted"]) == set(one["measured"])
    assert sum(found["large"].values()) > 1e6


def test_view(tmp_path):
    summary = miniature(tmp_path, "view")["summary"]
    assert list(summary) == ["cold", "warm", "again"]
    for found in summary.values():
        assert len(found["ms"]) == 2
        assert 0 < min(found["ms"]) <= found["median"] <= found["worst"]
        assert 0 < found["server_ms"]["median"] < found["median"]


# --- What measures ------------------------------------------------------------------------------


def measured(code, folder, monkeypatch):
    """Measure a line of Python, which at UNTIL_SEEN waits for a whole look at its memory that began after READY."""
    ready, seen = folder / "ready", folder / "seen"
    ready.unlink(missing_ok=True)
    seen.unlink(missing_ok=True)
    inner, began_ready = measure.marked, False

    def marked(mark):
        nonlocal began_ready
        if began_ready:
            seen.touch()
        began_ready = ready.exists()
        return inner(mark)

    code = code.replace("READY", f"open({str(ready)!r}, 'w').close()")
    code = code.replace("UNTIL_SEEN", f"[time.sleep(0.01) for _ in iter(lambda: os.path.exists({str(seen)!r}), True)]")
    with monkeypatch.context() as patch:
        patch.setattr(measure, "marked", marked)
        code = f"import os, subprocess, sys, tempfile, time; {code}"
        return measure.run(measure.python("-c", code), seconds=300)


def test_measured_memory_and_time(tmp_path, monkeypatch):
    # Files in memory belong to whoever runs beside it; other tests have theirs there.
    monkeypatch.setattr(measure, "MEMORY_FOLDER", tmp_path / "none")
    held = measured("x = b'1' * (200 << 20); READY; UNTIL_SEEN; time.sleep(0.6)", tmp_path, monkeypatch)
    assert held.outcome == "done"
    assert 200 << 20 < held.memory < 230 << 20
    assert held.largest == held.memory
    assert held.memory < held.resident < 260 << 20  # with the interpreter's files
    assert 0.6 < held.seconds < 120


def test_the_kernel_counts_a_peak_between_two_looks(tmp_path, monkeypatch):
    code = "x = b'1' * (300 << 20); del x; READY; UNTIL_SEEN"
    assert measured(code, tmp_path, monkeypatch).resident > 300 << 20
    # The control: it is not the rest of the process.
    assert 1 << 20 < measured("READY; UNTIL_SEEN", tmp_path, monkeypatch).resident < 100 << 20


@pytest.mark.skipif(not measure.MEMORY_FOLDER.is_dir(), reason="no file system in memory")
def test_measured_memory_counts_files_in_memory(tmp_path, monkeypatch):
    code = "f = tempfile.TemporaryFile(dir='/dev/shm'); f.write(bytes({} << 20)); f.flush(); READY; UNTIL_SEEN"
    # Other tests, which run beside this one, may write or remove more in memory than this does, but not each time.
    for mb, least, most in ((200, 170, 330), (1, 0, 50)):  # the control: it is not the rest of the process
        for _ in range(10):
            held = measured(code.format(mb), tmp_path, monkeypatch)
            assert held.outcome == "done"
            if least << 20 < held.memory < most << 20:
                break
        assert least << 20 < held.memory < most << 20


def test_measured_memory_counts_children_that_leave(tmp_path, monkeypatch):
    code = (
        "left = subprocess.Popen([sys.executable, '-c', "
        "\"import time; x = b'1' * (100 << 20); READY; time.sleep(600)\"], start_new_session=True); "
        "UNTIL_SEEN; left.wait(0.01)"
    )
    held = measured(code, tmp_path, monkeypatch)
    assert held.outcome == "failed"
    assert "TimeoutExpired" in held.message
    assert held.memory > 100 << 20


@pytest.mark.parametrize(
    ("limits", "outcome"), [({"seconds": 0.5}, "out of time"), ({"memory": 50 << 20}, "out of memory")]
)
def test_limits_end_a_run(limits, outcome):
    started = time.monotonic()
    ended = measure.run(measure.python("-c", "import time; x = b'1' * (100 << 20); time.sleep(600)"), **limits)
    assert ended.outcome == outcome
    assert time.monotonic() - started < 300


def test_cache_is_evicted_and_warmed(tmp_path):
    (tmp_path / "file").write_bytes(bytes(4 << 20))
    cache.evict([tmp_path])
    if cache.cached_share([tmp_path]) != 0:
        pytest.skip("this filesystem keeps its pages")
    cache.warm([tmp_path])
    assert cache.cached_share([tmp_path]) == 1


def test_free_memory_is_filled():
    """Run in separate processes, so that their pages are freed with them."""
    code = (
        "import os; from pathlib import Path; from benchmarks import cache; "
        "free = lambda: os.sysconf('SC_AVPHYS_PAGES') * os.sysconf('SC_PAGE_SIZE'); before = free(); "
        "done = cache.fill_memory(Path('.'), before - ({} << 20)); print(before - free(), done)"
    )
    # Whatever runs beside this may take or give back as much, but not each time.
    for mb, is_filled in ((512, True), (-512, False)):
        for _ in range(10):
            less, done = map(int, measure.run(measure.python("-c", code.format(mb))).stdout.split())
            if (less > 300 << 20 and done > 0) if is_filled else done == 0:
                break
        assert done > 0 if is_filled else done == 0
        assert less > 300 << 20 or not is_filled


def test_source_rows_carry_their_number(tmp_path):
    path = sources.make_source(tmp_path, 100_000, 64, 10_000)
    order = np.concatenate([words[:, 0] for _, words in formats.blocks(path)])
    np.testing.assert_array_equal(order, np.arange(sources.rows_of(path)))
    assert sum((path / key).stat().st_size for key in sources.chunk_keys(path)) >= 100_000 // 64 * 64


@pytest.mark.parametrize(
    ("order", "verdict"),
    [
        (np.random.default_rng(0).permutation(4096), "pass"),
        (np.arange(4096), "FAIL"),
        (np.random.default_rng(0).permutation(4096).reshape(64, 64).argsort(1).reshape(-1), "not a permutation"),
        (np.random.default_rng(0).permutation(4095), "not a permutation"),
    ],
)
def test_orders_are_judged(tmp_path, order, verdict):
    np.asarray(order, np.uint64).tofile(tmp_path / "rows")
    work = Work("", str(tmp_path), 4096, 8, 256, 1, None, 0)
    (tmp_path / "row_bytes").write_text("8")
    assert driver._mixing("mosaicml", None, tmp_path, work)["verdict"] == verdict


def test_kinks_are_named():
    def rows(slow):
        return [
            {
                "factor": f,
                "round": 0,
                "bytes": f * 10**9,
                "levels": 2 + (f > 8),
                "seconds": (2 + f * (2 + (f > 8))) * (slow if f == 4 else 1),
                "largest": 10**8,
            }
            for f in (1, 2, 4, 8, 16, 32)
        ]

    for slow, expected in ((1.0, "none"), (1.5, "4x (+50%)")):
        found, line = growth.summary(rows(slow), {"memory": 0.0})
        assert line["per_gb"] == pytest.approx(1)
        text = growth.page(found, line, 10**8, 0)[-1]
        assert f"off the line: {expected}." in text
        assert "16x (2 to 3)" in text


def test_every_peer_has_its_function():
    assert not PEERS["command"].module  # a command line, no function
    for peer in (peer for name, peer in PEERS.items() if name != "command"):
        module = __import__(f"benchmarks.peers.{peer.module}", fromlist=["x"])
        assert callable(getattr(module, peer.function))


def test_engine_is_as_it_was_after_a_timed_run(tmp_path):
    from benchmarks import phases

    before = [getattr(owner, name) for _, owner, name in phases.PROBES]
    source = sources.make_source(tmp_path, 1 << 16, 64)
    found = shuffle._shuffle(Serial(), source, tmp_path / "out", 64 << 20, 2, False)
    assert found["tasks"] > 2
    assert [getattr(owner, name) for _, owner, name in phases.PROBES] == before


def test_words():
    assert spread([3, 1, 2]) == {"median": 2, "low": 1, "high": 3, "rounds": 3}
    assert list(table(("a", "b"), [("x", 1)])) == ["| a | b |", "| --- | ---: |", "| x | 1 |"]
    assert command_line("floor", {"size": 5, "modes": ["a", "b"], "tiny": True, "only": None}) == (
        "python -m benchmarks floor --size 5 --modes a,b --tiny"
    )
    assert command_line("floor", {"rounds": 0, "tiny": False, "modes": [], "out": ""}) == (
        "python -m benchmarks floor --rounds 0"
    )
