"""Text and a model as a virtual source: probe the model, turn the text into tokens, and describe both.

The description fixes the number of rows before the first pass of the model; activations.py reads the rows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from actshuffle._version import __version__
from actshuffle.arrays import virtual
from actshuffle.arrays.metadata import metadata_of
from actshuffle.building.activations import READER
from actshuffle.building.models import DTYPES, Model, load_tokenizer, model_of
from actshuffle.building.tokens import COLUMNS, Cut, Frame, prefix_token, special_tokens, tokenize
from actshuffle.errors import RequestError, SourceError
from actshuffle.progress import Progress
from actshuffle.seals import checksum
from actshuffle.storage.objects import open_objects
from actshuffle.storage.place import Place
from actshuffle.units import counted, dropped_text

NAMED_FILES = 10_000  # attributes name up to this many files, and count more


def write_source(
    source: Place, files: Sequence[Path], asked: dict[str, Any], identity: str, progress: Progress
) -> dict[str, Any]:
    """Write the virtual source of a collection and return the settings of its reader."""
    tokenizer = load_tokenizer(asked["tokenizer"])
    before, after = special_tokens(tokenizer)
    lead = [prefix_token(tokenizer, asked["prefix"])] if "prefix" in asked else []
    if lead and before[:1] == lead:
        raise RequestError(
            f"the tokenizer begins each window with {tokenizer.decode(lead)!r} itself, and rows of special tokens are "
            "dropped unless --special keep is given: leave --prefix out"
        )
    run = {k: asked[k] for k in ("model", "model_dtype", "layers", "hooks", "dtype", "device")}
    if "gradients" in asked:
        run["gradients"] = True
    run["probe"] = [*lead, *before, *tokenizer("one two three", add_special_tokens=False)["input_ids"], *after]
    model = model_of(run)
    most = model.most_tokens(tokenizer)
    context = asked["context"] or min(128, most)
    around = len(lead) + len(before) + len(after)
    if context <= around or context > most:
        whose = f"{around} of them special" if not lead else f"{around} of them special or the prefix"
        raise RequestError(f"a window of {counted(context, 'token')}: the model takes {most:,} at most, {whose}")
    drop_tokens = asked.get("drop_tokens", [])
    if drop_tokens and not 0 <= drop_tokens[0] <= drop_tokens[-1] < len(tokenizer):
        raise RequestError(f"tokens to drop are ids from 0 to {len(tokenizer) - 1:,}, got {drop_tokens}")
    keep, skip_first = asked["special"] == "keep", asked.get("skip_first", 0)
    frame = Frame(context - around, tuple(lead), tuple(before), tuple(after), keep, skip_first, tuple(drop_tokens))
    widths = model.widths(run["probe"], context)
    objects = open_objects(source)
    there = virtual.describe(source)
    if there is not None and there["settings"].get("asked") != asked:
        objects.delete_prefix("")  # one of the same arguments stays: another part may be reading it
    cut = Cut(objects, frame, asked["rows"])
    try:
        listing = _tokenized(files, tokenizer, cut, asked, progress)
    except SourceError:
        if virtual.describe(source) is None:  # otherwise another part has written it, of the same text
            objects.delete_prefix("")
        raise
    gradients = {f"grad_layer_{n}" for n in asked["layers"]} if "gradients" in asked else set()
    dtype = {"float32": "<f4", "float16": "<f2"}.get(asked["dtype"], asked["dtype"])
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {
        name: ("<f4", (width // 4,)) if name in gradients else (dtype, (width // DTYPES[asked["dtype"]],))
        for name, width in widths.items()
    }
    arrays = {name: metadata_of(name, *shape, cut.rows) for name, shape in shapes.items()}
    arrays |= {name: metadata_of(name, kind, (), cut.rows) for name, kind in COLUMNS.items()}
    settings = {
        "asked": asked,
        "run": run,
        "lead": lead,
        "prefix": before,
        "suffix": after,
        "special": asked["special"],
        "drops": frame.drops,
        "batch_tokens": model.batch_tokens(asked["batch_tokens"]),
        "groups": cut.groups,
        "row_bytes": widths,
        "documents": cut.documents,
        "dropped": cut.dropped | {"drop_norm": 0},
        "model": model.identity,
    }
    attributes = _attributes(asked, model, tokenizer, frame, listing, cut)
    marker = {"kind": "collection", "source": asked["model"], "collected": identity, "documents": cut.documents}
    virtual.write(source, READER, settings, arrays, attributes, kind="copy", stage="collect", marker=marker)
    return settings


def _tokenized(
    files: Sequence[Path], tokenizer: Any, cut: Cut, asked: Mapping[str, Any], progress: Progress
) -> list[dict[str, Any]]:
    """Cut all text into windows, of which some row must be left; returns which file has which documents."""
    progress.begin("tokens", len(files), 0)
    listing = tokenize(files, tokenizer, cut, asked, progress)
    progress.end()
    cut.finish()
    if cut.rows == 0:
        where = ", ".join(map(str, files[:3])) + ", ..." * (len(files) > 3)
        if lost := dropped_text({option: cut.dropped[option] for option in ("skip_first", "drop_tokens")}):
            raise SourceError(f"no row is left of {where}: {lost}")
        raise SourceError(f"no tokens in {where}")
    return listing


def _attributes(
    asked: Mapping[str, Any], model: Model, tokenizer: Any, frame: Frame, listing: list[dict[str, Any]], cut: Cut
) -> dict[str, Any]:
    """The attributes of the store: enough to make it again, and to read it."""
    names = [str(tokenizer.decode([i])) for i in (*frame.before, *frame.after)]
    special = f"{len(names)} of them special" + ", 1 the prefix" * len(frame.lead)
    prefix = [{"id": i, "token": str(tokenizer.decode([i]))} for i in frame.lead]
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    of = " of the encoder" if "part" in model.identity else ""
    layers = {
        f"layer_{n}": f"hidden_states[{n}]{of}: the residual stream "
        + ("before the first block" if n == 0 else f"after {n} of {counted(model.layers, 'block')}")
        + (", with the final norm where the model applies one" if n == model.layers else "")
        for n in asked["layers"]
    }
    grads = {
        f"grad_layer_{n}": f"gradient of the window's loss with respect to layer_{n}, float32; the loss is the cross "
        "entropy in nats, summed over all tokens that the window reads but the first"
        for n in (asked["layers"] if "gradients" in asked else ())
    }
    return {
        "model": model.identity,
        "tokenizer": {
            "name": asked["tokenizer"],
            "class": type(tokenizer).__name__,
            "vocabulary": len(tokenizer),
            "fingerprint": checksum(vocabulary, 32),
        },
        "arrays": layers | grads | {name: f"output of {name}" for name in asked["hooks"]},
        "dtype": asked["dtype"],
        "windows": f"{counted(frame.context, 'token')} at most, {special}; windows of a document follow each other "
        "without overlap; each runs alone or with others of its length, so there is no padding",
        "special_tokens": {
            "rows": "kept, with position -1" if asked["special"] == "keep" else "dropped",
            "tokens": names,
        },
        "row_filter": {
            "prefix": prefix[0] if prefix else None,
            "skip_first": frame.skip_first,
            "drop_tokens": list(frame.drop_tokens),
            "drop_norm": None,
        },
        "dropped_rows": cut.dropped | {"drop_norm": 0},
        "documents": listing if len(listing) <= NAMED_FILES else len(listing),
        "collected_by": f"actshuffle {__version__}",
    }
