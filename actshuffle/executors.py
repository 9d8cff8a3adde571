"""How tasks are run.  The serial executor is the specification; any other must do exactly as it does.

An executor maps a function over the argument tuples of many calls and yields results in any order.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import islice
from typing import Any, TypeVar

from actshuffle.errors import ActshuffleError, ClusterError, RequestError
from actshuffle.limits import LEAST_WINDOW, WINDOW
from actshuffle.machine import cores, machine_memory
from actshuffle.storage import buffers

T = TypeVar("T")
SHARE = 0.6  # of a worker's memory that a task may use if nobody says otherwise
log = logging.getLogger("actshuffle")


class Executor:
    """Runs ``fn(*call)`` for every call and yields results as they come, in any order.

    A new executor implements `map`; the defaults say that its work is done here, by one worker.
    """

    workers: int = 1
    dashboard: str | None = None
    one_machine: bool = True  # every worker is certainly on this machine
    tasks_per_worker: int = 1  # run at the same time in one process and share its memory
    processes: bool = False  # tasks run in other processes, and a run that is stopped waits for them

    def map(self, fn: Callable[..., T], calls: Iterable[tuple[Any, ...]]) -> Iterator[T]:
        raise NotImplementedError

    def task_memory(self) -> int:
        """Bytes that one task may use if nobody says otherwise."""
        return int(SHARE * machine_memory() / self.workers)

    @property
    def tasks_wanted(self) -> int | None:
        """Tasks that keep all workers busy to the end; None for one worker, which is busy with any."""
        return 3 * self.workers if self.workers > 1 else None

    def close(self) -> None:
        """Give back what the workers hold between tasks."""


class Serial(Executor):
    """One call after the other, in this process."""

    def map(self, fn: Callable[..., T], calls: Iterable[tuple[Any, ...]]) -> Iterator[T]:
        for call in calls:
            yield fn(*call)

    def close(self) -> None:
        buffers.release()


class Threads(Executor):
    """Threads of this process, for work that numpy does without the interpreter's lock."""

    def __init__(self, workers: int | None = None) -> None:
        self.workers = workers or cores()

    def map(self, fn: Callable[..., T], calls: Iterable[tuple[Any, ...]]) -> Iterator[T]:
        with ThreadPoolExecutor(self.workers, "actshuffle") as pool:
            yield from pool.map(lambda call: fn(*call), calls)


