"""What tasks of `interactions` leave for later tasks: named arrays in one object, with checksums."""

from __future__ import annotations

import io
import zipfile
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actshuffle.jobs import FolderJob, FolderTask
from saetrain.errors import DataError
from saetrain.products.energy import Gram
from saetrain.products.tiles import COLUMNS, Kept

SCRATCH = "scratch"


def put(job: FolderJob, name: str, arrays: dict[str, Tensor]) -> tuple[str, int]:
    """Write tensors under a name; returns the object's key and its size."""
    held = io.BytesIO()
    np.savez(held, allow_pickle=False, **{key: tensor.cpu().numpy() for key, tensor in arrays.items()})
    key = f"{SCRATCH}/{name}.npz"
    job.objects.put(key, held.getbuffer())
    return key, held.tell()


def get(job: FolderJob, name: str) -> dict[str, Tensor]:
    """Read them; a damaged object is an error that names it."""
    key = f"{SCRATCH}/{name}.npz"
    try:
        with np.load(io.BytesIO(job.objects.get(key) or b"")) as held:
            return {name: torch.from_numpy(held[name]) for name in held.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{job.place}/{key} is damaged ({error}); delete it, and run again to make it anew") from error


def is_there(job: FolderJob, task: FolderTask, receipt: dict[str, Any]) -> bool:
    """True if the objects that a receipt names are present."""
    return all(job.objects.size(key) is not None for key in receipt["keys"])


# --- Gram matrices and tables -------------------------------------------------------------------


def get_gram(job: FolderJob, name: str) -> Gram:
    held = get(job, name)
    return Gram(held["matrix"], held["total"])


def tensors_of(kept: Kept) -> dict[str, Tensor]:
    found = {"over": kept.over, "top_value": kept.top.value, "top_index": kept.top.index}
    if kept.bottom is not None:
        found |= {"bottom_value": kept.bottom.value, "bottom_index": kept.bottom.index}
    return found


def join(kept: Kept, start: int, part: dict[str, Tensor]) -> None:
    """Take the tables of a part, whose first row is `start`; parts come in order of their columns."""
    kept.over[start : start + len(part["over"])] += part["over"]
    for name, table in (("top", kept.top), ("bottom", kept.bottom)):
        value, index = part.get(f"{name}_value"), part.get(f"{name}_index")
        for low in range(0, len(part["over"]), COLUMNS):  # which bounds what an offer takes on the way
            if table is not None and value is not None and index is not None:
                table.offer(start + low, value[low : low + COLUMNS], index[low : low + COLUMNS])
