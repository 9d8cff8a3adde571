"""The display of a run: a live line per stage on a terminal, dated log lines anywhere else.

::

    plan            2 levels, 41 blocks, 532 MB scratch, 40 MB per worker
    cluster         2 workers
    level 1 of 2    ━━━━━━━━━━━━━━━━━━━━━  100%   516 MB   307 MB/s         1.7 s
    level 2 of 2    ━━━━━━━━╸────────────   41%   212 MB   301 MB/s     0:01 left

Tasks report only when they are done, a millisecond or ten minutes apart, so a thread redraws the line
ten times a second from a `Meter`, which advances at the measured rate in between.

In a notebook the line is live too.  `shown` gives each long call of the library such a display.
"""

from __future__ import annotations

import math
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from typing import Any, ParamSpec, TextIO, TypeVar, cast

from actshuffle.errors import RequestError
from actshuffle.progress import Progress
from actshuffle.progress.meter import Meter, clock_face
from actshuffle.units import counted, format_bytes, format_seconds

P = ParamSpec("P")
T = TypeVar("T")

TITLE = 16  # columns of a title; "verify (quick)" fits
BAR = 40  # columns of a bar at most
REDRAW = 0.1  # seconds
QUIET_START = 0.5  # a stage that moves no bytes and is over by then is not shown
LOG_EVERY, LOG_SELDOM = 5.0, 60.0  # seconds between log lines: at first, and in a long stage
PATIENCE = 1.0  # seconds that a call of the library may take unseen
GREEN, CYAN, DIM, PLAIN = "\x1b[32m", "\x1b[36m", "\x1b[2m", "\x1b[0m"


