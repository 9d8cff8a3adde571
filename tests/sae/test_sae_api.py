"""saetrain's public names, flags and on-disk names are those of the fixture, which was written before the rooms were.

An item may be added; none may go or change.
"""

from __future__ import annotations

import inspect
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest

import saetrain
from saetrain import cli, data, errors
from saetrain.cli.app import command_line
from saetrain.config import Config
from saetrain.exchange import folders as exchange
from support.sae import ARCHS, MemorySource, Planted, one_rank, small

FROZEN = Path(__file__).parents[1] / "fixtures" / "saetrain_api.json"
Section = dict[str, str]


# --- Python


def signature(name: str, function: Callable[..., Any]) -> Iterator[tuple[str, str]]:
    """An item for each parameter, and one for the result."""
    found = inspect.signature(function)
    for place, (parameter, about) in enumerate(found.parameters.items()):
        default = "callable" if callable(about.default) and about.default is not about.empty else repr(about.default)
        told = "required" if about.default is about.empty else f"default {default}"
        yield f"{name}({parameter})", f"{about.kind.description} {place}, {about.annotation}, {told}"
    yield f"{name} ->", str(found.return_annotation)


def members(name: str, found: type) -> Iterator[tuple[str, str]]:
    """An item for each public attribute of a class, with the signatures of its methods."""
    ours = [cls for cls in found.__mro__ if cls.__module__.startswith("saetrain")]
    for attribute in sorted({a for cls in ours for a in (*vars(cls), *inspect.get_annotations(cls))}):
        if attribute.startswith("_") and attribute != "__call__":
            continue
        value = inspect.getattr_static(found, attribute, None)
        method = value.__func__ if isinstance(value, staticmethod | classmethod) else value
        yield f"{name}.{attribute}", "method" if inspect.isfunction(method) else "value"
        if inspect.isfunction(method):
            yield from signature(f"{name}.{attribute}", method)


def python_names() -> Section:
    found: Section = {}
    for name in saetrain.__all__:
        public = getattr(saetrain, name)
        found |= dict(signature(f"saetrain.{name}", public))
        if inspect.isclass(public):
            found |= dict(members(f"saetrain.{name}", public))
    found |= dict(members("saetrain.data.Source", data.Source))
    found |= dict(signature("saetrain.cli.main", cli.main))
    for name, error in vars(errors).items():
        if inspect.isclass(error) and issubclass(error, errors.SaetrainError):
            bases = ", ".join(base.__name__ for base in error.__bases__)
            found[f"saetrain.errors.{name}"] = f"exit {error.exit_code}, under {bases}"
    return found


# --- Commands


def commands() -> Section:
    found: Section = {}
    for name in command_line.commands:
        command = command_line.get_command(click.Context(command_line), name)
        arguments = [p for p in command.params if isinstance(p, click.Argument)]
        for place, argument in enumerate(arguments):
            many = ", one or more" if argument.nargs == -1 else ""
            found[f"{name} {str(argument.name).upper()}"] = f"argument {place}{many}"
        for option in command.params:
            if isinstance(option, click.Option):
                default = getattr(Config(), str(option.name), option.default)
                found[f"{name} {'/'.join(option.opts)}"] = option_text(default, getattr(option.type, "choices", None))
    return found


def option_text(default: Any, choices: Any) -> str:
    text = "option" if default is None or "UNSET" in repr(default) else f"option, default {default!r}"
    return f"{text}, one of {', '.join(choices)}" if choices else text


# --- Files


def files(folder: Path) -> Section:
    """The files of a run of each variant and of its exports, with the names inside them."""
    planted, found = Planted.make(2048, 16, 24), {}
    with one_rank() as mesh:
        for arch in ARCHS:
            source = MemorySource(planted.rows, planted.documents)
            saetrain.fit(source, {folder / arch: small(arch, steps=4, eval_every=2, log_every=1)}, mesh)
            exchange.export(folder / arch, folder / f"{arch}.saelens")
    exchange.export(folder / "topk", folder / "topk.sparsify", "sparsify")
    exchange.bring(folder / "topk.saelens", folder / "imported")
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file() and "tensorboard" not in name:
            found[name] = f"file: {', '.join(names_in(path))}"
    return found


def names_in(path: Path) -> list[str]:
    if path.suffix == ".safetensors":
        raw = path.read_bytes()
        return sorted(json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")]))
    if path.suffix == ".md":  # for people
        return []
    inside = json.loads(path.read_text().splitlines()[-1] if path.suffix == ".jsonl" else path.read_text())
    return sorted(dotted(inside))


def dotted(value: Any, name: str = "") -> Iterator[str]:
    if isinstance(value, dict) and value:
        for key, held in value.items():
            yield from dotted(held, f"{name}.{key}".lstrip("."))
    else:
        yield name


# --- Comparison


def description(folder: Path) -> dict[str, Section]:
    return {"python": python_names(), "commands": commands(), "files": files(folder)}


def differences(frozen: dict[str, Section], found: dict[str, Section]) -> list[str]:
    """A line for each frozen item that is missing or changed."""
    return [
        f"{section}: {item} was {text!r}, is {found[section].get(item, 'gone')!r}"
        for section, items in frozen.items()
        for item, text in items.items()
        if found[section].get(item) != text
    ]


def test_public_names_flags_and_files_are_as_they_were(tmp_path: Path) -> None:
    assert differences(json.loads(FROZEN.read_text()), description(tmp_path)) == []


@pytest.mark.parametrize(
    ("section", "item"), [("python", "saetrain.Config(lr)"), ("commands", "fit --k"), ("files", "relu/metrics.jsonl")]
)
def test_an_item_that_goes_or_changes_is_noticed(section: str, item: str) -> None:
    frozen = json.loads(FROZEN.read_text())
    for change in ("gone", "other"):
        found = {name: dict(items) for name, items in frozen.items()}
        if change == "gone":
            del found[section][item]
        else:
            found[section][item] += "!"
        [line] = differences(frozen, found)
        assert item in line
    assert differences(frozen, frozen) == []


if __name__ == "__main__":  # freeze what is there now: PYTHONPATH=.:tests python tests/sae/test_sae_api.py
    with tempfile.TemporaryDirectory() as made:
        FROZEN.write_text(json.dumps(description(Path(made)), indent=1, sort_keys=True) + "\n")
