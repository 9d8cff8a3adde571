"""The commands and programs of the pages on training, features and probing; see `tests/test_pages.py`."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.pages import ROOT, fault
from support.stage import Stage, play
from test_pages import TRAINING


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    return Stage(tmp_path_factory.mktemp("stage"))


@pytest.mark.parametrize("page", TRAINING)
def test_a_page_runs_and_prints_what_it_shows(page: str, stage: Stage, tmp_path: Path) -> None:
    faults = [fault(step, printed) for step, printed in play(page, (ROOT / page).read_text(), stage, tmp_path)]
    assert [found for found in faults if found] == []
