"""The pages are true: links lead somewhere, flags and names exist, the API page is current."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import shlex
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

import click
import pytest

import actshuffle
from actshuffle.cli.app import main as actshuffle_main
from saetrain.cli.app import command_line as saetrain_main

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"  # written once by a benchmark, and then kept as they are
WRITTEN = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))]
WRITTEN += [ROOT / "benchmarks" / "README.md", ROOT / "examples" / "README.md"]
sys.path.insert(0, str(ROOT))  # benchmarks are run from the root, not installed
ALL = [*WRITTEN, ROOT / "CHANGELOG.md", *sorted(RESULTS.glob("*/README.md"))]


def of(pages: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("page", pages, ids=lambda page: page.relative_to(ROOT).as_posix())


def test_pages_are_found():
    assert {page.name for page in WRITTEN} >= {"README.md", "CONTRIBUTING.md", "architecture.md", "api.md", "theory.md"}
    assert len(ALL) > len(WRITTEN) + 10


# --- What is code on a page -----------------------------------------------------------------------


def blocks(text: str) -> Iterator[str]:
    """Blocks of code, fenced or indented, without their marks."""
    fenced = re.compile(r"^```[^\n]*\n(.*?)^```", re.M | re.S)
    yield from fenced.findall(text)
    yield from re.findall(r"(?:(?<=\n\n)|\A)((?:(?: {4}[^\n]*)?\n)+)", fenced.sub("", text) + "\n")


def spans(text: str) -> Iterator[str]:
    """Code within prose."""
    prose = re.sub(r"^```[^\n]*\n.*?^```", "", text, flags=re.M | re.S)
    yield from (" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose))


def commands(text: str) -> Iterator[str]:
    """Lines of blocks with continued ones joined, and code within prose."""
    for block in blocks(text):
        yield from (line.strip().removeprefix("$ ") for line in block.replace("\\\n", " ").splitlines())
    yield from spans(text)


# --- Links ----------------------------------------------------------------------------------------


def anchors(text: str) -> set[str]:
    """The fragments by which GitHub names the headings of a page."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        name = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        found.add(next(n for n in (name, *(f"{name}-{i}" for i in range(1, 99))) if n not in found))
    return found


def link_faults(text: str, page: Path) -> list[str]:
    faults = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, fragment = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        if not there.exists() or ROOT not in there.parents:
            faults.append(f"{target} is not there")
        elif fragment and fragment not in anchors(text if there == page else there.read_text()):
            faults.append(f"{target} names no heading")
    return faults


@of(ALL)
def test_links_lead_somewhere(page):
    assert link_faults(page.read_text(), page) == []


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("[a](docs/nowhere.md)", "docs/nowhere.md is not there"),
        ("![a](docs/nothing.png)", "docs/nothing.png is not there"),
        ("[two\nlines](docs/theory.md#9-nothing)", "docs/theory.md#9-nothing names no heading"),
        ("# One\n[a](#two)", "#two names no heading"),
        ("[a](../../etc/passwd)", "../../etc/passwd is not there"),
    ],
)
def test_control_links_that_lead_nowhere(text, fault):
    assert link_faults(text, ROOT / "README.md") == [fault]


def test_links_that_lead_somewhere_are_no_faults():
    text = "# One `two`, three\n[a](#one-two-three) [b](docs/theory.md#2-the-proof) [c](https://example.org/#x)"
    assert link_faults(text, ROOT / "README.md") == []


def test_every_page_of_docs_is_on_the_map():
    linked = {
        (page.parent / target.partition("#")[0]).resolve()
        for page in (ROOT / "docs" / "index.md", ROOT / "docs" / "decisions" / "README.md")
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    }
    assert set(WRITTEN) - linked == {ROOT / "docs" / "index.md"}


# --- Flags ----------------------------------------------------------------------------------------

# Flags of other programs, where a page names one without its program.
FOREIGN = {"--lifetime": "dask worker", "--help": "every command"}


@cache
def programs() -> dict[str, dict[str, set[str]]]:
    """The flags of each command of each program of ours."""
    benchmarks = importlib.import_module("benchmarks.__main__").main
    groups = {"actshuffle": actshuffle_main, "saetrain": saetrain_main, "benchmarks": benchmarks}
    return {program: commands_of(group) for program, group in groups.items()}


def commands_of(group: click.Group) -> dict[str, set[str]]:
    context = click.Context(group)
    found = {name: group.get_command(context, name) for name in group.list_commands(context)}
    return {name: flags(command) for name, command in found.items() if command is not None}


def flags(command: click.Command) -> set[str]:
    return {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}


