"""saetrain's own rules: one import direction, small rooms, and one place that tells variants apart.

Each rule is a function from parsed modules to faults, and has a negative control.  There are no exemptions: imports
inside functions and under TYPE_CHECKING count like any other.  tests/test_layout.py holds saetrain to the public names
of actshuffle.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import actshuffle
import saetrain

PACKAGE = Path(saetrain.__file__).parent
Trees = dict[str, ast.Module]

# A module imports from lower rows and from its own room only.  A name without a dot is a room or a module at the top.
LAYERS = [
    {"errors"},
    {"settings", "compute", "tensors"},
    {"model"},
    {"variants"},
    {"config"},
    {"data"},
    {"training"},
    {"sae"},
    {"exchange"},
    {"opening"},
    {"cli", "__init__"},
    {"__main__"},
]
LONGEST = 350  # lines of a module
LARGEST = 14  # modules of a room


def package() -> Trees:
    """Every module by its name inside the package."""
    paths = sorted(PACKAGE.rglob("*.py"))
    return {".".join(p.relative_to(PACKAGE).with_suffix("").parts): ast.parse(p.read_text()) for p in paths}


def imports(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(module, name) of every import, wherever it stands; the name is empty for `import module`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield from ((str(node.module), alias.name) for alias in node.names)


def inner_imports(trees: Trees) -> Iterator[tuple[str, str]]:
    """(importing, imported) modules of the package."""
    for name, tree in trees.items():
        for module, imported in imports(tree):
            inside = [part for part in f"{module}.{imported}".split(".") if part]
            if inside[0] == "saetrain":
                found = ".".join(inside[1:])
                while found and found not in trees:  # a name inside a module
                    found = found.rpartition(".")[0]
                yield name, found or "__init__"


def room(name: str) -> str:
    return name.split(".")[0]


# --- Direction


def direction_faults(trees: Trees) -> list[str]:
    row = {name: number for number, names in enumerate(LAYERS) for name in names}
    faults = [f"{name} has no row in LAYERS" for name in trees if room(name) not in row]
    for name, other in inner_imports(trees):
        above = room(name) != room(other) and row.get(room(other), -1) >= row.get(room(name), -1)
        if above:
            faults.append(f"{name} imports {other}, which is not below it")
    return faults + circles(trees)


def circles(trees: Trees) -> list[str]:
    """The modules that import each other, directly or not."""
    below: dict[str, set[str]] = {name: set() for name in trees}
    for name, other in inner_imports(trees):
        below[name].add(other)
    while free := [name for name, others in below.items() if not others & below.keys()]:
        for name in free:
            del below[name]
    return [f"a circle of imports: {', '.join(sorted(below))}"] if below else []


def test_imports_go_one_way() -> None:
    trees = package()
    assert direction_faults(trees) == []
    assert {name for names in LAYERS for name in names} == {room(name) for name in trees}, (
        "rows of modules that are gone"
    )


@pytest.mark.parametrize(
    "text",
    [
        "from saetrain import config",
        "import saetrain.config",
        "from saetrain.config import Config",
        "def f():\n    from saetrain.config import Config",
        "if TYPE_CHECKING:\n    from saetrain.config import Config",
    ],
)
def test_an_import_of_a_higher_module_is_noticed(text: str) -> None:
    trees = {"config": ast.parse(""), "model": ast.parse(text)}
    assert direction_faults(trees) == ["model imports config, which is not below it"]
    assert direction_faults({"config": ast.parse(""), "cli": ast.parse(text)}) == []
    assert direction_faults({"novel": ast.parse("")}) == ["novel has no row in LAYERS"]


def test_a_circle_inside_a_room_is_noticed() -> None:
    texts = {"compute.mesh": "import saetrain.compute.kernels", "compute.kernels": "from saetrain.compute import mesh"}
    trees = {name: ast.parse(text) for name, text in texts.items()}
    assert direction_faults(trees) == ["a circle of imports: compute.kernels, compute.mesh"]


# --- Import by string


def string_import_faults(trees: Trees) -> list[str]:
    names = ("import_module", "__import__")
    return [
        f"{name}:{node.lineno} imports by a string"
        for name, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in names
    ]


def test_nothing_is_imported_by_a_string() -> None:
    assert string_import_faults(package()) == []


@pytest.mark.parametrize("call", ["import_module('saetrain.cli')", "importlib.import_module(x)", "__import__('zarr')"])
def test_an_import_by_a_string_is_noticed(call: str) -> None:
    assert string_import_faults({"model": ast.parse(call)}) == ["model:1 imports by a string"]


# --- Names and sizes


def name_faults(names: list[str], public: list[str]) -> list[str]:
    return sorted({f"{name} bears a public name" for name in names if set(name.split(".")) & set(public)})


def test_no_module_or_room_bears_a_public_name() -> None:
    assert name_faults(list(package()), [*saetrain.__all__, *actshuffle.__all__]) == []


def test_a_module_with_a_public_name_is_noticed() -> None:
    assert name_faults(["sae", "training.fit", "load.x"], saetrain.__all__) == [
        "load.x bears a public name",
        "training.fit bears a public name",
    ]


def size_faults(lines: dict[str, int]) -> list[str]:
    faults = [f"{name} has {count} lines" for name, count in lines.items() if count > LONGEST]
    rooms = [name.rpartition(".")[0] for name in lines if not name.endswith("__init__")]
    return faults + [f"{name or 'the top'} has too many modules" for name in set(rooms) if rooms.count(name) > LARGEST]


def test_modules_and_rooms_are_small() -> None:
    assert size_faults({name: len((PACKAGE / path_of(name)).read_text().splitlines()) for name in package()}) == []


def path_of(name: str) -> str:
    return name.replace(".", "/") + ".py"


def test_large_modules_and_rooms_are_noticed() -> None:
    crowd = {f"compute.m{i}": 10 for i in range(LARGEST + 1)}
    assert size_faults({"cli": LONGEST + 1} | crowd) == ["cli has 351 lines", "compute has too many modules"]
    assert size_faults({"cli": LONGEST, "compute.__init__": 1} | {f"compute.m{i}": 10 for i in range(LARGEST)}) == []


def init_faults(trees: Trees) -> list[str]:
    rooms = {name: tree for name, tree in trees.items() if name.endswith(".__init__")}
    return [
        f"{name} is more than a docstring"
        for name, tree in rooms.items()
        if not ast.get_docstring(tree) or tree.body[1:]
    ]


def test_the_init_of_a_room_is_a_docstring() -> None:
    assert init_faults(package()) == []


def test_an_init_with_code_is_noticed() -> None:
    assert init_faults({"compute.__init__": ast.parse('"""Text."""')}) == []
    for text in ("", '"""Text."""\nimport torch'):
        assert init_faults({"compute.__init__": ast.parse(text)}) == ["compute.__init__ is more than a docstring"]


# --- Variants


def variant_faults(trees: Trees) -> list[str]:
    """Where the variant decides without the table: `arch` and its like are compared, matched, looked up, or asked for.

    They may index VARIANTS, and be looked for in it.
    """
    faults = []
    for name, tree in trees.items():
        for node in ast.walk(tree) if room(name) != "variants" else ():
            asks: list[ast.expr] = []
            if isinstance(node, ast.Compare) and ast.unparse(node.comparators[-1]) != "VARIANTS":
                asks = [node.left, *node.comparators]
            elif isinstance(node, ast.Subscript) and ast.unparse(node.value) != "VARIANTS":
                asks = [node.slice]
            elif isinstance(node, ast.Match):
                asks = [node.subject]
            elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".get"):
                asks = node.args
            if any(_last(ask) in ("arch", "activation") for ask in asks) or _last(node) == "is_sparse":
                faults.append(f"{name}:{getattr(node, 'lineno', 0)} decides by variant")
    return faults


def _last(node: ast.AST) -> str:
    """The last name of `a.b.name` or `name`."""
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def test_only_the_table_tells_variants_apart() -> None:
    assert variant_faults(package()) == []


@pytest.mark.parametrize(
    "text",
    [
        'if config.arch == "topk": pass',
        'x = 1 if arch in ("relu", "jumprelu") else 2',
        'x = "topk" != found.activation',
        '{"relu": 5.0}[config.arch]',
        '{"relu": 5.0}.get(config.arch, 0.0)',
        'match arch:\n    case "topk": pass',
        "if model.config.is_sparse: pass",
    ],
)
def test_a_decision_by_variant_elsewhere_is_noticed(text: str) -> None:
    assert variant_faults({"training.optim": ast.parse(text)}) == ["training.optim:1 decides by variant"]
    assert variant_faults({"variants.relu": ast.parse(text)}) == []
    allowed = "if arch not in VARIANTS: pass\nx = VARIANTS[self.config.arch].takes_k"
    assert variant_faults({"config": ast.parse(allowed)}) == []
