"""What the commands share: options that all have, and printing."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])
RED_ERROR = click.style("error:", fg="red", bold=True)  # click drops the colour where there is no terminal


def first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


def print_json(document: dict[str, Any], as_json: bool) -> None:
    if as_json and first_rank():
        click.echo(json.dumps(document))


def all_of(*options: Callable[[F], F]) -> Callable[[F], F]:
    """Several options as one decorator, in the order given."""

    def apply(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return apply


LOOK = all_of(
    click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout."),
    click.option("--debug", is_flag=True, expose_value=False, help="Show tracebacks."),
)
