"""Collect activations of a language model over text into a store, in document order.

>>> collect("gpt2", ["corpus/"], "acts.zarr", layers=[3, 5])          # doctest: +SKIP

Text becomes tokens first, which fixes the number of rows.  Then the activations are a virtual source
(activations.py), and a run copies it block by block: whole chunks, receipts, a marker at the end, and a
stopped run resumes at the block where it was.  One row is one token::

    layer_3, layer_5      the residual stream, hidden_states[3] and [5]
    NAME                  the output of the module NAME
    token, document, position, window_position

Several processes share the work with ``part``: each does its blocks, and the last one publishes.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from typing import Any

from actshuffle.arrays import virtual
from actshuffle.arrays.marker import read_marker
from actshuffle.arrays.names import RUN_KEY
from actshuffle.building.models import DTYPES
from actshuffle.building.textsource import write_source
from actshuffle.engine.prepare import prepare
from actshuffle.engine.request import Request
from actshuffle.engine.run import Shuffle, copy_through
from actshuffle.errors import DestinationExistsError, RequestError, ResumeMismatchError
from actshuffle.executors import Executor, Serial
from actshuffle.executors.choice import as_executor
from actshuffle.foreign.finding import text_files
from actshuffle.foreign.textfiles import kind_of
from actshuffle.jobs.running import run_part
from actshuffle.loading.dataset import open_dataset
from actshuffle.progress import Progress, Silent
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
        rate = f", {self.rows / self.seconds:,.0f} rows/s" if self.complete else ""
        state = "" if self.complete else "; this part is done, others are not"
        told = dropped_text(self.dropped)
        dropped = f"\n  rows dropped: {told}" if told else ""
        return (
            f"{self.destination}: {size}, {format_bytes(self.nbytes)}, {format_seconds(self.seconds)}{rate}{state}"
            f"{dropped}"
        )


def collect(
    model: str,
    text: Sequence[str | Path],
    out: str | Path,
    *,
    layers: Sequence[int] = (),
    hooks: Sequence[str] = (),
    dtype: str = "float32",
    model_dtype: str = "float32",
    context: int | None = None,
    special: str = "drop",
    prefix: str | int | None = None,
    skip_first: int = 0,
    drop_tokens: Iterable[int] = (),
    batch_tokens: int = 8192,
    tokens_per_document: int | None = None,
    rows: int | None = None,
    field: str = "text",
    tokenizer: str | None = None,
    device: str = "auto",
    part: tuple[int, int] | None = None,
    memory: str | int | None = None,
    chunk_rows: int | None = None,
    codec: str | None = None,
    block_bytes: str | int | None = None,
    scratch: str | Path | None = None,
    overwrite: bool = False,
    executor: Executor | None = None,
    progress: Progress | None = None,
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
    dtype, model_dtype : data types of the store (rounded to nearest even), and of the model's computation.
    context : tokens per window, special ones and the prefix included.  Default: 128, or less if the model takes less.
    special : "drop" or "keep" the rows of tokens that the tokenizer adds to each window.
    prefix : a token that each window begins with, whose rows are dropped: "bos", an id, or a token of the vocabulary.
    skip_first : drop the rows of so many tokens at the start of each window, prefix and special tokens included.
    drop_tokens : ids of tokens whose rows are dropped, wherever they stand.
    batch_tokens : the most tokens of one forward pass.
    tokens_per_document, rows : the most tokens to take of a document, and the most rows in total.
    part : (i, n) does the i-th of n parts of the work, i from 1; all parts name the same ``out``.

    Other parameters are as in `actshuffle.shuffle`.
    """
    switches(overwrite=overwrite, fsync=fsync)
    started, crew, shown = (
        time.perf_counter(),
        as_executor(Serial() if executor is None else executor),
        progress or Silent(),
    )
    if not layers and not hooks:
        raise RequestError("give at least one layer or module")
    if dtype not in DTYPES or model_dtype not in DTYPES:
        raise RequestError(f"types are {', '.join(DTYPES)}; got {dtype}, {model_dtype}")
    if special not in ("drop", "keep"):
        raise RequestError(f"special tokens are kept or dropped: keep or drop, got {special!r}")
    if isinstance(prefix, bool) or not isinstance(prefix, str | Integral | None) or str(prefix) == "":
        raise RequestError(f"the prefix is bos, the id of a token, or a token, got {prefix!r}")
    rules: dict[str, Any] = {"prefix": prefix if prefix is None else str(prefix)}
    rules["skip_first"] = whole("skip_first", skip_first)
    rules["drop_tokens"] = sorted(
        {whole("drop_tokens", token) for token in several("drop_tokens", drop_tokens, of="ids")}
    )
    if part is not None and not 1 <= part[0] <= part[1]:
        raise RequestError(f"part {part[0]} of {part[1]} makes no sense; parts count from 1")
    place = as_place(out, storage_options)
    source = place.beside(".collect")
    files = text_files([Path(p) for p in text], apart=[local_path(place), local_path(source)])
    for file in files:
        kind_of(file)  # one that is not text is refused before the model is loaded
    asked = {
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
        **{name: value for name, value in rules.items() if value not in (None, 0, [])},  # earlier versions had none
    }
    identity = seal(asked)
    marker = None if overwrite else read_marker(open_objects(place))
    if marker is not None:
        if marker.get("collected") != identity:
            raise DestinationExistsError(f"{place} is finished with other arguments; --overwrite replaces it")
        done = open_dataset(out, storage_options=storage_options)
        dropped = done.attributes.get("dropped_rows", {})
        return Collected(done.path, done.rows, marker["documents"], done.nbytes, 0.0, dropped=dropped)
    settings = (virtual.describe(source) or {}).get("settings", {})
    if settings.get("asked") != asked or overwrite:
        _refuse_other(place, settings.get("asked"), asked, overwrite)
        settings = write_source(source, files, asked, identity, shown)
    request = Request.of(
        seed=0,
        source_row=False,
        memory=memory,
        block_bytes=BLOCK_BYTES if block_bytes is None else block_bytes,
        chunk_rows=chunk_rows,
        codec=codec,
        scratch=scratch,
        tasks_wanted=max(3 * crew.workers, part[1]) if part else None,
    )
    complete = True
    if part is None:
        plan = copy_through(source, place, request, crew, shown, overwrite=overwrite, fsync=fsync).plan
    else:
        job = prepare(source, place, request, crew, overwrite=overwrite, fsync=fsync)
        plan, complete = job.plan, run_part(Shuffle(job), part, crew, shown)
        if complete:
            open_objects(source).delete_prefix("")
    nbytes, seconds = plan.rows * plan.row_bytes, time.perf_counter() - started
    dropped = settings.get("dropped", {})
    return Collected(str(place), plan.rows, settings["documents"], nbytes, seconds, complete, dropped)


def _refuse_other(place: Place, was: dict[str, Any] | None, now: dict[str, Any], overwrite: bool) -> None:
    """Refuse to resume a half-done collection with other arguments."""
    if overwrite or was is None or open_objects(place).size(RUN_KEY) is None:
        return
    told = [
        "the text changed" if k == "text" else f"{k} was {was.get(k)!r}, now {now.get(k)!r}"
        for k in sorted(now | was)
        if was.get(k) != now.get(k)
    ]
    raise ResumeMismatchError(
        f"{place} is half done with other arguments: {'; '.join(told)}. Give the same to resume, or "
        "--overwrite to start again"
    )
