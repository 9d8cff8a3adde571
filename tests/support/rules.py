"""Rules of a package's layout: functions from syntax trees to the list of their faults.

A *room* is a folder of a package, or a module at its top.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import ModuleType

Trees = Mapping[str, ast.Module]  # by dotted name within the package; "room.__init__" for the file of a room itself
LARGEST = 14  # modules of a room
LONGEST = 350  # lines of a module


# --- Syntax trees -------------------------------------------------------------------------------


def folder_of(package: ModuleType) -> Path:
    return Path(str(package.__file__)).parent


@cache
def trees(package: ModuleType) -> Trees:
    folder = folder_of(package)
    return {
        ".".join(path.relative_to(folder).with_suffix("").parts): ast.parse(path.read_text())
        for path in sorted(folder.rglob("*.py"))
    }


def dotted_names(*packages: ModuleType) -> frozenset[str]:
    """Names of the modules and rooms of packages, but not of the packages themselves."""
    folders = [folder_of(package) for package in packages]
    paths = [path.relative_to(folder.parent) for folder in folders for path in folder.rglob("*.py")]
    modules = {".".join(path.with_suffix("").parts) for path in paths}
    return frozenset(modules | {".".join(path.parent.parts) for path in paths if path.parent.parent.name})


def lengths(package: ModuleType) -> dict[str, int]:
    """Lines of each module."""
    folder = folder_of(package)
    return {n: len((folder / f"{n.replace('.', '/')}.py").read_text().splitlines()) for n in trees(package)}


def module(name: str, text: str) -> Trees:
    """A package of one module, for negative controls."""
    return {name: ast.parse(text)}


def room_of(name: str) -> str:
    return name.split(".")[0]


def within(name: str, place: str) -> bool:
    """True for the place itself, and for what is in this room or package."""
    return name == place or name.startswith(f"{place}.")


@cache
def nodes(tree: ast.Module) -> list[ast.AST]:
    return list(ast.walk(tree))


@cache
def imports(tree: ast.Module) -> list[str]:
    """Dotted names of all imports, in functions and under TYPE_CHECKING too, ``from a import b`` as a.b."""
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
    """The last part of the name of the called function."""
    return ast.unparse(node.func).split(".")[-1]


def strings(node: ast.AST) -> Iterator[str]:
    return (n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str))


def inner_imports(tree: ast.Module, home: str) -> list[str]:
    """Names within the package ``home`` that a module of it imports; "" is the package itself."""
    return [name.removeprefix(home).removeprefix(".") for name in imports(tree) if within(name, home)]


# --- Directions ---------------------------------------------------------------------------------


def rows_of(layers: Sequence[str]) -> dict[str, int]:
    return {room: row for row, rooms in enumerate(layers) for room in rooms.split()}


def layer_faults(package: Trees, home: str, layers: Sequence[str]) -> list[str]:
    """Imports of the own row or a higher one; a public name comes from the package's own ``__init__``."""
    rows, faults = rows_of(layers), []
    for name, tree in package.items():
        room = room_of(name)
        if room not in rows:
            faults.append(f"{name} has no row")
            continue
        faults += [f"{name} imports {other} by a relative path" for other in imports(tree) if other.startswith(".")]
        for other in inner_imports(tree, home):
            there = room_of(other) if room_of(other) in rows else "__init__"
            if there != room and rows[there] >= rows[room]:
                faults.append(f"{name} imports {there}, which is not below it")
    return faults


def circle_faults(package: Trees, home: str) -> list[str]:
    """Modules that import each other, directly or not, which may lie in one room."""
    below = {}
    for name, tree in package.items():
        below[name] = {_owner(other, package) for other in inner_imports(tree, home)}
    while free := [name for name, others in below.items() if not others & below.keys()]:
        for name in free:
            del below[name]
    return [f"{name} is in or above a circle of imports" for name in sorted(below)]


def _owner(name: str, package: Trees) -> str:
    """The module that a name is in, or that it is."""
    while name and name not in package:
        if f"{name}.__init__" in package:
            return f"{name}.__init__"
        name = name.rpartition(".")[0]
    return name or "__init__"


def string_faults(package: Trees, known: Collection[str]) -> list[str]:
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


# --- Names, sizes and the files of rooms --------------------------------------------------------


def name_faults(names: Collection[str], public: Collection[str]) -> list[str]:
    """Modules and rooms that bear a public name, so that a reader could take the one for the other."""
    return [name for name in names if set(public) & set(name.removesuffix("__init__").strip(".").split("."))]


