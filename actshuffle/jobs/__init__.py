"""Jobs of idempotent tasks, resumed by receipts: the base of the shuffle, open to tasks of any kind.

`run_in_folder` runs plain functions ``do(job, task)`` on any executor, keeps a receipt of each in the folder
of the results, resumes after a kill, refuses to mix two requests, and writes the completion marker last.
"""

from actshuffle.jobs.folder import FolderJob, FolderTask, Step, read_done, run_in_folder
from actshuffle.jobs.locks import hold
from actshuffle.jobs.running import Outcome

__all__ = ["FolderJob", "FolderTask", "Outcome", "Step", "hold", "read_done", "run_in_folder"]
