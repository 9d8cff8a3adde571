"""Executors on a Dask cluster: the user's, or a local one that lasts as long as a run.

The only module that imports Dask, and it does so late: the import takes half a second.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from importlib.util import find_spec
from ipaddress import ip_address
from itertools import islice
from typing import Any, TypeVar

from actshuffle.errors import ActshuffleError, ClusterError, RequestError, words_of
from actshuffle.executors.base import SHARE, Executor
from actshuffle.executors.mainguard import check_main_guard
from actshuffle.limits import LEAST_WINDOW, WINDOW
from actshuffle.machine import machine_memory
from actshuffle.storage import buffers

T = TypeVar("T")
# By default Dask looks 50 times a second whether each server still turns, and 100 times what a worker's task is doing:
# 14% of a core with two workers that do nothing, and 2% so.
QUIET = {
    "distributed.admin.low-level-log-length": 100,
    "distributed.admin.tick.interval": "1s",
    "distributed.worker.profile.interval": "200ms",
}
log = logging.getLogger("actshuffle")


class Dask(Executor):
    """Runs calls on the workers of a Dask cluster, with a bounded window of futures.

    At most ``window`` calls per worker thread (or `LEAST_WINDOW`) are in the scheduler at once, so a
    million tasks cost it no more memory than a few hundred do; once half of them are back, as many new ones
    go out together.  An `ActshuffleError` is final; any other failure is retried ``retries`` times.
    Dask replaces workers that die.
    """

    def __init__(self, client: Any, *, window: int = WINDOW, retries: int = 2, one_machine: bool = False) -> None:
        if client.asynchronous:
            raise RequestError("the Dask client is asynchronous, and runs wait for its answers: make it a plain Client")
        if client.status == "connecting":  # as it says when its scheduler has died
            raise ClusterError("the Dask client has lost its scheduler; run again with one that answers, to resume")
        if client.status != "running":
            raise RequestError(f"the Dask client is not connected, its status is {client.status!r}: make a new Client")
        self.client, self.processes = client, True
        self.window = window
        self.retries = retries
        self.one_machine = one_machine
        if not one_machine or find_spec("bokeh") is not None:  # which the scheduler needs, on its own machine
            with suppress(KeyError), self._asking():  # it was started without a page
                self.dashboard = client.dashboard_link
        self._seen = 1

    @property
    def workers(self) -> int:  # type: ignore[override]
        """Number of workers, now or when the cluster last answered."""
        with self._asking(quiet=True):
            self._seen = max(1, len(self.client.scheduler_info(n_workers=-1)["workers"]))
        return self._seen

    @property
    def tasks_per_worker(self) -> int:  # type: ignore[override]
        """Threads of the worker that has most."""
        with self._asking():
            self._threads()  # waits for a worker
            return int(max(self.client.nthreads().values(), default=1))

    def map(self, fn: Callable[..., T], calls: Iterable[tuple[Any, ...]]) -> Iterator[T]:
        from distributed import CancelledError, KilledWorker, as_completed

        calls = iter(calls)
        running: dict[Any, tuple[tuple[Any, ...], int]] = {}  # future: its call, failures so far

        def submit(batch: list[tuple[tuple[Any, ...], int]]) -> None:
            # Many at once: alone, a call costs scheduler and driver twice as much as its share of a graph of many.
            if batch:
                columns = zip(*(call for call, _ in batch), strict=True)
                futures = self.client.map(fn, *columns, pure=False)
                running.update(zip(futures, batch, strict=True))
                done.update(futures)

        try:
            done = as_completed()
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
                        done.add(future)  # its result died with a worker, and Dask computes it again
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
                with self._asking(quiet=True):
                    self.client.cancel(list(running))

    def _threads(self) -> int:
        deadline = time.monotonic() + 60
        while not (threads := sum(self.client.nthreads().values())):
            if time.monotonic() > deadline:
                raise ClusterError("the Dask cluster has no workers (waited 60 s)")
            time.sleep(0.2)
        return int(threads)

    def task_memory(self) -> int:
        """The smallest share of memory per task of any worker; workers without a limit share the machine."""
        with self._asking():
            found = self.client.scheduler_info(n_workers=-1)["workers"].values()
        threads = sum(w["nthreads"] for w in found) or 1
        limits = [(w["memory_limit"] or machine_memory() * w["nthreads"] / threads) / w["nthreads"] for w in found]
        return int(SHARE * min(limits, default=machine_memory()))

    def close(self) -> None:
        if self.client.status == "running":
            with self._asking(quiet=True):
                self.client.run(buffers.release)

    @contextmanager
    def _asking(self, *, quiet: bool = False) -> Iterator[None]:
        """Ask the scheduler, which may be dead."""
        try:
            yield
        except Exception as err:
            if not self._is_gone(err):
                raise
            if not quiet:
                raise _went_away(err) from err

    def _is_gone(self, err: Exception) -> bool:
        """True if the scheduler is gone, which Dask may report as any error at all."""
        return isinstance(err, OSError | TimeoutError) or self.client.status != "running"


class _Theirs(Exception):
    """Carries a task's error past the handlers for errors of the cluster."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