class Dask(Executor):
    """On the workers of a Dask cluster, with a bounded window of futures.

    At most ``window`` calls per worker thread (or `LEAST_WINDOW`) are in the scheduler at once, so a
    million tasks cost it no more memory than a few hundred do; when half have come back, as many go
    out together.  A call that fails with an error of ours is final; one that fails
    otherwise is tried ``retries`` times more.  A worker that dies is Dask's to replace.
    """

    def __init__(self, client: Any, *, window: int = WINDOW, retries: int = 2, one_machine: bool = False) -> None:
        self.client, self.processes = client, True
        self.window = window
        self.retries = retries
        self.one_machine = one_machine
        has_page = find_spec("bokeh") is not None
        self.dashboard = client.dashboard_link if has_page else None
        self._seen = 1

    @property
    def workers(self) -> int:  # type: ignore[override]
        """How many there are, or were when the cluster last answered."""
        with self._asking(suppress=True):
            self._seen = max(1, len(self.client.scheduler_info(n_workers=-1)["workers"]))
        return self._seen

    @property
    def tasks_per_worker(self) -> int:  # type: ignore[override]
        """Threads of the worker that has most."""
        self._threads()  # there are some
        with self._asking():
            return int(max(self.client.nthreads().values(), default=1))

    def map(self, fn: Callable[..., T], calls: Iterable[tuple[Any, ...]]) -> Iterator[T]:
        from distributed import CancelledError, KilledWorker, as_completed

        calls = iter(calls)
        running: dict[Any, tuple[tuple[Any, ...], int]] = {}  # future: its call, failures so far
        done = as_completed()

        def submit(batch: list[tuple[tuple[Any, ...], int]]) -> None:
            # Many at once: a graph of one costs scheduler and driver twice as much as a share of many.
            if batch:
                columns = zip(*(call for call, _ in batch), strict=True)
                futures = self.client.map(fn, *columns, pure=False)
                running.update(zip(futures, batch, strict=True))
                done.update(futures)

        try:
            window = max(self.window * self._threads(), LEAST_WINDOW)
            submit([(call, 0) for call in islice(calls, window)])
            while running:
                ready = done.next_batch()
                finished = [future for future in ready if future.status == "finished"]
                results = self.client.gather(finished)
                for future in finished:
                    del running[future]
                    future.release()
                again = []
                for future in set(ready).difference(finished):
                    if future.status in ("pending", "lost", "finished"):
                        done.add(future)  # its result died with a worker, and is being made again
                        continue
                    call, failures = running.pop(future)
                    if future.status != "error":
                        raise CancelledError(str(future.key))
                    error = future.exception()
                    if isinstance(error, ActshuffleError):
                        raise error
                    if failures >= self.retries:
                        if isinstance(error, KilledWorker):
                            raise ClusterError(
                                f"a task killed its worker again and again ({error}); if memory ran "
                                "out, lower --memory; run again to resume"
                            ) from error
                        raise _Theirs(error)
                    log.warning("a task failed (%s: %s), trying again", type(error).__name__, error)
                    again.append((call, failures + 1))
                submit(again)
                if len(running) <= window // 2:
                    submit([(call, 0) for call in islice(calls, window - len(running))])
                yield from results
        except _Theirs as err:
            raise err.error from None
        except ActshuffleError:
            raise
        except Exception as err:
            if not isinstance(err, CancelledError) and not self._is_gone(err):
                raise
            raise _went_away(err) from err
        finally:
            if running and self.client.status == "running":
                with self._asking(suppress=True):
                    self.client.cancel(list(running))

    def _threads(self) -> int:
        deadline = time.monotonic() + 60
        while True:
            threads = sum(self.client.nthreads().values())
            if threads or time.monotonic() > deadline:
                break
            time.sleep(0.2)
        if not threads:
            raise ClusterError("the Dask cluster has no workers (waited 60 s)")
        return int(threads)

    def task_memory(self) -> int:
        """The least that any worker has for one task; workers without a limit share the machine."""
        with self._asking():
            found = self.client.scheduler_info(n_workers=-1)["workers"].values()
        threads = sum(w["nthreads"] for w in found) or 1
        limits = [(w["memory_limit"] or machine_memory() * w["nthreads"] / threads) / w["nthreads"] for w in found]
        return int(SHARE * min(limits, default=machine_memory()))

    def close(self) -> None:
        if self.client.status == "running":
            with self._asking(suppress=True):
                self.client.run(buffers.release)

    @contextmanager
    def _asking(self, *, suppress: bool = False) -> Iterator[None]:
        """A question to the scheduler, which may be dead."""
        try:
            yield
        except Exception as err:
            if not self._is_gone(err):
                raise
            if not suppress:
                raise _went_away(err) from err

    def _is_gone(self, err: Exception) -> bool:
        """Is this what Dask makes of a scheduler that is not there?  It may be any error at all."""
        return isinstance(err, OSError | TimeoutError) or self.client.status != "running"


class _Theirs(Exception):
    """An error of a task, on its way past those of the cluster."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


def _went_away(err: BaseException) -> ClusterError:
    return ClusterError(
        f"the Dask cluster went away ({type(err).__name__}: {err}); what was finished is kept, run again to resume"
    )


@contextmanager
def local_cluster(workers: int) -> Iterator[Dask]:
    """A Dask cluster of our own: one process per worker, one thread each, loopback only."""
    from dask import config
    from distributed import Client, LocalCluster

    with (
        tempfile.TemporaryDirectory(prefix="actshuffle-dask-") as folder,
        config.set({"distributed.admin.low-level-log-length": 100}),
        LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            processes=True,
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",
            silence_logs=logging.ERROR,
            local_directory=folder,
            memory_limit=None,  # the plan bounds memory; Dask need not pause or kill
        ) as cluster,
        Client(cluster) as client,
    ):
        yield Dask(client, one_machine=True)


@contextmanager
def executor_for(workers: int | None, client: Any = None) -> Iterator[Executor]:
    """The executor a user asked for: their client, an own local cluster, or none."""
    if workers is not None and workers < 0:
        raise RequestError(f"workers must be 0 (no cluster) or more, got {workers}")
    if client is not None:
        executor: Executor = Dask(client)
        try:
            yield executor
        finally:
            executor.close()
    elif workers:
        with local_cluster(workers) as executor:
            yield executor
    else:
        executor = Serial()
        try:
            yield executor
        finally:
            executor.close()
