"""A read-only handle on a finished store, which has its completion marker.  Three kinds have one::

    shuffle      the output of `actshuffle.shuffle`: rows in the order of their keys
    collection   collected or imported: rows in the order in which they were made
    view         a contiguous row range of another finished store: a marker, and no rows of its own

Where chunk files are the plain bytes of their rows, a read is one copy, by the kernel, from the file
to where the caller wants the rows; else zarr decodes, whole chunks at a time, and the last few are
kept, so that reads on both sides of a cut decode it once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actshuffle.arrays import virtual
from actshuffle.arrays.field import Field
from actshuffle.arrays.marker import array_names, is_begun, read_marker
from actshuffle.arrays.metadata import open_node, source_arrays
from actshuffle.arrays.names import FORMAT, MARKER_KEY, OUR_GROUP, SOURCE_ROW
from actshuffle.arrays.small import group_metadata
from actshuffle.arraytypes import U8
from actshuffle.errors import DestinationExistsError, FormatError, IncompleteStoreError, RequestError, words_of
from actshuffle.html import page
from actshuffle.loading.fieldinfo import FieldInfo, field_info
from actshuffle.loading.rowreader import RowReader, stored_field
from actshuffle.loading.views import fault_of, followed, reference
from actshuffle.seals import checksum, seal
from actshuffle.storage.objects import Objects, open_objects
from actshuffle.storage.place import Place, as_place, public_url
from actshuffle.units import counted, format_bytes, switches

_DEPTH = 16  # views of views that are followed


@dataclass(eq=False)
class Dataset:
    """A store that is open for reading.  Cheap to pickle and to copy; safe to read from many threads.

    Attributes
    ----------
    place, kind, marker : of the store that was opened; kind "plain" has no marker.
    rows, fields, attributes : what it holds.
    root, start : the store that has the bytes, and where row 0 is in it (differs for views).
    root_marker : the marker of that store.
    """

    place: Place
    kind: str
    marker: dict[str, Any] | None
    rows: int
    fields: dict[str, FieldInfo]
    attributes: dict[str, Any]
    root: Place
    start: int
    root_marker: dict[str, Any] | None
    _stored: dict[str, Field] = field(repr=False)
    _root_rows: int
    _held: RowReader | None = field(default=None, repr=False)

    @property
    def path(self) -> str:
        return public_url(self.place.url)

    @property
    def nbytes(self) -> int:
        return self.rows * self.row_bytes

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of all fields."""
        return sum(f.row_bytes for f in self.fields.values())

    @property
    def shuffled(self) -> bool:
        """True if the rows are in the order of their keys."""
        return self.root_marker is not None and self.root_marker["kind"] == "shuffle"

    @property
    def population(self) -> int:
        """The rows that were shuffled, of which a view, a sample or a part has some."""
        return int((m := self.root_marker or {}).get("population", m.get("rows", self.rows)))

    @property
    def order(self) -> tuple[Any, ...]:
        """Equal for two stores exactly if row i of both comes from row i of equal sources."""
        m = self.root_marker
        if m is None or not self.shuffled:
            return ("stored", self.rows)
        first = m.get("first_rank", 0) + self.start  # a copied range, or a sample, is part of more
        keys = m["seed"], self.population, *m.get("key_bits", ())
        rule = (seal(m["split"]),) if "split" in m else ()  # some of those rows, by a rule
        return ("shuffle", *keys, *rule, first, self.rows)

    @property
    def identity(self) -> str:
        """Digest of what is stored here: marker, row range, fields; the same after the store is moved."""
        marker = self.root_marker and {k: v for k, v in self.root_marker.items() if k != "source"}
        fields = [(f.name, f.dtype_name, f.row_shape) for f in self.fields.values()]
        return seal([marker, self.start, self.rows, fields])

    def read(self, name: str, start: int, stop: int, out: NDArray[Any] | None = None) -> NDArray[Any]:
        """Rows ``[start, stop)`` of a field, as ``(stop - start, *row_shape)`` of its dtype.

        Into ``out`` if given: any C-contiguous array of as many bytes, of the field's dtype or uint8.
        """
        info = self._info(name)
        rows = stop - start
        self._check_range(start, stop)
        if out is None:
            out = np.empty((rows, *info.row_shape), info.dtype)
        flat = self._flat(info, rows, out)
        self._reading(name, [(start, stop)], flat)()
        return flat.view(info.dtype).reshape(rows, *info.row_shape)

    def read_ranges(self, name: str, ranges: Sequence[tuple[int, int]], out: U8) -> None:
        """Row ranges of a field one after the other into ``out``, uint8 ``(rows in all, row_bytes)``."""
        self.reading(name, ranges, out)()

    def reading(
        self, name: str, ranges: Sequence[tuple[int, int]], out: U8, *, once: bool = False
    ) -> Callable[[], None]:
        """Prepare `read_ranges` as a call for later, by any thread, with files found and the first ones open.

        ``once``: nobody will read these rows again soon; rows outside the page cache bypass it.
        """
        for start, stop in ranges:
            self._check_range(start, stop)
        flat = self._flat(self._info(name), sum(b - a for a, b in ranges), out)
        return self._reading(name, ranges, flat, once=once)

    def is_cached(self, name: str, row: int) -> bool:
        """True if a row of a field would come straight from the system's page cache."""
        self._info(name)
        return self._reader().is_cached(self._stored[name], row + self.start)

    def take(self, name: str, rows: Iterable[int] | NDArray[Any]) -> NDArray[Any]:
        """Any rows of a field, in the order given; neighbours are read together, nothing else is."""
        info = self._info(name)
        wanted, back = np.unique(np.asarray(rows, np.int64), return_inverse=True)
        if len(wanted) and not 0 <= wanted[0] <= wanted[-1] < self.rows:
            raise RequestError(f"row {wanted[0] if wanted[0] < 0 else wanted[-1]:,} of {self.rows:,} in {self.path}")
        cuts = np.flatnonzero(np.diff(wanted) != 1) + 1
        ranges = [(int(r[0]), int(r[-1]) + 1) for r in np.split(wanted, cuts) if len(r)]
        out = np.empty((len(wanted), *info.row_shape), info.dtype)
        self._reading(name, ranges, self._flat(info, len(wanted), out))()
        return out[back]

    def _info(self, name: str) -> FieldInfo:
        if name not in self.fields:
            raise RequestError(f"no array named {name!r} in {self.path}; it has {sorted(self.fields)}")
        return self.fields[name]

    def _check_range(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= self.rows:
            raise RequestError(f"rows {start:,} to {stop:,} of {self.rows:,} in {self.path}")

    def _flat(self, info: FieldInfo, rows: int, out: NDArray[Any]) -> U8:
        need = rows * info.row_bytes
        if not out.flags.c_contiguous or not out.flags.writeable or out.dtype.hasobject:
            raise RequestError("out must be a C-contiguous, writeable array")
        if out.nbytes != need or out.dtype not in (info.dtype, np.dtype(np.uint8)):
            raise RequestError(
                f"out has {counted(out.nbytes, 'byte')} of {out.dtype}; {counted(rows, 'row')} of {info.name!r} are "
                f"{counted(need, 'byte')} of {info.dtype}"
            )
        return out.reshape(-1).view(np.uint8)

    def _reading(
        self, name: str, ranges: Sequence[tuple[int, int]], flat: U8, *, once: bool = False
    ) -> Callable[[], None]:
        moved = [(a + self.start, b + self.start) for a, b in ranges if b > a]
        return self._reader().reading(self._stored[name], moved, flat, once=once)

    def _reader(self) -> RowReader:
        if self._held is None or self._held.process != os.getpid():
            self._held = RowReader(self.root, self._root_rows)
        return self._held

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_held": None}

    def __len__(self) -> int:
        return self.rows

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.kind}, {counted(self.rows, 'row')}, {format_bytes(self.nbytes)}"]
        wide = max((len(name) for name in self.fields), default=0)
        lines += [f"  {name:{wide}}  {form}" for name, form in self._forms()]
        return "\n".join(lines)

    __repr__ = __str__

    def _forms(self) -> list[tuple[str, str]]:
        shapes = {name: ", ".join(map(str, (self.rows, *f.row_shape))) for name, f in self.fields.items()}
        return [(name, f"({shape}) {self.fields[name].dtype_name}") for name, shape in shapes.items()]

    def _repr_html_(self) -> str:
        facts = {
            "path": self.path,
            "kind": self.kind,
            "rows": f"{self.rows:,}",
            "bytes": format_bytes(self.nbytes),
            "order": f"shuffled, seed {self.order[1]}" if self.shuffled else "as it was made",
        }
        rows = [
            (n, form, f"{format_bytes(f.row_bytes)}", f"{f.object_rows:,}")
            for (n, form), f in zip(self._forms(), self.fields.values(), strict=True)
        ]
        return page("Dataset", facts, ("field", "shape and type", "row", "rows an object"), rows)


