"""Which rows of a store pass a filter: a job of small tasks, which resumes, and whose result depends on no division.

::

    norms      |x| of each row of each array, float64          norms/NAME/7     a task for each range of rows
    medians    the exact median of each array's norms          (in receipts)    a task for each array
    choosing   numbers of the rows that pass, ascending        rows/7           a task for each range of rows

A row counts as dropped by the first rule that it breaks, in the order of the fields of `Rules`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actshuffle.arrays.metadata import is_bfloat16, source_arrays, source_field
from actshuffle.arrays.source import Source
from actshuffle.arraytypes import F64
from actshuffle.bfloat16 import widened
from actshuffle.errors import RequestError, SourceError
from actshuffle.executors import Serial
from actshuffle.jobs import Step, read_done
from actshuffle.jobs.folder import FolderJob, FolderTask, run_held
from actshuffle.jobs.receipts import Payload
from actshuffle.jobs.work import Work
from actshuffle.loading.dataset import Dataset
from actshuffle.loading.fieldinfo import is_float
from actshuffle.loading.trace import NAMES
from actshuffle.storage.objects import Objects, open_objects
from actshuffle.storage.place import Place, as_place
from actshuffle.units import several, whole

TASK_BYTES = 256 << 20  # rows of one task, so what a kill costs
PIECE_BYTES = 4 << 20  # read at a time
DROP_NORM = 10.0  # the default of `collect`
OPTIONS = ("skip_first", "drop_tokens", "drop_norm")


@dataclass(frozen=True)
class Rules:
    """The rows to drop, and the arrays that tell: 0, () and 0 drop none.

    ``skip_first``: those of the first tokens of a window, by their place in ``position``; ``drop_tokens``: those of
    tokens in ``token``, by their id; ``drop_norm``: those whose Euclidean norm in any of ``arrays`` exceeds so many
    times the median norm of that array.  An array whose median is 0 drops no row.
    """

    skip_first: int = 0
    drop_tokens: tuple[int, ...] = ()
    drop_norm: float = 0.0
    position: str = "window_position"
    token: str = "token"
    arrays: tuple[str, ...] = ()

    @classmethod
    def of(cls, skip_first: Any, drop_tokens: Any, drop_norm: Any) -> Rules:
        """The rules as people give them."""
        ids = {whole("drop_tokens", token) for token in several("drop_tokens", drop_tokens, of="ids")}
        if isinstance(drop_norm, bool) or not isinstance(drop_norm, Real) or 0 != float(drop_norm) <= 1:
            raise RequestError(
                f"--drop-norm is a multiple of the median norm, above 1, or 0 for none; got {drop_norm!r}"
            )
        if not math.isfinite(drop_norm):
            raise RequestError(f"--drop-norm must be finite, got {drop_norm}; 0 drops no row by its norm")
        return cls(whole("skip_first", skip_first), tuple(sorted(ids)), float(drop_norm))

    def fitted(self, store: Dataset, position: str | None, token: str | None, arrays: Iterable[str] | None) -> Rules:
        """The same rules with the arrays of a store that they need, or a refusal; None stands for the usual names."""
        known = [name for name in NAMES["token"] if name in store.fields]
        position, token = position or "window_position", token or next(iter(known), "token")
        for option, kind, name in (("skip_first", "position", position), ("drop_tokens", "token", token)):
            info = store.fields.get(name)
            if getattr(self, option) and (info is None or info.row_shape or info.dtype.kind not in "iu"):
                what = "the place of each row in its window" if kind == "position" else "the token of each row"
                raise RequestError(
                    f"{store.path} has no array {name!r} of whole numbers with {what}, which "
                    f"--{option.replace('_', '-')} needs; it has {sorted(store.fields)}: name one with --{kind}"
                )
        vectors = [n for n, info in store.fields.items() if info.row_shape and is_float(info)]
        usual = [name for name in vectors if not name.startswith("grad_")]
        chosen = sorted(set(usual if arrays is None else several("arrays", arrays, of="names")))
        if odd := [name for name in chosen if name not in vectors]:
            raise RequestError(f"no array {odd[0]!r} of vectors in {store.path}; there are {vectors}")
        if self.drop_norm and not chosen:
            raise RequestError(f"--drop-norm needs an array of vectors, and {store.path} has {sorted(store.fields)}")
        arrays = tuple(chosen) if self.drop_norm else ()
        return replace(self, position=position, token=token, arrays=arrays)

    @classmethod
    def read(cls, found: Mapping[str, Any]) -> Rules:
        """The rules as JSON holds them."""
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in found.items()}
        return cls(**values)


@dataclass(frozen=True)
class Passed:
    """The rows that pass: how many, how many each rule dropped, and by array the median norm and the rows beyond it."""

    rows: int
    dropped: dict[str, int]
    medians: dict[str, float]
    beyond: dict[str, int]


def choose(folder: Place, store: Dataset, rules: Rules, identity: str, work: Work) -> Passed:
    """Run the job in ``folder``, which the caller holds.

    Its ``rows/N`` then hold the numbers of the rows that pass, as little-endian uint64.
    ``identity`` is that of the store's content.
    """
    step = _step(store, rules)
    settings = {
        "source": store.root.url,
        "identity": identity,
        "range": [store.start, store.start + store.rows],
        "step": step,
        "rules": asdict(rules),
    }
    count = -(-store.rows // step)
    steps = [Step("choosing", _choose, count)]
    if rules.arrays:
        steps = [Step("norms", _norms, count), Step("medians", _medians, len(rules.arrays)), *steps]
    job = FolderJob("row filter", json.loads(json.dumps(settings)), folder, tuple(steps), work.fsync)
    crew = work.crew if count > 1 else Serial()  # a cluster takes longer to start than one task
    run_held(job, _added_up, replace(work, crew=crew, overwrite=True))
    done = read_done(folder)
    assert done is not None
    return Passed(**done["found"])


def chosen_rows(folder: Place, store: Dataset, rules: Rules) -> Iterator[bytes]:
    """The numbers of the rows that pass, from the folder of a finished job."""
    objects = open_objects(folder)
    for number in range(-(-store.rows // _step(store, rules))):
        yield _stored(objects, f"rows/{number}")


def _step(store: Dataset, rules: Rules) -> int:
    """The rows of one task."""
    width = max((store.fields[name].row_bytes for name in rules.arrays), default=64)
    return max(1, TASK_BYTES // width)


class _Range:
    """The rows of one task, ``[start, stop)`` of the store."""

    def __init__(self, job: FolderJob, task: FolderTask) -> None:
        settings = job.settings
        self.rules = Rules.read(settings["rules"])
        self._place = as_place(settings["source"], json.loads(job.place.options))
        self._first, stop = settings["range"]
        self.start = settings["step"] * task.number
        self.stop = min(self.start + settings["step"], stop - self._first)

    def pieces(self, name: str) -> Iterator[tuple[int, NDArray[Any]]]:
        """The rows of an array a piece at a time, flat, each with the number of its first row in the range."""
        array = source_arrays(self._place, [name])[name]
        field, source = source_field(name, array), Source(self._place)
        step = max(1, PIECE_BYTES // field.row_bytes)
        if not field.source_key:  # whole chunks, so that none is decoded twice
            step = field.read_rows * max(1, step // field.read_rows)
        dtype = np.dtype("<u2") if is_bfloat16(array) else array.dtype.newbyteorder("<")
        for start in range(self.start, self.stop, step):
            out = np.empty((min(step, self.stop - start), field.row_bytes), np.uint8)
            source.read(field, self._first + start, out)
            values = out.view(dtype)
            yield start - self.start, widened(values) if is_bfloat16(array) else values

    def column(self, name: str) -> NDArray[Any]:
        """One number for each row."""
        return np.concatenate([values[:, 0] for _, values in self.pieces(name)])


def _norms(job: FolderJob, task: FolderTask) -> tuple[Payload, int]:
    rows, nbytes = _Range(job, task), 0
    for name in rows.rules.arrays:
        norms = np.empty(rows.stop - rows.start)
        for at, values in rows.pieces(name):
            wide = values.astype(np.float64)
            with np.errstate(over="ignore", invalid="ignore"):
                norms[at : at + len(wide)] = np.sqrt(np.vecdot(wide, wide))
            nbytes += values.nbytes
        if not np.isfinite(norms).all():
            first = rows.start + int(np.flatnonzero(~np.isfinite(norms))[0])
            raise SourceError(
                f"row {first:,} of {name!r} has no finite norm, so it cannot be compared with the median: leave that "
                "array out with --arrays, or filter without --drop-norm"
            )
        job.objects.put(f"norms/{name}/{task.number}", norms.astype("<f8").tobytes())
    return {}, nbytes


def _medians(job: FolderJob, task: FolderTask) -> tuple[Payload, int]:
    name, settings = job.settings["rules"]["arrays"][task.number], job.settings
    rows = settings["range"][1] - settings["range"][0]

    def parts() -> Iterator[F64]:
        return (_of(job, f"norms/{name}/{n}") for n in range(-(-rows // settings["step"])))

    return {"median": median(parts, rows)}, 8 * rows


def median(parts: Callable[[], Iterator[F64]], count: int) -> float:
    """``np.median`` of ``count`` non-negative floats, read in parts as often as needed, in constant memory."""
    return (_nth(parts, (count - 1) // 2) + _nth(parts, count // 2)) / 2


def _nth(parts: Callable[[], Iterator[F64]], rank: int) -> float:
    """The float of a rank, by its bits, 16 at a time: those of non-negative floats have the order of the floats."""
    found, digits = np.uint64(0), np.uint64(0xFFFF)
    for shift in map(np.uint64, (48, 32, 16, 0)):
        counts = np.zeros(1 << 16, np.int64)
        for part in parts():
            bits = part.view(np.uint64) >> shift
            alike = bits[(bits >> np.uint64(16)) == found]
            counts += np.bincount((alike & digits).astype(np.int64), minlength=1 << 16)
        ends = np.cumsum(counts)
        digit = int(np.searchsorted(ends, rank, side="right"))
        rank -= int(ends[digit] - counts[digit])
        found = (found << np.uint64(16)) | np.uint64(digit)
    return float(np.array([found], np.uint64).view(np.float64)[0])


def _choose(job: FolderJob, task: FolderTask) -> tuple[Payload, int]:
    rows = _Range(job, task)
    rules, count = rows.rules, rows.stop - rows.start
    left, dropped = np.ones(count, bool), dict.fromkeys(OPTIONS, 0)

    def drop(option: str, mask: NDArray[np.bool_]) -> None:
        dropped[option] = int((mask & left).sum())
        left[mask] = False

    if rules.skip_first:
        drop("skip_first", rows.column(rules.position) < rules.skip_first)
    if rules.drop_tokens:
        drop("drop_tokens", np.isin(rows.column(rules.token), rules.drop_tokens))
    beyond = {}
    if rules.arrays:
        far = np.zeros(count, bool)
        for name, found in zip(rules.arrays, job.results("medians"), strict=True):
            limit = rules.drop_norm * found["median"] or math.inf
            mask = _of(job, f"norms/{name}/{task.number}") > limit
            beyond[name] = int((mask & left).sum())
            far |= mask
        drop("drop_norm", far)
    chosen = np.flatnonzero(left).astype("<u8") + np.uint64(rows.start)
    job.objects.put(f"rows/{task.number}", chosen.tobytes())
    return {"rows": len(chosen), "dropped": dropped, "beyond": beyond}, count


def _added_up(job: FolderJob) -> Payload:
    """The facts that a `Passed` is made of."""
    arrays = job.settings["rules"]["arrays"]
    chosen = list(job.results("choosing"))
    medians = [found["median"] for found in job.results("medians")] if arrays else []
    return {
        "rows": sum(found["rows"] for found in chosen),
        "dropped": {option: sum(found["dropped"][option] for found in chosen) for option in OPTIONS},
        "medians": dict(zip(arrays, medians, strict=True)),
        "beyond": {name: sum(found["beyond"][name] for found in chosen) for name in arrays},
    }


def _of(job: FolderJob, key: str) -> F64:
    return np.frombuffer(_stored(job.objects, key), "<f8")


def _stored(objects: Objects, key: str) -> bytes:
    data = objects.get(key)
    if data is None:
        raise SourceError(f"{key} is missing from the filter's folder: filter again with --overwrite")
    return data
