"""Names that users rely on stay: of Python, the command line, files, and JSON; see public_api.py."""

from __future__ import annotations

import builtins
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

import public_api
from public_api import FROZEN, Description, Section, differences


@pytest.fixture(scope="module")
def found() -> Description:
    return public_api.description()


def test_public_names_are_those_that_are_frozen(found: Description) -> None:
    lines = differences(json.loads(FROZEN.read_text()), found)
    assert not lines, public_api.advice(lines)


def test_description_is_not_of_an_empty_package(found: Description) -> None:
    least = {"python": 250, "deep names": 100, "objects": 250, "errors": 14, "commands": 200, "printed JSON": 250}
    least |= {"files of half-done runs": 200, "files of finished runs": 100}
    assert {section for section, items in found.items() if len(items) < least[section]} == set()
    for section, item in (
        ("python", "actshuffle.shuffle(seed)"),
        ("deep names", "actshuffle.data.dataset.write_view(start)"),
        ("objects", "Loader.state_dict"),
        ("commands", "actshuffle run --spill-memory"),
        ("files of half-done runs", "DST.scratch-TAG/level1/receipts/N.json"),
        ("files of half-done runs", "run.json: body.plan.plan.leaf_rows"),
        ("files of half-done runs", "_actshuffle/virtual.json: settings.parts[].store"),
        ("files of finished runs", "DST/_actshuffle/stats/stats.json"),
        ("files of finished runs", "_actshuffle/zarr.json: attributes.actshuffle.source_identity"),
        ("printed JSON", "verify --json: ok"),
    ):
        assert item in found[section]


# --- Negative controls ----------------------------------------------------------------------------------------


def report(was: Section, now: Section) -> list[str]:
    return differences({"section": was}, {"section": now})


def items(function: Callable[..., Any]) -> Section:
    return dict(public_api.signature("f", function))


def options(*decorators: Callable[[Any], Any]) -> Section:
    def run(**_: Any) -> None: ...

    for decorator in decorators:
        run = decorator(run)
    return dict(public_api.command("tool run", click.command()(run)))


def test_control_names_that_come_and_go() -> None:
    assert report({"a": "function"}, {"a": "function"}) == []
    assert report({"a": "function", "b": "class"}, {"a": "function"}) == ["section: b is gone; it was: class"]
    assert report({}, {"a": "function"}) == ["section: a is new: function"]
    assert differences({"old": {"a": "x"}}, {}) == ["old: a is gone; it was: x"]


def test_control_a_changed_signature() -> None:
    def before(a: int, b: int = 1, *, c: str | None = None) -> list[str]: ...
    def other_default(a: int, b: int = 2, *, c: str | None = None) -> list[str]: ...
    def other_kind(a: int, b: int = 1, c: str | None = None) -> list[str]: ...
    def other_order(b: int, a: int = 1, *, c: str | None = None) -> list[str]: ...
    def other_result(a: int, b: int = 1, *, c: str | None = None) -> set[str]: ...
    def without(a: int, b: int = 1) -> list[str]: ...
    def respelled(a: Any, b: Any = 1, *, c: Any = None) -> builtins.list[builtins.str]: ...

    was = items(before)
    assert report(was, items(respelled)) == []
    assert report(was, items(other_default)) == [
        "section: f(b) was: positional or keyword 1, default 1; it is: positional or keyword 1, default 2"
    ]
    assert report(was, items(other_kind)) == [
        "section: f(c) was: keyword-only, default None; it is: positional or keyword 2, default None"
    ]
    assert len(report(was, items(other_order))) == 2
    assert report(was, items(other_result)) == ["section: f -> was: list[str]; it is: set[str]"]
    assert report(was, items(without)) == ["section: f(c) is gone; it was: keyword-only, default None"]


def test_control_a_changed_object() -> None:
    class Before:
        size: int

        def read(self, start: int) -> None: ...

    class After:
        @property
        def size(self) -> int:
            return 1

        def _read(self, start: int) -> None: ...

    was, now = dict(public_api.members("Store", Before)), dict(public_api.members("Store", After))
    assert report(was, now) == [
        "section: Store.read is gone; it was: method",
        "section: Store.read -> is gone; it was: None",
        "section: Store.read(start) is gone; it was: positional or keyword 1, required",
    ]


def test_control_a_changed_command() -> None:
    size = click.option("--size", type=int, default=1)
    was = options(size, click.option("--codec", type=click.Choice(["none", "zstd"])), click.argument("path", nargs=-1))
    codec = "tool run --codec"
    now = options(size, click.argument("path", nargs=-1))
    assert report(was, now) == [f"section: {codec} is gone; it was: option, choice none, zstd, optional"]
    now = options(size, click.option("--codec", type=click.Choice(["none"])), click.argument("path", nargs=-1))
    assert report(was, now) == [
        f"section: {codec} was: option, choice none, zstd, optional; it is: option, choice none, optional"
    ]
    now = options(
        click.option("--size", "-s", type=int, default=2, required=True),
        click.option("--codec", type=click.Choice(["none", "zstd"]), help="Help is not frozen."),
        click.argument("path"),
    )
    assert report(was, now) == [
        "section: tool run --size is gone; it was: option, integer, optional, default 1",
        "section: tool run --size/-s is new: option, integer, required, default 2",
        "section: tool run PATH was: argument 0, text, optional, nargs -1; it is: argument 0, text, required",
    ]


def test_control_a_renamed_file_or_attribute(tmp_path: Path) -> None:
    def snapshot(name: str, document: Any) -> Section:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        path = folder / "out.zarr" / name
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(document))
        return public_api.files(folder)

    document = {"body": {"format": 1, "facts": '{"stage": "import"}', "rows": [1, 2]}}
    was = snapshot("level1/receipts/7.json", document)
    assert report(was, snapshot("level1/receipts/12.json", document)) == []
    renamed = {"body": {"format": 2, "facts": '{"step": "import"}', "rows": [1, None]}}
    assert report(was, snapshot("level1/receipts/7.json", renamed)) == [
        "section: level1/receipts/N.json: body.facts.stage is gone; it was: 'import'",
        "section: level1/receipts/N.json: body.facts.step is new: str",
        "section: level1/receipts/N.json: body.format was: 1; it is: 2",
        "section: level1/receipts/N.json: body.rows[] was: int; it is: NoneType or int",
    ]
    assert "section: DST/level1/receipts/N.json is gone; it was: file" in report(was, snapshot("receipts/7.json", {}))


def test_control_a_module_that_moved() -> None:
    was = public_api.python(["actshuffle.errors", "actshuffle.executors.Serial"])
    assert was == {"actshuffle.errors": "module", "actshuffle.executors.Serial": "class"}
    assert public_api.python(["actshuffle.mistakes", "actshuffle.executors.Cereal"]) == {}
