"""The report: who is on the frontier, what the page says of each run, and the scales of its charts."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from saetrain.config import Config
from saetrain.reporting.charts import Axis
from saetrain.reporting.frontier import frontier
from saetrain.reporting.page import around, cell
from saetrain.reporting.report import report
from saetrain.reporting.when import when

HOSTILE = "<script>alert(1)"
MEMBERS = {  # L0, FVU
    "k=2": (2.0, 0.5),
    "k=4": (4.0, 0.3),
    "k=5": (5.0, 0.35),  # k=4 has less of both
    "k=8": (8.0, 0.2),
    HOSTILE: (8.0, 0.25),
}


def test_the_frontier() -> None:
    assert frontier(MEMBERS) == ["k=2", "k=4", "k=8"]
    assert frontier({"a": (1.0, 0.1), "b": (1.0, 0.1), "c": (1.0, 0.2)}) == ["a", "b"]
    assert frontier({}) == []


def line(l0: float, fvu: float) -> dict[str, Any]:
    found = {"step": 10, "tokens": 640, "loss": fvu, "l0": l0, "eval_dead": 0.125, "eval_rows": 64}
    for key, value in (("eval_l0", l0), ("eval_fvu", fvu)):
        found |= {key: value, f"{key}_low": value * 0.9, f"{key}_high": value * 1.1}
    return found


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """The folder of a sweep, one member of which has diverged."""
    for name, (l0, fvu) in MEMBERS.items():
        run = tmp_path / name.replace("/", "_")
        run.mkdir()
        (run / "metrics.jsonl").write_text(json.dumps(line(l0, fvu)) + "\n")
        about = {"store": "rows.zarr", "rows": 2048, "device": "cpu"}
        (run / "config.json").write_text(json.dumps({"config": Config(k=int(l0)).to_json(), "about": about}))
    (tmp_path / "k=9").mkdir()
    (tmp_path / "k=9" / "metrics.jsonl").write_text(json.dumps({"step": 3, "diverged": "diverged: the loss is nan"}))
    return tmp_path


def test_the_page_of_a_sweep(sweep: Path) -> None:
    page, image = report([sweep], sweep)
    text = page.read_text()
    assert image.stat().st_size > 0
    assert "On the frontier: k=2, k=4, k=8." in text
    assert text.count('class="dot c') == len(MEMBERS)
    assert len(re.findall(r'class="dot c\d on"', text)) == 3
    rows = {row.split("</th>")[0].rsplit(">", 1)[1]: row for row in text.split("<tr>") if "swatch" in row}
    assert "0.300 &plusmn; 0.030" in rows["k=4"]
    assert "<td>12.5%</td><td>yes</td>" in rows["k=4"]
    assert "<td>12.5%</td><td></td>" in rows["k=5"]
    assert "diverged: the loss is nan" in rows["k=9"]
    assert "<td>yes</td>" not in rows["k=9"]
    facts = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", text))
    assert (facts["Store"], facts["Rows"], facts["On"]) == ("rows.zarr", "2,048", "cpu")
    assert facts["Trained"] == "up to 10 steps, 640 tokens"
    assert ", that differ in k<" in text
    assert "<script" not in text
    assert "http" not in text.replace("http-equiv", ""), "it loads nothing"


@pytest.mark.parametrize(("last", "shown"), [(None, "left out: training was faster"), (0.25, "25.00%")])
def test_an_mfu_that_was_left_out_is_said_to_be(last: float | None, shown: str, tmp_path: Path) -> None:
    """And no earlier one stands in its place."""
    lines = [line(4.0, 0.5) | {"mfu": 0.75}, line(4.0, 0.5) | {"step": 20, "mfu": last}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    text = report([tmp_path], tmp_path)[0].read_text()
    (cell,) = re.findall(r"<th>MFU at the end</th><td>(.*?)</td>", text)
    assert cell.startswith(shown)
    (end,) = re.findall(r"\(MFU\)</span><b>(.*?)</b>", text)
    assert end == ("left out" if last is None else "0.25")


@pytest.mark.parametrize(
    ("value", "key", "shown"),
    [(16_384, "", "16,384"), (101_076.4, "tokens_per_s", "101,076"), (0.08114, "", "0.08114"), (True, "", "True")],
)
def test_whole_numbers_have_all_their_digits(value: Any, key: str, shown: str) -> None:
    assert cell(value, key) == f"<td>{shown}</td>"


def test_the_page_of_one_run_has_no_frontier(sweep: Path) -> None:
    page = report([sweep / "k=4"], sweep / "out")[0].read_text()
    assert "<h1>k=4</h1>" in page
    assert "frontier" not in page.split("</style>")[1]
    assert "<div><b>0.300 &plusmn; 0.030</b><span>FVU" in page
    assert "<div><b>12.5%</b><span>dead latents" in page
    assert "of training" not in page, "these lines have no dates"


DATES = {10: (20.0, "2026-03-01T23:58:20Z"), 20: (45.5, "2026-03-01T23:58:45Z"), 30: (70.0, "2026-03-02T01:00:10Z")}


def test_when_a_run_trained_and_for_how_long(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [{"step": s, "seconds": x, "time": t} for s, (x, t) in DATES.items()]
    found = when(lines[:2])
    assert found is not None
    assert (found.span(), found.length()) == ("1 March 2026, 23:58 UTC", "45.5 s")
    found = when(lines)
    assert found is not None
    assert found.span() == "1 March 2026, 23:58 to 2 March 2026, 01:00 UTC"
    assert found.length() == "1 min 10 s, with pauses of 1 h 01 min"
    broken: list[dict[str, Any]] = [{"step": 1}, {"step": 2, "seconds": 1.0}, {"seconds": 2.0, "time": "yesterday"}]
    assert when(broken) is None
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        text = "".join(json.dumps(line(4.0, 0.3) | dated) + "\n" for dated in lines[:2])
        (tmp_path / name / "metrics.jsonl").write_text(text)
    page = report([tmp_path / "one"], tmp_path)[0].read_text()
    assert "20 steps, 640 tokens; 1 March 2026, 23:58 UTC; 45.5 s of training" in page
    page = report([tmp_path / "one", tmp_path / "two"], tmp_path)[0].read_text()
    assert page.count("<td>45.5 s</td>") == 2


def test_what_never_changes_is_told_and_not_drawn(sweep: Path) -> None:
    run = sweep / "k=4"
    lines = [line(4.0, 0.3) | {"step": 10 * i, "l0": 4.0, "loss": 1 / i} for i in (1, 2, 3)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    page = report([run], sweep / "out")[0].read_text()
    assert "Constant, and not drawn: active latents a token (L0) 4;" in page
    assert "<span>active latents a token (L0)</span>" not in page.split("<figure>", 1)[1]
    assert "<figcaption><span>loss</span><b>0.333</b></figcaption>" in page


def test_figures_have_the_digits_that_their_interval_allows() -> None:
    found = [around(0.07516, 0.0044), around(31.99849, 0.00151), around(4.0, 0.0), around(1234.56, 78.9)]
    assert [text.replace("&plusmn;", "+-") for text in found] == [
        "0.0752 +- 0.0044",
        "31.9985 +- 0.0015",
        "4 +- 0",
        "1,235 +- 79",
    ]


@pytest.mark.parametrize(
    ("values", "log"),
    [
        ([1e-4, 1e-2], True),
        ([31.9985, 32.0], False),
        ([0.16, 0.19], True),
        ([2.0, 2.0], True),
        ([0.0, 1.0], False),
        ([3.0, 3.0], False),
    ],
)
def test_scales_hold_all_values_and_have_ticks(values: list[float], log: bool) -> None:
    axis = Axis.of(values, 0, 100, log=log)
    assert all(0 < axis.place(v) <= 100 or v == 0 for v in values)
    ticks = axis.ticks()
    assert 2 <= len(ticks) <= 8
    assert all(axis.low <= tick <= axis.high * (1 + 1e-9) for tick in ticks)
    places = [axis.place(tick) for tick in ticks]
    assert all(a < b for a, b in pairwise(places))
