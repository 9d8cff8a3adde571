"""A command of saetrain that is refused leaves every file as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import actshuffle
from saetrain.cli.app import COMMANDS, command_line
from support.causal import saved, texts
from support.stores import group

SMALL = "--steps 2 --d-sae 64 --k 4 --batch-size 64 --device cpu --no-report --eval-every 2"
MODEL = "--model model --device cpu"
# A command of which something is impossible, and a part of what it says.
REFUSED = [
    (f"fit acts --out out {SMALL}", "not shuffled"),
    (f"fit plain --out out {SMALL}", "error: {home}/plain has no completion marker"),
    (f"fit gone --out out {SMALL}", "gone"),
    (f"fit s --field none --out out {SMALL}", "none"),
    (f"fit s --out s/inside {SMALL}", "s"),
    (f"fit s --heldout wide --out out {SMALL}", "wide"),
    (f"fit s --out run {SMALL} --seed 9", "seed"),
    (f"fit faulty --out out {SMALL}", "is nan"),
    ("plan gone", "no such source"),
    ("resume gone", "gone"),
    ("resume acts", "acts"),
    (f"sweep acts --out out {SMALL.replace('--k 4', '--k 2,4')}", "not shuffled"),
    (f"sweep s --out s/inside {SMALL.replace('--k 4', '--k 2,4')}", "s"),
    ("report gone --out out", "gone"),
    ("report run gone --out out", "gone"),
    ("features run s out", "shuffled"),
    ("features gone acts out", "gone"),
    ("features run wide out", "wide"),
    ("features run acts out --memory 1KB", "memory"),
    ("export-features run out --format neuronpedia --model-id m --layer 1 --set s", "no finished result"),
    ("export gone out", "gone"),
    ("export run acts", "acts"),
    ("import gone out", "gone"),
    ("import acts out", "acts"),
    (f"evaluate gone {MODEL} --text text", "gone"),
    ("evaluate run --model gone --text text", "gone"),
    (f"evaluate run {MODEL} --text gone", "gone"),
    (f"steer run {MODEL} --feature 9999 --prompt w1 --strengths 1 --unit activation --out out", "9999"),
    (f"attribute run {MODEL} --prompt w1 --target absent", "absent"),
    (f"ablate run {MODEL} --feature 9999 --text text", "9999"),
    (f"graph run gone {MODEL} --prompt w1 --out out.json", "gone"),
    (f"graph run run {MODEL} --prompt w1 --out out.json", "layer"),
    ("interactions run gone out", "gone"),
    ("interactions run run out --memory 1KB", "memory"),
    ("view run", "no finished result"),
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    home = tmp_path_factory.mktemp("home")
    dice = np.random.default_rng(0)
    rows = {"layer_2": dice.standard_normal((600, 16)).astype("<f4"), "token": np.zeros(600, "<i4")}
    with chdir(home):
        group(home / "plain", rows)
        actshuffle.filter_rows("plain", "acts", drop_tokens=[1])  # a collection of all rows
        group(home / "wide-source", {"layer_2": dice.standard_normal((300, 5)).astype("<f4")})
        bad = rows["layer_2"].copy()
        bad[7, 3] = np.nan
        group(home / "bad", {"layer_2": bad})
        for source, shuffled in (("acts", "s"), ("wide-source", "wide"), ("bad", "faulty")):
            actshuffle.shuffle(source, shuffled, seed=1)
        (home / "text").mkdir()
        for name, text in texts(4):
            (home / "text" / f"{name}.txt").write_text(text)
        saved(home / "model")
        made = CliRunner().invoke(command_line, f"fit s --out run {SMALL}".split(), prog_name="saetrain")
        assert made.exit_code == 0, made.output
        yield home


def snapshot() -> dict[str, tuple[int, bytes]]:
    """Every file and folder, with its time of change and its bytes; but for the run's lock, which says who was last."""
    found = [p for p in sorted(Path().rglob("*")) if p.name != ".lock" or p.parent.name != "run"]
    return {str(p): (p.stat().st_mtime_ns, b"" if p.is_dir() else p.read_bytes()) for p in found}


@pytest.mark.parametrize(("command", "said"), REFUSED)
def test_a_refused_command_leaves_everything_as_it_was(home: Path, command: str, said: str) -> None:
    before = snapshot()
    result = CliRunner().invoke(command_line, command.split(), prog_name="saetrain")
    after = snapshot()
    assert result.exit_code in (1, 2), result.output
    assert said.replace("{home}", str(home)) in result.output, result.output
    assert "Traceback" not in result.output
    assert "unexpected" not in result.output
    assert {k for k in {*before, *after} if before.get(k) != after.get(k)} == set()


def test_every_command_is_refused_something() -> None:
    assert {command.split()[0] for command, _ in REFUSED} == set(COMMANDS)


def test_control_the_snapshot_sees_what_a_command_writes(home: Path) -> None:
    before = snapshot()
    assert CliRunner().invoke(command_line, ["report", "run", "--out", "drawn"]).exit_code == 0
    assert any(key.startswith("drawn") for key in snapshot().keys() - before.keys())
