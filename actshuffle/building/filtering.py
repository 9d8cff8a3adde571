"""Copy the rows of a store that pass a filter, in their order.

>>> filter_rows("acts.zarr", "clean.zarr", skip_first=1, drop_norm=10)      # doctest: +SKIP

The rows that pass are chosen first (rowfilter.py), which settles their number; then a run copies them, block by block::

    SRC  ->  DST.filter  numbers of the rows that pass  ->  DST.chosen  a virtual source of them  ->  DST

`collect` drops rows by their norms in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from actshuffle.arrays import virtual
from actshuffle.arrays.inventory import take_inventory
from actshuffle.arrays.metadata import source_arrays
from actshuffle.arrays.names import RUN_KEY
from actshuffle.arrays.readers import Backing, reader
from actshuffle.arraytypes import U64
from actshuffle.building.joining import present
from actshuffle.building.rowfilter import Passed, Rules, choose, chosen_rows
from actshuffle.building.sampling import ROWS_KEY, Chosen
from actshuffle.engine.prepare import check_places, look_at
from actshuffle.engine.request import Request
from actshuffle.engine.run import copy_through
from actshuffle.errors import DestinationExistsError, RequestError, ResumeMismatchError, SourceError
from actshuffle.executors import Executor, check_memory
from actshuffle.html import page
from actshuffle.jobs.work import Work
from actshuffle.loading.dataset import Dataset, open_dataset, open_finished_or_plain
from actshuffle.loading.views import combined
from actshuffle.progress import Progress
from actshuffle.progress.display import shown
from actshuffle.seals import seal
from actshuffle.storage.objects import open_objects
from actshuffle.storage.place import Place, as_place, public_url
from actshuffle.units import counted, dropped_text, format_bytes, format_seconds


@dataclass(frozen=True)
class Filtered:
    """The outcome of a filter: the rows that are left, and the number that each option dropped.

    ``medians`` are the median norms by array, and ``beyond`` the rows that ``drop_norm`` dropped for it; a row may
    be beyond in several arrays.
    """

    destination: str
    rows: int
    nbytes: int
    seconds: float
    dropped: dict[str, int] = field(default_factory=dict)
    medians: dict[str, float] = field(default_factory=dict)
    beyond: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        if not self.seconds:
            return f"{self.destination}: already finished, {counted(self.rows, 'row')}"
        lines = [
            f"{self.destination}: {counted(self.rows, 'row')}, {format_bytes(self.nbytes)}, "
            f"{format_seconds(self.seconds)}",
            f"  rows dropped: {dropped_text(self.dropped) or 'none'}",
        ]
        for name, middle in self.medians.items():
            lines.append(f"  {name}: median norm {middle:.4g}, {counted(self.beyond[name], 'row')} beyond")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        facts = {"store": self.destination, "rows": f"{self.rows:,}", "bytes": format_bytes(self.nbytes)}
        facts["rows dropped"] = dropped_text(self.dropped) or "none"
        facts["time"] = format_seconds(self.seconds) if self.seconds else "already finished"
        rows = [(name, f"{middle:.4g}", f"{self.beyond[name]:,}") for name, middle in self.medians.items()]
        return page("Filtered", facts, ("array", "median norm", "rows beyond"), rows)


@shown
def filter_rows(
    src: str | Path,
    dst: str | Path,
    *,
    skip_first: int = 0,
    drop_tokens: Iterable[int] = (),
    drop_norm: float = 0,
    arrays: Iterable[str] | None = None,
    position: str | None = None,
    token: str | None = None,
    memory: str | int | None = None,
    block_bytes: str | int | None = None,
    chunk_rows: int | None = None,
    codec: str | None = None,
    scratch: str | Path | None = None,
    overwrite: bool = False,
    executor: Executor | None = None,
    progress: Progress | bool = True,
    fsync: bool = True,
    storage_options: dict[str, Any] | None = None,
) -> Filtered:
    """Write the rows of ``src`` that pass a filter to ``dst``, in their order, with all arrays.

    A row that breaks several rules counts as dropped by the first of them.  A stopped filter resumes when it is
    called again.  ``dst`` does not count as shuffled, even if ``src`` is.

    Parameters
    ----------
    src : a finished store or view, or any Zarr array or group.
    skip_first : drop the rows of so many tokens at the start of each window.
    drop_tokens : ids of tokens whose rows are dropped.
    drop_norm : drop the rows whose Euclidean norm in any of ``arrays`` exceeds so many times the exact median norm of
        that array, over all rows of ``src``; above 1, or 0 for none.  An array whose median is 0 drops no row.
    arrays : arrays whose norms count; by default all of float vectors but gradients (``grad_...``).
    position : the array of places in the window, from 0.  Default: "window_position", which `collect` writes.
    token : the array of token ids.  Default: "token", or another usual name of it.

    Other parameters are as in `actshuffle.shuffle`.

    Raises
    ------
    RequestError, SourceError : the request or the source was refused, or no row is left; nothing was written.
    DestinationInUseError : another process is writing ``dst``.
    """
    work = Work.of(executor, progress, overwrite=overwrite, fsync=fsync)
    rules = Rules.of(skip_first, drop_tokens, drop_norm)
    if rules == Rules():
        raise RequestError("no filter is given: drop rows with --skip-first, --drop-tokens or --drop-norm")
    request = Request.among(locals(), seed=0, source_row=False)
    check_memory(work.crew, request.memory)
    target = as_place(dst, storage_options)
    store = open_finished_or_plain(src, storage_options=storage_options)
    rules = rules.fitted(store, position, token, arrays)
    with work.locks:
        fresh = copy_passed(store, target, rules, _attributes(store, rules), {}, request, work)
    made = open_dataset(dst, storage_options=storage_options)
    facts = {name: made.attributes["filtered"][-1][name] for name in ("dropped", "medians", "beyond")}
    return Filtered(made.path, made.rows, made.nbytes, work.seconds if fresh else 0.0, **facts)


def _attributes(store: Dataset, rules: Rules) -> Callable[[Passed], dict[str, Any]]:
    """The attributes of a filtered store: those of its source, what was dropped in all, and by which filters."""
    before = store.attributes
    earlier, was = before.get("filtered"), before.get("dropped_rows")
    counts = {k: n for k, n in was.items() if type(n) is int} if isinstance(was, Mapping) else {}

    def of(passed: Passed) -> dict[str, Any]:
        told = {"source": store.path, "rows": store.rows, "rules": asdict(rules)}
        told |= {name: getattr(passed, name) for name in ("dropped", "medians", "beyond")}
        total = counts | {option: counts.get(option, 0) + n for option, n in passed.dropped.items()}
        return before | {"dropped_rows": total, "filtered": [*(earlier if isinstance(earlier, list) else []), told]}

    return of


def copy_passed(
    store: Dataset,
    target: Place,
    rules: Rules,
    attributes: Callable[[Passed], dict[str, Any]],
    marker: Mapping[str, Any],
    request: Request,
    work: Work,
) -> bool:
    """Copy the rows of ``store`` that pass to ``target``, with other attributes, and more entries in its marker.

    Returns False if an earlier call has finished that.
    """
    names = sorted(store.fields)
    check_places(store.root, target, request.scratch)
    work.locks.take(target)
    recorded, found = look_at(target, work.overwrite)
    identity, _ = take_inventory(store.root, source_arrays(store.root, names))
    asked = {"of": identity, "start": store.start, "rows": store.rows, "rules": asdict(rules), "names": names}
    filtered = seal(asked)
    if found is not None and found.get("filtered") != filtered:
        raise DestinationExistsError(f"{target} is finished with other arguments; --overwrite replaces it")
    chosen, folder = target.beside(".chosen"), target.beside(".filter")
    before = (virtual.describe(chosen) or {}).get("settings", {}).get("filtered")
    if recorded is not None and before not in (None, filtered):
        raise ResumeMismatchError(
            f"{target} is half done with another filter, or another source. Give the same to resume, or --overwrite "
            "to start again"
        )
    if found is not None and before is None:
        open_objects(folder).delete_prefix("")
        return False
    try:
        if before != filtered or work.overwrite:
            passed = choose(folder, store, rules, identity, work)
            if not passed.rows:
                raise SourceError(f"no row of {store.path} is left: {dropped_text(passed.dropped)}")
            told = {"source": public_url(store.root.url), "filtered": filtered, **marker}
            rows = chosen_rows(folder, store, rules)
            _write_chosen(chosen, store, passed.rows, rows, attributes(passed), told)
        copy_through(chosen, target, request, work)
    except (RequestError, SourceError):
        if open_objects(target).size(RUN_KEY) is None:  # else the same filter again resumes
            for place in (chosen, folder):
                open_objects(place).delete_prefix("")
        raise
    open_objects(folder).delete_prefix("")
    return True


def _write_chosen(
    chosen: Place, store: Dataset, count: int, rows: Iterable[bytes], attributes: dict[str, Any], marker: dict[str, Any]
) -> None:
    """Write the virtual source of the ``count`` rows that pass, whose numbers are ``rows``."""
    objects = open_objects(chosen)
    objects.delete_prefix("")
    shown = present(chosen, [store], sorted(store.fields), rows=count)
    with objects.writer(ROWS_KEY, 8 * count) as out:
        for data in rows:
            out.write(memoryview(data))
    settings = {**shown.settings, "filtered": marker["filtered"]}
    facts: dict[str, Any] = {"kind": "copy", "stage": "filter", "marker": {"kind": "collection", **marker}}
    virtual.write(chosen, "filtered", settings, shown.arrays, attributes, **facts)


@reader("filtered")
class Passing(Chosen):
    """Reads the rows that pass a filter; they are numbered anew."""

    def __init__(self, place: Place, settings: dict[str, Any]) -> None:
        super().__init__(place, settings)
        self._filtered = str(settings["filtered"])

    def numbers(self, start: int, stop: int) -> U64:
        return np.arange(start, stop, dtype=np.uint64)

    def inventory(self, names: Sequence[str]) -> Backing:
        found = super().inventory(names)
        return Backing(combined([found.identity, self._filtered]), {}, found.places)
