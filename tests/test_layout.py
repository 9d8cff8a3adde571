"""The package's own rules: one direction of imports, few doors to each library, small rooms, silence.

A *room* is a folder of `actshuffle/`, or a module at its top.  Each rule is a function from syntax trees to
the list of its faults, and has a negative control.  No table exempts anything from the layers; the few
exemptions from other rules say why, and the tests fail if one is no longer needed.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import actshuffle
import saetrain

ROOT = Path(__file__).parent.parent
PACKAGE = Path(actshuffle.__file__).parent
Trees = dict[str, ast.Module]  # by dotted name within the package; "room.__init__" for the file of a room itself

# A module imports from lower rows, and from its own room.
LAYERS = [
    "_version errors limits arraytypes progress html",
    "units extras machine bfloat16",
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
ROWS = {room: row for row, rooms in enumerate(LAYERS) for room in rooms.split()}

# Rooms that may import a library, wherever in a module that is, by `import` or by `extras.need`.
DOORS = {
    "zarr": "arrays storage.remote bfloat16 testing",
    "numcodecs": "",
    "dask": "executors.cluster",
    "distributed": "executors.cluster",
    "torch": "loading.torchface building",
    "transformers": "building loading.trace",
    "click": "cli",
    "hypothesis": "testing.stories",
    "pyarrow": "building.arrowfiles foreign.texttables",
    "matplotlib": "checking.statsreport",
    "fsspec": "",
    "pandas": "",
    "scipy": "",
    "xarray": "",
}

# What a room never imports, directly, though its row may allow it; `open` stands for the built-in function.
INPUT_OUTPUT = "zarr actshuffle.storage os io pathlib shutil tempfile mmap socket subprocess open"
NEVER = {
    "ordering": INPUT_OUTPUT,
    "planning": INPUT_OUTPUT,
    "checking": "actshuffle.engine",  # what checks shares no code with what it checks
    "loading": "actshuffle.engine",
    "jobs": "actshuffle.ordering actshuffle.planning",  # it knows nothing of rows and keys
}

FACES = {"__init__", "executors", "jobs", "testing"}  # their `__init__` gives the public names of the room
LARGEST = 14  # modules
LONGEST = 350  # lines
LONGER = {
    "ordering.mixing": "the statistics of one report",
    "checking.verifier": "full and quick checks, which share nothing with the engine",
    "loading.dataset": "what a finished store can be asked",
}
SAETRAIN_SEES = {"errors", "jobs"}  # of actshuffle, beside its public names


@cache
def trees(package: Path = PACKAGE) -> Trees:
    return {
        ".".join(path.relative_to(package).with_suffix("").parts): ast.parse(path.read_text())
        for path in sorted(package.rglob("*.py"))
    }


def fault_of(text: str, name: str) -> Trees:
    """A package of one module, for negative controls."""
    return {name: ast.parse(text)}


def room_of(module: str) -> str:
    return module.split(".")[0]


def within(module: str, place: str) -> bool:
    """Is the module this place, or in this room?"""
    return module == place or module.startswith(f"{place}.")


@cache
def nodes(tree: ast.Module) -> list[ast.AST]:
    return list(ast.walk(tree))


@cache
def imports(tree: ast.Module) -> list[str]:
    """Dotted names of all that is imported, in functions and under TYPE_CHECKING too, ``from a import b`` as a.b."""
    found = []
    for node in nodes(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += ["." * node.level + f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and called(node) in ("import_module", "__import__", "need") and node.args:
            found += strings(node.args[0])
    return found


def called(node: ast.Call) -> str:
    """The last part of the name of what is called."""
    return ast.unparse(node.func).split(".")[-1]


def strings(node: ast.AST) -> Iterator[str]:
    return (n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str))


def imported_rooms(tree: ast.Module) -> Iterator[str]:
    """Rooms of actshuffle that a module imports; a public name comes from the package's own ``__init__``."""
    for name in imports(tree):
        if within(name, "actshuffle"):
            room = room_of(name.removeprefix("actshuffle").removeprefix("."))
            yield room if room in ROWS else "__init__"


# --- Layers -------------------------------------------------------------------------------------


def layer_faults(package: Trees) -> list[str]:
    faults = []
    for name, tree in package.items():
        room = room_of(name)
        if room not in ROWS:
            faults.append(f"{name} has no place in LAYERS")
            continue
        faults += [f"{name} imports {other} by a relative path" for other in imports(tree) if other.startswith(".")]
        for other in imported_rooms(tree):
            if other != room and ROWS[other] >= ROWS[room]:
                faults.append(f"{name} imports {other}, which is not below it")
    return faults