def room_faults(names: Collection[str]) -> list[str]:
    """Rooms with too many modules; the package itself is one.  The files by which Python enters one do not count."""
    modules = [name for name in names if not name.endswith(("__init__", "__main__"))]
    sizes = Counter(name.rpartition(".")[0] for name in modules)
    return [f"{room or 'the package'} has {size} modules" for room, size in sizes.items() if size > LARGEST]


def length_faults(lines: Mapping[str, int], longer: Mapping[str, str]) -> list[str]:
    """Modules that are too long, and exemptions of modules that are not, or that give no reason."""
    long = {name for name, count in lines.items() if count > LONGEST}
    return sorted(long ^ set(longer)) + [name for name, reason in longer.items() if not reason]


def lost_rooms(names: Collection[str]) -> list[str]:
    """Rooms without a file of their own, which no wheel would hold."""
    rooms = {name.rpartition(".")[0] for name in names} - {""}
    return sorted(room for room in rooms if f"{room}.__init__" not in names)


def init_faults(package: Trees, home: str, faces: Collection[str]) -> list[str]:
    """A room's own file is a docstring; that of a public face may import from the room, and says `__all__`.

    A package's face may import late: for type checkers alone, or in functions.
    """
    faults = []
    for name, tree in package.items():
        if not name.endswith("__init__"):
            continue
        room = name.removesuffix(".__init__")
        inner = home if room == "__init__" else f"{home}.{room}"
        if not ast.get_docstring(tree):
            faults.append(f"{name}: no docstring")
        for node in tree.body[1:]:
            public = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
            late = room == "__init__" and _is_late(node, inner)
            if room not in faces or not (public or _is_from(node, inner) or late):
                faults.append(f"{name}: {ast.unparse(node)}")
    return faults


def _is_from(node: ast.stmt, place: str) -> bool:
    return isinstance(node, ast.ImportFrom) and node.level == 0 and within(str(node.module), place)


def _is_late(node: ast.stmt, home: str) -> bool:
    """True for what a face needs to import late: a condition, a private function, its registration, their tools."""
    if isinstance(node, ast.If):
        return all(_is_from(part, home) or _is_late(part, home) for part in [*node.body, *node.orelse])
    if isinstance(node, ast.Import | ast.ImportFrom):
        tools = {"__future__", "sys", "types", "typing"}
        return {getattr(node, "module", alias.name) for alias in node.names} <= tools
    registration = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    return registration or (isinstance(node, ast.FunctionDef) and node.name.startswith("_"))


# --- Messages -----------------------------------------------------------------------------------


def inner_words_faults(package: Trees, ours: Collection[str]) -> list[str]:
    """Texts of our errors, by ``str`` or within a message, where the handler of one names it.

    Such a text has the arguments of Python, and `errors.words_of` the options of the command line.
    """
    faults = []
    for name, tree in package.items():
        for handler in nodes(tree):
            if not isinstance(handler, ast.ExceptHandler) or handler.type is None or handler.name is None:
                continue
            caught = {getattr(node, "id", getattr(node, "attr", "")) for node in ast.walk(handler.type)}
            for node in ast.walk(handler) if caught & set(ours) else ():
                told = isinstance(node, ast.FormattedValue) and node.value
                if isinstance(node, ast.Call) and called(node) == "str" and node.args:
                    told = node.args[0]
                if isinstance(told, ast.Name) and told.id == handler.name:
                    faults.append(f"{name}: {handler.name}")
    return faults


NOUNS = re.compile(
    "(row|step|token|latent|feature|task|run|window|document|array|file|shard|rank|block|chunk|position|prompt|node|"
    "link|epoch|tile|label|prediction|checkpoint|text|object|store|worker|column|level)s|entries"
)


def plural_faults(package: Trees) -> list[str]:
    """Numbers with the plural of a noun behind them, whatever the number: `units.counted` writes "1 row".

    A name in capitals is a number that is known, and so is arithmetic with one or with none.
    """
    faults = []
    for name, tree in package.items():
        texts = [node.values for node in nodes(tree) if isinstance(node, ast.JoinedStr)]
        for value, after in ((v, a) for text in texts for v, a in pairwise(text)):
            if (
                not isinstance(value, ast.FormattedValue)
                or value.conversion != -1
                or not isinstance(after, ast.Constant)
            ):
                continue
            noun = re.match(r" (\w+)\b(?!/)", str(after.value))
            names = [node.id for node in ast.walk(value.value) if isinstance(node, ast.Name)]
            if noun and NOUNS.fullmatch(noun[1]) and names and not any(map(str.isupper, names)):
                faults.append(f"{name}: {{{ast.unparse(value.value)}}} {noun[1]}")
    return faults
