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
from saetrain.reporting.report import report

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
    assert "0.3 &plusmn; 0.03" in rows["k=4"]
    assert "<td>12.5%</td><td>yes</td>" in rows["k=4"]
    assert "<td>12.5%</td><td></td>" in rows["k=5"]
    assert "diverged: the loss is nan" in rows["k=9"]
    assert "<td>yes</td>" not in rows["k=9"]
    assert "Trained on store rows.zarr; rows 2,048; device cpu." in text
    assert "<script" not in text
    assert "http" not in text.replace("http-equiv", ""), "it loads nothing"


@pytest.mark.parametrize(("last", "shown"), [(None, "left out: training was faster"), (0.25, "0.25")])
def test_an_mfu_that_was_left_out_is_said_to_be(last: float | None, shown: str, tmp_path: Path) -> None:
    """And no earlier one stands in its place."""
    lines = [line(4.0, 0.5) | {"mfu": 0.75}, line(4.0, 0.5) | {"step": 20, "mfu": last}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    text = report([tmp_path], tmp_path)[0].read_text()
    (cell,) = re.findall(r"<th>MFU at the end</th><td>(.*?)</td>", text)
    assert cell.startswith(shown)


def test_the_page_of_one_run_has_no_frontier(sweep: Path) -> None:
    page = report([sweep / "k=4"], sweep / "out")[0].read_text()
    assert "<h1>k=4</h1>" in page
    assert "frontier" not in page.split("</style>")[1]


@pytest.mark.parametrize(
    ("values", "log"),
    [([1e-4, 1e-2], True), ([0.16, 0.19], True), ([2.0, 2.0], True), ([0.0, 1.0], False), ([3.0, 3.0], False)],
)
def test_scales_hold_all_values_and_have_ticks(values: list[float], log: bool) -> None:
    axis = Axis.of(values, 0, 100, log=log)
    assert all(0 < axis.place(v) <= 100 or v == 0 for v in values)
    ticks = axis.ticks()
    assert 2 <= len(ticks) <= 8
    assert all(axis.low <= tick <= axis.high * (1 + 1e-9) for tick in ticks)
    places = [axis.place(tick) for tick in ticks]
    assert all(a < b for a, b in pairwise(places))
