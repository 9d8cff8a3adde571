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

A message is written with the options of the command line.  That prints `ActshuffleError.on_command_line`; in Python
the text of an error has the arguments of the function instead (`in_python`).
"""

from __future__ import annotations

import re
from typing import ClassVar

# Options that take no value, and those whose argument has another name in Python.
SWITCHES = (
    *("again", "copy", "cosine", "drop-same", "flatten", "fsync", "gather", "gradients", "incomplete", "insecure"),
    *("keep-codes", "mixing", "ordered", "overwrite", "quick", "random-reads", "renumber", "simulate", "source-row"),
)
_RENAMED = {"name": "names"}
_WORDS = "document|row|fill|refuse|keep|drop|bos|cpu|cuda|bfloat16|float16|float32"  # values that messages name
_SIZE = r"\d[\d_.,e+]*\d|\d"
# A whole command, which stands in backticks; or an option, perhaps with its value.
_OPTION = re.compile(
    rf"`[^`]*`|(?P<bare>\bleave )?(?<![\w-])--(?P<no>no-)?(?P<name>[a-z][a-z0-9-]*)"
    rf"(?: (?P<value>(?:{_SIZE})(?: ?[KMGTP]?i?B)?(?![\w-])|(?:{_WORDS})\b))?(?P<was> (?:was|must)\b)?"
)


def in_python(message: str) -> str:
    """A message of the command line with the arguments of functions in place of options.

    >>> in_python("give --memory 4GB or --by document; --overwrite replaces it; or leave --gather out")
    'give memory="4GB" or by="document"; overwrite=True replaces it; or leave gather out'
    >>> in_python("lower --block-bytes, or --no-renumber: `actshuffle run a b --overwrite`")
    'lower block_bytes, or renumber=False: `actshuffle run a b --overwrite`'
    """

    def argument(found: re.Match[str]) -> str:
        if found["name"] is None:
            return found[0]
        name, value, was = found["name"].replace("-", "_"), found["value"], found["was"] or ""
        before = (found["bare"] or "") + _RENAMED.get(name, name)
        if value is not None:
            return f"{before}={value if value.isdecimal() else chr(34) + value + chr(34)}{was}"
        if found["name"] in SWITCHES and not found["bare"] and not was:
            return f"{before}={not found['no']}"
        return before + was

    return _OPTION.sub(argument, message)


def words_of(err: BaseException) -> str:
    """The text of an error, for a message of the command line that has another error's text within.

    The text of one of ours, or of saetrain's, keeps its options; `in_python` is for the outermost message.
    """
    return str(getattr(err, "on_command_line", err))


class ActshuffleError(Exception):
    """Base of all errors raised on purpose by actshuffle."""

    def __str__(self) -> str:
        return in_python(self.on_command_line)

    @property
    def on_command_line(self) -> str:
        """The message, with the options of the command line."""
        return super().__str__()

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