def test_layers():
    assert layer_faults(trees()) == []


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
    assert layer_faults(fault_of(text, "ordering.keys")) == ["ordering.keys imports engine, which is not below it"]
    assert len(layer_faults(fault_of(text, "loading.loader"))) == 1  # a room of the same row
    assert layer_faults(fault_of(text, "engine.tasks")) == []
    assert layer_faults(fault_of(text, "cli.app")) == []


def test_layers_control_of_public_names_relative_paths_and_new_rooms():
    assert layer_faults(fault_of("from actshuffle import shuffle", "engine.run")) == [
        "engine.run imports __init__, which is not below it"
    ]
    assert len(layer_faults(fault_of("from .keys import Keys", "ordering.mixing"))) == 1
    assert layer_faults(fault_of("", "novel")) == ["novel has no place in LAYERS"]


def test_layers_hold_rooms_that_exist():
    assert set(ROWS) == {room_of(name) for name in trees()}


# --- No imports by string -----------------------------------------------------------------------


def string_faults(package: Trees, known: frozenset[str]) -> list[str]:
    """Calls that import one of our modules by its name, and strings that are such a name."""
    faults = []
    ours = re.compile(r"(actshuffle|saetrain)(\..*)?")
    for name, tree in package.items():
        for node in nodes(tree):
            if isinstance(node, ast.Call) and called(node) in ("import_module", "__import__", "find_spec", "need"):
                faults += [f"{name}: {text!r}" for text in strings(node) if ours.fullmatch(text)]
            elif isinstance(node, ast.Constant) and node.value in known:
                faults.append(f"{name}: {node.value!r}")
    return faults


def our_modules() -> frozenset[str]:
    """Dotted names of our modules and rooms, but not of the two packages themselves."""
    packages = [Path(package.__file__).parent for package in (actshuffle, saetrain)]
    paths = [path.relative_to(package.parent) for package in packages for path in package.rglob("*.py")]
    modules = {".".join(path.with_suffix("").parts) for path in paths}
    rooms = {".".join(path.parent.parts) for path in paths if path.parent.parent.name}
    return frozenset(modules | rooms)


def test_imports_by_string():
    assert string_faults(trees(), our_modules()) == []


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
    assert len(string_faults(fault_of(text, "arrays.virtual"), our_modules())) == 1


def test_imports_by_string_control_of_other_names():
    text = "getLogger('actshuffle')\nkey = 'actshuffle.insecure'\nimport_module('matplotlib.figure')"
    assert string_faults(fault_of(text, "cli.app"), our_modules()) == []


# --- Doors to libraries, and what a room never sees ---------------------------------------------


def door_faults(package: Trees) -> list[str]:
    return [
        f"{name} imports {library}"
        for name, tree in package.items()
        for library in sorted({room_of(other) for other in imports(tree)} & set(DOORS))
        if not any(within(name, place) for place in DOORS[library].split())
    ]


def test_doors():
    assert door_faults(trees()) == []


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
    assert door_faults(fault_of(text, name)) == [f"{name} imports {library}"]


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
    assert unused_doors(trees()) == []


def test_doors_are_used_control():
    package = fault_of("import zarr.codecs", "arrays.output")
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
    assert never_faults(trees()) == []
    assert set(NEVER) <= set(ROWS)


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
    assert never_faults(fault_of(text, name)) == [f"{name} sees {never}"]


# --- Names, sizes and the files of rooms --------------------------------------------------------


def name_faults(package: Trees) -> list[str]:
    """Modules and rooms that bear a public name, so that a reader could take the one for the other."""
    public = {*actshuffle.__all__, *saetrain.__all__}
    return [name for name in package if public & set(name.removesuffix("__init__").strip(".").split("."))]


def test_names():
    assert name_faults(trees()) == []


def test_names_control():
    assert name_faults(dict.fromkeys(["verify", "checking.verify", "shuffle.run", "append.__init__", "fit"])) == [
        "verify",
        "checking.verify",
        "shuffle.run",
        "append.__init__",
        "fit",
    ]


def room_faults(names: list[str]) -> list[str]:
    """Rooms with too many modules; the package itself is one.  The files by which Python enters one do not count."""
    modules = [name for name in names if not name.endswith(("__init__", "__main__"))]
    sizes = Counter(name.rpartition(".")[0] for name in modules)
    return [f"{room or 'actshuffle'} has {size} modules" for room, size in sizes.items() if size > LARGEST]


def test_rooms_are_small():
    assert room_faults(list(trees())) == []


def test_rooms_are_small_control():
    crowd = [f"engine.part{n}" for n in range(15)]
    assert room_faults([*crowd, "engine.__init__"]) == ["engine has 15 modules"]
    assert room_faults([*crowd[1:], "engine.__init__"]) == []


