"""The cost of a plan on many hosts: cases worked out by hand, conservation, and invariants."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from click.testing import CliRunner

from actshuffle.cli.app import main
from actshuffle.errors import RequestError
from actshuffle.ordering import bounds
from actshuffle.planning import cost, simulate, stages, tree
from actshuffle.planning.cost import Cluster, Stage
from actshuffle.planning.forecast import forecast, text
from actshuffle.planning.memory import MemoryModel
from actshuffle.planning.planner import REMOTE_RUN_BYTES, make_plan

FREE = {"latency": 0.0, "overhead": 0.0, "dispatch": 0.0, "jitter": 0.0}


def play(stage, grain=0, seed=0, **cluster):
    """The outcome of a single stage."""
    rng = np.random.default_rng(seed)
    return simulate._Playing(stage, Cluster(**(FREE | cluster)), rng, grain).play()


def small_plan(size=10**12, **settings):
    width = 8192
    return make_plan(size // width, width, **({"memory": 10**9} | settings))


# --- Worked out by hand -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "cluster", "seconds", "limit"),
    [  # 8 tasks of 10 bytes in and 20 bytes out on 2 hosts of 2 workers: 4 at a time, 2 rounds
        (Stage("", 8, cpu=40.0), {}, 10.0, "workers"),
        (Stage("", 8, read=80.0), {"network": 5.0}, 8.0, "network"),
        # 2 workers of a host share it: 20 bytes in at 5 a second, then 40 out, twice
        (Stage("", 8, read=80.0, written=160.0), {"network": 5.0}, 24.0, "network"),
        (
            Stage("", 8, read=80.0, written=160.0, read_from="disk", write_to="disk"),
            {"disk": 10.0, "network": 5.0},
            24.0,
            "disk",
        ),  # its disks are across the network too
        (Stage("", 8, read=80.0), {"store": 4.0}, 20.0, "store"),
        (Stage("", 8, gets=80.0), {"requests": 5.0}, 16.0, "requests"),
        (Stage("", 8, gets=16.0), {"latency": 3.0, "network": 1e9}, 0.75, "workers"),  # 16 at once
        (Stage("", 8, gets=16.0, at_once=1), {"latency": 3.0}, 12.0, "workers"),  # one by one
        (Stage("", 8), {"overhead": 2.0}, 4.0, "workers"),
        (Stage("", 8, read=80.0, written=40.0), {"stream": 2.0, "network": 1e9}, 15.0, "workers"),
        (Stage("", 1, cpu=7.0, driver=2.0), {}, 9.0, "one task"),
        (Stage("", 0, driver=2.0), {}, 2.0, "driver"),
        (Stage("", 5, cpu=25.0), {}, 10.0, "workers"),  # one round of 4, then the fifth alone
        # The scheduler hands out one task a second: the eighth begins at 8 and takes 1.
        (Stage("", 8, cpu=8.0), {"dispatch": 1.0}, 9.0, "scheduler"),
        # Uneven: 1 + 1 + 4 + 2 rows at one second each, in order of need
        (Stage("", 4, cpu=8.0, rows=np.array([1, 1, 4, 2])), {}, 4.0, "one task"),
    ],
)
def test_stage_by_hand(stage, cluster, seconds, limit):
    found = play(stage, **({"hosts": 2, "workers_per_host": 2, "network": 1e12} | cluster))
    assert found.seconds == pytest.approx(seconds, rel=1e-6, abs=1e-6)
    assert found.limit == limit
    assert found.least <= found.seconds * (1 + 1e-6) + 1e-6


def test_sharing_by_hand():
    """One task reads 30 bytes, one 10, at 10 a second together: the short one is done at 2 s, the long one at 4 s."""
    stage = Stage("", 2, read=40.0, rows=np.array([3, 1]))
    found = play(stage, hosts=1, workers_per_host=2, network=10.0)
    assert (found.seconds, found.tail) == (pytest.approx(4.0), pytest.approx(2.0))


def test_stragglers_by_hand():
    stage = Stage("", 8, cpu=8.0)
    found = play(stage, hosts=2, workers_per_host=2, straggling=1.0, slowness=3.0)
    assert found.seconds == pytest.approx(6.0)


def test_failed_host_comes_back_and_its_task_is_done_again():
    stage = Stage("", 4, cpu=400_000.0)
    found = play(stage, hosts=2, workers_per_host=1, mtbf=150_000.0, repair=1000.0)
    assert found.failures
    assert found.lost
    assert found.seconds > 200_000 + found.lost * simulate.DETECT / 2
    quiet = play(stage, hosts=2, workers_per_host=1)
    assert (quiet.failures, quiet.lost, quiet.seconds) == (0, 0, pytest.approx(200_000))


def test_stages_by_hand():
    """10^6 rows of 1,000 bytes in blocks of 10^8 bytes: 10 splits, 10 leaves."""
    plan = make_plan(10**6, 1000, block_bytes=10**8, run_bytes=10**7, chunk_rows=10_000)
    assert (plan.levels, plan.blocks(1), plan.leaves) == (2, 10, 10)
    found = {s.name: s for s in stages.stages(plan, Cluster(hosts=2))}
    assert list(found) == ["boundaries", "level 1", "index 1", "level 2", "publish"]
    split, index, leaf = found["level 1"], found["index 1"], found["level 2"]
    assert split.read == 10**9
    assert split.written == 1016 * 10**6 + 10 * 10 * stages.RECEIPT
    assert split.puts == 10 * (2 + 13 + 1)  # 101.6 MB in 13 parts, between a start and an end, and a receipt
    assert index.gets == 10 + 1
    assert index.puts == 2 * 10 + 1
    # 100 runs of 10.16 MB in 3 pieces each, and 10 tasks that look for receipt, runs and sums
    assert leaf.gets == 100 * 3 + 10 + 3 * 10
    assert leaf.puts == 100 + 2 * 10
    assert leaf.written == 1008 * 10**6
    on_disk = {s.name: s for s in stages.stages(plan, Cluster(hosts=2, disk=1e9))}
    assert sum(s.gets + s.puts for s in on_disk.values()) == 0
    mixed = {s.name: s for s in stages.stages(plan, Cluster(hosts=2, disk=1e9, requests=100.0))}
    assert mixed["level 1"].read_from == mixed["level 2"].write_to == "store"
    assert mixed["level 1"].write_to == mixed["level 2"].read_from == "disk"


def test_stages_of_many_receipts_by_hand(monkeypatch):
    """The same with 4 receipts a pack: 10 blocks are 3 packs, and an index task makes the tables of 3 of 10 buckets."""
    monkeypatch.setattr(tree, "PACK", 4)
    monkeypatch.setattr(tree, "TABLE_BYTES", 3 * 16 * 10)
    monkeypatch.setattr(bounds, "COUNT_ROWS", 10**5)
    plan = make_plan(10**6, 1000, block_bytes=10**8, run_bytes=10**7, chunk_rows=10_000)
    found = {s.name: s for s in stages.stages(plan, Cluster(hosts=2))}
    assert list(found) == ["boundaries", "level 1", "pack 1", "index 1", "level 2", "publish"]
    pack, index, publish, search = (found[name] for name in ("pack 1", "index 1", "publish", "boundaries"))
    assert (pack.tasks, pack.gets, pack.puts, pack.written) == (3, 10 + 3, 2 * 3, 16 * 100)
    # Each of the 4 tasks looks for its receipt, and reads two parts of each pack.
    assert (index.tasks, index.gets, index.puts, index.read) == (4, 4 * (1 + 2 * 3), 2 * 10 + 4, 16 * 100)
    assert (publish.tasks, publish.gets, publish.puts) == (3, 10 + 3, 2 * 3)
    # One pass of counts by 16 bits, one that returns keys: 10 ranges in each.
    assert (search.tasks, search.passes, search.written) == (20, 2, 10 * 8 * 2**16)
    assert stages.concerns(plan, Cluster()) == []


def test_passes_wait_for_each_other():
    """Three passes of 3 tasks on 2 workers take 2 rounds each; without the wait, 9 tasks would take 5."""
    stage = Stage("", 9, cpu=9.0, driver=0.5, passes=3)
    cluster = Cluster(hosts=1, workers_per_host=2, **FREE)
    found = simulate._played(stage, cluster, np.random.default_rng(0), 0)
    assert (found.tasks, found.seconds) == (9, pytest.approx(6.5))
    assert found.least <= found.seconds
    assert play(dataclasses.replace(stage, passes=1), hosts=1, workers_per_host=2).seconds == pytest.approx(5.5)


def test_little_of_10_pb_waits_for_one_task_or_the_driver():
    model = MemoryModel(8192, remote=True, output_copies=2)
    plan = make_plan(1220 * 10**9, 8192, memory=16 * 10**9, run_bytes=REMOTE_RUN_BYTES, model=model)
    cluster = Cluster(hosts=200, workers_per_host=16, network=3e9, requests=350_000.0, stream=4e8)
    waits, works = 0.0, 0.0
    for stage in stages.stages(plan, cluster):
        if stage.name.startswith("level"):
            works += cost.least_seconds(stage, cluster)[0]
        else:
            waits += simulate._played(stage, cluster, np.random.default_rng(0), simulate.GRAIN).seconds
    assert waits < 0.015 * works


def test_dollars_by_hand():
    plan = make_plan(10**6, 1000, block_bytes=10**8, run_bytes=10**7, chunk_rows=10_000)
    c = Cluster(hosts=3, put_price=2.0, get_price=1.0, host_price=5.0, scratch_price=1e-9)
    told = cost.dollars(plan, [Stage("", 1, gets=7, puts=11)], c, seconds=10.0)
    scratch = 1016 * 10**6 * 10 * 1e-9
    assert told == {
        "requests": 29.0,
        "hosts": 150.0,
        "scratch": pytest.approx(scratch),
        "total": pytest.approx(179 + scratch),
    }


# --- What must hold of any run ------------------------------------------------------------------

CLUSTERS = [
    {"requests": 50_000.0},
    {"disk": 2e9},
    {"disk": 2e9, "store": 5e10, "requests": 1e5},
    {"straggling": 0.05, "slowness": 4.0},
    {"mtbf": 1800.0, "repair": 60.0},
    {"stream": 1e8},
]


@pytest.mark.parametrize("settings", CLUSTERS)
@pytest.mark.parametrize("grain", [0, simulate.GRAIN])
def test_every_task_once_and_every_byte(settings, grain):
    plan = small_plan()
    cluster = Cluster(hosts=10, workers_per_host=8, **settings)
    for stage, played in zip(
        stages.stages(plan, cluster), simulate.simulate(plan, cluster, seed=1, grain=grain), strict=True
    ):
        assert played.read == pytest.approx(stage.read)
        assert played.written == pytest.approx(stage.written)
        assert played.seconds >= played.least * 0.97  # jitter may be kind
        assert (played.failures > 0) <= bool(cluster.mtbf)


@pytest.mark.parametrize("size", [0, 10**9, 3 * 10**11, 10**12 + 8192 * 7])
@pytest.mark.parametrize("levels", [1, 2, 3, 4])
def test_task_rows_are_those_of_the_plan(size, levels):
    plan = small_plan(size, levels=levels, memory=None, block_bytes=max(size, 10**9) if levels == 1 else 10**9)
    for level in range(1, plan.levels + 1):
        rows = stages.task_rows(plan, level)
        assert rows.sum() == plan.rows
        if level < plan.levels:
            blocks = (plan.block(level, i) for i in range(plan.blocks(level)))
            assert rows.tolist() == [b.stop - b.start for b in blocks]
        else:
            leaves = (plan.bucket_ranks(level - 1, i) for i in range(plan.leaves))
            assert rows.tolist() == [stop - start for start, stop in leaves]


def test_same_seed_same_run_and_other_seed_another():
    plan, cluster = small_plan(10**11), Cluster(hosts=4, workers_per_host=4, mtbf=500.0)
    once, again = (simulate.simulate(plan, cluster, seed=5) for _ in range(2))
    assert once == again
    assert once != simulate.simulate(plan, cluster, seed=6)


def test_turns_of_many_tasks_change_little():
    plan, cluster = small_plan(4 * 10**12), Cluster(hosts=8, workers_per_host=8, requests=2e5)
    one_by_one = sum(p.seconds for p in simulate.simulate(plan, cluster, grain=0))
    together = sum(p.seconds for p in simulate.simulate(plan, cluster))
    assert together == pytest.approx(one_by_one, rel=0.06)


def test_check_sees_a_lost_task(monkeypatch):
    """Negative control: a simulation that forgets the tasks of a dead host must not go unnoticed."""
    plan, cluster = small_plan(10**11), Cluster(hosts=4, workers_per_host=4, mtbf=300.0)

    def forget(self, tasks):
        self._count(*tasks)  # as if done
        self._count(*tasks)
        self.left += tasks[1]

    monkeypatch.setattr(simulate._Playing, "_returned", forget)
    with pytest.raises(AssertionError, match="lost or done twice"):
        simulate.simulate(plan, cluster)


@pytest.mark.parametrize(
    ("better", "value"), [("network", 1e10), ("hosts", 40), ("latency", 0.001), ("split_cpu", 0.0), ("dispatch", 0.0)]
)
def test_more_of_anything_takes_no_longer(better, value):
    plan, cluster = small_plan(), Cluster(hosts=10, workers_per_host=8, requests=2e4)
    base = sum(cost.least_seconds(s, cluster)[0] for s in stages.stages(plan, cluster))
    richer = dataclasses.replace(cluster, **{better: value})
    assert sum(cost.least_seconds(s, richer)[0] for s in stages.stages(plan, richer)) <= base


def test_scratch_in_a_store_needs_requests_that_disks_do_not():
    plan = small_plan()
    remote = make_plan(
        plan.rows, 8192, memory=10**9, run_bytes=4 << 20, model=MemoryModel(8192, remote=True, output_copies=2)
    )
    stored = forecast(remote, Cluster(hosts=10, requests=5e4))
    disks = forecast(plan, Cluster(hosts=10, disk=1e9))
    assert stored["puts"] > remote.leaves
    assert disks["gets"] == disks["puts"] == 0


def test_concerns_are_raised_where_tables_outgrow_a_task():
    huge = make_plan(12 * 10**12, 8192, memory=10**9)
    assert any("index 1" in c for c in stages.concerns(huge, Cluster(hosts=200)))
    assert stages.concerns(small_plan(10**11), Cluster(hosts=200)) == []


def test_answers_stay_small_at_any_size():
    for rows, leaves in ((10**12, 10**6), (10**13, 10**6), (10**12, 10)):
        assert max(bounds.answers(rows, leaves)[:-1]) <= 8 * bounds._MOST_COUNTS
        assert -(-rows // bounds.range_rows(rows)) <= bounds.COUNT_TASKS


# --- The command --------------------------------------------------------------------------------

PLAN = ["plan", "--rows", "122e6", "--row-bytes", "8KiB", "--memory", "1GB"]


def run(*words):
    return CliRunner().invoke(main, [*PLAN, *words])


def test_command_forecasts_and_simulates():
    told = json.loads(
        run(
            "--hosts",
            "20",
            "--requests",
            "5e4",
            "--simulate",
            "--stragglers",
            "0.01:4",
            "--mtbf",
            "100",
            "--price-per-put",
            "0.005",
            "--json",
        ).stdout
    )
    found = told["forecast"]
    assert found["simulated"]
    assert found["workers"] == 320
    assert found["dollars"]["total"] > 0
    assert found["seconds"] == pytest.approx(sum(row["seconds"] for row in found["stages"]))
    least = json.loads(run("--hosts", "20", "--requests", "5e4", "--json").stdout)["forecast"]
    assert least["seconds"] < found["seconds"]
    assert "forecast" not in json.loads(run("--json").stdout)
    page = run("--hosts", "20", "--simulate").stdout
    assert "simulated" in page
    assert "index 1" in page


def test_text_names_hosts_that_died():
    plan = small_plan()
    told = forecast(plan, Cluster(hosts=10, mtbf=600.0), simulated=True)
    assert told["failures"] > 0
    assert f"{told['failures']:,} hosts died" in text(told)


@pytest.mark.parametrize(
    ("failures", "lost", "words"), [(1, 1, "1 host died, 1 task was"), (2, 0, "2 hosts died, 0 tasks were")]
)
def test_numbers_of_hosts_and_tasks_agree_with_their_nouns(failures, lost, words):
    told = forecast(small_plan(), Cluster(hosts=1, workers_per_host=1), simulated=True)
    assert "1 host, 1 worker;" in text(told)
    assert f"{words} done again" in text(told | {"failures": failures, "lost_tasks": lost})


@pytest.mark.parametrize(
    "words",
    [
        ("--hosts", "0"),
        ("--hosts", "2", "--stragglers", "2:3"),
        ("--hosts", "2", "--stragglers", "x"),
        ("--hosts", "2", "--network", "0"),
        ("--hosts", "2", "--mtbf", "-1"),
        ("--hosts", "2", "--disk", "fast"),
    ],
)
def test_command_refuses(words):
    assert run(*words).exit_code == 2


def test_cluster_refuses_what_is_no_rate():
    with pytest.raises(RequestError, match="network must be positive"):
        Cluster(network=float("inf"))