def flag_faults(text: str) -> list[str]:
    ours, faults = programs(), []
    anywhere = set().union(FOREIGN, *(flags for found in ours.values() for flags in found.values()))
    for line in commands(text):
        try:
            words = shlex.split(line, comments=True)
        except ValueError:  # prose with an apostrophe
            continue
        program = next((word for word in words if word in ours), None)
        if program is None:
            if words and words[0].startswith("--") and (flag := words[0].partition("=")[0]) not in anywhere:
                faults.append(f"no command of ours has {flag}")
            continue
        after = words[words.index(program) + 1 :]
        if not after or not re.fullmatch(r"[a-z][a-z0-9-]*", after[0]):
            known = set(FOREIGN)
        elif after[0] not in ours[program]:
            faults.append(f"{program} has no command {after[0]}")
            continue
        else:
            known = ours[program][after[0]] | set(FOREIGN)
        used = {word.partition("=")[0] for word in after if re.match(r"--?[a-z]", word)}
        faults += [f"{' '.join([program, *after[:1]])} has no {flag}" for flag in sorted(used - known)]
    return faults


@of(WRITTEN)
def test_flags_are_those_of_the_commands(page):
    assert flag_faults(page.read_text()) == []


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("Give `--nonsense 3`.", "no command of ours has --nonsense"),
        ("Use `actshuffle run a b --k 3`.", "actshuffle run has no --k"),
        (
            "So:\n\n    actshuffle plan --rows 3 \\\n        --nonsense 4     # --comment\n",
            "actshuffle plan has no --nonsense",
        ),
        ("```\n$ saetrain fit a --epochs=3\n```\n", "saetrain fit has no --epochs"),
        ("`python -m benchmarks growth --sizes 3`", "benchmarks growth has no --sizes"),
        ("`actshuffle shuffle a b`", "actshuffle has no command shuffle"),
    ],
)
def test_control_flags_that_do_not_exist(text, fault):
    assert fault in flag_faults(text)


def test_flags_that_exist_are_no_faults():
    text = "`--memory`, `actshuffle`\n\n    $ actshuffle run a b --memory 8GB --no-fsync   # --what\n"
    text += "    dask worker --nthreads 1\n"
    assert flag_faults(text) == []


def test_foreign_flags_are_named_somewhere():
    text = "".join(page.read_text() for page in WRITTEN)
    assert [flag for flag in FOREIGN if flag not in text] == []


# --- Names of the code ----------------------------------------------------------------------------

ROOMS = sorted({path.parent.name for path in (ROOT / "actshuffle").glob("*/*.py")})
FOLDERS = ["actshuffle", "saetrain", "benchmarks", "tests", "examples", "docs"]


def exists(name: str) -> bool:
    """True if a dotted name leads to a module, or to something in one."""
    first, *others = name.split(".")
    found: object = importlib.import_module(first)
    for part in others:
        if hasattr(found, part):
            found = getattr(found, part)
            continue
        if part in getattr(found, "__annotations__", ()):  # a field without a default
            return True
        if not isinstance(found, ModuleType):
            return False
        try:
            found = importlib.import_module(f"{found.__name__}.{part}")
        except ModuleNotFoundError:
            return False
    return True


@cache
def file_names() -> set[str]:
    return {path.name for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}


def name_faults(text: str) -> list[str]:
    """Files, tests and dotted names of ours that a page mentions and that do not exist."""
    faults = []
    paths = sorted(set(re.findall(rf"(?<![\w/.-])(?:{'|'.join([*FOLDERS, *ROOMS])})/[a-z0-9_/]+\.py\b", text)))
    lone = [span for span in spans(text) if re.fullmatch(r"[a-z0-9_]+\.py", span)]
    roots = [ROOT, ROOT / "actshuffle", ROOT / "tests"]
    faults += [f"{path} does not exist" for path in paths if not any((root / path).is_file() for root in roots)]
    faults += [f"{name} does not exist" for name in lone if name not in file_names()]
    for path, test in re.findall(r"([\w/]+\.py)::(\w+)", text):
        if (ROOT / path).is_file() and f"def {test}(" not in (ROOT / path).read_text():
            faults.append(f"{path} has no {test}")
    dotted = set(re.findall(r"(?<![\w/.-])(?:actshuffle|saetrain)(?:\.[A-Za-z_]\w*)+", text))
    dotted |= {f"actshuffle.{n}" for n in re.findall(rf"(?<![\w/.-])(?:{'|'.join(ROOMS)})(?:\.[A-Za-z_]\w*)+", text)}
    modules = [name for name in sorted(dotted) if not name.endswith((".py", ".md"))]
    return faults + [f"{name} does not exist" for name in modules if not exists(name)]


@of(WRITTEN)
def test_names_exist(page):
    assert name_faults(page.read_text()) == []


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("see `actshuffle/nothing.py`", "actshuffle/nothing.py does not exist"),
        ("see `cli/nothing.py`", "cli/nothing.py does not exist"),
        ("see `nothing_of_this_name.py`", "nothing_of_this_name.py does not exist"),
        ("`pytest tests/test_docs.py::test_of_nothing`", "tests/test_docs.py has no test_of_nothing"),
        ("call `actshuffle.shufle(src)`", "actshuffle.shufle does not exist"),
        ("the `cli.app.man` function", "actshuffle.cli.app.man does not exist"),
        ("a `saetrain.Config.wide`", "saetrain.Config.wide does not exist"),
    ],
)
def test_control_names_that_do_not_exist(text, fault):
    assert name_faults(text) == [fault]


