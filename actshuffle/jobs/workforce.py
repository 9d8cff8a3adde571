"""Who runs the tasks of a job, for packages that see this room only."""

from actshuffle.executors import Executor, executor_for
from actshuffle.executors.cluster import connected
from actshuffle.progress import Progress

__all__ = ["Executor", "Progress", "connected", "executor_for"]
