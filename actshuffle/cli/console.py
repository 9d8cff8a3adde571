"""The process of every command: signals that stop it in order, pure JSON on stdout, lines that wrap.

It imports nothing of the other rooms, since --help and --version use it too.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import sys
import textwrap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NoReturn

import click


@contextmanager
def loading() -> Iterator[None]:
    """Collect no garbage while modules are loaded, and look at none of their objects later.

    They make some 100,000 objects that live as long as the process.  Python would look at them again and again, and
    once more when it exits, which takes an eighth of the time of a run of 100 MB.
    """
    if "numpy" in sys.modules or not gc.isenabled():  # a program of others, which has garbage of its own
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextmanager
def signals() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM stop a run in order, and a second one stop it at once."""

    def stop(number: int, _: Any) -> NoReturn:
        signal.signal(number, lambda *_: os._exit(1))  # workers go when they see that we are gone
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def print_json(document: dict[str, Any]) -> None:
    click.echo(json.dumps(document))


def wrapped(text: str, stream: Any) -> str:
    """The text, broken at spaces where a terminal would break words."""
    if not stream.isatty():
        return text
    wrap = partial(
        textwrap.fill, width=shutil.get_terminal_size().columns, break_long_words=False, break_on_hyphens=False
    )
    return "\n".join(map(wrap, text.splitlines()))
