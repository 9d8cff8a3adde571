"""Every error a user can meet, in one tree.

::

    ActshuffleError                    code             exit
    ├── RequestError                   bad-request      2     the arguments cannot be met
    │   ├── InfeasibleError            infeasible       2     ... by the arithmetic of levels, memory or disk
    │   ├── DestinationExistsError     exists           2     dst is finished, or is not ours
    │   ├── DestinationInUseError      in-use           2     another process is writing dst
    │   └── ResumeMismatchError        resume-mismatch  2     dst is half done, with other arguments
    ├── SourceError                    bad-source       2     the input is damaged or not supported
    │   └── MissingChunkError          missing-chunk    2     ... a chunk is absent or truncated
    ├── FormatError                    bad-format       1     a file of ours is damaged or of another version
    ├── IncompleteStoreError           incomplete       2     a store without its completion marker
    ├── ConservationError              conservation     1     rows were lost, doubled or altered on the way
    ├── StorageError                   io               1     the store refused a read or a write
    │   └── StorageFullError           no-space         1     ... because it is full
    ├── ClusterError                   cluster          1     the Dask cluster went away
    └── InterruptedRunError            interrupted      1     stopped on request; run again to resume

A message names the fault and its place, gives the numbers, and says what to do.  All errors are picklable
(one message argument), so they cross from a worker to the driver unchanged.
"""

from __future__ import annotations

from typing import ClassVar


class ActshuffleError(Exception):
    """Base of all errors raised on purpose by actshuffle."""

    code: ClassVar[str] = "error"
    exit_code: ClassVar[int] = 1


class RequestError(ActshuffleError, ValueError):
    code = "bad-request"
    exit_code = 2


class InfeasibleError(RequestError):
    code = "infeasible"


class DestinationExistsError(RequestError):
    code = "exists"


class DestinationInUseError(RequestError):
    code = "in-use"


class ResumeMismatchError(RequestError):
    code = "resume-mismatch"


class SourceError(ActshuffleError):
    code = "bad-source"
    exit_code = 2


class MissingChunkError(SourceError):
    code = "missing-chunk"


class FormatError(ActshuffleError):
    code = "bad-format"


class IncompleteStoreError(ActshuffleError):
    code = "incomplete"
    exit_code = 2


class ConservationError(ActshuffleError):
    code = "conservation"


class StorageError(ActshuffleError):
    code = "io"


class StorageFullError(StorageError):
    code = "no-space"


class ClusterError(ActshuffleError):
    code = "cluster"


class InterruptedRunError(ActshuffleError):
    code = "interrupted"
