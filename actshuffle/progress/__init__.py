"""Reports of progress from a run to its observer, and the display that is one."""

from actshuffle.progress.observers import Progress, Silent, done_within, heard_by, observer

__all__ = ["Progress", "Silent", "done_within", "heard_by", "observer"]