def open_dataset(
    path: str | Path, *, incomplete: bool = False, storage_options: dict[str, Any] | None = None
) -> Dataset:
    """A finished store or view; with ``incomplete``, any Zarr array or group whatever made it.

    Raises
    ------
    IncompleteStoreError : there is no completion marker.
    SourceError, FormatError : there is no store, or it is damaged.
    """
    return _open(as_place(path, storage_options), incomplete, ())


def open_place(place: Place) -> Dataset:
    """`open_dataset` for code that has a place, with the options of its store."""
    return _open(place, False, ())


def open_finished_or_plain(
    path: str | Path | Dataset, *, incomplete: bool = False, storage_options: dict[str, Any] | None = None
) -> Dataset:
    """Open any store to look at: a finished one, or one that actshuffle did not write, which needs no marker."""
    if isinstance(path, Dataset):
        return path
    place = as_place(path, storage_options)
    return _open(place, incomplete or not is_ours(open_objects(place)), ())


def is_ours(objects: Objects) -> bool:
    """True if a store holds entries that only actshuffle writes.  A virtual source does not count: it holds no rows,
    and its description is written in one step."""
    if objects.size(virtual.KEY) is not None:
        return False
    return next(iter(objects.list(OUR_GROUP)), None) is not None


def _open(place: Place, incomplete: bool, views: tuple[str, ...]) -> Dataset:
    switches(incomplete=incomplete)
    objects = open_objects(place)
    marker = read_marker(objects)
    if marker is None and not incomplete:
        if is_begun(place):
            why = ": what writes it has not finished; the same command again goes on"
        else:
            open_node(place)  # says so if there is nothing at all
            others = ": it was not made by actshuffle, whose `run` would shuffle it"
            why = ", so it may be half written" if is_ours(objects) else others
        raise IncompleteStoreError(f"{public_url(place.url)} has no completion marker{why}")
    if marker is not None and marker["kind"] == "view":
        return _open_view(place, marker, views)
    names = None if marker is None else array_names(marker)
    try:
        arrays = source_arrays(place, names)
    except RequestError as err:
        raise FormatError(f"{MARKER_KEY} does not fit the store: {words_of(err)}") from err
    rows = next(iter(arrays.values())).shape[0]
    if marker is not None and marker["rows"] != rows:
        raise FormatError(f"{place.url} has {counted(rows, 'row')}, its marker says {marker['rows']:,}")
    return Dataset(
        place=place,
        kind="plain" if marker is None else marker["kind"],
        marker=marker,
        rows=rows,
        fields={name: field_info(name, arrays[name]) for name in names or arrays},
        attributes=dict(open_node(place).attrs),
        root=place,
        start=0,
        root_marker=marker,
        _stored={name: stored_field(name, array) for name, array in arrays.items()},
        _root_rows=rows,
    )


