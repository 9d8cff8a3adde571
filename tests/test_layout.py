"""The package's own rules: one import direction, few doors to each library, small modules, silence."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import actshuffle

PACKAGE = Path(actshuffle.__file__).parent

# A module imports from lower rows, and from its own room.  A room is a folder, or a module at the top.
LAYERS = [
    "_version errors limits arraytypes progress html",
    "units extras machine bfloat16",
    "ordering",
    "planning storage",  # neither knows the other
    "arrays executors",
    "engine loading",  # neither knows the other
    "building checking",  # neither knows the other
    "cli testing",
    "data files __main__",  # the package itself, and paths that documentation once gave
]
FLOORS = {room: floor for floor, rooms in enumerate(LAYERS) for room in rooms.split()}

# Who may import what, at the top of the module; late imports are for executors and the command line.
DOORS = {
    "zarr": "storage.remote arrays.guard bfloat16 arrays.metadata arrays.source arrays.output arrays.small "
    "arrays.inventory engine.prepare engine.preview checking.contents checking.verifier testing loading.rowreader "
    "loading.dataset building.joining building.filesource",
    "dask": "executors",
    "distributed": "executors machine cli.session building.models",  # the last two ask where they run
    "torch": "loading.torchface",
    "click": "cli.options cli.display cli.session cli.data cli.sources cli.tools cli.app",
    "hypothesis": "testing",
    "pyarrow": "",
    "numcodecs": "",
    "scipy": "",
    "xarray": "",
}

LONGEST = 350
LONGER = {  # lines, and why not less
    "ordering.mixing": 520,  # the statistics of one report
    "checking.verifier": 540,  # full and quick checks, which share nothing with the engine
    "testing": 750,  # strategies, faulty stores and the state machine, for other people's tests
    "engine.prepare": 430,  # all refusals
    "loading.dataset": 400,  # what a finished store can be asked
    "building.cut": 390,
    "checking.moments": 360,  # sums and their merging, which must fit each other
}
PRINTERS = {"cli.app", "cli.data", "cli.display", "cli.session"}


def modules() -> Iterator[tuple[str, Path]]:
    """Name within the package and path of each module; a package's own file says only what it is."""
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.name != "__init__.py":
            yield ".".join(path.relative_to(PACKAGE).with_suffix("").parts), path


def trees() -> dict[str, ast.Module]:
    return {name: ast.parse(path.read_text()) for name, path in modules()}


def imports(tree: ast.Module) -> Iterator[tuple[str, bool]]:
    """Every module that is imported, with its parts joined by dots, and whether that happens on import."""
    on_import = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in on_import) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            if node.module == "actshuffle" or (PACKAGE.parent / str(node.module).replace(".", "/")).is_dir():
                for alias in node.names:
                    yield f"{node.module}.{alias.name}", id(node) in on_import
            else:
                yield str(node.module), id(node) in on_import


def of_ours(tree: ast.Module) -> Iterator[tuple[str, bool]]:
    for name, on_import in imports(tree):
        if name.startswith("actshuffle."):
            yield name.removeprefix("actshuffle."), on_import


def direction_faults(package: dict[str, ast.Module]) -> list[str]:
    faults = []
    for name, tree in package.items():
        room = name.split(".")[0]
        if room not in FLOORS:
            faults.append(f"{name} has no place in LAYERS")
            continue
        for other, _ in of_ours(tree):
            there = other.split(".")[0]
            if there != room and FLOORS.get(there, -1) >= FLOORS[room]:
                faults.append(f"{name} imports {other}, which is not below it")
    return faults


def test_direction_imports_go_one_way():
    assert direction_faults(trees()) == []


@pytest.mark.parametrize(
    "text",
    [
        "from actshuffle.engine import run",
        "import actshuffle.engine.run",
        "from actshuffle.engine.run import execute",
        "def f():\n    from actshuffle.engine.run import execute",
        "if TYPE_CHECKING:\n    from actshuffle.engine.run import Result",
    ],
)
def test_direction_check_sees_an_import_of_a_higher_room(text):
    assert len(direction_faults({"ordering.keys": ast.parse(text)})) == 1
    assert len(direction_faults({"loading.loader": ast.parse(text)})) == 1
    assert direction_faults({"cli.app": ast.parse(text)}) == []
    assert direction_faults({"novel": ast.parse("")}) == ["novel has no place in LAYERS"]


def door_faults(package: dict[str, ast.Module]) -> list[str]:
    faults = []
    for name, tree in package.items():
        for module, on_import in imports(tree):
            library = module.split(".")[0]
            if library in DOORS and name not in DOORS[library].split():
                faults.append(f"{name} imports {library}")
            elif library in ("dask", "distributed") and on_import:
                faults.append(f"{name} imports {library} before it is needed")
    return faults


def test_doors_libraries_are_imported_by_few():
    assert door_faults(trees()) == []


def test_doors_check_sees_others():
    assert door_faults({"ordering.keys": ast.parse("import zarr.codecs")}) == ["ordering.keys imports zarr"]
    assert door_faults({"loading.loader": ast.parse("def f():\n    import torch")}) == ["loading.loader imports torch"]
    early = "executors imports distributed before it is needed"
    assert door_faults({"executors": ast.parse("from distributed import Client")}) == [early]


def print_faults(package: dict[str, ast.Module]) -> list[str]:
    faults = []
    for name, tree in package.items():
        for node in ast.walk(tree):
            printing = isinstance(node, ast.Call) and ast.unparse(node.func) in (
                "print",
                "click.echo",
                "sys.stdout.write",
                "sys.stderr.write",
                "pprint",
            )
            if printing and name not in PRINTERS:
                faults.append(f"{name}:{node.lineno}")
    return faults


def test_silence_only_the_command_line_prints():
    assert print_faults(trees()) == []


def test_silence_check_sees_a_print():
    assert print_faults({"run": ast.parse("def f():\n    print(1)")}) == ["run:2"]


def test_size_modules_are_short():
    lines = {name: len(path.read_text().splitlines()) for name, path in modules()}
    assert {k: n for k, n in lines.items() if n > LONGER.get(k, LONGEST)} == {}


def test_import_is_light():
    code = (
        "import json, sys, time; start = time.perf_counter(); import actshuffle;"
        "print(json.dumps([time.perf_counter() - start, sorted({m.split('.')[0] for m in sys.modules})]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, modules = json.loads(done.stdout)
    assert {"numpy", "zarr", "actshuffle"} <= set(modules)  # the list is one of what was loaded
    assert not {"torch", "distributed", "dask", "pandas", "pyarrow", "xarray", "click", "hypothesis"} & set(modules)
    assert seconds < 10  # about 0.3 s on an idle machine


@pytest.mark.parametrize(
    "module", ["loading.loader", "loading.dataset", "ordering.mixing", "checking.verifier", "planning.planner"]
)
def test_import_of_a_module_alone_needs_no_torch(module):
    code = f"import sys, actshuffle.{module}; assert not {{'torch', 'distributed'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


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
