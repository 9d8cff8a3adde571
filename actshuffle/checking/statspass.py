"""The statistics of a store: one parallel pass over its rows, kept beside them for the trainer.

::

    store/_actshuffle/stats/NAME/mean, variance     float64, one value per place in a row
    store/_actshuffle/stats/NAME/norms              int64 (bins, 2): histogram of squared norms
    store/_actshuffle/stats/stats.json              all else, and digests of those arrays; written last

The arrays are Zarr.  A ``stats.json`` whose arrays are not the ones it speaks of counts as damaged, and
one of another store as stale.  For a view all this is in the view's own folder.  See
`actshuffle.checking.moments` for how it is summed and how exact it is.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from actshuffle.arrays.names import OUR_GROUP
from actshuffle.arrays.small import get_array, group_metadata, put_array
from actshuffle.checking.moments import FloatSums, IntPart, IntSums, Part, distinct, merge
from actshuffle.checking.statsreport import FORMAT, Stats
from actshuffle.checking.statstypes import NUMBERS, FloatStats, IntStats
from actshuffle.errors import FormatError, RequestError, StorageError
from actshuffle.executors import Executor, Threads
from actshuffle.executors.choice import as_executor
from actshuffle.jobs.running import sweep
from actshuffle.jobs.work import Work
from actshuffle.loading.dataset import Dataset, open_dataset, open_finished_or_plain
from actshuffle.loading.fieldinfo import FieldInfo, is_float, is_integer
from actshuffle.loading.prefetch import in_order
from actshuffle.progress import Progress, observer
from actshuffle.progress.display import shown
from actshuffle.seals import checksum
from actshuffle.storage.buffers import pages
from actshuffle.storage.objects import Objects, open_objects
from actshuffle.units import switches

log = logging.getLogger("actshuffle")
FOLDER = f"{OUR_GROUP}/stats"
KEY = f"{FOLDER}/stats.json"
READ_BYTES = 8 << 20  # at a time, past the page cache; a task has two such pieces in memory
# Long beside the reading of the first piece and the adding of the last, which nothing overlaps.
TASK_BYTES = 1 << 30
T = TypeVar("T")
_ARRAYS = ("mean", "variance", "norms")


@shown
def stats(
    path: str | Path | Dataset,
    *,
    fields: Iterable[str] | None = None,
    executor: Executor | None = None,
    write: bool = True,
    incomplete: bool = False,
    storage_options: dict[str, Any] | None = None,
    progress: Progress | bool = True,
) -> Stats:
    """Mean, variance, norms and faults of every field, in one pass.

    Written beside the rows (with ``write``, and only of a finished store and all its fields), where
    `read_stats` finds them; a store that cannot be written to gets a line in the log.  Runs on threads
    of this process unless given an executor.

    Raises
    ------
    IncompleteStoreError : the store is half done; a plain Zarr store that is not ours is taken.
    DestinationInUseError : another process writes to the store; ``write=False`` computes beside it.
    """
    switches(write=write, incomplete=incomplete)
    dataset = open_finished_or_plain(path, incomplete=incomplete, storage_options=storage_options)
    work = Work(as_executor(executor, Threads), observer(progress))
    with work.locks:
        writes = write and fields is None and dataset.marker is not None
        if writes:
            work.locks.take(dataset.place)
        return _stats(dataset, fields, work, write=writes)


def _stats(dataset: Dataset, fields: Iterable[str] | None, work: Work, *, write: bool) -> Stats:
    names = list(dataset.fields) if fields is None else [fields] if isinstance(fields, str) else list(fields)
    if unknown := [name for name in names if name not in dataset.fields]:
        raise RequestError(f"no array named {unknown[0]!r} in {dataset.path}; it has {sorted(dataset.fields)}")
    chosen = {name: dataset.fields[name] for name in names}
    counted = tuple(n for n, f in chosen.items() if is_float(f) or is_integer(f))
    row_bytes = sum(chosen[n].row_bytes for n in counted)
    calls = [(dataset, counted, a, b) for a, b in _ranges(dataset, row_bytes, work.crew.workers)]
    size, total = lambda part: row_bytes * min(dataset.rows - part[0], calls[0][3]), dataset.rows * row_bytes
    parts = dict(sweep("stats", sums, calls, work.crew, work.progress, size, total))
    merged = [_sums(chosen[name]).part() for name in counted]
    for start in sorted(parts):  # in the order of rows, so that the result does not depend on who was first
        merged = list(map(merge, merged, parts[start]))
    result = Stats(
        path=dataset.path,
        rows=dataset.rows,
        identity=dataset.identity,
        fields={name: _finish(chosen[name], part) for name, part in zip(counted, merged, strict=True)},
        skipped={n: f.dtype_name for n, f in chosen.items() if n not in counted},
        nbytes=dataset.rows * row_bytes,
        seconds=work.seconds,
        written=write,
    )
    if write:
        work.locks.check()
        try:
            _write(open_objects(dataset.place), result)
        except StorageError as err:  # where we may only read: what was found is no less true
            log.warning("the statistics are not kept in the store: %s", err)
            return replace(result, written=False)
    return result


def sums(dataset: Dataset, names: tuple[str, ...], start: int, stop: int) -> tuple[int, list[Part]]:
    """One task: the sums over rows ``[start, stop)`` of each field.  Reads on while it adds."""
    found: list[Part] = []
    with ThreadPoolExecutor(1, "actshuffle-read") as reader:
        for name in names:
            info = dataset.fields[name]
            summed = _sums(info)
            step = max(1, min(READ_BYTES // info.row_bytes, stop - start))
            # Each its own, as an arena of so little would not be in huge pages, which a disk fills faster.
            memory = [pages(step * info.row_bytes) for _ in range(2)]
            buffers = cycle([one.reshape(step, info.row_bytes) for one in memory])
            pieces = ((a, min(a + step, stop), next(buffers)) for a in range(start, stop, step))

            def read(piece: tuple[int, int, NDArray[np.uint8]], name: str = name) -> tuple[NDArray[Any], int]:
                a, b, buffer = piece
                info, buffer = dataset.fields[name], buffer[: b - a]
                dataset.reading(name, [(a, b)], buffer, once=True)()
                return buffer.view(info.dtype).reshape(b - a, *info.row_shape), a

            for rows, first in in_order(reader, read, pieces, 2, lambda _: None):
                summed.add(rows, first)
            found.append(summed.part())
    return start, found


def _sums(info: FieldInfo) -> FloatSums | IntSums:
    return FloatSums(info) if is_float(info) else IntSums(info)


def _ranges(dataset: Dataset, row_bytes: int, workers: int) -> list[tuple[int, int]]:
    """Row ranges of whole objects of the widest field: enough for all workers, and not too many."""
    if not dataset.rows or not row_bytes:
        return []
    unit = max(dataset.fields.values(), key=lambda f: f.row_bytes).object_rows
    wanted = min(TASK_BYTES // row_bytes, -(-dataset.rows // (4 * workers)))
    step = max(1, round(wanted / unit)) * unit if unit < 4 * wanted else max(1, wanted)
    return [(a, min(a + step, dataset.rows)) for a in range(0, dataset.rows, step)]


def _finish(info: FieldInfo, part: Part) -> FloatStats | IntStats:
    if isinstance(part, IntPart):
        number, exact = distinct(part)
        if part.least is not None and part.most is not None:
            number = min(number, part.most - part.least + 1)
        number = min(number, part.count * math.prod(info.row_shape))
        return IntStats(info.dtype_name, part.count, part.least, part.most, number, exact)
    n, blank = part.count, np.full(math.prod(info.row_shape), math.nan)
    return FloatStats(
        dtype=info.dtype_name,
        count=n,
        mean=(part.mean if n else blank).reshape(info.row_shape),
        variance=(part.m2 / n if n else blank).reshape(info.row_shape),
        mean_squared_norm=part.squares / n if n else math.nan,
        norm_min=math.sqrt(part.least) if n else math.nan,
        norm_max=math.sqrt(part.most) if n else math.nan,
        norms=np.stack([part.bins, part.counts], axis=1),
        left_out=part.left_out,
        nans=part.nans,
        infs=part.infs,
        first_nan=part.first_nan,
        first_inf=part.first_inf,
    )


# --- Kept beside the rows -----------------------------------------------------------------------


def _write(objects: Objects, found: Stats) -> None:
    body = found.as_dict()
    objects.put(f"{FOLDER}/zarr.json", group_metadata({}))
    for name, of in found.fields.items():
        if isinstance(of, FloatStats):
            objects.put(f"{FOLDER}/{name}/zarr.json", group_metadata({}))
            arrays = {kind: getattr(of, kind) for kind in _ARRAYS}
            for kind, array in arrays.items():
                put_array(objects, f"{FOLDER}/{name}/{kind}", np.atleast_1d(array))
            body["fields"][name]["arrays"] = {k: _seal(np.atleast_1d(a)) for k, a in arrays.items()}
    objects.put(KEY, json.dumps(body, indent=1).encode())


def read_stats(path: str | Path | Dataset, *, storage_options: dict[str, Any] | None = None) -> Stats:
    """The statistics that `stats` wrote beside a store's rows.

    Raises
    ------
    RequestError : there are none yet.
    FormatError : they are damaged, of another version, or of rows that are no longer there.
    """
    dataset = path if isinstance(path, Dataset) else open_dataset(path, storage_options=storage_options)
    objects = open_objects(dataset.place)
    data = objects.get(KEY)
    if data is None:
        raise RequestError(f"{dataset.path} has no statistics yet; run `actshuffle stats {dataset.path}`")
    again = f"run `actshuffle stats {dataset.path}` again"
    try:
        body = json.loads(data)
        if body["format"] != FORMAT:
            raise FormatError(f"{KEY} has format {body['format']}, this reads {FORMAT}; {again}")
        if body["identity"] != dataset.identity:
            raise FormatError(f"{KEY} is not of what is stored now; {again}")
        fields = {name: _read_field(objects, dataset, name, d) for name, d in body["fields"].items()}
        return Stats(
            dataset.path, body["rows"], body["identity"], fields, body["skipped"], body["bytes"], body["seconds"], True
        )
    except (ValueError, KeyError, TypeError, AttributeError) as err:
        raise FormatError(f"{KEY} is damaged ({type(err).__name__}: {err}); {again}") from err


def _read_field(objects: Objects, dataset: Dataset, name: str, body: dict[str, Any]) -> FloatStats | IntStats:
    info = dataset.fields[name]
    if body["kind"] == "int":
        return IntStats(**{k: body[k] for k in ("dtype", "count", "min", "max", "distinct", "exact")})
    arrays = {}
    for kind in _ARRAYS:
        array = get_array(objects, f"{FOLDER}/{name}/{kind}")
        if array is None or _seal(array) != body["arrays"][kind]:
            raise ValueError(f"array {kind} of {name} is not the one it was")
        arrays[kind] = array if kind == "norms" else array.reshape(info.row_shape)
    first = {k: None if body[k] is None else tuple(body[k]) for k in ("first_nan", "first_inf")}
    numbers = {k: math.nan if body[k] is None else float(body[k]) for k in NUMBERS}
    rest = {k: body[k] for k in ("dtype", "count", "left_out", "nans", "infs")}
    everything: dict[str, Any] = {**rest, **numbers, **arrays, **first}
    return FloatStats(**everything)


def _seal(array: NDArray[Any]) -> str:
    return checksum(np.ascontiguousarray(array).tobytes())