def length_faults(lines: dict[str, int], longer: dict[str, str] = LONGER) -> list[str]:
    """Modules that are too long, and exemptions of modules that are not, or that give no reason."""
    long = {name for name, count in lines.items() if count > LONGEST}
    return sorted(long ^ set(longer)) + [name for name, reason in longer.items() if not reason]


def test_modules_are_short():
    lines = {name: len((PACKAGE / f"{name.replace('.', '/')}.py").read_text().splitlines()) for name in trees()}
    assert length_faults(lines) == []
    assert len(LONGER) <= 4


def test_modules_are_short_control():
    lines = {"engine.run": LONGEST, "engine.tasks": LONGEST + 1}
    assert length_faults(lines, {}) == ["engine.tasks"]
    assert length_faults(lines, {"engine.tasks": "because"}) == []
    assert length_faults(lines, {"engine.tasks": "because", "engine.run": "so"}) == ["engine.run"]
    assert length_faults(lines, {"engine.tasks": ""}) == ["engine.tasks"]


def lost_rooms(names: list[str]) -> list[str]:
    """Rooms without a file of their own, which no wheel would hold."""
    return sorted(
        {name.rpartition(".")[0] for name in names if f"{name.rpartition('.')[0]}.__init__" not in names} - {""}
    )


def test_rooms_have_files():
    for package in (PACKAGE, Path(saetrain.__file__).parent):
        assert lost_rooms(list(trees(package))) == []


def test_rooms_have_files_control():
    assert lost_rooms(["__init__", "units", "engine.run", "cli.__init__", "cli.app"]) == ["engine"]


def init_faults(package: Trees) -> list[str]:
    """A room's own file is a docstring; that of a public face may import from the room, and says `__all__`."""
    faults = []
    for name, tree in package.items():
        room = name.removesuffix(".__init__")
        if not name.endswith("__init__"):
            continue
        home = "actshuffle" if room == "__init__" else f"actshuffle.{room}"
        for node in tree.body[ast.get_docstring(tree) is not None :]:
            public = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
            inside = isinstance(node, ast.ImportFrom) and node.level == 0 and within(str(node.module), home)
            if room not in FACES or not (public or inside):
                faults.append(f"{name}: {ast.unparse(node)}")
    return faults


def test_files_of_rooms():
    assert init_faults(trees()) == []


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("engine.__init__", "'''The shuffle.'''\nfrom actshuffle.engine.run import execute"),
        ("engine.__init__", "'''The shuffle.'''\nX = 1"),
        ("executors.__init__", "'''Executors.'''\nfrom actshuffle.machine import cores\n__all__ = ['cores']"),
        ("executors.__init__", "def executor(): ..."),
        ("__init__", "import zarr"),
    ],
)
def test_files_of_rooms_control(name, text):
    assert len(init_faults(fault_of(text, name))) == 1


# --- saetrain -----------------------------------------------------------------------------------


def saetrain_faults(package: Trees) -> list[str]:
    """What saetrain imports beyond the public names of actshuffle, its errors and its jobs."""
    public = {"", *actshuffle.__all__}
    faults = []
    for name, tree in package.items():
        for other in imports(tree):
            inner = other.removeprefix("actshuffle").removeprefix(".")
            if within(other, "actshuffle") and inner not in public and room_of(inner) not in SAETRAIN_SEES:
                faults.append(f"{name} imports {other}")
    return faults


def test_saetrain_sees_public_names():
    assert saetrain_faults(trees(Path(saetrain.__file__).parent)) == []


def test_saetrain_sees_public_names_control():
    text = (
        "import actshuffle\nfrom actshuffle.errors import RequestError\nfrom actshuffle import Loader, errors, loading"
    )
    assert saetrain_faults(fault_of(text, "data")) == ["data imports actshuffle.loading"]
    assert len(saetrain_faults(fault_of("def f():\n    from actshuffle.loading.loader import Loader", "data"))) == 1
    assert len(saetrain_faults(fault_of("if TYPE_CHECKING:\n    import actshuffle.loading", "data"))) == 1


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
    assert print_faults(trees()) == []


def test_silence_control():
    assert print_faults(fault_of("def f():\n    print(1)", "engine.run")) == ["engine.run:2"]
    assert print_faults(fault_of("print(1)", "cli.app")) == []


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


def test_import_is_light():
    code = (
        "import json, sys, time; start = time.perf_counter(); import actshuffle;"
        "print(json.dumps([time.perf_counter() - start, sorted({m.split('.')[0] for m in sys.modules})]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, modules = json.loads(done.stdout)
    assert {"numpy", "zarr", "actshuffle"} <= set(modules)  # the list is one of what was loaded
    assert not {"torch", "distributed", "dask", "pandas", "pyarrow", "xarray", "click", "hypothesis"} & set(modules)
    code = "import sys, actshuffle; assert 'actshuffle.testing' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert seconds < 10  # about 0.3 s on an idle machine


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
