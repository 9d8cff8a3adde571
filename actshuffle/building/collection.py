"""Collect activations of a language model over text into a store, in document order.

>>> collect("gpt2", ["corpus/"], "acts.zarr", layers=[3, 5])          # doctest: +SKIP

Text becomes tokens first, which fixes the number of rows.  Then the activations are a virtual source
(activations.py), and a run copies it block by block: whole chunks, receipts, a marker at the end, and a
stopped run resumes at the block where it was.  One row is one token::

    layer_3, layer_5      the residual stream, hidden_states[3] and [5]
    grad_layer_3, ...     the gradient of the loss with respect to it (gradients.py)
    NAME                  the output of the module NAME
    token, document, position, window_position

Several processes share the work with ``part``: each does its blocks, and the last one publishes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral
from pathlib import Path
from typing import Any

from actshuffle.arrays import virtual
from actshuffle.arrays.marker import is_begun, is_finished, read_marker
from actshuffle.arrays.names import RUN_KEY, UNFILTERED
from actshuffle.building.filtering import copy_passed
from actshuffle.building.models import DTYPES
from actshuffle.building.rowfilter import DROP_NORM, Passed, Rules
from actshuffle.building.textsource import write_source
from actshuffle.engine.job import Job
from actshuffle.engine.prepare import look_at, remove
from actshuffle.engine.request import Request
from actshuffle.engine.run import Shuffle, execute, prepared
from actshuffle.errors import (
    ActshuffleError,
    DestinationExistsError,
    DestinationInUseError,
    InfeasibleError,
    RequestError,
    ResumeMismatchError,
)
from actshuffle.executors import Executor
from actshuffle.foreign.finding import text_files
from actshuffle.foreign.textfiles import kind_of
from actshuffle.html import page
from actshuffle.jobs.locks import Locks
from actshuffle.jobs.running import run_part
from actshuffle.jobs.work import Work
from actshuffle.loading.dataset import open_place
from actshuffle.progress import Progress, heard_by
from actshuffle.progress.display import shown
from actshuffle.seals import seal
from actshuffle.storage.objects import open_objects
from actshuffle.storage.place import Place, as_place, local_path
from actshuffle.units import counted, dropped_text, format_bytes, format_seconds, several, switches, whole

BLOCK_BYTES = 128 << 20  # the most work that a kill can cost


@dataclass(frozen=True)
class Collected:
    """The outcome of a collection.

    ``complete`` is False while other parts are still missing; ``dropped`` counts tokens without a row by the option
    that dropped them.
    """

    destination: str
    rows: int
    documents: int
    nbytes: int
    seconds: float
    complete: bool = True
    dropped: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        size = f"{counted(self.rows, 'token')} of {counted(self.documents, 'document')}"
        if not self.seconds:
            return f"{self.destination}: already finished, {size}"
        rate = f", {self.rows / self.seconds:,.0f} rows/s" if self.complete else "; this part is done, others are not"
        text = f"{self.destination}: {size}, {format_bytes(self.nbytes)}, {format_seconds(self.seconds)}{rate}"
        told = dropped_text(self.dropped)
        return text + (f"\n  rows dropped: {told}" if told else "")

    def _repr_html_(self) -> str:
        facts = {"store": self.destination, "tokens": f"{self.rows:,}", "documents": f"{self.documents:,}"}
        facts |= {"bytes": format_bytes(self.nbytes), "rows dropped": dropped_text(self.dropped) or "none"}
        facts["time"] = format_seconds(self.seconds) if self.seconds else "already finished"
        return page("Collected" if self.complete else "Collected in part", facts)


@shown
def collect(
    model: str | Path,
    text: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    layers: Sequence[int] = (),
    hooks: Sequence[str] = (),
    gradients: bool = False,
    dtype: str = "float32",
    model_dtype: str = "float32",
    context: int | None = None,
    special: str = "drop",
    prefix: str | int | None = None,
    skip_first: int = 0,
    drop_tokens: Iterable[int] = (),
    drop_norm: float | None = None,
    batch_tokens: int = 8192,
    tokens_per_document: int | None = None,
    rows: int | None = None,
    field: str = "text",
    tokenizer: str | Path | None = None,
    device: str = "auto",
    part: tuple[int, int] | None = None,
    memory: str | int | None = None,
    chunk_rows: int | None = None,
    codec: str | None = None,
    block_bytes: str | int | None = None,
    scratch: str | Path | None = None,
    overwrite: bool = False,
    executor: Executor | None = None,
    progress: Progress | bool = True,
    fsync: bool = True,
    storage_options: dict[str, Any] | None = None,
) -> Collected:
    """Write the activations of ``model`` over ``text`` to the store ``out``.

    Parameters
    ----------
    model : name or path, as transformers' AutoModel takes it; any causal or encoder model, or one with a part that
        is (the text model of Gemma 3, the encoder of T5).
    text : files and folders of JSON lines, JSON, CSV, parquet, Arrow (a document is the ``field`` of each row)
        and plain text (a file is a document), compressed or not; see docs/inputs.md.
    layers, hooks : numbers of ``hidden_states`` (0 is the embedding), names of modules; at least one.
    gradients : also write the gradient of the next-token loss with respect to each layer, float32 (``grad_layer_3``);
        of causal language models only.  `actshuffle.building.gradients` defines the loss.
    dtype, model_dtype : data types of the store (rounded to nearest even), and of the model's computation.
    context : tokens per window, special ones and the prefix included.  Default: 128, or less if the model takes less.
    special : "drop" or "keep" the rows of tokens that the tokenizer adds to each window.
    prefix : a token that each window begins with, whose rows are dropped: "bos", an id, or a token of the vocabulary.
    skip_first : drop the rows of so many tokens at the start of each window, prefix and special tokens included.
    drop_tokens : ids of tokens whose rows are dropped, wherever they stand.
    drop_norm : drop rows whose norm in any layer or module exceeds so many times the median there, or 0.  Default: 10.
    batch_tokens : the most tokens of one forward pass.
    tokens_per_document, rows : the most tokens to take of a document, and the most rows before ``drop_norm``.
    part : (i, n) does the i-th of n parts of the work, i from 1; all parts name the same ``out``.

    Other parameters are as in `actshuffle.shuffle`.
    """
    switches(gradients=gradients)
    model, tokenizer = str(model), None if tokenizer is None else str(tokenizer)
    text = [text] if isinstance(text, str | Path) else several("text", text, of="paths")
    work = Work.of(executor, progress, overwrite=overwrite, fsync=fsync)
    limits = {"context": context, "tokens_per_document": tokens_per_document, "rows": rows}
    for name, value in {**limits, "batch_tokens": batch_tokens}.items():
        if value is not None or name not in limits:
            whole(name, value, 1)
    if not layers and not hooks:
        raise RequestError("give at least one layer or module, with --layers or --hooks")
    if gradients and not layers:
        raise RequestError("gradients are those of layers: give at least one")
    if dtype not in DTYPES or model_dtype not in DTYPES:
        raise RequestError(f"types are {', '.join(DTYPES)}; got {dtype}, {model_dtype}")
    if special not in ("drop", "keep"):
        raise RequestError(f"special tokens are kept or dropped: keep or drop, got {special!r}")
    if isinstance(prefix, bool) or not isinstance(prefix, str | Integral | None) or str(prefix) == "":
        raise RequestError(f"the prefix is bos, the id of a token, or a token, got {prefix!r}")
    rules = Rules.of(skip_first, drop_tokens, DROP_NORM if drop_norm is None else drop_norm)
    if part is not None and not 1 <= part[0] <= part[1]:
        raise RequestError(f"part {part[0]} of {part[1]} makes no sense; parts count from 1")
    place = as_place(out, storage_options)
    source, unfiltered = place.beside(".collect"), place.beside(UNFILTERED)
    files = text_files([Path(p) for p in text], apart=[local_path(p) for p in (place, source, unfiltered)])
    for file in files:
        kind_of(file)  # one that is not text is refused before the model is loaded
    asked: dict[str, Any] = {
        "model": model,
        "tokenizer": tokenizer or model,
        "layers": sorted(set(layers)),
        "hooks": list(dict.fromkeys(hooks)),
        "dtype": dtype,
        "model_dtype": model_dtype,
        "context": context,
        "special": special,
        "batch_tokens": batch_tokens,
        "tokens_per_document": tokens_per_document,
        "rows": rows,
        "field": field,
        "device": device,
        "text": [[str(f.absolute()), f.stat().st_size, f.stat().st_mtime_ns] for f in files],
        "drop_norm": rules.drop_norm,
    }
    named: dict[str, Any] = {"skip_first": rules.skip_first, "drop_tokens": list(rules.drop_tokens)}
    named["gradients"] = gradients
    named["prefix"] = "" if prefix is None else str(prefix)
    asked |= {name: value for name, value in named.items() if value}  # version 0.1.0 had none of these
    with work.locks:
        # Parts share the store; what --overwrite deletes is nobody else's.
        work.locks.take(place, shared=seal(asked) if part is not None and not overwrite else "")
        marker = None if overwrite else read_marker(open_objects(place))
        settings = (virtual.describe(source) or {}).get("settings", {})
        earlier = {k: v for k, v in asked.items() if k != "drop_norm"}  # nor did it drop rows by their norms
        if not (drop_norm or overwrite) and (
            settings.get("asked") == earlier or (marker or {}).get("collected") == seal(earlier)
        ):
            asked = earlier
        identity, filters = seal(asked), bool(asked.get("drop_norm"))
        all_rows = read_marker(open_objects(unfiltered)) if filters and not overwrite else None
        collected = all_rows is not None and all_rows.get("collected") == identity
        if marker is not None and marker.get("collected") != identity:
            raise DestinationExistsError(f"{place} is finished with other arguments; --overwrite replaces it")
        if marker is not None and not collected:
            return _collected(place, marker, 0.0)
        most = BLOCK_BYTES if block_bytes is None else block_bytes
        tasks = max(3 * work.crew.workers, part[1]) if part else None
        request = Request.among(locals(), seed=0, source_row=False, block_bytes=most, tasks_wanted=tasks)
        if not collected:
            if settings.get("asked") != asked or overwrite:
                _refuse_other(place, settings.get("asked"), asked, overwrite)
                settings = write_source(source, files, asked, identity, work.progress)
            target = unfiltered if filters else place
            job = prepared(source, target, request, work)
            if filters:
                _make_way(job, place, overwrite)
            course, plan, crew = Shuffle(job, work.locks), job.plan, work.crew
            with heard_by(work.progress, plan.row_bytes):
                if part is None:
                    execute(job, crew, work.progress, work.locks)
                alone = part is None or run_part(course, part, crew, work.progress)
            if not alone and not is_finished(open_objects(place)):
                size, dropped = (settings["documents"], plan.rows * plan.row_bytes), settings.get("dropped", {})
                return Collected(str(place), plan.rows, *size, work.seconds, complete=False, dropped=dropped)
            open_objects(source).delete_prefix("")
        if filters:
            with Locks() as held:
                try:
                    held.take(unfiltered)
                except DestinationInUseError:
                    if part is None:
                        raise
                    # Two parts were the last at the same time, and the other one copies.
                    found = _collected(unfiltered, all_rows or job.known.marker, work.seconds)
                    return replace(found, destination=str(place), complete=False)
                _drop_far(unfiltered, place, asked, request, replace(work, overwrite=False))
        return _collected(place, read_marker(open_objects(place)) or {}, work.seconds)


def _collected(place: Place, marker: Mapping[str, Any], seconds: float) -> Collected:
    """The outcome that a finished store tells."""
    made = open_place(place)
    dropped = made.attributes.get("dropped_rows", {})
    return Collected(made.path, made.rows, marker["documents"], made.nbytes, seconds, dropped=dropped)


def _make_way(job: Job, place: Place, overwrite: bool) -> None:
    """Refuse what is in the way of the filtered rows, and a disk without room for them beside all rows."""
    recorded, _ = look_at(place, overwrite)
    if recorded is not None:
        raise ResumeMismatchError(f"{place} is half done with other arguments; --overwrite starts again")
    objects = open_objects(place)
    need, free = 2 * job.plan.output_bytes, objects.free_bytes()
    if free is not None and need > free and job.at_destination.size(RUN_KEY) is None:
        raise InfeasibleError(
            f"{place} needs {format_bytes(need)}, for all rows and for those that --drop-norm leaves, and its disk has "
            f"{format_bytes(free)} free; free some, or give --drop-norm 0 and filter on another disk"
        )
    if overwrite:
        remove(objects)


def _drop_far(unfiltered: Place, place: Place, asked: Mapping[str, Any], request: Request, work: Work) -> None:
    """Copy the rows whose norms are near the median, and remove the others."""
    try:
        store = open_place(unfiltered)
        names = sorted([*(f"layer_{n}" for n in asked["layers"]), *asked["hooks"]])
        rules = Rules(drop_norm=asked["drop_norm"], arrays=tuple(names))
        marker = {k: v for k, v in (store.marker or {}).items() if k in ("source", "collected", "documents")}

        def attributes(passed: Passed) -> dict[str, Any]:
            told = {"multiple": rules.drop_norm, "medians": passed.medians, "rows": passed.beyond}
            before, dropped = store.attributes, {"drop_norm": passed.dropped["drop_norm"]}
            changed = {"row_filter": before["row_filter"] | {"drop_norm": told}}
            return before | changed | {"dropped_rows": before["dropped_rows"] | dropped}

        copy_passed(store, place, rules, attributes, marker, request, work)
    except ActshuffleError:
        if not is_finished(open_objects(place)):  # else another part was faster
            raise
    open_objects(unfiltered).delete_prefix("")


def _refuse_other(place: Place, was: dict[str, Any] | None, now: dict[str, Any], overwrite: bool) -> None:
    """Refuse to resume a half-done collection with other arguments."""
    if overwrite or not is_begun(place):
        return
    unfiltered = read_marker(open_objects(place.beside(UNFILTERED)))
    if was is None and unfiltered is None:
        return  # what is there is another run's, which `prepare` refuses
    before = now if was is None else was
    changed = [k for k in sorted(now | before) if before.get(k) != now.get(k)]
    told = ["the text changed" if k == "text" else f"{k} was {before.get(k)!r}, now {now.get(k)!r}" for k in changed]
    raise ResumeMismatchError(
        f"{place} is half done with other arguments{': ' * bool(told)}{'; '.join(told)}. Give the same to resume, or "
        "--overwrite to start again"
    )