def _open_view(place: Place, marker: dict[str, Any], views: tuple[str, ...]) -> Dataset:
    where = public_url(place.url)
    if place.url in views or len(views) >= _DEPTH:
        raise FormatError(f"views lead in a circle, or are more than {_DEPTH} deep: {where}")
    parent = _open(followed(place, marker["of"]), False, (*views, place.url))
    if fault := fault_of(where, marker, names := array_names(marker), parent):
        raise FormatError(fault)
    return replace(
        parent,
        place=place,
        kind="view",
        marker=marker,
        rows=marker["rows"],
        fields={name: parent.fields[name] for name in names},
        start=parent.start + marker["start"],
    )


def write_view(
    path: str | Path,
    parent: str | Path | Dataset,
    start: int,
    stop: int,
    *,
    storage_options: dict[str, Any] | None = None,
) -> Dataset:
    """Make ``path`` the rows ``[start, stop)`` of a finished store, without copying one of them.

    A view of a view is written as a view of the store that has the rows.
    """
    if not isinstance(parent, Dataset):
        parent = open_dataset(parent, storage_options=storage_options)
    if parent.marker is None:
        raise IncompleteStoreError(f"{parent.path} has no completion marker; views are of finished stores")
    parent._check_range(start, stop)
    objects = open_objects(place := as_place(path, storage_options))
    if objects.size("zarr.json") is not None or next(iter(objects.list("")), None) is not None:
        raise DestinationExistsError(f"{place.url} exists already")
    root = _open(parent.root, False, ())
    names = {name: {"object_rows": f.object_rows} for name, f in parent.fields.items()}
    body = {
        "format": FORMAT,
        "kind": "view",
        "of": reference(place, parent.root),
        "of_identity": root.identity,
        **({"of_source": source} if (source := (root.marker or {}).get("source_identity")) else {}),
        "start": parent.start + start,
        "stop": parent.start + stop,
        "rows": stop - start,
        "source_row": names.pop(SOURCE_ROW, None) is not None,
        "fields": names,
    }
    objects.put("zarr.json", text := group_metadata(parent.attributes))
    body["files"] = {"zarr.json": checksum(text)}
    body["sha256"] = seal(body, 64)
    objects.put(MARKER_KEY, group_metadata({"actshuffle": body}))
    return _open(place, False, ())
