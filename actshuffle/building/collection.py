"""Collect activations of a language model over text into a store, in document order.

>>> collect("gpt2", ["corpus/"], "acts.zarr", layers=[3, 5])          # doctest: +SKIP

Text becomes tokens first, which fixes the number of rows.  Then the activations are a virtual source
(activations.py), and a run copies it block by block: whole chunks, receipts, a marker at the end, and a
stopped run resumes at the block where it was.  One row is one token::

    layer_3, layer_5      the residual stream, hidden_states[3] and [5]
    NAME                  the output of the module NAME
    token, document, position

Several processes share the work with ``part``: each does its blocks, and the last one publishes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actshuffle._version import __version__
from actshuffle.arrays import virtual
from actshuffle.arrays.marker import read_marker
from actshuffle.arrays.metadata import metadata_of
from actshuffle.arrays.names import RUN_KEY
from actshuffle.building.activations import READER
from actshuffle.building.models import DTYPES, Model, load_tokenizer, model_of
from actshuffle.building.tokens import COLUMNS, Cut, special_tokens, tokenize
from actshuffle.engine.prepare import prepare
from actshuffle.engine.request import Request
from actshuffle.engine.run import Shuffle, copy_through
from actshuffle.errors import DestinationExistsError, RequestError, ResumeMismatchError, SourceError
from actshuffle.executors import Executor, Serial
from actshuffle.executors.choice import as_executor
from actshuffle.foreign.finding import text_files
from actshuffle.foreign.textfiles import kind_of
from actshuffle.jobs.running import run_part
from actshuffle.loading.dataset import open_dataset
from actshuffle.progress import Progress, Silent
from actshuffle.seals import checksum, seal
from actshuffle.storage.objects import open_objects
from actshuffle.storage.place import Place, as_place, local_path
from actshuffle.units import counted, format_bytes, format_seconds, switches

BLOCK_BYTES = 128 << 20  # the most work that a kill can cost
NAMED_FILES = 10_000  # attributes name up to this many files, and count more


@dataclass(frozen=True)
class Collected:
    """The outcome of a collection; ``complete`` is False while other parts are still missing."""

    destination: str
    rows: int
    documents: int
    nbytes: int
    seconds: float
    complete: bool = True

    def __str__(self) -> str:
        if not self.seconds:
            size = f"{counted(self.rows, 'token')} of {counted(self.documents, 'document')}"
            return f"{self.destination}: already finished, {size}"
        rate = f", {self.rows / self.seconds:,.0f} rows/s" if self.complete else ""
        state = "" if self.complete else "; this part is done, others are not"
        return (
            f"{self.destination}: {counted(self.rows, 'token')} of {counted(self.documents, 'document')}, "
            f"{format_bytes(self.nbytes)}, {format_seconds(self.seconds)}{rate}{state}"
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
    context : tokens per window, special ones included.  Default: 128, or less if the model takes less.
    special : "drop" or "keep" the rows of tokens that the tokenizer adds to each window.
    batch_tokens : the most tokens of one forward pass.
    tokens_per_document, rows : the most tokens to take of a document, and in total.
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
    }
    identity = seal(asked)
    marker = None if overwrite else read_marker(open_objects(place))
    if marker is not None:
        if marker.get("collected") != identity:
            raise DestinationExistsError(f"{place} is finished with other arguments; --overwrite replaces it")
        done = open_dataset(out, storage_options=storage_options)
        return Collected(done.path, done.rows, marker["documents"], done.nbytes, 0.0)
    settings = (virtual.describe(source) or {}).get("settings", {})
    if settings.get("asked") != asked or overwrite:
        _refuse_other(place, settings.get("asked"), asked, overwrite)
        settings = _write_source(source, files, asked, identity, shown)
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
    return Collected(str(place), plan.rows, settings["documents"], nbytes, seconds, complete)


def _refuse_other(place: Place, was: dict[str, Any] | None, now: dict[str, Any], overwrite: bool) -> None:
    """Refuse to resume a half-done collection with other arguments."""
    if overwrite or was is None or open_objects(place).size(RUN_KEY) is None:
        return
    told = [
        "the text changed" if k == "text" else f"{k} was {was.get(k)!r}, now {now[k]!r}"
        for k in sorted(now)
        if was.get(k) != now[k]
    ]
    raise ResumeMismatchError(
        f"{place} is half done with other arguments: {'; '.join(told)}. Give the same to resume, or "
        "--overwrite to start again"
    )


def _write_source(
    source: Place, files: Sequence[Path], asked: dict[str, Any], identity: str, progress: Progress
) -> dict[str, Any]:
    """Probe the model, turn the text into tokens, and write both as a virtual source."""
    tokenizer = load_tokenizer(asked["tokenizer"])
    before, after = special_tokens(tokenizer)
    run = {k: asked[k] for k in ("model", "model_dtype", "layers", "hooks", "dtype", "device")}
    run["probe"] = [*before, *tokenizer("one two three", add_special_tokens=False)["input_ids"], *after]
    model = model_of(run)
    most = model.most_tokens(tokenizer)
    context = asked["context"] or min(128, most)
    content = context - len(before) - len(after)
    if content < 1 or context > most:
        raise RequestError(
            f"a window of {counted(context, 'token')}: the model takes {most:,} at most, {len(before) + len(after)} of "
            "them special"
        )
    widths = model.widths(run["probe"], context)
    objects = open_objects(source)
    there = virtual.describe(source)
    if there is not None and there["settings"].get("asked") != asked:
        objects.delete_prefix("")  # one of the same arguments stays: another part may be reading it
    cut = Cut(objects, content, before, after, asked["special"] == "keep", asked["rows"])
    progress.begin("tokens", len(files), 0)
    try:
        listing = tokenize(files, tokenizer, cut, asked, progress)
    except SourceError:
        if virtual.describe(source) is None:  # otherwise another part has written it, of the same text
            objects.delete_prefix("")
        raise
    progress.end()
    cut.finish()
    if cut.rows == 0:
        raise SourceError(f"no tokens in {', '.join(map(str, files[:3]))}" + ", ..." * (len(files) > 3))
    dtype = {"float32": "<f4", "float16": "<f2"}.get(asked["dtype"], asked["dtype"])
    shapes = {name: (dtype, (width // DTYPES[asked["dtype"]],)) for name, width in widths.items()}
    arrays = {name: metadata_of(name, *shape, cut.rows) for name, shape in shapes.items()}
    arrays |= {name: metadata_of(name, kind, (), cut.rows) for name, kind in COLUMNS.items()}
    settings = {
        "asked": asked,
        "run": run,
        "prefix": before,
        "suffix": after,
        "special": asked["special"],
        "batch_tokens": asked["batch_tokens"],
        "groups": cut.groups,
        "row_bytes": widths,
        "documents": cut.documents,
        "model": model.identity,
    }
    virtual.write(
        source,
        READER,
        settings,
        arrays,
        _attributes(asked, model, tokenizer, context, before, after, listing, cut),
        kind="copy",
        stage="collect",
        marker={"kind": "collection", "source": asked["model"], "collected": identity, "documents": cut.documents},
    )
    return settings


def _attributes(
    asked: Mapping[str, Any],
    model: Model,
    tokenizer: Any,
    context: int,
    before: Sequence[int],
    after: Sequence[int],
    listing: list[dict[str, Any]],
    cut: Cut,
) -> dict[str, Any]:
    """The attributes of the store: enough to make it again, and to read it."""
    names = [str(tokenizer.decode([i])) for i in (*before, *after)]
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    of = " of the encoder" if "part" in model.identity else ""
    layers = {
        f"layer_{n}": f"hidden_states[{n}]{of}: the residual stream "
        + ("before the first block" if n == 0 else f"after {n} of {model.layers} blocks")
        + (", with the final norm where the model applies one" if n == model.layers else "")
        for n in asked["layers"]
    }
    return {
        "model": model.identity,
        "tokenizer": {
            "name": asked["tokenizer"],
            "class": type(tokenizer).__name__,
            "vocabulary": len(tokenizer),
            "fingerprint": checksum(vocabulary, 32),
        },
        "arrays": layers | {name: f"output of {name}" for name in asked["hooks"]},
        "dtype": asked["dtype"],
        "windows": f"{counted(context, 'token')} at most, {len(before) + len(after)} of them special; windows of a "
        "document follow each other without overlap; each runs alone or with others of its length, so "
        "there is no padding",
        "special_tokens": {
            "rows": "kept, with position -1" if asked["special"] == "keep" else "dropped",
            "tokens": names,
        },
        "documents": listing if len(listing) <= NAMED_FILES else len(listing),
        "collected_by": f"actshuffle {__version__}",
    }
