"""Describe everything that users can name: functions, classes, errors, commands, files, and JSON attributes.

    python tests/public_api.py              compare this code with tests/fixtures/public_api.json
    python tests/public_api.py --write      make this code's names the ones that are frozen

A description is a dict of items by section, and an item is a name and a short text, so that two descriptions differ
by items that a message can name.  Help texts are not part of it, nor is the kind of an attribute: a field, a property
and a cached property are all values.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from click.testing import CliRunner

import actshuffle
import make_half_done as runs
from actshuffle import errors
from actshuffle.cli.app import main as command_line

FROZEN = Path(__file__).parent / "fixtures" / "public_api.json"
# Names outside of `actshuffle.__all__` that README.md, docs/*.md or benchmarks/README.md lead users to.
DEEP = [
    "actshuffle.bfloat16.BFloat16",
    "actshuffle.data.dataset.write_view",
    "actshuffle.errors",
    "actshuffle.executors.Dask",
    "actshuffle.executors.Serial",
    "actshuffle.files.LocalObjects",
    "actshuffle.mixing",
    "actshuffle.simulate.simulate",
    "actshuffle.testing",
    "actshuffle.testing.simulate",
]
PROTOCOL = ("__call__", "__enter__", "__exit__", "__getitem__", "__iter__", "__len__", "_repr_html_")
LITERAL = ("format", "kind", "reader", "rule", "stage")  # attributes of files whose values are names, too
SLOW = ("collect", "spill_memory")  # runs that need a model, and a folder that all processes share

Section = dict[str, str]
Description = dict[str, Section]


# --- Python ---------------------------------------------------------------------------------------------------


def signature(name: str, function: Callable[..., Any]) -> Iterator[tuple[str, str]]:
    """An item for each parameter, and one for the type of the result without its module."""
    found = inspect.signature(function)
    for place, parameter in enumerate(found.parameters.values()):
        if parameter.name.startswith("_"):
            continue
        kind = parameter.kind.description
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            kind += f" {place}"
        value = parameter.default
        default = f"default {value.__name__ if inspect.isfunction(value) else repr(value)}"
        default = "required" if value is parameter.empty else default
        yield f"{name}({parameter.name})", kind if "variadic" in kind else f"{kind}, {default}"
    if not inspect.isclass(function) and found.return_annotation is not found.empty:
        yield f"{name} ->", re.sub(r"\b(?:\w+\.)+(\w+)", r"\1", _text(found.return_annotation))


def _text(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)


def members(name: str, found: type, instance: Any = None) -> Iterator[tuple[str, str]]:
    """An item for each public attribute that an object has from our own classes, with the signatures of methods."""
    ours = [cls for cls in found.__mro__ if cls.__module__.split(".")[0] not in ("builtins", "typing")]
    names = {attribute for cls in ours for attribute in (*vars(cls), *inspect.get_annotations(cls))}
    names |= set(getattr(instance, "__dict__", ()))
    for attribute in sorted(n for n in names if not n.startswith("_") or n in PROTOCOL):
        value = inspect.getattr_static(found, attribute, None)
        method = value.__func__ if isinstance(value, staticmethod | classmethod) else value
        if inspect.isfunction(method):
            yield f"{name}.{attribute}", "method"
            items = signature(f"{name}.{attribute}", method)
            yield from (item for item in items if not item[0].endswith(("(self)", "(cls)")))
        else:
            yield f"{name}.{attribute}", "value"


def described(name: str, found: Any) -> Iterator[tuple[str, str]]:
    """The items of a public name."""
    if inspect.ismodule(found):
        yield name, "module"
        for inside in getattr(found, "__all__", ()):
            yield from described(f"{name}.{inside}", getattr(found, inside))
    elif inspect.isclass(found):
        yield name, "class"
        if not issubclass(found, BaseException):
            yield from signature(name, found)
    elif inspect.isfunction(found):
        yield name, "function"
        yield from signature(name, found)
    else:
        yield name, type(found).__name__


def resolved(name: str) -> Any:
    """The module, class or function with a dotted name, imported by that name."""
    module, *parts = name.split(".")
    found = importlib.import_module(module)
    for part in parts:
        module = f"{module}.{part}"
        found = getattr(found, part) if hasattr(found, part) else importlib.import_module(module)
    return found


def python(names: Iterable[str]) -> Section:
    """Modules, functions and classes by their dotted names; absent ones are left out."""
    found: Section = {}
    for name in names:
        with suppress(ImportError, AttributeError):
            found |= described(name, resolved(name))
    return found


def error_tree() -> Section:
    """The error classes with their codes, exit codes and bases."""
    found = {}
    for name, error in vars(errors).items():
        if inspect.isclass(error) and issubclass(error, errors.ActshuffleError):
            bases = ", ".join(base.__name__ for base in error.__bases__)
            found[name] = f"code {error.code}, exit {error.exit_code}, under {bases}"
    return found


# --- Commands -------------------------------------------------------------------------------------------------


def command(name: str, found: click.Command) -> Iterator[tuple[str, str]]:
    """An item for each argument and option of a command, and of those inside a group."""
    yield name, "group" if isinstance(found, click.Group) else "command"
    context = click.Context(found)
    if "help_option_names" in found.context_settings:
        yield f"{name} {'/'.join(found.context_settings['help_option_names'])}", "option of all commands"
    for place, parameter in enumerate(found.params):
        info = parameter.to_info_dict()
        default = parameter.get_default(context)
        told = [_type(parameter.type, info["type"]), "required" if parameter.required else "optional"]
        if parameter.nargs != 1:
            told.append(f"nargs {parameter.nargs}")
        if isinstance(parameter, click.Option):
            told += [word for word in ("is_flag", "multiple", "count") if info[word]]
        if _given(default):
            told.append(f"default {parameter.type_cast_value(context, default)!r}")
        if parameter.envvar:
            told.append(f"envvar {parameter.envvar}")
        if isinstance(parameter, click.Argument):
            yield f"{name} {parameter.human_readable_name.upper()}", f"argument {place}, " + ", ".join(told)
        else:
            flags = "/".join(parameter.opts + parameter.secondary_opts)
            yield f"{name} {flags}", "option, " + ", ".join(told)
    if isinstance(found, click.Group):
        for inside in found.list_commands(context):
            child = found.get_command(context, inside)
            assert child is not None
            yield from command(f"{name} {inside}", child)


def _given(default: Any) -> bool:
    """True if this is a default, and not click's mark for none."""
    return default is not None and "UNSET" not in repr(default)


