"""The display of a run: a live line per stage on a terminal, dated log lines anywhere else.

::

    plan            2 levels, 41 blocks, 532 MB scratch, 40 MB per worker
    cluster         2 workers
    level 1 of 2    ━━━━━━━━━━━━━━━━━━━━━  100%   516 MB   307 MB/s         1.7 s
    level 2 of 2    ━━━━━━━━╸────────────   41%   212 MB   301 MB/s     0:01 left

Tasks report only when they are done, a millisecond or ten minutes apart, so a thread redraws the line
ten times a second from a `Meter`, which advances at the measured rate in between.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import TextIO

import click

from actshuffle.units import counted, format_bytes, format_seconds

TITLE = 16  # columns of a title; "verify (quick)" fits
BAR = 40  # columns of a bar at most
REDRAW = 0.1  # seconds
QUIET_START = 0.5  # a stage that moves no bytes and is over by then is not shown
LOG_EVERY, LOG_SELDOM = 5.0, 60.0  # seconds between log lines: at first, and in a long stage
WINDOW = 30.0  # seconds that the rate looks back, or longer where tasks take longer


class Meter:
    """The progress of a stage, its rate, and the time that is left.

    Tasks of an earlier run count as done, but not into the rate.  Between two completions the estimate
    advances at the rate, but not past the bytes of the tasks in flight, and it never goes back.
    """

    def __init__(self, tasks: int, nbytes: int, workers: int, now: float, rate: float | None = None) -> None:
        self.tasks, self.nbytes, self.workers, self.started = tasks, nbytes, max(1, workers), now
        self.units = nbytes or tasks  # a stage that moves no bytes is measured in tasks
        self.share = self.units / max(1, tasks)
        self.tasks_done, self.resumed, self.done, self.fresh = 0, 0, 0.0, 0.0
        self._marks = deque([(now, 0.0)])  # times, and fresh units by then
        self._before = rate if nbytes else None  # the last stage's rate, until this one has its own
        self._ahead = 0.0  # units of tasks under way that count as done already
        self.token_bytes = 0.0  # of one token, in a stage that counts tokens
        self._shown = 0.0

    def advance(self, nbytes: int, fresh: bool, now: float) -> None:
        self.tasks_done = min(self.tasks_done + 1, self.tasks)
        amount: float = nbytes if fresh and self.nbytes else self.share
        known = min(self._ahead, amount)
        self._ahead, amount = self._ahead - known, amount - known
        self.done = min(self.done + amount, self.units)
        if not fresh:
            self.resumed += 1
        self._mark(amount if fresh else 0.0, now)

    def within(self, nbytes: int, tokens: int, now: float) -> None:
        """Some bytes of a task that is not done yet, the rows of so many tokens."""
        self.token_bytes = nbytes / tokens if tokens else self.token_bytes
        self._ahead += nbytes
        self.done = min(self.done + nbytes, self.units)
        self._mark(nbytes, now)

    def _mark(self, amount: float, now: float) -> None:
        self.fresh += amount
        marks = self._marks
        if not self.fresh:
            marks[0] = now, 0.0  # fresh work starts after this at the earliest
            return
        if len(marks) > 1 and now - marks[-2][0] < WINDOW / 100:
            marks[-1] = now, self.fresh
        else:
            marks.append((now, self.fresh))
        while len(marks) > 4 * self.workers + 1 and now - marks[1][0] > WINDOW:
            marks.popleft()

    def rate(self, now: float) -> float | None:
        """Units per second at the last completion; lower once the next one is overdue."""
        (t0, before), (t1, after) = self._marks[0], self._marks[-1]
        if after <= before:
            return None
        patience = 2 * self.workers * (t1 - t0) / (len(self._marks) - 1)
        return (after - before) / max(t1 - t0, now - patience - t0, 1e-3)

    def estimate(self, now: float) -> float:
        """Units done, including the likely share of the tasks in flight."""
        rate = self.rate(now) or self._before or 0.0
        in_flight = max(0.0, min(self.workers, self.tasks - self.tasks_done) * self.share - self._ahead)
        guess = self.done + min(rate * (now - self._marks[-1][0]), 0.95 * in_flight)
        self._shown = max(self._shown, min(guess, self.units))
        return self._shown

    def left(self, now: float) -> float | None:
        rate = self.rate(now) or self._before
        return (self.units - self.estimate(now)) / rate if rate else None

    def mean_rate(self, now: float) -> float | None:
        """Units of fresh work per second, over the whole stage."""
        return self.fresh / (now - self.started) if self.fresh and now > self.started else None


class Display:
    """A `Progress` that writes to a terminal or a log.

    ``workers`` returns the number of tasks in flight; ``before`` is called with the bytes of a stage ahead of its
    first task.  ``live`` follows the stream if not given; without a stream nothing is shown.
    """

    def __init__(
        self,
        stream: TextIO | None,
        *,
        workers: Callable[[], int] = lambda: 1,
        before: Callable[..., object] = lambda *work: None,
        live: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.stream, self.workers, self.before, self.clock = stream, workers, before, clock
        terminal = stream is not None and stream.isatty() and os.environ.get("TERM") != "dumb"
        self.live = terminal if live is None else live
        self._colour = self.live and not os.environ.get("NO_COLOR")
        self._fancy = "utf" in (getattr(stream, "encoding", None) or "").lower()
        self._lock = threading.RLock()
        self._stop = threading.Event()
        self._ticker: threading.Thread | None = None
        self._stage = ""
        self._meter: Meter | None = None
        self._rate: float | None = None  # of the last stage that moved bytes
        self._open = False  # the cursor stands behind a live line
        self._logged = 0.0

    # --- Progress ---------------------------------------------------------------------------------

    def begin(self, stage: str, tasks: int, nbytes: int) -> None:
        if nbytes:
            self.before(nbytes)
        with self._lock:
            now = self.clock()
            self._stage, self._logged = stage, now
            self._meter = Meter(tasks, nbytes, self.workers(), now, self._rate)
        if self.live and self._ticker is None:
            self._ticker = threading.Thread(target=self._tick, name="actshuffle-display", daemon=True)
            self._ticker.start()
        size = f", {format_bytes(nbytes)}" if nbytes else ""
        self._log(f"begins: {tasks:,} task{'s' * (tasks != 1)}{size}")

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
            self._write_live(f"{title:<{TITLE}}{text}", "\n")
            self._log(text, title)

    def hint(self, title: str, text: str) -> None:
        """A line that stays until the next one; nothing in a log."""
        with self._lock:
            self._write_live(f"{title:<{TITLE}}{text}", "")

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
                if meter is None or (not meter.nbytes and now - meter.started < QUIET_START):
                    continue
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
            return f"{title:<{TITLE}}{percent:>4}  {when:>12}"[:columns]
        done, rest = bar(fraction, width, fancy=self._fancy)
        if self._colour:
            done = click.style(done, fg="green" if fraction >= 1 else "cyan")
            rest = click.style(rest, dim=True)
        return f"{title:<{TITLE}}{done}{rest}{numbers}"

    def _columns(self) -> int:
        with suppress(OSError, ValueError):
            assert self.stream is not None
            return max(20, os.get_terminal_size(self.stream.fileno()).columns - 3)  # room for ^C
        return 77

    def _write_live(self, text: str, end: str) -> None:
        if self.live:
            self._put(("\r" if self._open else "") + text + "\x1b[K" + end)
            self._open = not end

    def _log(self, text: str, title: str | None = None) -> None:
        if not self.live:
            stamp = time.strftime("%Y-%m-%d %H:%M:%S")
            self._put(f"{stamp}  {self._stage if title is None else title:<{TITLE}}{text}\n")

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


class LogLines(logging.Handler):
    """Shows the library's own log records among a display's lines."""

    def __init__(self, display: Display) -> None:
        super().__init__(logging.WARNING)
        self.display = display

    def emit(self, record: logging.LogRecord) -> None:
        self.display.line(record.levelname.lower(), record.getMessage())


def bar(fraction: float, width: int, *, fancy: bool = True) -> tuple[str, str]:
    """The done part and the rest of a bar, together ``width`` columns.

    >>> "".join(bar(0.45, 10)), "".join(bar(0.45, 10, fancy=False))
    ('━━━━╸─────', '####------')
    """
    halves = int(min(max(fraction, 0.0), 1.0) * width * 2)
    full, half = divmod(halves, 2)
    done = "━" * full + "╸" * half if fancy else "#" * full
    return done, ("─" if fancy else "-") * (width - len(done))


def clock_face(seconds: float) -> str:
    """Whole seconds as ``0:07``, ``12:34``, ``3:02:01`` or ``2 d 5 h``.

    >>> clock_face(7.4), clock_face(754), clock_face(10921), clock_face(190800)
    ('0:07', '12:34', '3:02:01', '2 d 5 h')
    """
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} d {hours % 24} h"
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"
