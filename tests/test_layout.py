"""The package's own rules: one direction of imports, few doors to each library, small rooms, silence.

Each rule has a negative control.  No table exempts anything from the layers; the few exemptions from other rules say
why, and the tests fail if one is no longer needed.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import actshuffle.errors
import saetrain
import saetrain.errors
from support.rules import (
    LONGEST,
    Trees,
    circle_faults,
    dotted_names,
    imports,
    init_faults,
    inner_words_faults,
    layer_faults,
    length_faults,
    lengths,
    lost_rooms,
    module,
    name_faults,
    nodes,
    plural_faults,
    room_faults,
    room_of,
    rows_of,
    string_faults,
    trees,
    within,
)

ROOT = Path(__file__).parent.parent
HOME = "actshuffle"
OURS = trees(actshuffle)
KNOWN = dotted_names(actshuffle, saetrain)
PUBLIC = {*actshuffle.__all__, *saetrain.__all__}

# A module imports from lower rows, and from its own room.
LAYERS = [
    "_version errors limits arraytypes html seals",
    "units extras machine bfloat16",
    "progress",
    "ordering",
    "planning storage",  # neither knows the other
    "arrays executors",
    "jobs",
    "engine loading foreign",  # none knows another
    "building checking",  # neither knows the other
    "__init__",  # the package itself, which gathers the public names
    "cli testing",
    "data files mixing simulate __main__",  # paths that documentation once gave, and the command
]

# Rooms that may import a library, wherever in a module that is, by `import` or by `extras.need`.
DOORS = {
    "zarr": "arrays storage.fsspecstore bfloat16 testing",
    "numcodecs": "",
    "dask": "executors.cluster",
    "distributed": "executors.cluster",
    "torch": "loading.torchface building foreign.bytefiles",
    "transformers": "building loading.trace",
    "click": "cli",
    "hypothesis": "testing.stories",
    "pyarrow": "foreign",
    "matplotlib": "checking.statsreport",
    "fsspec": "",
    "obstore": "storage.bucket",
    "botocore": "storage.credentials",
    "pandas": "",
    "scipy": "",
    "xarray": "",
}

# Modules that a room never imports directly, though its row may allow it; `open` stands for the built-in function.
INPUT_OUTPUT = "zarr actshuffle.storage os io pathlib shutil tempfile mmap socket subprocess open"
NEVER = {
    "ordering": INPUT_OUTPUT,
    "planning": INPUT_OUTPUT,
    "checking": "actshuffle.engine",  # what checks shares no code with what it checks
    "loading": "actshuffle.engine",
    "jobs": "actshuffle.ordering actshuffle.planning",  # it knows nothing of rows and keys
}

FACES = {"__init__", "executors", "jobs", "progress", "testing"}  # their `__init__` gives the public names of the room
LONGER = {"ordering.mixing": "the statistics of one report"}
SAETRAIN_SEES = {"errors", "executors", "extras", "jobs", "machine", "progress", "units"}  # beside public names


# --- Layers -------------------------------------------------------------------------------------


def test_layers():
    assert layer_faults(OURS, HOME, LAYERS) == []
    assert circle_faults(OURS, HOME) == []


@pytest.mark.parametrize(
    "text",
    [
        "from actshuffle.engine import run",
        "from actshuffle import engine",
        "import actshuffle.engine.run",
        "from actshuffle.engine.run import execute",
        "def f():\n    from actshuffle.engine.run import execute",
        "if TYPE_CHECKING:\n    from actshuffle.engine.run import Result",
    ],
)
def test_layers_control(text):
    assert layer_faults(module("ordering.keys", text), HOME, LAYERS) == [
        "ordering.keys imports engine, which is not below it"
    ]
    assert len(layer_faults(module("loading.loader", text), HOME, LAYERS)) == 1  # a room of the same row
    assert layer_faults(module("engine.tasks", text), HOME, LAYERS) == []
    assert layer_faults(module("cli.app", text), HOME, LAYERS) == []


def test_layers_control_of_public_names_relative_paths_and_new_rooms():
    assert layer_faults(module("engine.run", "from actshuffle import shuffle"), HOME, LAYERS) == [
        "engine.run imports __init__, which is not below it"
    ]
    assert len(layer_faults(module("ordering.mixing", "from .keys import Keys"), HOME, LAYERS)) == 1
    assert layer_faults(module("novel", ""), HOME, LAYERS) == ["novel has no row"]


def test_layers_control_of_circles_in_a_room():
    package = {
        **module("ordering.keys", "def f():\n    from actshuffle.ordering import bounds"),
        **module("ordering.bounds", "from actshuffle.ordering.keys import Keys"),
        **module("ordering.digest", "import actshuffle.units"),
    }
    assert layer_faults(package, HOME, LAYERS) == []
    assert circle_faults(package, HOME) == [
        f"ordering.{name} is in or above a circle of imports" for name in ("bounds", "keys")
    ]


def test_layers_hold_rooms_that_exist():
    assert set(rows_of(LAYERS)) == {room_of(name) for name in OURS}


# --- No imports by string -----------------------------------------------------------------------


def test_imports_by_string():
    assert string_faults(OURS, KNOWN) == []


@pytest.mark.parametrize(
    "text",
    [
        "import_module('actshuffle.novel')",
        "importlib.import_module('saetrain')",
        "__import__('actshuffle')",
        "importlib.util.find_spec('actshuffle.' + name)",
        "import_module(f'actshuffle.{name}')",
        "import_module('.tasks', 'actshuffle.novel')",
        "READERS = {'concat': 'actshuffle.building.joining'}",
        "sys.modules['actshuffle.engine']",
    ],
)
def test_imports_by_string_control(text):
    assert len(string_faults(module("arrays.virtual", text), KNOWN)) == 1


def test_imports_by_string_control_of_other_names():
    text = "getLogger('actshuffle')\nkey = 'actshuffle.insecure'\nimport_module('matplotlib.figure')"
    assert string_faults(module("cli.app", text), KNOWN) == []


# --- Doors to libraries, and what a room never sees ---------------------------------------------


def door_faults(package: Trees) -> list[str]:
    return [
        f"{name} imports {library}"
        for name, tree in package.items()
        for library in sorted({room_of(other) for other in imports(tree)} & set(DOORS))
        if not any(within(name, place) for place in DOORS[library].split())
    ]


def test_doors():
    assert door_faults(OURS) == []


@pytest.mark.parametrize(
    ("name", "text", "library"),
    [
        ("engine.tasks", "import zarr.codecs", "zarr"),
        ("storage.files", "from zarr import open", "zarr"),
        ("storage.remote", "from numcodecs import Zstd", "numcodecs"),
        ("engine.run", "def f():\n    from distributed import Client", "distributed"),
        ("loading.loader", "def f():\n    import torch", "torch"),
        ("loading.loader", "torch = need('torch', 'train')", "torch"),
        ("engine.run", "if TYPE_CHECKING:\n    import click", "click"),
        ("checking.verifier", "import hypothesis.strategies as st", "hypothesis"),
    ],
)
def test_doors_control(name, text, library):
    assert door_faults(module(name, text)) == [f"{name} imports {library}"]


def unused_doors(package: Trees, doors: dict[str, str] = DOORS) -> list[str]:
    """Places that a table of doors lets import a library which none of their modules does."""
    found = [(name, room_of(other)) for name, tree in package.items() for other in imports(tree)]
    return [
        f"{place} does not import {library}"
        for library, places in doors.items()
        for place in places.split()
        if not any(within(name, place) and other == library for name, other in found)
    ]


def test_doors_are_used():
    assert unused_doors(OURS) == []


def test_doors_are_used_control():
    package = module("arrays.output", "import zarr.codecs")
    assert unused_doors(package, {"zarr": "arrays bfloat16"}) == ["bfloat16 does not import zarr"]


def never_faults(package: Trees) -> list[str]:
    faults = []
    for name, tree in package.items():
        opens = any(isinstance(node, ast.Call) and ast.unparse(node.func) == "open" for node in nodes(tree))
        for never in NEVER.get(room_of(name), "").split():
            if any(within(other, never) for other in [*imports(tree), *["open"] * opens]):
                faults.append(f"{name} sees {never}")
    return faults


def test_never():
    assert never_faults(OURS) == []
    assert set(NEVER) <= set(rows_of(LAYERS))


@pytest.mark.parametrize(
    ("name", "text", "never"),
    [
        ("checking.verifier", "from actshuffle.engine import tasks", "actshuffle.engine"),
        ("loading.dataset", "def f():\n    import actshuffle.engine", "actshuffle.engine"),
        ("ordering.keys", "from zarr import Array", "zarr"),
        ("planning.cost", "from actshuffle.storage.remote import PIECE", "actshuffle.storage"),
        ("planning.planner", "from pathlib import Path", "pathlib"),
        ("ordering.bounds", "open('bounds').read()", "open"),
    ],
)
def test_never_control(name, text, never):
    assert never_faults(module(name, text)) == [f"{name} sees {never}"]


# --- Names, sizes and the files of rooms --------------------------------------------------------


def test_names():
    assert name_faults(OURS, PUBLIC) == []


def test_names_control():
    names = ["verify", "checking.verify", "shuffle.run", "append.__init__", "fit"]
    assert name_faults([*names, "verifier", "checking.__init__"], PUBLIC) == names


def test_rooms_are_small():
    assert room_faults(OURS) == []


def test_rooms_are_small_control():
    crowd = [f"engine.part{n}" for n in range(15)]
    assert room_faults([*crowd, "engine.__init__"]) == ["engine has 15 modules"]
    assert room_faults([*crowd[1:], "engine.__init__"]) == []


def test_modules_are_short():
    assert length_faults(lengths(actshuffle), LONGER) == []
    assert len(LONGER) <= 3


def test_modules_are_short_control():
    lines = {"engine.run": LONGEST, "engine.tasks": LONGEST + 1}
    assert length_faults(lines, {}) == ["engine.tasks"]
    assert length_faults(lines, {"engine.tasks": "because"}) == []
    assert length_faults(lines, {"engine.tasks": "because", "engine.run": "so"}) == ["engine.run"]
    assert length_faults(lines, {"engine.tasks": ""}) == ["engine.tasks"]


def test_rooms_have_files():
    assert lost_rooms(OURS) == []


def test_rooms_have_files_control():
    assert lost_rooms(["__init__", "units", "engine.run", "cli.__init__", "cli.app"]) == ["engine"]


def test_files_of_rooms():
    assert init_faults(OURS, HOME, FACES) == []


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("engine.__init__", "'''The shuffle.'''\nfrom actshuffle.engine.run import execute"),
        ("engine.__init__", "'''The shuffle.'''\nX = 1"),
        ("executors.__init__", "'''Executors.'''\nfrom actshuffle.machine import cores\n__all__ = ['cores']"),
        ("executors.__init__", "def executor(): ..."),
        ("__init__", "import zarr"),
        ("__init__", "'''The package.'''\nimport zarr"),
        ("__init__", "'''The package.'''\nif zarr:\n    from zarr import open"),
        ("__init__", "'''The package.'''\ndef shuffle(): ..."),
        ("executors.__init__", "'''Executors.'''\ndef __getattr__(name): ..."),
    ],
)
def test_files_of_rooms_control(name, text):
    assert len(init_faults(module(name, text), HOME, FACES)) == 1


def test_files_of_rooms_control_of_late_imports():
    text = "'''The package.'''\nif TYPE_CHECKING:\n    from actshuffle.engine.run import shuffle"
    text += "\ndef __getattr__(name): ...\nload_with(__getattr__)"
    assert init_faults(module("__init__", text), HOME, FACES) == []


# --- Messages -----------------------------------------------------------------------------------


@pytest.mark.parametrize("package", [actshuffle, saetrain])
def test_numbers_agree_with_their_nouns(package):
    assert plural_faults(trees(package)) == []


def test_control_numbers_that_do_not_agree_with_their_nouns():
    assert plural_faults(module("a", "f'{len(found):,} rows, {n} steps.'")) == ["a: {len(found)} rows", "a: {n} steps"]
    assert plural_faults(module("a", "f'{MOST} rows, {counted(n, \"row\")} of {n:,}, {name!r} runs'")) == []


OUR_ERRORS = {name for part in (actshuffle, saetrain) for name in vars(part.errors) if name.endswith("Error")}


@pytest.mark.parametrize("package", [actshuffle, saetrain])
def test_errors_within_errors_keep_the_options_of_the_command_line(package):
    assert inner_words_faults(trees(package), OUR_ERRORS) == []


@pytest.mark.parametrize("use", ["print(str(err))", "raise SourceError(f'bad: {err}') from err"])
def test_control_errors_within_errors_that_lose_the_options_of_the_command_line(use):
    text = "try:\n    read()\nexcept ({}) as err:\n    {}"
    assert inner_words_faults(module("a", text.format("RequestError, OSError", use)), OUR_ERRORS) == ["a: err"]
    assert inner_words_faults(module("a", text.format("OSError", use)), OUR_ERRORS) == []
    kept = use.replace("str(err)", "words_of(err)").replace("{err}", "{words_of(err)}")
    assert inner_words_faults(module("a", text.format("RequestError, OSError", kept)), OUR_ERRORS) == []


# --- saetrain -----------------------------------------------------------------------------------


def saetrain_faults(package: Trees) -> list[str]:
    """The imports of saetrain beyond the public names of actshuffle, its errors and units, and what runs jobs."""
    public = {"", *actshuffle.__all__}
    faults = []
    for name, tree in package.items():
        for other in imports(tree):
            inner = other.removeprefix("actshuffle").removeprefix(".")
            if within(other, "actshuffle") and inner not in public and room_of(inner) not in SAETRAIN_SEES:
                faults.append(f"{name} imports {other}")
    return faults


def test_saetrain_sees_public_names():
    assert saetrain_faults(trees(saetrain)) == []


def test_saetrain_sees_public_names_control():
    text = (
        "import actshuffle\nfrom actshuffle.errors import RequestError\nfrom actshuffle import Loader, errors, loading"
    )
    assert saetrain_faults(module("data", text)) == ["data imports actshuffle.loading"]
    assert len(saetrain_faults(module("data", "def f():\n    from actshuffle.loading.loader import Loader"))) == 1
    assert len(saetrain_faults(module("data", "if TYPE_CHECKING:\n    import actshuffle.loading"))) == 1


# --- Silence ------------------------------------------------------------------------------------


def print_faults(package: Trees) -> list[str]:
    printers = ("print", "click.echo", "sys.stdout.write", "sys.stderr.write", "pprint", "pprint.pprint")
    return [
        f"{name}:{node.lineno}"
        for name, tree in package.items()
        for node in nodes(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in printers and room_of(name) != "cli"
    ]


def test_silence():
    assert print_faults(OURS) == []


def test_silence_control():
    assert print_faults(module("engine.run", "def f():\n    print(1)")) == ["engine.run:2"]
    assert print_faults(module("cli.app", "print(1)")) == []


# --- Exemptions from the linter -----------------------------------------------------------------


def unused_exemptions(ignored: dict[str, list[str]]) -> list[str]:
    """Codes of per-file-ignores of which no file of that pattern would be accused."""
    codes = sorted({code for listed in ignored.values() for code in listed})
    command = [sys.executable, "-m", "ruff", "check", "--output-format=json", "--exit-zero", "."]
    command += ["--config=lint.per-file-ignores={}", f"--select={','.join(codes)}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found = [(Path(fault["filename"]).relative_to(ROOT), fault["code"]) for fault in json.loads(done.stdout)]
    return [
        f"{pattern}: {code}"
        for pattern, listed in ignored.items()
        for code in listed
        if not any(path.is_relative_to(pattern.removesuffix("/*")) and other.startswith(code) for path, other in found)
    ]


def test_exemptions_from_the_linter_are_used():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert unused_exemptions(settings["tool"]["ruff"]["lint"]["per-file-ignores"]) == []


def test_exemptions_from_the_linter_are_used_control():
    ignored = {"tests/*": ["T20", "F401"], "actshuffle/absent.py": ["T20"]}
    assert unused_exemptions(ignored) == ["tests/*: F401", "actshuffle/absent.py: T20"]


# --- What an import does ------------------------------------------------------------------------


HEAVY = {"torch", "distributed", "dask", "pandas", "pyarrow", "xarray", "hypothesis"}
COMMAND = "import sys\nfrom actshuffle.cli.app import main\nsys.exit(main())"  # as pip writes it


def loaded(tmp_path: Path, code: str, *, name: str = "script", arguments: tuple[str, ...] = ()) -> set[str]:
    """The modules that a script of this name has imported when it ends."""
    listed, script = tmp_path / "modules", tmp_path / name
    script.write_text(
        "import atexit, sys; from pathlib import Path\n"
        f"atexit.register(lambda: Path({str(listed)!r}).write_text(chr(10).join(sys.modules)))\n{code}\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, script, *arguments], env=environment, capture_output=True, check=True)
    return set(listed.read_text().splitlines())


def rooms(names: set[str]) -> set[str]:
    return {room_of(name) for name in names}


def test_import_is_light(tmp_path):
    found = loaded(tmp_path, "import actshuffle")
    assert {"zarr", "actshuffle"} <= rooms(found)  # zarr, to register bfloat16 with it
    assert not (HEAVY | {"click"}) & rooms(found)
    assert not {"actshuffle.testing", "actshuffle.engine.run", "actshuffle.building.collection"} & found
    found = loaded(tmp_path, "import actshuffle; actshuffle.plan")
    assert {"actshuffle.engine.run", "actshuffle.building.collection"} <= found
    assert "actshuffle.testing" not in found
    assert not (HEAVY | {"click"}) & rooms(found)


@pytest.mark.parametrize("name", ["actshuffle", "saetrain"])
@pytest.mark.parametrize("arguments", [("--version",), ("--help",), ("-h",)])
def test_version_and_help_import_no_library(tmp_path, arguments, name):
    command = COMMAND if name == "actshuffle" else COMMAND.replace("actshuffle.cli.app", "saetrain.cli")
    found = rooms(loaded(tmp_path, command, name=name, arguments=arguments))
    assert {name, "click"} <= found
    assert not (HEAVY | {"zarr", "numcodecs", "numpy", "fsspec", "asyncio"}) & found


def test_a_package_that_is_run_as_a_module_is_its_command():
    words = (sys.executable, "-X", "importtime", "-m", "actshuffle", "--version")
    made = subprocess.run(words, cwd=ROOT, capture_output=True, check=True)
    assert b"click" in made.stderr
    assert b"zarr" not in made.stderr


def test_another_package_that_is_run_as_a_module_is_not(tmp_path):
    """Though it imports ours while Python looks for its module."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other/__init__.py").write_text("import actshuffle")
    (tmp_path / "other/__main__.py").write_text("import sys; print('zarr' in sys.modules)")
    words = (sys.executable, "-m", "other", "actshuffle")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    made = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, check=True, text=True)
    assert made.stdout == "True\n"


