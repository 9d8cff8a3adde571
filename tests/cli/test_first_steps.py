"""What people meet in the first hour: commands under other names, mistyped places, limits beyond the machine, and
messages that name options on the command line and arguments in Python."""

from __future__ import annotations

import ast
import inspect
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner

import actshuffle
import saetrain
from actshuffle import machine
from actshuffle.cli import app
from actshuffle.errors import SWITCHES, DestinationExistsError, InfeasibleError, RequestError, in_python
from saetrain.cli import app as sae_app
from saetrain.errors import ConfigError
from saetrain.features import pipeline
from saetrain.products.productplan import make_plan
from support.stores import array, group, values

ROOT = Path(actshuffle.__file__).parent.parent
PROGRAMS = {"actshuffle": (app.main, app), "saetrain": (sae_app.command_line, sae_app)}
IN_BACKTICKS = re.compile(r"`[^`]*`")
FLAG = re.compile(r"(?<![\w-])--(?:no-)?([a-z][a-z0-9-]*)")


def commands() -> Iterator[click.Command]:
    for _, module in PROGRAMS.values():
        for name, (room, _) in module.COMMANDS.items():
            yield next(command for command in room() if command.name == name)


def options() -> dict[str, click.Option]:
    """Every option of both programs, by its long name without hyphens in front."""
    found = [p for command in commands() for p in command.params if isinstance(p, click.Option)]
    return {flag[2:]: option for option in found for flag in option.opts if flag.startswith("--")}


# --- Commands


@pytest.mark.parametrize("program", PROGRAMS)
def test_names_of_other_programs_suggest_a_command_that_exists(program: str) -> None:
    main, module = PROGRAMS[program]
    known = {f"{name} {command}" for name, (_, one) in PROGRAMS.items() for command in one.COMMANDS}
    assert set(module.MEANT.values()) <= known
    assert not set(module.MEANT) & set(module.COMMANDS)
    word = {"actshuffle": "shuffle", "saetrain": "train"}[program]
    found = CliRunner().invoke(main, [word, "a", "b"], prog_name=program)
    assert found.exit_code == 2
    assert f"did you mean `{module.MEANT[word]}`?" in found.output
    misspelt = {"actshuffle": {"shufle": "run", "verfy": "verify"}, "saetrain": {"trian": "fit", "exprt": "export"}}
    for word, due in misspelt[program].items():
        found = CliRunner().invoke(main, [word, "a"], prog_name=program)
        assert found.exit_code == 2
        assert f"no command {word!r}; did you mean `{program} {due}`?" in found.output
    assert "did you mean" not in CliRunner().invoke(main, ["zzz"]).output.lower()


# --- Messages


def messages() -> Iterator[tuple[str, str]]:
    """The literal texts of everything that is raised, each with its place."""
    for package in ("actshuffle", "saetrain"):
        for file in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Raise) and node.exc is not None:
                    found = [n.value for n in ast.walk(node.exc) if isinstance(n, ast.Constant)]
                    text = " | ".join(part for part in found if isinstance(part, str))
                    yield f"{file}:{node.lineno}", IN_BACKTICKS.sub("", text)


def arguments() -> set[str]:
    """The arguments of all public functions, and the settings of training."""
    found = {name for module in (actshuffle, saetrain) for name in module.__all__}
    makers = [getattr(module, name) for module in (actshuffle, saetrain) for name in module.__all__ if name in found]
    makers += [pipeline.plan_features, make_plan, actshuffle.executors.connected]
    named = {name for maker in makers if callable(maker) for name in inspect.signature(maker).parameters}
    return named | {"compute", "nproc", "panel", "port"}  # of the command line alone


def test_options_in_messages_exist_and_become_arguments() -> None:
    known, named, seen = options(), arguments(), 0
    for place, text in messages():
        for flag in FLAG.findall(text):
            seen += 1
            assert flag in known, f"{place} names --{flag}, which no command has"
            if "/cli/" not in place:
                (python,) = re.findall(r"^leave (\w+)$", in_python(f"leave --{flag}"))
                assert python in named, f"{place} names --{flag}, and no function has {python}"
    assert seen > 100


def test_no_message_names_an_argument_where_the_command_line_has_an_option() -> None:
    own = {"source_row"}  # also the name of an array
    words = {name.replace("-", "_") for name in options() if "-" in name} - own
    for place, text in messages():
        if "loading/loader.py" in place or "loading/torchface.py" in place:  # of Python alone
            continue
        found = words & set(re.findall(r"(?<![\w'\"-])[a-z]+(?:_[a-z]+)+(?![\w'\"])", text))
        assert not found, f"{place} says {found}: write the option"


def test_switches_are_those_of_the_commands() -> None:
    """Options of the command line alone, such as --json, are in no message."""
    known = options()
    assert [name for name in SWITCHES if name not in known or not known[name].is_flag] == []
    named = {flag for place, text in messages() if "/cli/" not in place for flag in FLAG.findall(text)}
    assert {name for name in named if known[name].is_flag} <= set(SWITCHES)


def test_an_error_says_options_on_the_command_line_and_arguments_in_python(tmp_path: Path) -> None:
    array(tmp_path / "a", values(20, (2,)))
    actshuffle.shuffle(tmp_path / "a", tmp_path / "b", seed=1)
    with pytest.raises(DestinationExistsError, match="or overwrite=True replaces it") as raised:
        actshuffle.shuffle(tmp_path / "a", tmp_path / "b", seed=2)
    assert "--" not in str(raised.value)
    said = CliRunner().invoke(app.main, ["run", f"{tmp_path}/a", f"{tmp_path}/b", "--seed", "2"]).output
    assert "or --overwrite replaces it" in said
    with pytest.raises(ConfigError, match=r"^batch_size must be"):
        saetrain.Config(batch_size=-1)
    with pytest.raises(RequestError, match=r"^memory must be more than 0 bytes"):
        actshuffle.plan(tmp_path / "a", memory=0)


