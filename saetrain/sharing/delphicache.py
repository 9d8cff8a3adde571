"""delphi's cache of activations, so that its explainers and scorers run on them: one file for each chunk of latents.

::

    latents/MODULE/FIRST_LAST.safetensors     locations [n, 3] (sequence, position, latent - FIRST), activations [n],
                                              tokens [sequences, length]
    latents/MODULE/config.json

The rows of the store are cut into sequences of equal length; rows at the end that fill none are left out.  A sequence
may run from one document into the next.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actshuffle.units import counted
from saetrain.errors import ExchangeError
from saetrain.features.keeping import by_feature
from saetrain.sharing.naming import Names

HALF = 65_504  # the largest number of float16


def arrays(features: Any, chunk: int, length: int) -> tuple[str, dict[str, NDArray[Any]]]:
    """The name of a chunk's file, and its arrays."""
    facts = features.facts
    first, last = chunk * facts["chunk"], min((chunk + 1) * facts["chunk"], len(features)) - 1
    counts = features.array("stat/count", first, last + 1)
    total, sequences = int(counts.sum()), features.rows // length
    data = features.group(by_feature(chunk)) if total else None
    rows = data.read("row", 0, total) if data else np.zeros(0, np.int64)
    values = data.read("value", 0, total) if data else np.zeros(0, np.float32)
    latent = np.repeat(np.arange(last + 1 - first), counts)
    whole = rows < sequences * length
    found = np.stack([rows // length, rows % length, latent], axis=1)[whole]
    kind = np.uint16 if int(found.max(initial=0)) < 1 << 16 else np.uint32
    values = values[whole]
    fits = float(abs(values).max(initial=0)) <= HALF
    tokens = features.store.read(facts["token"], 0, sequences * length).astype(np.int64)
    return f"{first}_{last}.safetensors", {
        "locations": found.astype(kind),
        "activations": values.astype(np.float16 if fits else np.float32),
        "tokens": tokens.reshape(sequences, length),
    }


def safetensors(held: dict[str, NDArray[Any]]) -> bytes:
    """A safetensors file of arrays; `saetrain.tensors` has the types of torch only, and no unsigned ones."""
    header, at = {}, 0
    for name, array in held.items():
        kind = f"{array.dtype.kind.upper()}{array.dtype.itemsize * 8}"
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [at, at + array.nbytes]}
        at += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return b"".join(
        [len(text).to_bytes(8, "little"), text, *(np.ascontiguousarray(a).tobytes() for a in held.values())]
    )


def config(features: Any, names: Names, length: int) -> bytes:
    """The content of config.json."""
    found = {
        "dataset_repo": names.dataset,
        "dataset_split": "",
        "dataset_name": "",
        "dataset_column": "text",
        "batch_size": 32,
        "ctx_len": length,
        "cache_ctx_len": length,
        "n_tokens": features.rows // length * length,
        "n_splits": -(-len(features) // features.facts["chunk"]),
        "model_name": names.model,
    }
    return json.dumps(found, indent=4).encode()


def check(features: Any, length: int) -> None:
    """Refuse what the format cannot hold, before anything is written."""
    if not features.facts["keep_codes"]:
        raise ExchangeError(
            f"{features.path} keeps no codes, and delphi needs them: run `saetrain features --keep-codes`"
        )
    if not 1 <= length <= features.rows:
        raise ExchangeError(
            f"sequences of {counted(length, 'token')}, and the store has {counted(features.rows, 'row')}"
        )
