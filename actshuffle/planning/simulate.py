"""A run on many hosts, played out: a discrete-event simulation of a plan's real tasks on a `Cluster`.

Every stage of `stages.stages` begins when the one before has ended.  Its tasks queue in order; the scheduler
hands them out one by one to free workers, and runs ahead of demand by the executor's window.  A task reads,
computes and writes::

    host 1   worker  |read....|compute|write....|read....|compute| ...
             worker  |read......|compute|write......|          x host dies, its tasks go back
             disk, or network in and out: shared evenly among its users at each moment
    store    bytes and requests of all hosts, first come first served
    driver   receives the answers at the end

Thousands of workers and millions of tasks are too many to follow one by one: while many tasks are left, a
worker takes several at once, fewer and fewer towards the end, so that the last ones, which everybody waits
for, are single tasks.  One seed gives one result, to the last bit.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from actshuffle.limits import LEAST_WINDOW, WINDOW
from actshuffle.planning.cost import Cluster, Stage, least_seconds
from actshuffle.planning.stages import stages
from actshuffle.planning.tree import Plan

GRAIN = 8  # fewest turns of each worker in a stage, if the stage has enough tasks
SPREAD = 0.1  # random share by which turns differ in tasks, so that workers fall out of step as with single tasks
DETECT = 300.0  # seconds until the scheduler gives up a host that went silent (Dask's worker-ttl)


@dataclass(frozen=True)
class Played:
    """The outcome of a stage.  ``least`` is its lower bound in seconds by `cost.limits`, set by ``limit``.

    ``tail`` is the time in seconds from the first idle worker to the end; ``lost`` counts the tasks that were
    under way on a host that died, and were done again.  ``read`` and ``written`` are bytes of useful work.
    """

    name: str
    tasks: int
    seconds: float
    least: float
    limit: str
    tail: float
    failures: int
    lost: int
    read: float
    written: float


def simulate(plan: Plan, cluster: Cluster, *, seed: int = 0, grain: int = GRAIN) -> list[Played]:
    """Play all stages of a run; ``grain`` 0 follows every task on its own."""
    rng = np.random.default_rng(seed)
    return [_played(stage, cluster, rng, grain) for stage in stages(plan, cluster)]


def _played(stage: Stage, cluster: Cluster, rng: Any, grain: int) -> Played:
    """Play a stage, one pass after the other."""
    if stage.passes == 1:
        return _Playing(stage, cluster, rng, grain).play()
    shared = ("tasks", "read", "written", "gets", "puts", "cpu")
    part = {name: getattr(stage, name) / stage.passes for name in shared}
    one = replace(stage, **part | {"tasks": stage.tasks // stage.passes, "driver": 0.0, "passes": 1})
    played = [_Playing(one, cluster, rng, grain).play() for _ in range(stage.passes)]
    least, limit = least_seconds(stage, cluster)
    return Played(
        stage.name,
        sum(p.tasks for p in played),
        sum(p.seconds for p in played) + stage.driver,
        least,
        limit,
        sum(p.tail for p in played),
        sum(p.failures for p in played),
        sum(p.lost for p in played),
        sum(p.read for p in played),
        sum(p.written for p in played),
    )


class _Channel:
    """A host's disk, or one way of its network, shared evenly by its users at each moment.

    From the moment that two users are both present, each receives as many bytes as the other.  So ``given``
    counts the bytes of an imaginary user present from the beginning, and a user is done when ``given`` has
    grown by the bytes it wants.
    """

    __slots__ = ("at", "given", "rate", "users", "version")

    def __init__(self, rate: float) -> None:
        self.rate, self.given, self.at, self.version = rate, 0.0, 0.0, 0
        self.users: list[tuple[float, int, _Turn]] = []

    def go_on(self, now: float) -> None:
        if self.users:
            self.given += (now - self.at) * self.rate / len(self.users)
        self.at = now


class _Turn:
    """The tasks ``[first, first + count)`` of a stage, which one worker does together."""

    __slots__ = ("count", "dead", "earliest", "first", "host", "phase", "share", "started")

    def __init__(self, host: int, first: int, count: int, share: float, started: float) -> None:
        self.host, self.first, self.count, self.share = host, first, count, share
        self.phase, self.started, self.earliest, self.dead = 0, started, 0.0, False


class _Playing:
    """One stage under way."""

    def __init__(self, stage: Stage, cluster: Cluster, rng: Any, grain: int) -> None:
        self.stage, self.c, self.rng, self.grain = stage, cluster, rng, grain
        self.events: list[tuple[float, int, str, Any]] = []
        self.number = 0  # events so far, so that those of one moment keep their order
        self.now = self.handed_out = 0.0
        self.idle_since: float | None = None
        self.store_free = self.requests_free = 0.0  # when the store will have served all requests so far
        self.next_task, self.left = 0, stage.tasks
        self.again: deque[tuple[int, int]] = deque()
        self.idle: deque[int] = deque()  # hosts, once per idle worker
        self.turns: list[set[_Turn]] = [set() for _ in range(cluster.hosts)]
        self.channels: dict[tuple[int, str], _Channel] = {}
        self.times_done = np.zeros(stage.tasks, np.uint8)
        self.failures = self.lost = 0
        self.work = 0.0  # work done, as a share of all
        ends = np.arange(stage.tasks + 1) if stage.rows is None else np.cumsum(stage.rows)
        before = ends if stage.rows is None else np.concatenate([[0], ends])
        self.before = (before / max(before[-1], 1)).tolist()  # share of the work before each task

    def play(self) -> Played:
        stage = self.stage
        least, limit = least_seconds(stage, self.c)
        if stage.tasks:
            for worker in range(self.c.workers):
                self.idle.append(worker % self.c.hosts)
            if self.c.mtbf:
                for host in range(self.c.hosts):
                    self._later(self.rng.exponential(self.c.mtbf), "failure", host)
            self._hand_out()
            while self.left:
                self.now, _, what, about = heapq.heappop(self.events)
                getattr(self, f"_{what}")(about)
            if not (self.times_done == 1).all():
                raise AssertionError("a task was lost or done twice")
        tail = 0.0 if self.idle_since is None else self.now - self.idle_since
        seconds, read, written = self.now + stage.driver, self.work * stage.read, self.work * stage.written
        return Played(stage.name, stage.tasks, seconds, least, limit, tail, self.failures, self.lost, read, written)

    def _later(self, time: float, what: str, about: Any) -> None:
        self.number += 1
        heapq.heappush(self.events, (time, self.number, what, about))

    # --- Tasks go out and come back ---------------------------------------------------------------

    def _hand_out(self) -> None:
        while self.idle and (self.again or self.next_task < self.stage.tasks):
            host = self.idle.popleft()
            first, count = self._take()
            # The scheduler has worked ahead, though no further than the window.
            ahead = max(WINDOW * self.c.workers, LEAST_WINDOW) * self.c.dispatch
            self.handed_out = max(self.handed_out, self.now - ahead) + count * self.c.dispatch
            share = self.before[first + count] - self.before[first]
            turn = _Turn(host, first, count, share, max(self.now, self.handed_out))
            self.turns[host].add(turn)
            self._later(turn.started, "begin", turn)
        if self.idle and self.idle_since is None:
            self.idle_since = self.now

    def _take(self) -> tuple[int, int]:
        if self.again:
            return self.again.popleft()
        first, count = self.next_task, 1
        if self.grain:
            even = (self.stage.tasks - first) / (self.grain * self.c.workers)
            count = max(1, round(even * self.rng.uniform(1 - SPREAD, 1 + SPREAD)))
        self.next_task += count
        return first, count

    def _finish(self, turn: _Turn) -> None:
        """Everything is read, computed and written; the worker of a straggler waits longer."""
        c = self.c
        slow = self.rng.binomial(turn.count, c.straggling) if c.straggling else 0
        extra = slow / turn.count * (c.slowness - 1) * (self.now - turn.started)
        self._later(self.now + extra, "done", turn)

    def _done(self, turn: _Turn) -> None:
        if turn.dead:
            return
        self.turns[turn.host].discard(turn)
        self._count(turn.first, turn.count)
        self.idle.append(turn.host)
        self._hand_out()

    def _count(self, first: int, count: int) -> None:
        self.times_done[first : first + count] += 1
        self.work += self.before[first + count] - self.before[first]
        self.left -= count

    # --- A turn's phases --------------------------------------------------------------------------

    def _begin(self, turn: _Turn) -> None:
        """Enter the turn's phase: 0 reads, 1 computes, 2 writes."""
        if turn.dead:
            return
        stage, c = self.stage, self.c
        if turn.phase == 1:
            vary = 1 + c.jitter * self.rng.uniform(-1, 1) / math.sqrt(turn.count)
            self._later(self.now + stage.cpu * turn.share * vary + c.overhead * turn.count, "phase", turn)
            return
        reads = turn.phase == 0
        nbytes = turn.share * (stage.read if reads else stage.written)
        requests = turn.share * (stage.gets if reads else stage.puts)
        place = stage.read_from if reads else stage.write_to
        turn.earliest = self.now + requests * c.latency / stage.at_once
        if c.stream:
            turn.earliest = max(turn.earliest, self.now + nbytes / c.stream)
        if place == "store" and c.store:
            self.store_free = max(self.store_free, self.now) + nbytes / c.store
            turn.earliest = max(turn.earliest, self.store_free)
        if c.requests:
            self.requests_free = max(self.requests_free, self.now) + requests / c.requests
            turn.earliest = max(turn.earliest, self.requests_free)
        if not nbytes:
            self._later(turn.earliest, "phase", turn)
            return
        key = (turn.host, "disk" if place == "disk" else "in" if reads else "out")
        channel = self.channels.get(key)
        if channel is None:
            channel = self.channels[key] = _Channel(c.channel_rate(key[1]))
        channel.go_on(self.now)
        self.number += 1
        heapq.heappush(channel.users, (channel.given + nbytes, self.number, turn))
        self._watch(channel)

    def _watch(self, channel: _Channel) -> None:
        """Predict the next event of a channel anew; earlier predictions are void once its users change."""
        channel.version += 1
        if channel.users:
            wanted = max(0.0, channel.users[0][0] - channel.given)
            end = channel.at + wanted * len(channel.users) / channel.rate
            self._later(end, "channel", (channel, channel.version))

    def _channel(self, about: tuple[_Channel, int]) -> None:
        channel, version = about
        if version != channel.version:
            return
        channel.go_on(self.now)
        channel.given = max(channel.given, channel.users[0][0])  # rounding
        while channel.users and channel.users[0][0] <= channel.given:
            turn = heapq.heappop(channel.users)[2]
            self._later(max(self.now, turn.earliest), "phase", turn)
        self._watch(channel)

    def _phase(self, turn: _Turn) -> None:
        """A phase is over."""
        if turn.dead:
            return
        turn.phase += 1
        if turn.phase == 3:
            self._finish(turn)
        else:
            self._begin(turn)

    # --- Hosts that die ---------------------------------------------------------------------------

    def _failure(self, host: int) -> None:
        """The tasks under way on a host go back to the queue; results its workers had finished are in the store."""
        self.failures += 1
        for turn in sorted(self.turns[host], key=lambda t: t.first):
            turn.dead = True
            done = int(turn.count * self.rng.random())  # which of its tasks was under way
            self._count(turn.first, done)
            self.lost += 1
            self._later(self.now + DETECT, "returned", (turn.first + done, turn.count - done))
        self.turns[host].clear()
        self.idle = deque(h for h in self.idle if h != host)
        for (owner, _), channel in self.channels.items():
            if owner == host:
                channel.users.clear()
                self._watch(channel)
        self._later(self.now + self.c.repair, "repaired", host)

    def _returned(self, tasks: tuple[int, int]) -> None:
        self.again.append(tasks)
        self._hand_out()

    def _repaired(self, host: int) -> None:
        self.idle.extend([host] * self.c.workers_per_host)
        self._later(self.now + self.rng.exponential(self.c.mtbf), "failure", host)
        self._hand_out()
