"""The commands and programs of README and docs run in order on a small collection, and print what the pages show.

`tests/test_pages_training.py` has the pages on training; `python tests/support/pages.py` writes outputs anew.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pytest

from support.pages import NOT_RUN, OTHERS, ROOT, blocks, fault, form, rewritten, run, steps, why_not
from support.stage import GIVEN, Stage, pages, play
from support.stores import group

TRAINING = ["docs/training.md", "docs/features.md", "docs/interactions.md", "docs/view.md", "docs/probing.md"]
HERE = [page for page in pages() if page not in TRAINING]


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    return Stage(tmp_path_factory.mktemp("stage"))


@pytest.mark.parametrize("page", HERE)
def test_a_page_runs_and_prints_what_it_shows(page: str, stage: Stage, tmp_path: Path) -> None:
    faults = [fault(step, printed) for step, printed in play(page, (ROOT / page).read_text(), stage, tmp_path)]
    assert [found for found in faults if found] == []


def test_every_page_with_commands_is_run() -> None:
    assert set(GIVEN) == set(pages())
    assert len(pages()) >= 10


def test_every_exception_is_used() -> None:
    found = [step for page in pages() for step in steps(page, (ROOT / page).read_text())]
    unused = [key for key in NOT_RUN if not any(s.page == key[0] and s.text.startswith(key[1]) for s in found)]
    assert unused == []
    programs = {step.text.split(" ", 1)[0] for step in found}
    assert set(OTHERS) - programs == set()
    assert sum(not why_not(step) for step in found) > 50


# --- Controls ---------------------------------------------------------------------------------------

PAGE = """Text.

    $ actshuffle head s 1
    act
      [1. 2.]
    $ actshuffle head s 1

```python
print(rows + 1)
```

    actshuffle info s \\
        --json

More text.

    a picture   of   things
"""


def test_steps_of_a_page() -> None:
    found = list(steps("p", PAGE))
    assert [(s.line, s.text, s.shown) for s in found] == [
        (3, "actshuffle head s 1", "act\n  [1. 2.]"),
        (6, "actshuffle head s 1", ""),
        (9, "print(rows + 1)", None),
        (12, "actshuffle info s --json", None),
    ]
    assert [block.line for block in blocks(PAGE)] == [3, 9, 12, 17]


def test_control_lines_that_are_no_commands() -> None:
    with pytest.raises(ValueError, match="'rn a b' is no command"):
        list(steps("p", "Text.\n\n    actshuffle run a b\n    rn a b\n"))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("act\n      [1. 2.]", "act\n      [1. 2.] and more"),
        ("act\n      [1. 2.]", "token\n      [1. 2.]"),
        ("    act\n      [1. 2.]\n", ""),
        ("    act\n", "    act\n    another\n"),
        ("head s 1\n    act", "head s 1 --ordered --json\n    act"),
        ("head s 1\n    act", "head gone 1\n    act"),
        ("head s 1\n    act", "head s 1 --no-such-flag\n    act"),
        ("print(rows + 1)", "print(rows +)"),
        ("print(rows + 1)", "print(row + 1)"),
    ],
)
def test_control_a_changed_block_or_output_is_seen(old: str, new: str, tmp_path: Path) -> None:
    group(tmp_path / "s", {"act": np.array([[1, 2]], "<f4")})

    def faults(text: str) -> list[str]:
        names, found = {"rows": 1}, []
        with contextlib.chdir(tmp_path):
            for step in steps("p", text):
                try:
                    found.append(fault(step, run(step, names)))
                except (AssertionError, NameError, SyntaxError) as err:
                    found.append(str(err))
        return [text for text in found if text]

    whole = PAGE.replace("$ actshuffle head s 1\n\n", "$ actshuffle head s 1\n    act\n      [1. 2.]\n\n")
    assert faults(whole) == []
    assert old in whole
    assert len(faults(whole.replace(old, new, 1))) == 1


def test_figures_units_and_folders_may_change_and_words_may_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert form("1,234 rows in 3.4 s, 1.2 GB/s") == form("9 rows  in 1 min 3 s, 80 KB/s")
    assert form(f"{tmp_path}/a.zarr: 3 rows") == form("a.zarr: 12 rows")
    assert form("loss 1e-05 (95 %: -0.1 to 2.0)") == form("loss 0.3 (95 %: 0.1 to 2)")
    assert form("3 rows of a.zarr") != form("3 rows of b.zarr")
    assert form("layer_3") != form("layer_5")


def test_outputs_are_written_where_one_differs() -> None:
    text = rewritten("p", PAGE, {3: "act\n  [3. 4.]\n", 6: "act\n  [5. 6.]\n"})
    shown = [(s.line, s.shown) for s in steps("p", text)]
    assert shown[:2] == [(3, "act\n  [3. 4.]"), (7, "act\n  [5. 6.]")]
    assert rewritten("p", text, {3: "act\n  [9. 9.]\n", 7: "act\n  [8. 8.]\n"}) == text
    assert text.endswith(PAGE[PAGE.index("```python") :])
