"""Packages that only some commands need, imported when they are, with word of what to install."""

from __future__ import annotations

import importlib
from typing import Any

from actshuffle.errors import RequestError


def need(module: str, extra: str) -> Any:
    """The module, or a `RequestError` that names the extra which brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as err:
        package = module.partition(".")[0]
        raise RequestError(
            f"this needs {package}, which is not installed ({err}): pip install 'actshuffle[{extra}]'"
        ) from err
