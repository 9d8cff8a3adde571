"""The safetensors format, written row by row and read by slices.

::

    8 bytes   length of the header, little-endian
    header    JSON: {name: {"dtype": "F32", "shape": [n, d], "data_offsets": [from, to]}, "__metadata__": {...}}
    data      the tensors' bytes, little-endian, C order, without gaps

The safetensors package is not used, since its writer needs every tensor whole in memory, and a dictionary larger than
one machine's memory is exported from its shards a block at a time.  Nothing in such a file is code.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from actshuffle.units import counted
from saetrain.errors import CheckpointError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MOST_HEADER = 100_000_000


class Spec(NamedTuple):
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write(
    path: Path, specs: Mapping[str, Spec], blocks: Iterable[tuple[str, Tensor]], metadata: Mapping[str, str]
) -> str:
    """Write a file and make it durable; returns the SHA-256 of its bytes.

    `blocks` gives each tensor in the order of `specs`, whole or as consecutive blocks of rows.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, spec in specs.items():
        header[name] = {"dtype": _NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [at, at + spec.nbytes]}
        at += spec.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest, written, due = hashlib.sha256(), 0, iter(specs)
    name, left = "", 0
    with path.open("wb") as file:
        for part in (len(text).to_bytes(8, "little"), text):
            file.write(part)
            digest.update(part)
        for of, block in blocks:
            if not left:
                name = next(due, "")
                while specs.get(name, Spec(torch.uint8, (1,))).nbytes == 0:
                    name = next(due, "")
                left = specs[name].nbytes if name else 0
            piece = as_bytes(block)
            if of != name or len(piece) > left or block.dtype != specs[name].dtype:
                raise ValueError(f"block of {of!r}, {counted(len(piece), 'byte')}, where {left} of {name!r} are due")
            file.write(piece)
            digest.update(piece)
            written, left = written + len(piece), left - len(piece)
        if written != at:
            raise ValueError(f"{counted(written, 'byte')} given, {at} announced")
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def as_bytes(x: Tensor) -> memoryview:
    """The bytes of a tensor, copied if it is on a GPU or not contiguous."""
    flat = x.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return memoryview(flat.numpy())  # type: ignore[arg-type]


class TensorFile:
    """A file to read from.  Opening it reads the header only."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if not 2 <= length <= min(size - 8, _MOST_HEADER):
                    raise ValueError(f"header of {counted(length, 'byte')} in a file of {size}")
                header = json.loads(file.read(length))
            self.start = 8 + length
            self.metadata: dict[str, str] = header.pop("__metadata__", {})
            self.specs, self.offsets = {}, {}
            for name, entry in header.items():
                spec = Spec(DTYPES[entry["dtype"]], tuple(int(s) for s in entry["shape"]))
                a, b = (int(v) for v in entry["data_offsets"])
                fits = b - a == spec.nbytes and 0 <= a <= b <= size - self.start
                if min(spec.shape, default=0) < 0 or not fits:
                    raise ValueError(
                        f"{name!r} at [{a}, {b}) of {counted(size - self.start, 'byte')} does not fit {spec}"
                    )
                self.specs[name], self.offsets[name] = spec, a
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} is not a safetensors file: {error}") from error

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows [start, stop) of a tensor, copied into new memory."""
        if name not in self.specs:
            raise CheckpointError(f"{self.path} has no {name!r}; it has {sorted(self.specs)}")
        spec = self.specs[name]
        rows = spec.shape[0] if spec.shape else 1
        start, stop, _ = slice(start, stop).indices(rows)
        row_bytes = spec.nbytes // max(rows, 1)
        with self.path.open("rb") as file:
            file.seek(self.start + self.offsets[name] + start * row_bytes)
            data = np.fromfile(file, np.uint8, max(stop - start, 0) * row_bytes)
        empty = torch.empty(0, dtype=spec.dtype)
        flat = torch.from_numpy(data).view(spec.dtype) if len(data) else empty
        return flat.view(max(stop - start, 0), *spec.shape[1:]) if spec.shape else flat.view(())

    def mapped(self, name: str) -> Tensor:
        """A whole tensor in the file's own pages, which the system may drop; what is written to it stays in memory."""
        spec = self.specs[name]
        if not spec.nbytes:
            return self.read(name)
        data = np.memmap(self.path, np.uint8, "c", self.start + self.offsets[name], (spec.nbytes,))
        return torch.frombuffer(data, dtype=spec.dtype).view(spec.shape)

    def blocks(self, name: str, rows: int = 1024) -> Iterator[Tensor]:
        for start in range(0, self.specs[name].shape[0], rows):
            yield self.read(name, start, start + rows)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
