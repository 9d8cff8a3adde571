"""Exit 2 means that nothing was written: the file system around a refused command is what it was before."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from actshuffle import head, shuffle
from actshuffle.cli.app import COMMANDS, main
from support.stores import act_and_token, group, values

ROWS = 60
# A command of which something is impossible, and a part of what it says.
REFUSED = [
    ("run src out --memory 1", "memory"),
    ("run src out --fields none", "none"),
    ("run s out", "source_row"),
    ("run src src/inside", "src"),
    ("sample s 10 out", "leave it out with --fields act,token"),
    ("sample src 10 out --memory 1", "memory"),
    ("sample src 61 out", "cannot take 61 of the 60 rows"),
    ("sample src 10 s", "s"),
    ("split s out/a=0.7 out/b=0.7", "in total"),
    ("split s out=0.5 s=rest", "exists already"),
    ("split src a=0.5", "no completion marker"),
    ("head s 61 out", "61"),
    ("filter src out --drop-tokens 1 --drop-norm -1", "drop-norm"),
    ("filter src out --drop-tokens 1 --memory 1", "memory"),
    ("filter src s --drop-norm 2", "s"),
    ("concat src wide --out out", "shape"),
    ("concat src gone --out out", "no such source"),
    ("append s wide --out out", "shape"),
    ("append s src --out out", "already"),
    ("append view src --out out", "not the whole of a shuffle"),
    ("append s more --out out --memory 1", "memory"),
    ("import x.npy --out out --memory 1", "memory"),
    ("collect nowhere text --layers 1 --out out --rows 0", "--rows"),
    ("run gone out", "no such source"),
    ("plan src --memory 1", "memory"),
    ("plan gone", "no such source"),
    ("status src", "src"),
    ("info gone", "no such"),
    ("came-from s 60", "no row 60"),
    ("came-from src 0", "no completion marker"),
    ("where-is s 60", "no row 60"),
    ("where-is src 0", "no completion marker"),
    ("stats gone", "no such source"),
    ("quality s --batch-size 60", "two are needed"),
    ("sample gone 5 out", "no such source"),
    ("split s out=0.5 --by document", "--copy"),
    ("split src out/a=0.5 --by document", "no array of document numbers"),
    ("split src out/a=10 --by row", "fractions"),
    ("split src out/a=0.5 s=rest --by row", "exists already"),
    ("filter src out --skip-first 1", "window_position"),
    ("filter gone out --drop-norm 2", "no such source"),
    ("concat src s --out out", "arrays"),
    ("append src more --out out", "no completion marker"),
    ("import gone.npy --out out", "gone.npy"),
    ("import x.npy --out s", "s is finished"),
    ("import x.npy --out out --columns none", "none"),
    ("collect --model gone --text text --layers 1 --out out", "gone"),
    ("collect --model gone --text text --out out", "--layers"),
    ("verify src view2", "no completion marker"),
    ("verify s view", "is a view of"),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    fields = act_and_token(2 * ROWS)
    group(folder / "src", {k: v[:ROWS] for k, v in fields.items()})
    group(folder / "more", {k: v[ROWS:] for k, v in fields.items()})
    group(folder / "wide", {"act": values(9, (6,)), "token": values(9, (), "<i4")})
    group(folder / "view2", {"act": values(9, (6,))})
    shuffle(folder / "src", folder / "s", seed=3)
    head(folder / "s", 10, folder / "view")
    np.save(folder / "x.npy", np.zeros((4, 3), "f4"))
    (folder / "text").mkdir()
    (folder / "text/a.txt").write_text("one two three")
    return folder


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file and folder, with its time of change and its bytes."""
    return {
        str(p.relative_to(folder)): (p.stat().st_mtime_ns, b"" if p.is_dir() else p.read_bytes())
        for p in sorted(folder.rglob("*"))
    }


@pytest.mark.parametrize(("command", "said"), REFUSED)
def test_a_refused_command_leaves_everything_as_it_was(
    made: Path, command: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(made)
    before = snapshot(made)
    result = CliRunner().invoke(main, command.split())
    after = snapshot(made)
    assert result.exit_code == 2, result.output
    assert said in result.output
    assert [k for k in {*before, *after} if before.get(k) != after.get(k)] == []


def test_every_command_is_refused_something() -> None:
    assert {command.split()[0] for command, _ in REFUSED} == set(COMMANDS)


def test_the_snapshot_sees_what_a_command_writes(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(shutil.copytree(made, tmp_path / "made"))
    monkeypatch.chdir(folder)
    before = snapshot(folder)
    assert CliRunner().invoke(main, ["sample", "src", "10", "out", "--seed", "1"]).exit_code == 0
    assert any(key.startswith("out") for key in snapshot(folder).keys() - before.keys())
