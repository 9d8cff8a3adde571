"""Processes that import the main script again: refuse to start them from a script that would start them once more."""

from __future__ import annotations

import ast
import inspect
import multiprocessing
import sys
import threading
from pathlib import Path
from types import FrameType, ModuleType

from actshuffle.errors import RequestError


def check_main_guard(method: str) -> None:
    """Refuse a call that a script makes outside of ``if __name__ == "__main__":``, if processes would import it.

    ``method`` is how processes start; one that is forked from this one imports nothing.
    """
    main = sys.modules.get("__main__")
    path = getattr(main, "__file__", None)
    if method == "fork" or path is None:
        return
    name = getattr(getattr(main, "__spec__", None), "name", "")
    if name == "__main__" or name.endswith(".__main__"):  # a package run by -m is not imported again
        return
    again = f"workers are processes that import {Path(path).name} again"
    way = 'under `if __name__ == "__main__":`, or leave workers out'
    if getattr(multiprocessing.current_process(), "_inheriting", False):  # one that imports it just now
        raise RequestError(f"{again}, which starts workers in each of them: put what starts them {way}")
    frame = _in_module(inspect.currentframe(), main)
    if frame is not None and _is_unguarded(Path(path), frame.f_lineno):
        raise RequestError(f"{again}, so its line {frame.f_lineno} would start workers in each of them: put it {way}")
    # A call in another thread, for which the script waits.
    frame = _in_module(sys._current_frames().get(threading.main_thread().ident or 0), main)
    if frame is not None and _is_unguarded(Path(path), frame.f_lineno):
        raise RequestError(
            f"{again}, so the thread for which its line {frame.f_lineno} waits would start workers in each of them: "
            f"put what starts that thread {way}"
        )


def _in_module(frame: FrameType | None, main: ModuleType | None) -> FrameType | None:
    """The frame of the script itself among those that have led to one; None if it is not among them."""
    while frame is not None and not (frame.f_code.co_name == "<module>" and frame.f_globals is vars(main)):
        frame = frame.f_back
    return frame


def _is_unguarded(path: Path, line: int) -> bool:
    try:
        body = ast.parse(path.read_bytes()).body
    except (OSError, SyntaxError, ValueError):
        return False
    for statement in body:
        if statement.lineno <= line <= (statement.end_lineno or statement.lineno):
            test = statement.test if isinstance(statement, ast.If) else None
            return test is None or not any(isinstance(n, ast.Name) and n.id == "__name__" for n in ast.walk(test))
    return False