def test_names_that_exist_are_no_faults():
    text = "`actshuffle.shuffle`, `cli.app.main`, `actshuffle/errors.py`, `errors.py`, `cli/NAME.py`, shuffled.zarr"
    text += " `actshuffle.Result.seed` `tests/test_docs.py::test_names_exist` https://example.org/actshuffle.html"
    assert name_faults(text) == []


# --- The page of inputs ---------------------------------------------------------------------------


def claims(text: str) -> list[str]:
    """Rows of tables without their heads, items of lists, and paragraphs that are neither."""
    found = []
    for block in re.sub(r"^#.*$", "", text, flags=re.M).split("\n\n"):
        lines = block.strip("\n").splitlines()
        if lines and lines[0].startswith("|"):
            found += lines[2:]
        elif lines and lines[0].startswith("- "):
            found += [" ".join(item.split()) for item in re.split(r"^- ", block, flags=re.M) if item.strip()]
        elif lines:
            found.append(" ".join(block.split()))
    return found


def untested(text: str) -> list[str]:
    """Claims that name no test; a paragraph that only introduces what follows (it ends with a colon) makes none."""
    test = re.compile(r"`[\w/]+\.py::test_\w+`")
    return [claim for claim in claims(text) if not claim.endswith(":") and not test.search(claim)]


# Sentences that say how to read the page, by their first words.
GUIDES = ("People's files are", "The first bytes of a file", "An index beside", "A trial on a few tokens")


def test_every_line_of_the_inputs_names_its_test():
    faults = untested((ROOT / "docs" / "inputs.md").read_text())
    assert [fault for fault in faults if not fault.startswith(GUIDES)] == []
    assert all(any(fault.startswith(guide) for fault in faults) for guide in GUIDES)


@pytest.mark.parametrize("name", ["docs/inputs.md"])
def test_control_lines_of_the_inputs_without_a_test(name):
    text = (ROOT / name).read_text()
    for claim in re.findall(r"^(?:\||- ).*`(tests/\S+)`.*$", text, re.M)[::9]:
        assert len(untested(text.replace(f"`{claim}`", "`no test`"))) > len(untested(text)), claim
    assert untested("# A\n\nRead:\n\n| a | test |\n|---|---|\n| b | c |\n\n- d\n  e\n- f `t.py::test_f`") == [
        "| b | c |",
        "d e",
    ]


@of(WRITTEN)
def test_python_on_pages_is_python(page):
    for code in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S):
        if not re.match(r"(class )?\w+(\.\w+)+[(:\n]", code) or page.name != "api.md":
            ast.parse(code)


# --- Messages -------------------------------------------------------------------------------------


@cache
def messages() -> str:
    """The texts of the code, with those that are written in pieces as one."""
    code = [path.read_text() for package in ("actshuffle", "saetrain") for path in (ROOT / package).rglob("*.py")]
    return re.sub(r'"\s*\n\s*f?"', "", "\n".join(code))


def message_faults(text: str) -> list[str]:
    """Messages in the first column of a table that no code prints."""
    table = text.partition("| the message says |")[2].partition("\n\n")[0]
    found = re.findall(r"^\| `([^`]+)`", table, re.M)
    return [message for message in found if message not in messages()] if found else ["no table of messages"]


def test_messages_of_the_guide_are_those_of_the_code():
    assert message_faults((ROOT / "docs/guide.md").read_text()) == []


def test_control_messages_that_no_code_prints():
    text = "| the message says | why |\n|---|---|\n| `join the sources` | |\n| `never said by anyone` | |\n"
    assert message_faults(text) == ["never said by anyone"]
    assert message_faults("# Guide") == ["no table of messages"]


# --- The API page ---------------------------------------------------------------------------------


@pytest.fixture
def make_api():
    spec = importlib.util.spec_from_file_location("make_api", ROOT / "docs" / "make_api.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_api_page_is_current(make_api):
    assert (ROOT / "docs" / "api.md").read_text() == make_api.page(), "run python docs/make_api.py"


def test_control_api_page_follows_the_code(make_api, monkeypatch):
    before = make_api.page()

    def head(path: str) -> None:
        """Another function.  And more."""

    monkeypatch.setattr(actshuffle, "head", head)
    after = make_api.page()
    assert "actshuffle.head(path: str) -> None\n```\n\nAnother function.\n" in after
    assert after.replace(make_api.entry("actshuffle.head", head), "") != before


def test_control_api_page_leaves_no_public_name_out(make_api, monkeypatch):
    monkeypatch.setattr(actshuffle, "__all__", [*actshuffle.__all__, "novel"])
    with pytest.raises(ValueError, match="novel of actshuffle must go into a section"):
        make_api.page()
