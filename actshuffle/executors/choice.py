"""The executor a user asks for, by a number of workers or by the client of a cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any

from actshuffle.errors import RequestError
from actshuffle.executors.base import Executor
from actshuffle.executors.cluster import Dask, local_cluster
from actshuffle.executors.local import Serial

# The members that a run uses.
MEMBERS = ("map", "workers", "one_machine", "tasks_per_worker", "task_memory", "close")
# Executors of a user's own cluster, by the library of its client.
CLIENTS: dict[str, Callable[[Any], Executor]] = {"distributed": Dask}


@contextmanager
def executor_for(workers: int | None, client: Any = None, *, imports: Sequence[str] = ()) -> Iterator[Executor]:
    """The executor a user asks for: on their client's cluster, on a local cluster of ``workers``, or serial.

    ``imports`` names modules of the tasks, which the workers of a local cluster import as they start.
    """
    if workers is not None and (type(workers) is not int or workers < 0):
        raise RequestError(f"workers must be 0 (no cluster) or a positive whole number, got {workers!r}")
    if client is None and workers:
        with local_cluster(workers, imports) as executor:
            yield executor
    else:
        with closing(Serial() if client is None else _on(client)) as executor:
            yield executor


def _on(client: Any) -> Executor:
    for kind in type(client).__mro__:
        if make := CLIENTS.get(kind.__module__.split(".")[0]):
            return make(client)
    raise RequestError(f"client must be one of {', '.join(CLIENTS)}, got {type(client).__name__}")


def as_executor(executor: Any, default: Callable[[], Executor] = Serial) -> Executor:
    """The executor that a user gave, or the default for None; a `RequestError` if it is no executor."""
    if executor is None:
        return default()
    # A class of the user's own need not derive from ours, if it has what ours has.
    if not isinstance(executor, Executor) and not all(hasattr(executor, name) for name in MEMBERS):
        hint = ": a client goes to client=" if type(executor).__module__.split(".")[0] in CLIENTS else ""
        raise RequestError(f"executor must be an actshuffle.executors.Executor, got {type(executor).__name__}{hint}")
    found: Executor = executor
    return found
