"""Who runs the tasks: this process, its threads, or a Dask cluster.

A new executor is a new module here, with a subclass of `Executor`, and one row in `choice.py`.
"""

from actshuffle.executors.base import Executor, check_memory
from actshuffle.executors.choice import executor_for
from actshuffle.executors.cluster import Dask, connected, local_cluster
from actshuffle.executors.local import Serial, Threads

__all__ = ["Dask", "Executor", "Serial", "Threads", "check_memory", "connected", "executor_for", "local_cluster"]
