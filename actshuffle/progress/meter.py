"""A meter of one stage: the share that is done, its rate, and the time left."""

from __future__ import annotations

from collections import deque

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