class Display:
    """A `Progress` that writes to a terminal or a log.

    ``workers`` returns the number of tasks in flight; ``before`` is called with the bytes of a stage ahead of its
    first task.  ``live`` follows the stream if not given; without a stream nothing is shown, nor is anything in the
    first seconds of ``patience``.
    """

    def __init__(
        self,
        stream: TextIO | None,
        *,
        workers: Callable[[], int] = lambda: 1,
        before: Callable[..., object] = lambda *work: None,
        live: bool | None = None,
        patience: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.stream, self.workers, self.before, self.clock = stream, workers, before, clock
        terminal = stream is not None and stream.isatty() and os.environ.get("TERM") != "dumb"
        self._notebook = type(stream).__module__.startswith("ipykernel.")
        self.live = (terminal or self._notebook) if live is None else live
        self._colour = self.live and not self._notebook and not os.environ.get("NO_COLOR")
        self._fancy = "utf" in (getattr(stream, "encoding", None) or "").lower()
        self._lock = threading.RLock()
        self._stop = threading.Event()
        self._ticker: threading.Thread | None = None
        self._stage = ""
        self._meter: Meter | None = None
        self._rate: float | None = None  # of the last stage that moved bytes
        self._open = False  # the cursor stands behind a live line
        self._width = 0  # of the line before, in a notebook
        self._logged = 0.0
        self._speaks = clock() + patience  # from then on
        self._late: str | None = None  # the beginning of a stage that came before

    # --- Progress ---------------------------------------------------------------------------------

    def begin(self, stage: str, tasks: int, nbytes: int) -> None:
        if nbytes:
            self.before(nbytes)
        with self._lock:
            now = self.clock()
            self._stage, self._logged = stage, now
            self._meter = Meter(tasks, nbytes, self.workers(), now, self._rate)
        if (self.live or now < self._speaks) and self._ticker is None:
            self._ticker = threading.Thread(target=self._tick, name="actshuffle-display", daemon=True)
            self._ticker.start()
        size = f", {format_bytes(nbytes)}" if nbytes else ""
        begins = f"begins: {tasks:,} task{'s' * (tasks != 1)}{size}"
        self._late = begins if now < self._speaks else None
        self._log(begins)

    def advance(self, nbytes: int, fresh: bool) -> None:
        with self._lock:
            meter, now = self._meter, self.clock()
            if meter is None:
                return
            meter.advance(nbytes, fresh, now)
            self._log_sometimes(meter, now)

    def within(self, nbytes: int, tokens: int) -> None:
        with self._lock:
            meter, now = self._meter, self.clock()
            if meter is None:
                return
            first = not meter.token_bytes
            meter.within(nbytes, tokens, now)
            self._log_sometimes(meter, now, at_once=first)

    def _log_sometimes(self, meter: Meter, now: float, *, at_once: bool = False) -> None:
        wait = min(max(LOG_EVERY, (now - meter.started) / 20), LOG_SELDOM)
        if not self.live and (at_once or now - self._logged >= wait):
            self._logged = now
            parts = [f"{meter.tasks_done:,} of {counted(meter.tasks, 'task')}", *self._numbers(meter, now)]
            self._log(", ".join(p for p in parts if p))

    def end(self) -> None:
        with self._lock:
            meter, now = self._meter, self.clock()
            if meter is None:
                return
            self._meter = None
            took, mean = format_seconds(now - meter.started), meter.mean_rate(now)
            rate = _pace(meter, mean)
            self._rate = mean if meter.nbytes else self._rate
            if self.live and (meter.nbytes or self._open):
                amount = format_bytes(meter.nbytes) if meter.nbytes else f"{meter.tasks:,}"
                self._write_live(self._row(self._stage, 1.0, "100%", amount, rate, took), "\n")
            again = f", {meter.resumed:,} of {counted(meter.tasks, 'task')} were done before" if meter.resumed else ""
            self._log(f"done in {took}" + (f", {rate}" if rate else "") + again)

    # --- Other lines ------------------------------------------------------------------------------

    def line(self, title: str, text: str) -> None:
        """A titled line above the live one."""
        with self._lock:
            self._write_live(f"{title:<{TITLE - 1}} {text}", "\n")
            self._log(text, title)

    def hint(self, title: str, text: str) -> None:
        """A line that stays until the next one; nothing in a log."""
        with self._lock:
            self._write_live(f"{title:<{TITLE - 1}} {text}", "")

    def close(self) -> None:
        """Leave the last line as it is.  May be called again."""
        self._stop.set()
        with self._lock:
            if self._open:
                self._put("\n")
            self._open, self._meter = False, None

    # --- Drawing ----------------------------------------------------------------------------------

    def _tick(self) -> None:
        while not self._stop.wait(REDRAW):
            with self._lock:
                meter, now = self._meter, self.clock()
                if meter is None or (not meter.nbytes and now - meter.started < QUIET_START) or now < self._speaks:
                    continue
                if self._late is not None:
                    self._log(self._late)
                    self._late = None
                percent, amount, rate, left = self._numbers(meter, now)
                if not left:  # no rate is known yet
                    left = f"{clock_face(now - meter.started)} so far"
                elif meter.tasks_done == meter.tasks:
                    left = "finishing"
                fraction = meter.estimate(now) / meter.units if meter.units else 1.0
                self._write_live(self._row(self._stage, fraction, percent, amount, rate, left), "")

    def _numbers(self, meter: Meter, now: float) -> tuple[str, str, str, str]:
        """Percent, amount, rate and time left; the last two are empty while unknown."""
        done, rate, left = meter.estimate(now), meter.rate(now), meter.left(now)
        percent = f"{int(100 * done / meter.units) if meter.units else 100}%"
        return (
            percent,
            format_bytes(done) if meter.nbytes else "",
            _pace(meter, rate),
            "" if left is None else f"{clock_face(math.ceil(left))} left",
        )

    def _row(self, title: str, fraction: float, percent: str, amount: str, rate: str, when: str) -> str:
        """One line, never wider than the terminal: title, bar, four columns of numbers."""
        columns = self._columns()
        numbers = f"  {percent:>4}  {amount:>7}  {rate:>9}  {when:>12}"
        width = min(BAR, columns - TITLE - len(numbers))
        if width < 5:
            return f"{title:<{TITLE - 1}} {percent:>4}  {when:>12}"[:columns]
        done, rest = bar(fraction, width, fancy=self._fancy)
        if self._colour:
            done = (GREEN if fraction >= 1 else CYAN) + done + PLAIN
            rest = DIM + rest + PLAIN
        return f"{title:<{TITLE - 1}} {done}{rest}{numbers}"

    def _columns(self) -> int:
        with suppress(OSError, ValueError):
            assert self.stream is not None
            return max(20, os.get_terminal_size(self.stream.fileno()).columns - 3)  # room for ^C
        return 77

    def _write_live(self, text: str, end: str) -> None:
        if not self.live or self.clock() < self._speaks:
            return
        if self._notebook:  # which knows no command that clears the rest of a line
            self._width, text = len(text), text.ljust(self._width)
            self._put(("\r" if self._open else "") + text + end)
        else:
            self._put(("\r" if self._open else "") + text + "\x1b[K" + end)
        self._open = not end

    def _log(self, text: str, title: str | None = None) -> None:
        if not self.live and self.clock() >= self._speaks:
            stamp = time.strftime("%Y-%m-%d %H:%M:%S")
            self._put(f"{stamp}  {self._stage if title is None else title:<{TITLE - 1}} {text}\n")

    def _put(self, text: str) -> None:
        if self.stream is not None:
            with suppress(OSError, ValueError):  # nobody looks any more, and the run continues
                self.stream.write(text)
                self.stream.flush()


def _pace(meter: Meter, rate: float | None) -> str:
    """A rate as people read it: tokens where they are counted, else bytes."""
    if not rate or not meter.nbytes:
        return ""
    return f"{rate / meter.token_bytes:,.0f} tok/s" if meter.token_bytes else f"{format_bytes(rate)}/s"


def bar(fraction: float, width: int, *, fancy: bool = True) -> tuple[str, str]:
    """The done part and the rest of a bar, together ``width`` columns.

    >>> "".join(bar(0.45, 10)), "".join(bar(0.45, 10, fancy=False))
    ('━━━━╸─────', '####------')
    """
    halves = int(min(max(fraction, 0.0), 1.0) * width * 2)
    full, half = divmod(halves, 2)
    done = "━" * full + "╸" * half if fancy else "#" * full
    return done, ("─" if fancy else "-") * (width - len(done))


def shown(call: Callable[P, T]) -> Callable[P, T]:
    """Let a function's keyword ``progress`` be True, its default, for a display on stderr.

    The function itself gets the display; an observer and False reach it as they are.
    """

    @wraps(call)
    def watched(*args: Any, **options: Any) -> T:
        given = options.get("progress", True)
        if not (given is None or isinstance(given, bool) or callable(getattr(given, "begin", None))):
            raise RequestError(
                f"progress must be True, False or an actshuffle.progress.Progress, got {type(given).__name__}"
            )
        if given is not True:
            return call(*args, **options)
        executor = options.get("executor")
        display = Display(
            sys.stderr, patience=PATIENCE, workers=lambda: getattr(executor, "workers", options.get("workers") or 1)
        )
        try:
            return call(*args, **(options | {"progress": cast(Progress, display)}))
        finally:
            display.close()

    return cast(Callable[P, T], watched)
