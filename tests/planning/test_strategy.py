"""The cheapest way to the output: which ways are possible, what each costs, and which one is chosen."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from actshuffle.errors import InfeasibleError
from actshuffle.planning.planner import make_plan
from actshuffle.planning.report import way_report, way_text
from actshuffle.planning.strategy import IDLE, Candidate, Site, candidates, cheapest
from actshuffle.planning.tree import Plan

GB = 10**9
SITE = Site(workers=2, one_machine=True, free=20 * GB, shared=10 * GB, cached=1.0, fields=1, staged=0, coded=0)


def planner(nbytes: int, row_bytes: int = 8192, memory: int = 2 * GB, tasks_wanted: int = 6) -> Any:
    def plan(
        gather: bool | None = None,
        spill_memory: int | None = None,
        levels: Any = "auto",
        memory: int = memory,
        **_: Any,
    ) -> Plan:
        return make_plan(
            nbytes // row_bytes,
            row_bytes,
            memory=memory,
            tasks_wanted=tasks_wanted,
            gather=bool(gather),
            spill_memory=spill_memory or 0,
            levels=levels,
        )

    return plan


def ways(site: Site, nbytes: int, **settings: Any) -> dict[str, Candidate]:
    return {one.name: one for one in candidates(site, planner(nbytes, **settings))}


def chosen(site: Site, nbytes: int, **settings: Any) -> Candidate:
    return cheapest([*ways(site, nbytes, **settings).values()])


@pytest.mark.parametrize("row_bytes", [512, 2048, 8192])
@pytest.mark.parametrize("cached", [0.0, 0.5, 1.0])
def test_a_source_that_fits_into_the_page_cache_is_gathered(row_bytes: int, cached: float) -> None:
    best = chosen(replace(SITE, cached=cached), 8 * GB, row_bytes=row_bytes)
    assert (best.name, best.asks) == ("gather", {"gather": True})
    assert best.nbytes == pytest.approx(8 * GB * (2 - cached), rel=0.03)


def test_a_source_that_must_be_decoded_is_decoded_once() -> None:
    site = replace(SITE, staged=8192, coded=8192)
    found = ways(site, 8 * GB)
    assert found["gather"].plan is None
    assert cheapest([*found.values()]).name == "memory"
    assert chosen(replace(site, shared=7 * GB), 8 * GB).name in ("spill", "levels")
    assert "8 GB of rows, 7 GB free" in ways(replace(site, shared=7 * GB), 8 * GB)["memory"].reason


@pytest.mark.parametrize("times", [1.5, 3.0])
def test_more_data_than_memory_spills_into_what_is_free(times: float) -> None:
    site = replace(SITE, free=16 * GB, shared=16 * GB, cached=0.1)
    found = ways(site, int(times * 16 * GB))
    best = cheapest([*found.values()])
    assert found["gather"].plan is None
    assert best.name == "spill"
    room = int(0.9 * 16 * GB) - 2 * 2 * GB - 3 * IDLE
    assert 0.85 * room < best.plan.kept_bytes <= room
    assert best.nbytes < found["levels"].nbytes - 1.8 * best.plan.kept_bytes
    assert best.asks == {"spill_memory": room}


def test_ways_that_need_one_machine_are_impossible_on_a_cluster() -> None:
    found = ways(replace(SITE, one_machine=False), 8 * GB)
    assert {name for name, one in found.items() if one.plan} == {"levels"}
    assert all("other machines" in one.reason for name, one in found.items() if name != "levels")


def test_the_page_cache_must_hold_the_source_beside_the_workers() -> None:
    need = 8 * GB + 2 * 2 * GB
    assert ways(replace(SITE, free=int(need / 0.9) + 10**7), 8 * GB)["gather"].plan is not None
    short = ways(replace(SITE, free=int(need / 0.9) - 10**7), 8 * GB)["gather"]
    assert short.plan is None
    assert "need 12 GB" in short.reason


def test_a_source_in_memory_needs_no_room_there() -> None:
    """It would not fit into what is free, and has no need to."""
    site = replace(SITE, free=5 * GB, shared=0)
    assert chosen(site, 8 * GB).name == "levels"
    best = chosen(replace(site, resident=True), 8 * GB)
    assert (best.name, best.reason) == ("gather", "the source lies in memory already")
    assert chosen(replace(site, resident=True, free=4 * GB), 8 * GB).name == "levels", "the workers need room"
    assert chosen(replace(site, resident=True, staged=8192, coded=8192), 8 * GB).name == "levels"


def test_one_task_leaves_no_workers_idle_on_a_cluster() -> None:
    """Data that one task could hold, and rows that no machine's memory holds for all."""
    site = replace(SITE, one_machine=False, workers=8)
    best = chosen(site, GB, tasks_wanted=24)
    assert (best.name, best.asks) == ("levels", {"levels": 2})
    assert best.plan.blocks(1) >= 8
    assert best.plan.leaves >= 8
    assert chosen(replace(site, workers=1), GB, tasks_wanted=1).plan.levels == 1
    assert chosen(site, GB // 1000).plan.levels == 1, "too little to share"


def test_little_data_is_sorted_in_one_task() -> None:
    assert chosen(replace(SITE, workers=1), 10**6, tasks_wanted=1).name == "levels"


def test_nothing_possible_gives_the_reason_of_the_levels() -> None:
    with pytest.raises(InfeasibleError, match="memory too small"):
        chosen(replace(SITE, one_machine=False), 8 * GB, memory=10**6)


def test_reports_of_the_ways() -> None:
    found = list(candidates(SITE, planner(8 * GB)))
    report = way_report(found)
    assert [one["strategy"] for one in report] == ["gather", "memory", "disk", "spill", "levels"]
    assert [one["chosen"] for one in report] == [True, False, False, False, False]
    assert report[1]["seconds"] is report[1]["bytes"] is report[1]["levels"] is None
    assert all(one["reason"] for one in report)
    text = way_text(found)
    assert "-> gather" in text
    assert "impossible" in text


@pytest.mark.parametrize("nbytes", [3 * GB, 6 * GB])
def test_workers_take_less_where_that_leaves_memory_for_spill(nbytes: int) -> None:
    """A container of 2 GB with two workers: at 600 MB each nothing is left for a block of theirs."""
    tight = replace(SITE, free=int(1.9 * GB), shared=2 * GB, cached=0.0)
    assert "not enough for a block" in ways(tight, nbytes, memory=600 * 10**6)["spill"].reason
    found = ways(replace(tight, elastic=True), nbytes, memory=600 * 10**6)
    best = cheapest([*found.values()])
    assert best.name == "spill"
    assert best.asks["memory"] in (300 * 10**6, 150 * 10**6)
    plain = found["levels"].plan
    assert (best.plan.chunk_rows, best.plan.object_rows) == (plain.chunk_rows, plain.object_rows)
    assert best.plan.memory == best.asks["memory"]
    assert best.plan.kept_bytes + 2 * best.plan.memory + 3 * IDLE <= 0.9 * tight.free
    assert best.plan.kept_bytes > 0.2 * GB
    assert best.seconds < found["levels"].seconds
    assert "of spill stay in memory" in best.reason
    assert "since workers take" in best.reason


@pytest.mark.parametrize("free", [0.9, 1.2, 1.5, 1.7, 1.9])
def test_chunks_do_not_depend_on_the_memory_that_is_free(free: float) -> None:
    """Or the same request would be refused when its output is there, on a day with other memory free."""
    site = replace(SITE, free=int(free * GB), shared=2 * GB, cached=0.0, elastic=True)
    for row_bytes in (512, 8192, 65536):
        found = ways(site, 6 * GB, memory=600 * 10**6, row_bytes=row_bytes)
        plans = [found[name].plan for name in ("spill", "levels") if found[name].plan]
        assert len({(plan.chunk_rows, plan.object_rows) for plan in plans}) == 1


def test_workers_take_all_where_memory_is_plentiful() -> None:
    """Blocks of a quarter would only be more tasks."""
    found = ways(replace(SITE, free=64 * GB, shared=64 * GB, elastic=True, cached=0.0), 70 * GB)
    assert found["spill"].plan.memory == 2 * GB
    assert "memory" not in found["spill"].asks


def test_control_a_way_that_costs_more_is_not_chosen() -> None:
    """Where decoding and leaving the workers idle cost the same, it is the estimate alone that decides."""
    found = list(candidates(SITE, planner(8 * GB)))
    slow = [replace(one, seconds=10**6 if one.name == "gather" else one.seconds) for one in found]
    assert cheapest(slow).name != "gather"


@pytest.mark.parametrize(("rate", "best"), [(1e6, "disk"), (20_000.0, "spill")])
def test_a_disk_that_serves_single_rows_fast_needs_one_pass(rate: float, best: str) -> None:
    """A million rows of 8 KiB a second are more than two passes give; 20,000 are less."""
    site = replace(SITE, free=16 * GB, shared=16 * GB, cached=0.1, wide=1, rate=lambda _: rate)
    found = chosen(site, 100 * GB)
    assert found.name == best
    if best == "disk":
        assert found.asks == {"gather": True, "random_reads": True}
        assert "1,000,000 single rows a second (8.19 GB)" in found.reason
        assert found.nbytes == pytest.approx(2 * 100 * GB, rel=0.01)


@pytest.mark.parametrize(
    ("facts", "nbytes", "reason"),
    [
        ({}, 8 * GB, "fits into memory"),
        ({"resident": True}, 100 * GB, "fits into memory"),
        ({"staged": 8192}, 100 * GB, "must be decoded or fetched"),
        ({"wide": 0}, 100 * GB, "rows of less than"),
        ({"one_machine": False}, 100 * GB, "other machines"),
    ],
)
def test_a_disk_is_not_tried_where_its_rate_decides_nothing(facts: dict[str, Any], nbytes: int, reason: str) -> None:
    def rate(_: float) -> float:
        raise AssertionError("tried")

    site = replace(SITE, free=16 * GB, shared=16 * GB, **{"wide": 1, "rate": rate, **facts})
    assert reason in ways(site, nbytes)["disk"].reason
    with pytest.raises(AssertionError, match="tried"):
        ways(replace(SITE, wide=1, rate=rate), 100 * GB)


@pytest.mark.parametrize(("nbytes", "most"), [(6 * GB, 0.2), (20 * GB, 0.5), (10**4 * GB, 1.0)])
def test_a_trial_of_the_disk_is_short_beside_the_run(nbytes: int, most: float) -> None:
    """A second of reads would be a fifth of a run of a few gigabytes."""
    asked = list[float]()

    def rate(seconds: float) -> float:
        asked.append(seconds)
        return 1e6

    found = ways(replace(SITE, free=4 * GB, shared=4 * GB, wide=1, rate=rate), nbytes, memory=GB)
    [seconds] = asked
    assert seconds == pytest.approx(min(1.0, 0.01 * found["levels"].seconds))
    assert seconds <= most