def test_version_and_help_import_no_library_control(tmp_path):
    found = rooms(loaded(tmp_path, COMMAND, name="actshuffle", arguments=("run", "--help")))
    assert {"zarr", "numpy"} <= found
    assert not HEAVY & found
    assert "zarr" in rooms(loaded(tmp_path, COMMAND, name="another", arguments=("--version",)))


@pytest.mark.parametrize("before", ["", "import numpy", "gc.disable()"])
def test_what_a_command_loads_is_left_out_of_collections(tmp_path, before):
    """But not where a program runs a command, whose own garbage would be left out too."""
    script, listed = tmp_path / "actshuffle", tmp_path / "frozen"
    told = f"open({str(listed)!r}, 'w').write(f'{{gc.get_freeze_count()}} {{gc.isenabled()}}')"
    script.write_text(f"import atexit, gc\n{before}\natexit.register(lambda: {told})\n{COMMAND}\n")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, script, "run", "--help"], env=environment, capture_output=True, check=True)
    frozen, enabled = listed.read_text().split()
    assert enabled == str("disable" not in before)
    assert (int(frozen) > 10_000) == (not before)


def test_workers_know_the_readers_of_virtual_sources(tmp_path):
    """A process that imports no more than a task's module opens every virtual source."""
    readers = {"concat", "renumbered", "files", "model", "merge", "chosen", "filtered", "part of a shuffle"}
    code = f"from actshuffle.arrays.readers import known; assert {readers} == {{*known()}}, known()"
    assert "actshuffle.building.joining" in loaded(tmp_path, f"import actshuffle.engine.tasks; {code}")
    assert "actshuffle.building.joining" not in loaded(tmp_path, "import actshuffle.engine.tasks")


def test_import_changes_no_configuration():
    code = (
        "import logging, warnings, numpy, zarr; "
        "state = lambda: (logging.root.level, len(logging.root.handlers), len(warnings.filters),"
        " numpy.geterr(), repr(zarr.config.config)); "
        "before = state(); import actshuffle; assert state() == before, (before, state())"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names_exist_and_are_documented():
    assert sorted(actshuffle.__all__, key=str.lower) == sorted(set(actshuffle.__all__), key=str.lower)
    for name in actshuffle.__all__:
        if name != "__version__":
            assert getattr(actshuffle, name).__doc__, name
    assert set(actshuffle.__all__) <= set(dir(actshuffle))
    with pytest.raises(AttributeError, match="module 'actshuffle' has no attribute 'shufle'"):
        _ = actshuffle.shufle
