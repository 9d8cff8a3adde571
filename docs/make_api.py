"""Write docs/api.md: the public names of actshuffle and saetrain, with signatures and first sentences.

    python docs/make_api.py

Everything on the page comes from the code: signatures from the functions, sentences from their docstrings.  Only the
sections below are chosen by hand; `page` refuses to leave a public name out.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PAGE = Path(__file__).with_name("api.md")
WIDTH = 100  # of a signature on one line

# Heading, module, names; an empty text stands for all that the module names in __all__ or, if it has none, defines.
SECTIONS = [
    ("Shuffle", "actshuffle", "plan shuffle Result status order priorities"),
    ("Check and describe", "actshuffle", "verify VerifyReport info stats read_stats quality"),
    ("Read", "actshuffle", "Loader open_dataset Dataset came_from where_is decoder document_name watch"),
    ("Make stores", "actshuffle", "collect import_store concat split head sample filter_rows append read_texts"),
    ("Sizes as people write them", "actshuffle", "parse_bytes format_bytes"),
    ("Views of any range", "actshuffle.data.dataset", "write_view"),
    ("Executors", "actshuffle.executors", "Executor Serial Threads Dask local_cluster executor_for connected"),
    ("Jobs of other packages", "actshuffle.jobs", ""),
    ("bfloat16", "actshuffle.bfloat16", "BFloat16"),
    ("Stores that fail, for tests", "actshuffle.testing", ""),
    ("Train", "saetrain", ""),
]
BRIEF = ("actshuffle.bfloat16", "actshuffle.testing")  # modules whose classes are shown without their members
COMPLETE = ("actshuffle", "saetrain")  # modules whose __all__ must be on the page as a whole

INTRODUCTION = """# API

The public names of `actshuffle` and `saetrain`, with their signatures and the first sentences of their docstrings;
`help(actshuffle.shuffle)` shows the rest. `python docs/make_api.py` writes this page. Names that are not on it are
internal and may move.
"""


def page() -> str:
    """The whole page as Markdown."""
    named = {(module, name) for _, module, names in SECTIONS for name in names.split() or public(module)}
    for module in COMPLETE:
        left = {name for name in public(module) if not name.startswith("_") and (module, name) not in named}
        if left:
            raise ValueError(f"{', '.join(sorted(left))} of {module} must go into a section of make_api.SECTIONS")
    return INTRODUCTION + "".join(section(*row) for row in SECTIONS) + errors()


def errors() -> str:
    """The trees of errors, from the docstrings of the two modules."""
    trees = []
    for module in ("actshuffle.errors", "saetrain.errors"):
        text = inspect.cleandoc(importlib.import_module(module).__doc__ or "")
        lines = [line for line in text.split("::\n", 1)[1].splitlines() if line.startswith("    ")]
        trees.append(f"`{module}`:\n\n```text\n{textwrap.dedent(chr(10).join(lines))}\n```\n")
    return "\n## Errors\n\n" + "\n".join(trees)


def public(module: str) -> list[str]:
    """The names that a module lists, or the classes and functions that it defines."""
    found = importlib.import_module(module)
    if hasattr(found, "__all__"):
        return list(found.__all__)
    own = (n for n, x in vars(found).items() if getattr(x, "__module__", "") == module and callable(x))
    return [name for name in own if not name.startswith("_")]


def section(heading: str, module: str, names: str) -> str:
    """One heading with an entry for each name."""
    found = importlib.import_module(module)
    members = [(name, getattr(found, name)) for name in names.split() or public(module)]
    blocks = [entry(f"{module}.{name}", value) for name, value in members if callable(value)]
    return f"\n## {heading}\n" + "".join(blocks)


def entry(name: str, value: Any) -> str:
    """Signature, first sentence, and the members of a class."""
    module, _, short = name.rpartition(".")
    if inspect.isclass(value):
        code, members = "\n".join(class_lines(name, value)), [] if module in BRIEF else list(member_lines(value))
    else:
        code, members = signature(name, value), []
    parts = [f"### `{short}`", f"```python\n{code}\n```", first_sentence(value), "\n".join(members)]
    return "".join(f"\n{part}\n" for part in parts if part)


def class_lines(name: str, value: type) -> Iterator[str]:
    """The constructor or, of a class whose instances are plain values, its fields."""
    if dataclasses.is_dataclass(value):
        yield f"class {name}:"
        for field in dataclasses.fields(value):
            if not field.name.startswith("_"):
                default = "" if field.default is dataclasses.MISSING else f" = {shown(field.default)}"
                yield f"    {field.name}: {annotation(field.type)}{default}"
        return
    constructor = None if getattr(value, "_is_protocol", False) else vars(value).get("__init__")
    yield signature(f"class {name}", constructor, result=False) if constructor else f"class {name}"


def member_lines(value: type) -> Iterator[str]:
    """An item for each public method and property, in the order of the code."""
    ours = [c for c in reversed(value.__mro__) if c.__module__.split(".")[0] in ("actshuffle", "saetrain")]
    found = {name: member for c in ours for name, member in vars(c).items() if not name.startswith("_")}
    for name, member in found.items():
        function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
        if inspect.isfunction(function):
            code = name if isinstance(member, property) else signature(name, function, width=10**6)
            sentence = first_sentence(member)
            yield f"- `{code}`" + (f": {sentence}" if sentence else "")


def signature(name: str, function: Any, *, result: bool = True, width: int = WIDTH) -> str:
    """``name(a: int, *, b: str = "x") -> None``, one parameter a line if it is long."""
    found = inspect.signature(function)
    parts: list[str] = []
    keyword_only = False
    for p in found.parameters.values():
        if p.name in ("self", "cls"):
            continue
        if p.kind is p.KEYWORD_ONLY and not keyword_only:
            parts.append("*")
        keyword_only = keyword_only or p.kind in (p.KEYWORD_ONLY, p.VAR_POSITIONAL)
        stars = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
        kind = "" if p.annotation is p.empty else f": {annotation(p.annotation)}"
        default = "" if p.default is p.empty else f" = {shown(p.default)}"
        parts.append(f"{stars}{p.name}{kind}{default}")
    to = "" if not result or found.return_annotation is found.empty else f" -> {annotation(found.return_annotation)}"
    line = f"{name}({', '.join(parts)}){to}"
    return line if len(line) <= width else f"{name}(\n    " + ",\n    ".join(parts) + f",\n){to}"


def annotation(found: Any) -> str:
    """The annotation as the code has it, which is a string under ``from __future__ import annotations``."""
    return found if isinstance(found, str) else getattr(found, "__name__", str(found))


def shown(default: Any) -> str:
    """A default value: a literal, or the name of a function."""
    text = getattr(default, "__name__", repr(default))
    return "..." if " at 0x" in text or text == "<lambda>" else text.replace("'", '"')


def first_sentence(value: Any) -> str:
    """The first sentence of a docstring, or nothing where there is none."""
    text = value.__doc__ if isinstance(value, property) else inspect.getdoc(value)
    paragraph = " ".join(inspect.cleandoc(text or "").split("\n\n")[0].split()).replace("``", "`")
    if inspect.isclass(value) and (paragraph.startswith(f"{value.__name__}(") or "__doc__" not in vars(value)):
        return ""  # made by dataclass, or inherited
    match = re.match(r".+?[.!?](?=\s|$)", paragraph)
    return match[0] if match else paragraph


if __name__ == "__main__":
    PAGE.write_text(page())