def test_an_error_within_a_report_says_them_likewise(tmp_path: Path) -> None:
    """A store whose metadata was altered: the problem that verify tells is the text of another error."""
    group(tmp_path / "g", {"data": values(40, (2,)), "token": values(40, ())})
    actshuffle.shuffle(tmp_path / "g", tmp_path / "s", seed=1)
    metadata = tmp_path / "s" / "token" / "zarr.json"
    metadata.write_text(metadata.read_text().replace("40", "30", 1))
    report = actshuffle.verify(tmp_path / "g", tmp_path / "s")
    assert "choose some with fields" in str(report)
    assert "choose some with fields" in report._repr_html_()
    said = " ".join(CliRunner().invoke(app.main, ["verify", f"{tmp_path}/g", f"{tmp_path}/s"]).output.split())
    assert "choose some with --fields" in said


# --- The machine, and places


@pytest.mark.parametrize("command", ["run", "sample", "filter", "append"])
def test_more_memory_than_the_machine_has_is_refused(command: str, tmp_path: Path) -> None:
    array(tmp_path / "a", np.ones((40, 2), "<f4"))
    actshuffle.shuffle(tmp_path / "a", tmp_path / "s", seed=1)
    group(tmp_path / "g", {"data": np.ones((9, 2), "<f4")})
    words = {
        "run": ["run", "a", "new"],
        "sample": ["sample", "a", "5", "new"],
        "filter": ["filter", "a", "new", "--drop-norm", "3"],
        "append": ["append", "s", "g", "--out", "new"],
    }[command]
    words = [f"{tmp_path}/{word}" if word in ("a", "s", "g", "new") else word for word in words]
    before = sorted(tmp_path.rglob("*"))
    found = CliRunner().invoke(app.main, [*words, "--memory", "900TB", "--workers", "0"])
    assert found.exit_code == 2
    assert re.search(r"--memory 900,000 GB is more than the [\d.]+ GB of this machine", " ".join(found.output.split()))
    assert sorted(tmp_path.rglob("*")) == before
    assert CliRunner().invoke(app.main, [*words, "--memory", "1GB", "--workers", "0"]).exit_code == 0


def test_features_and_products_are_refused_the_same_memory(tmp_path: Path) -> None:
    for call in (saetrain.build_features, saetrain.interactions):
        with pytest.raises(InfeasibleError, match=r"^memory=.900,000 GB. is more than"):
            call("absent", "absent", tmp_path / "out", memory=9 * 10**14)


def test_a_plan_of_more_memory_is_made_and_says_so(tmp_path: Path) -> None:
    array(tmp_path / "a", values(40, (2,)))
    plan = ["plan", str(tmp_path / "a"), "--memory"]
    assert "more than the" in CliRunner().invoke(app.main, [*plan, "900TB"]).output
    assert "more than the" not in CliRunner().invoke(app.main, [*plan, "1GB"]).output


def test_a_folder_that_is_made_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    array(tmp_path / "a", values(40, (2,)))
    with caplog.at_level(logging.WARNING):
        actshuffle.shuffle(tmp_path / "a", tmp_path / "b", seed=1)
        assert caplog.messages == []
        actshuffle.shuffle(tmp_path / "a", tmp_path / "runz" / "x" / "b", seed=1)
    assert caplog.messages == [f"there was no folder {tmp_path / 'runz'}; it is made now"]


def test_a_small_filter_starts_no_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cores", lambda: 2)
    array(tmp_path / "a", np.ones((40, 2), "<f4"))
    found = CliRunner().invoke(app.main, ["filter", f"{tmp_path}/a", f"{tmp_path}/b", "--drop-norm", "3"])
    assert found.exit_code == 0
    assert "40 rows" in found.output
    assert "cluster" not in found.output


def test_splits_by_other_seeds_are_said_to_overlap(tmp_path: Path) -> None:
    array(tmp_path / "a", values(400, (2,)))

    def split(*more: str) -> str:
        words = ["split", f"{tmp_path}/a", "x=0.5", "y=rest", "--by", "row", *more]
        return CliRunner().invoke(app.main, words).output

    assert "overlap" not in split("--folder", str(tmp_path))
    assert "another seed draws other lots" in split("--folder", str(tmp_path / "other"), "--seed", "5")
    told = CliRunner().invoke(app.main, ["info", str(tmp_path / "x")]).output
    assert "share 0 to 0.5, seed 0; splits by other seeds overlap it" in told
    assert "names rows of ../a, and copies none" in told
    assert "not an actshuffle output" in CliRunner().invoke(app.main, ["info", str(tmp_path / "a")]).output


def test_results_show_themselves_in_a_notebook(tmp_path: Path) -> None:
    array(tmp_path / "<a>", np.ones((40, 2), "<f4"))
    made = [actshuffle.filter_rows(tmp_path / "<a>", tmp_path / "f", drop_norm=2)]
    np.save(tmp_path / "n.npy", np.ones((5, 2)))
    made.append(actshuffle.import_store(tmp_path / "n.npy", tmp_path / "i"))
    actshuffle.shuffle(tmp_path / "i", tmp_path / "s", seed=1)
    made.append(actshuffle.append(tmp_path / "s", tmp_path / "i", again=True))
    for result, title in zip(made, ("Filtered", "Imported", "Appended"), strict=True):
        shown = result._repr_html_()
        assert f">{title}<" in shown
        assert result.destination in shown