def _went_away(err: BaseException) -> ClusterError:
    return ClusterError(
        f"the Dask cluster went away ({type(err).__name__}: {err}); what was finished is kept, run again to resume"
    )


@contextmanager
def local_cluster(workers: int, imports: Sequence[str] = ()) -> Iterator[Dask]:
    """Start a Dask cluster on this machine: one process per worker, one thread each, loopback only.

    ``imports`` names modules that the workers import as they start, so that no first task waits for them.
    """
    from dask import config
    from distributed import Client, LocalCluster

    check_main_guard(config.get("distributed.worker.multiprocessing-method"))
    with (
        tempfile.TemporaryDirectory(prefix="actshuffle-dask-") as folder,
        config.set(QUIET),
        LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            processes=True,
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",
            silence_logs=logging.ERROR,
            local_directory=folder,
            preload=list(imports),
            memory_limit=None,  # the plan bounds memory; Dask need not pause or kill
        ) as cluster,
        Client(cluster) as client,
    ):
        yield Dask(client, one_machine=True)


@contextmanager
def connected(address: str, *, insecure: bool = False) -> Iterator[Dask]:
    """The executor of the cluster whose scheduler listens at ``address``."""
    from distributed import Client

    with ExitStack() as stack:
        try:
            if not insecure:
                check_private(address)
            # Waits as long as Dask's configuration says, 30 s.
            client = stack.enter_context(Client(address))
        except (OSError, TimeoutError) as err:
            raise ClusterError(f"no Dask scheduler answers at {address} ({err})") from err
        except (ValueError, TypeError) as err:
            hint = " (certificates: docs/scaling.md)" if address.startswith("tls") else ""
            raise RequestError(f"cannot use {address!r} as a scheduler's address: {words_of(err)}{hint}") from err
        yield stack.enter_context(closing(Dask(client)))


def check_private(address: str) -> None:
    """Refuse a scheduler on another machine that is reached without encryption.

    Without TLS Dask neither hides nor authenticates: anyone on the network path can run code on both sides.
    """
    from distributed.comm.addressing import get_address_host, parse_address

    if parse_address(address)[0] in ("tls", "wss", "inproc"):
        return
    host = get_address_host(address)
    with suppress(ValueError):  # a name, which may be that of any machine
        if host == "localhost" or ip_address(host).is_loopback:
            return
    raise RequestError(
        f"the Dask scheduler at {address} is on another machine and without TLS: whoever is on the way "
        "can read the data and run code on the workers. Give a tls:// address (certificates are "
        "configured the Dask way), or --insecure if you trust that network"
    )


def worker_name() -> str | None:
    """The name of the Dask worker that runs this call; None outside of one."""
    from distributed import get_worker

    with suppress(ValueError):
        return str(get_worker().name)
    return None
