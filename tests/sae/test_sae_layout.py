"""saetrain's own rules: one import direction, small rooms, and one place that tells variants apart.

tests/test_layout.py has the negative controls of the rules that both packages share, and holds saetrain to the public
names of actshuffle.
"""

from __future__ import annotations

import ast

import pytest

import actshuffle
import saetrain
from support import rules

HOME = "saetrain"
OURS = rules.trees(saetrain)

# A module imports from lower rows and from its own room only.
LAYERS = [
    "errors describing writing",
    "settings compute tensors norms",
    "tile",
    "model",
    "variants",
    "config",
    "data memory",
    "training",
    "reporting",
    "sae",
    "foreign",
    "products",
    "exchange opening features",
    "probing reading",
    "sharing",
    "view",
    "runs",
    "cli __init__",
    "__main__",
]


def test_imports_go_one_way() -> None:
    assert rules.layer_faults(OURS, HOME, LAYERS) == []
    assert rules.circle_faults(OURS, HOME) == []
    assert set(rules.rows_of(LAYERS)) == {rules.room_of(name) for name in OURS}


def test_nothing_is_imported_by_a_string() -> None:
    assert rules.string_faults(OURS, rules.dotted_names(actshuffle, saetrain)) == []


def test_names_and_sizes() -> None:
    assert rules.name_faults(OURS, [*saetrain.__all__, *actshuffle.__all__]) == []
    assert rules.room_faults(OURS) == []
    assert rules.length_faults(rules.lengths(saetrain), {}) == []


def test_files_of_rooms_are_docstrings() -> None:
    assert rules.lost_rooms(OURS) == []
    assert rules.init_faults(OURS, HOME, {"__init__", "cli"}) == []


# --- Variants -----------------------------------------------------------------------------------


def variant_faults(trees: rules.Trees) -> list[str]:
    """Where the variant decides without the table: `arch` and its like are compared, matched, looked up, or asked for.

    They may index VARIANTS, and be looked for in it.
    """
    faults = []
    for name, tree in trees.items():
        for node in rules.nodes(tree) if rules.room_of(name) != "variants" else ():
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
    assert variant_faults(OURS) == []


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
    assert variant_faults(rules.module("training.optim", text)) == ["training.optim:1 decides by variant"]
    assert variant_faults(rules.module("variants.relu", text)) == []
    allowed = "if arch not in VARIANTS: pass\nx = VARIANTS[self.config.arch].takes_k"
    assert variant_faults(rules.module("config", allowed)) == []
