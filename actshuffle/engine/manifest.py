"""The records of a run beside its receipts: the job, the boundaries, and one marker when it is over.

::

    dst/_actshuffle/run.json            the job, until it is finished
    dst/_actshuffle/receipts/7.json     leaf 7 is written: digests of its objects
    dst/_actshuffle/digests/NAME        uint64 (objects, 2), at the end: digest of every output object
    dst/_actshuffle/zarr.json           the completion marker, written last
    scratch/run.json                    the job that owns the scratch
    scratch/bounds, bounds.json         keys at the boundaries between leaves, and their checksum
    scratch/level1/receipts/7.json      block 7 is split: rows and digests of its runs
    scratch/level1/index/0.json         the blocks of bucket 0 are complete and add up
    scratch/level1/packs/7.bin, .json   receipts of many blocks in one object, where they are very many (totals.py)
    dst/_actshuffle/packs/7.bin, .json  the same of leaves
    scratch/counts/16/...               counts for the boundaries, until these are found (jobs/sums.py)

`actshuffle.jobs.receipts` says when a receipt is valid.
"""

from __future__ import annotations

import json
from contextlib import suppress
from functools import lru_cache
from typing import Any

from actshuffle._version import __version__
from actshuffle.arrays.field import Field
from actshuffle.arrays.names import FORMAT, MARKER_KEY, RUN_KEY
from actshuffle.arrays.small import get_array, group_metadata, put_array
from actshuffle.arraytypes import U64
from actshuffle.engine.job import Job, Kind
from actshuffle.errors import FormatError, words_of
from actshuffle.jobs.records import format_of, sealed, unsealed
from actshuffle.ordering.keys import Keys
from actshuffle.planning.memory import MemoryModel
from actshuffle.planning.tree import Plan
from actshuffle.seals import checksum, seal
from actshuffle.storage.objects import Objects
from actshuffle.storage.place import Place, public_url

ORDER_NAME = "lexsort(lo, hi) of Philox4x64-10 words, SeedSequence(seed, spawn_key=(0,) and (1,))"


def write_run(job: Job) -> None:
    """Claim destination and scratch for this job."""
    text = sealed({"job": job.identity, "request": json.loads(job.request), "plan": job.to_json()})
    job.at_scratch.put("run.json", text)
    job.at_destination.put(RUN_KEY, text)


def read_run(objects: Objects, key: str = RUN_KEY) -> dict[str, Any] | None:
    """The record of the job that a half-done destination belongs to, or None."""
    data = objects.get(key)
    if data is None:
        return None
    body = unsealed(data)
    kinds = {"job": str, "request": dict, "plan": dict}
    if body is None or any(not isinstance(body.get(k), kind) for k, kind in kinds.items()):
        other = format_of(data)
        what = "is damaged" if other in (None, FORMAT) else f"has format {other!r}, but this version reads {FORMAT}"
        raise FormatError(
            f"{key} {what}, so this half-done run cannot be resumed; delete the destination "
            "(or give --overwrite) and start again"
        )
    return body


def job_from(body: dict[str, Any], options: str = "{}") -> Job:
    """The job that `write_run` wrote down."""
    d = dict(body["plan"])
    try:
        plan = d.pop("plan")
        tupled: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in plan.items() if k != "model"}
        model = {"block_copies": 2 * plan["model"]["remote"], **plan["model"]}  # left out where it is as it always was
        fields = [
            None if f is None else Field(**{**f, "row_shape": tuple(f["row_shape"])})
            for f in (*d.pop("fields"), d.pop("source_row"))
        ]
        return Job(
            plan=Plan(**tupled, model=MemoryModel(**model)),
            keys=Keys(**d.pop("keys")),
            source=Place(d.pop("source"), options),
            destination=Place(d.pop("destination"), options),
            scratch=Place(d.pop("scratch"), options),
            fields=tuple(f for f in fields[:-1] if f is not None),
            source_row=fields[-1],
            kind=Kind(d.pop("kind")),
            key_rows=None if (keyed := d.pop("key_rows", None)) is None else (keyed[0], keyed[1]),
            **d,
        )
    except (KeyError, TypeError, ValueError) as err:
        raise FormatError(f"{RUN_KEY} is damaged: {type(err).__name__}: {words_of(err)}") from err


def write_bounds(job: Job, bounds: U64) -> None:
    """Store the boundaries between leaves, uint64 ``(leaves - 1, 3)``: array first, checksum last."""
    objects = job.at_scratch
    put_array(objects, "bounds", bounds)
    check = checksum(bounds.astype("<u8").tobytes())
    objects.put("bounds.json", sealed({"job": job.identity, "bounds": check}))


def read_bounds(job: Job) -> U64 | None:
    """The boundaries, or None if they are absent, damaged or another job's."""
    objects = job.at_scratch
    body = unsealed(objects.get("bounds.json"))
    if body is not None and body.get("job") == job.identity:
        with suppress(FormatError):
            bounds = get_array(objects, "bounds")
            if bounds is not None and checksum(bounds.tobytes()) == body.get("bounds"):
                return bounds
    return None


@lru_cache(maxsize=2)
def boundaries(job: Job) -> U64:
    """Full keys at the first rank of leaves 1, 2, ...; uint64 ``(leaves - 1, 3)``."""
    found = read_bounds(job)
    if found is None:
        raise FormatError(f"the bucket boundaries in {job.scratch.url} are damaged; run again to remake them")
    return found


def write_marker(job: Job, sums: dict[str, str], files: dict[str, bytes]) -> None:
    """Make the last write of a run, after which the store is complete.

    ``files`` are the store's small files, everything but chunks; the marker records their digests for `verify`.
    """
    plan = job.plan
    body: dict[str, Any] = {
        "format": FORMAT,
        "kind": "shuffle",
        "version": __version__,
        "rows": plan.rows,
        "seed": job.keys.seed,
        "order": ORDER_NAME,
        "levels": plan.levels,
        "source": public_url(job.source.url),
        "source_identity": job.source_identity,
        "source_row": job.source_row is not None,
        "fill_missing": job.fill_missing,
        "fields": {f.name: {"sum": sums[f.name], "object_rows": f.object_rows} for f in job.fields},
        "files": {key: checksum(data) for key, data in sorted(files.items())},
    }
    if (job.keys.hi_bits, job.keys.lo_bits) != (64, 64):
        body["key_bits"] = [job.keys.hi_bits, job.keys.lo_bits]
    body |= job.known.marker
    if body["kind"] == "collection":  # it is not shuffled; the seed belongs to the digests
        del body["order"], body["levels"]
    body["sha256"] = seal(body, 64)
    objects = job.at_destination
    objects.put(MARKER_KEY, group_metadata({"actshuffle": body}))