def _type(kind: click.ParamType[Any], info: Mapping[str, Any]) -> str:
    choices = info.get("choices")
    return f"{kind.name} {', '.join(map(str, choices))}" if choices else kind.name


# --- Files and documents --------------------------------------------------------------------------------------


def pattern(key: str) -> str:
    """A file's path with placeholders for the output's name, for tags, and for numbers."""
    key = re.sub(r"^\w+\.zarr", "DST", key)
    key = re.sub(r"\.[0-9a-f]{16}\.actshuffle-partial", ".TAG.actshuffle-partial", key)
    key = re.sub(r"scratch-[0-9a-f]{8}", "scratch-TAG", key)
    return numbered(key)


def numbered(key: str) -> str:
    """A name with a placeholder for each number, but not for digits inside words."""
    return re.sub(r"\b\d+\b", "N", key)


def attributes(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """An item for each attribute inside a JSON value, also of JSON that is the text of an attribute."""
    inside = _parsed(value)
    if isinstance(inside, dict):
        for key, held in inside.items():
            yield from attributes(held, f"{name}.{numbered(key)}".lstrip("."))
    elif isinstance(inside, list):
        for held in inside:
            yield from attributes(held, f"{name}[]")
    else:
        literal = name.rsplit(".", 1)[-1] in LITERAL
        yield name, repr(value) if literal else "number" if isinstance(value, float) else type(value).__name__


def _parsed(value: Any) -> Any:
    """A JSON value, or the value that its text stands for.  The metadata of arrays is Zarr's, but for attributes."""
    if isinstance(value, str) and value.startswith(("{", "[")):
        with suppress(ValueError):
            value = json.loads(value)
    if isinstance(value, dict) and value.get("node_type") == "array":
        return {"attributes": value["attributes"]}
    return value


def files(folder: Path) -> Section:
    """The files of the runs in a folder, and the attributes in those that are JSON."""
    found: dict[str, set[str]] = {}
    for path in sorted(folder.rglob("*")):
        key = str(path.relative_to(folder))
        if not path.is_file() or not re.match(r"\w+\.zarr|both/", key):
            continue
        name = pattern(key)
        found[name] = {"file"}
        if path.name.endswith(".json"):
            inside = name.partition("/")[2]  # the same in all outputs, and in all scratches
            for attribute, kind in attributes(json.loads(path.read_text())):
                found.setdefault(f"{inside}: {attribute}", set()).add(kind)
    return {name: " or ".join(sorted(kinds)) for name, kinds in sorted(found.items())}


def printed(name: str, *arguments: str) -> Section:
    """The attributes of the JSON that a command prints."""
    words = [*name.split(), *arguments, "--json"]
    result = CliRunner().invoke(command_line, words, prog_name="actshuffle")
    if result.exit_code:
        raise AssertionError(f"actshuffle {' '.join(words)}: exit {result.exit_code}: {result.output}")
    found: dict[str, set[str]] = {}
    for attribute, kind in attributes(json.loads(result.stdout)):
        found.setdefault(f"{name} --json: {attribute}", set()).add(kind)
    return {item: " or ".join(sorted(kinds)) for item, kinds in found.items()}


# --- Small runs -----------------------------------------------------------------------------------------------


@dataclass
class Seen:
    """The sections that only runs can show."""

    half_done: Section
    finished: Section
    printed: Section
    objects: list[Any]


def watch_runs(folder: Path) -> Seen:
    """Stop and resume a run of every kind in a folder, which is the current one; keep the names that appear."""
    runs.write_sources(folder)
    kinds = {name: case for name, case in runs.CASES.items() if name not in SLOW}
    for case in kinds.values():
        runs.stop(case)
    half_done = files(folder)
    status = printed("status", "level_2.zarr")
    made = {name: case.start(fsync=False) for name, case in kinds.items()}
    dataset = actshuffle.head("shuffled.zarr", 20, folder / "view.zarr")
    statistics = actshuffle.stats(dataset.path)
    actshuffle.stats("shuffled.zarr")
    verified = actshuffle.verify("all.zarr", "shuffled.zarr", mixing=True)
    objects = [
        actshuffle.Loader("shuffled.zarr", batch_size=4),
        actshuffle.came_from("shuffled.zarr", [0])[0],
        actshuffle.plan("all.zarr"),
        actshuffle.quality("shuffled.zarr", batch_size=4, documents="doc"),
        dataset,
        dataset.fields["x"],
        made["append_merging"],
        made["import"],
        made["level_1"],
        statistics,
        statistics["doc"],
        statistics["x"],
        verified,
        verified.mixing,
    ]
    output = status | printed_by_commands()
    return Seen(half_done, files(folder), output, objects)


def printed_by_commands() -> Section:
    """The attributes of the JSON that cheap commands print."""
    shape = ("--block-bytes", "200", "--run-bytes", "1", "--chunk-rows", "4")
    found: Section = {}
    for name, *arguments in (
        ("run", "all.zarr", "by_run.zarr", "--workers", "0", "--seed", "7", *shape),
        ("plan", "all.zarr", *shape),
        ("verify", "all.zarr", "shuffled.zarr", "--workers", "0", "--mixing"),
        ("info", "shuffled.zarr"),
        ("info", "view.zarr"),
        ("came-from", "shuffled.zarr", "0"),
        ("where-is", "shuffled.zarr", "0"),
        ("split", "shuffled.zarr", "by_split.zarr=rest"),
        ("head", "shuffled.zarr", "2"),
        ("sample", "all.zarr", "4", "by_sample.zarr", "--workers", "0", "--seed", "7"),
        ("concat", "first.zarr", "second.zarr", "--out", "by_concat"),
        ("append", "first_shuffled.zarr", "second.zarr", "--out", "by_append.zarr", "--workers", "0"),
        ("import", "files/x.npy", "--out", "by_import.zarr", "--workers", "0"),
        ("stats", "shuffled.zarr", "--read"),
        ("quality", "shuffled.zarr", "--batch-size", "4", "--documents", "doc"),
    ):
        found |= printed(name, *arguments)
    return found


# --- The whole, and its comparison ----------------------------------------------------------------------------


def description() -> Description:
    """All sections of this code; runs are made in a temporary folder."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)
        try:
            seen = watch_runs(Path(name))
        finally:
            os.chdir(before)
    objects: Section = {}
    for found in seen.objects:
        objects |= members(type(found).__name__, type(found), found)
    return {
        "python": python([f"actshuffle.{name}" for name in actshuffle.__all__]),
        "deep names": python(DEEP),
        "objects": objects,
        "errors": error_tree(),
        "commands": dict(command("actshuffle", command_line)),
        "files of half-done runs": seen.half_done,
        "files of finished runs": seen.finished,
        "printed JSON": seen.printed,
    }


def differences(frozen: Description, found: Description) -> list[str]:
    """A line for each item that is gone, changed or new."""
    lines = []
    for section in sorted({*frozen, *found}):
        was, now = frozen.get(section, {}), found.get(section, {})
        for item in sorted({*was, *now}):
            if item not in now:
                lines.append(f"{section}: {item} is gone; it was: {was[item]}")
            elif item not in was:
                lines.append(f"{section}: {item} is new: {now[item]}")
            elif was[item] != now[item]:
                lines.append(f"{section}: {item} was: {was[item]}; it is: {now[item]}")
    return lines


def advice(lines: Iterable[str]) -> str:
    """Print the differences, and the command that freezes them."""
    return "\n".join(
        [
            "names that users rely on are not those of tests/fixtures/public_api.json:",
            *(f"  {line}" for line in lines),
            "Restore what is gone or changed. What is new and meant to stay becomes frozen by",
            "  python tests/public_api.py --write",
        ]
    )


def main(write: bool) -> int:
    found = description()
    if write:
        FROZEN.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
        return 0
    lines = differences(json.loads(FROZEN.read_text()), found)
    if lines:
        sys.stdout.write(advice(lines) + "\n")
    return bool(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] == ["--write"]))
