"""Packages that only some commands need: imported on first use; an error names the extra to install."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from actshuffle.errors import RequestError


def need(module: str, extra: str) -> Any:
    """Import and return a module, or raise a `RequestError` that names the extra which installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as err:
        package = module.partition(".")[0]
        raise RequestError(
            f"this needs {package}, which is not installed ({err}): in a checkout of actshuffle, "
            f"pip install '.[{extra}]'"
        ) from err


@contextmanager
def quietly(transformers: Any) -> Iterator[None]:
    """Without progress bars and advice of transformers on the terminal, which belongs to our own display."""
    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()
