"""Between a command and the library: who does the work, who watches it, how it stops, and how it answers.

Results go to stdout, all else to stderr.
"""

from __future__ import annotations

import logging
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from multiprocessing import resource_tracker
from typing import Any, NamedTuple, TypeVar

import click

from actshuffle import machine
from actshuffle.cli.console import print_json, wrapped
from actshuffle.cli.options import INSECURE, LOOK, WORK
from actshuffle.executors import Executor, Serial, connected, executor_for
from actshuffle.progress.display import Display
from actshuffle.units import counted, format_seconds

T = TypeVar("T")
QUIET_DASK = {"DASK_LOGGING__DISTRIBUTED": "critical", "PYTHONWARNINGS": "ignore"}  # for workers
SMALL = 256_000_000  # bytes that move sooner than a cluster of our own starts


class LogLines(logging.Handler):
    """Shows the library's own log records among a display's lines."""

    def __init__(self, display: Display) -> None:
        super().__init__(logging.WARNING)
        self.display = display

    def emit(self, record: logging.LogRecord) -> None:
        self.display.line(record.levelname.lower(), record.getMessage())


class _Crew(Executor):
    """The executor that was asked for, opened when the first work comes.

    A bad request is thus refused at once, and a small one waits for no cluster.  Nor does work that threads share
    as well as processes, unless a number of workers was given: rows that are taken from the page cache.
    """

    def __init__(self, workers: int | None, display: Display) -> None:
        self.workers = max(1, machine.cores() if workers is None else workers)
        self._alone = workers == 0 or (workers is None and self.workers == 1)
        self._small = SMALL if workers is None else -1
        self._threads = workers is None and self.workers > 1
        self._display = display
        self._stack = ExitStack()
        self._inner: Executor | None = None

    def ready(self, nbytes: int, shared: bool = False) -> Executor:
        """Open the executor for this many bytes of work, which threads share well or not, if it is not open."""
        if self._inner is None and shared and self._threads:
            from actshuffle.executors import Threads

            self._inner = Threads(self.workers)
            self._display.line("workers", f"{self.workers} threads of this process")
        if self._inner is None:
            alone = self._alone or nbytes <= self._small
            if not alone:
                self._display.hint("cluster", f"starting {counted(self.workers, 'worker')} ...")
            with _deaf_children():
                self._inner = self._stack.enter_context(executor_for(0 if alone else self.workers))
            self.workers, self.processes = self._inner.workers, self._inner.processes
            if not alone:
                self._display.line("cluster", self._inner.described())
        return self._inner

    def map(self, fn: Callable[..., T], calls: Iterable[tuple[Any, ...]]) -> Iterator[T]:
        return self.ready(self._small + 1).map(fn, calls)

    def task_memory(self) -> int:
        """A worker's share of the machine, as its cluster will see it."""
        return Serial().task_memory() // self.workers

    def close(self) -> None:
        self._stack.close()


@contextmanager
def _deaf_children() -> Iterator[None]:
    """Keep Ctrl-C from processes started here, and by threads started here.

    A terminal sends it to all processes; the workers are stopped by us.
    """
    resource_tracker.ensure_running()  # its start would undo the mask in the thread that starts workers
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def at_work(
    ctx: click.Context, workers: int | None, scheduler: str | None, quiet: bool
) -> Iterator[tuple[Executor, Display]]:
    """An executor and a display, both closed in order whatever happens."""
    if workers is not None and scheduler is not None:
        raise click.UsageError("give --workers or --scheduler, not both")
    display = Display(None if quiet else sys.stderr)
    handler, log = LogLines(display), logging.getLogger("actshuffle")
    log.addHandler(handler)
    log.propagate = False
    try:
        with ExitStack() as stack:
            for name, value in () if ctx.obj["debug"] else QUIET_DASK.items():
                if name not in os.environ:
                    os.environ[name] = value
                    stack.callback(os.environ.pop, name)
            executor: Executor
            stack.callback(display.close)
            if scheduler is not None:
                display.hint("cluster", f"connecting to {scheduler} ...")
                executor = stack.enter_context(connected(scheduler, insecure=ctx.meta.get(INSECURE, False)))
                display.line("cluster", executor.described())
            else:
                executor = crew = _Crew(workers, display)
                stack.callback(crew.close)
                display.before = crew.ready
            display.workers = lambda: executor.workers
            if not ctx.obj["debug"]:
                stack.callback(_hush)
            try:
                yield executor, display
            except KeyboardInterrupt:
                display.close()
                if executor.processes:
                    display.line("stopping", "Ctrl-C again does not wait for the tasks in flight")
                raise
    finally:
        log.removeHandler(handler)
        log.propagate = True


def _hush() -> None:
    """Silence what Dask logs about the connections that we are about to close."""
    for name in ("distributed", "distributed.client", "tornado.application", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)


class Answer(NamedTuple):
    """The result of a command: one JSON object, and text for people."""

    document: dict[str, Any]
    text: str
    ok: bool = True  # if not, the exit code is 1
    wraps: bool = True  # lines may be broken where the terminal ends
    next: tuple[str, ...] = ()  # the words of the command that usually follows
    then: Callable[[], object] = lambda: None  # called when the answer is printed


def _give(
    ctx: click.Context, answer: Answer, as_json: bool, quiet: bool = False, display: Display | None = None
) -> None:
    """Print an answer, and on stderr the whole time and the command that usually follows."""
    if as_json:
        print_json(answer.document)
    elif not quiet:
        click.echo(wrapped(answer.text, sys.stdout) if answer.wraps else answer.text)
        if answer.next and display is not None:
            took = format_seconds(time.perf_counter() - ctx.obj["started"])
            told = f"{took}; next: {shlex.join(answer.next)}"
            if display.live:
                click.echo(wrapped(f"in all: {told}", sys.stderr), err=True)
            else:
                display.line("in all", told)
    answer.then()
    if not answer.ok:
        ctx.exit(1)


def work(*, here: bool = False) -> Callable[[Callable[..., Answer]], Callable[..., None]]:
    """Give a command the options of `WORK`, an executor and a display, and print its answer.

    With ``here`` the executor is None unless --workers or --scheduler is given.
    """

    def decorate(command: Callable[..., Answer]) -> Callable[..., None]:
        @WORK
        @click.pass_context
        @wraps(command)
        def run(ctx: click.Context, /, *, as_json: bool, quiet: bool, **options: Any) -> None:
            workers, scheduler = options.pop("workers"), options.pop("scheduler")
            alone = here and workers is None and scheduler is None
            with at_work(ctx, 0 if alone else workers, scheduler, quiet) as (executor, display):
                answer = command(None if alone else executor, display, **options)
            _give(ctx, answer, as_json, quiet, display)

        return run

    return decorate


def look(command: Callable[..., Answer]) -> Callable[..., None]:
    """Give a command the options of `LOOK`, and print its answer."""

    @LOOK
    @click.pass_context
    @wraps(command)
    def run(ctx: click.Context, /, *, as_json: bool, **options: Any) -> None:
        _give(ctx, command(**options)._replace(wraps=False), as_json)

    return run
