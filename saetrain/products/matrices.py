"""Rows of a product's two sides: encoder or decoder rows of a dictionary, or the rows of a matrix in a file.

Rows are read a tile of COLUMNS at a time, at multiples of COLUMNS, and every computation on them sees such a tile;
so their bits do not depend on who reads them.  A run of ours is read by slices.  A folder of another tool is loaded
whole, since its encoder may lie in the file by columns.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saetrain.errors import DataError
from saetrain.foreign import read_foreign
from saetrain.products.tiles import COLUMNS
from saetrain.sae import Folded
from saetrain.tensors import TensorFile, sha256
from saetrain.training.checkpoint import find

PARTS = ("encoder", "decoder")


@dataclass(frozen=True)
class Side:
    """One side of a product: what names its rows, and a digest of the files that hold them.

    Attributes
    ----------
    path : a run, a checkpoint, a folder of SAELens or sparsify, or a matrix: .npy, or .safetensors with one tensor.
    part : "encoder" or "decoder"; says nothing of a matrix.
    unit : divide each row by its norm, which makes products cosines.
    """

    path: str
    part: str
    unit: bool
    rows: int
    width: int
    digest: str
    whole: bool  # it is in memory as a whole

    def settings(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def resident(self) -> int:
        """Bytes that an open side holds."""
        return 2 * self.rows * self.width * 4 if self.whole else 0

    def tile(self, start: int) -> Tensor:
        """Rows [start, start + COLUMNS) as float32 [n, width]; `start` is a multiple of COLUMNS."""
        read = _reader(self.path, self.part, self.digest)
        stop = min(start + COLUMNS, self.rows)
        rows = read(start, stop).float().reshape(stop - start, -1)
        if not bool(torch.isfinite(rows).all()):
            row = int((~torch.isfinite(rows)).any(1).nonzero()[0]) + start
            raise DataError(f"{self.path}: row {row} of the {self.part} holds a number that is not finite")
        if self.unit:
            rows = rows / rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        return rows


def open_side(path: str | Path, part: str = "decoder", unit: bool = False) -> Side:
    """The side of a product at a path; reads headers and digests, and whole files of other tools."""
    path = Path(path).absolute()
    if path.suffix == ".npy":
        array = _array(str(path))
        return Side(str(path), "matrix", unit, *_shape(path, array.shape), sha256(path), False)
    if path.suffix == ".safetensors":
        file = TensorFile(path)
        [shape] = [spec.shape for spec in file.specs.values()] if len(file.specs) == 1 else [()]
        return Side(str(path), "matrix", unit, *_shape(path, shape), sha256(path), False)
    if (path / "cfg.json").exists():
        digest = hashlib.sha256("".join(sha256(p) for p in sorted(path.glob("*.safetensors"))).encode()).hexdigest()
        rows, width = _loaded(str(path), digest)["decoder"].shape
        return Side(str(path), part, unit, rows, width, digest, True)
    found = find(path)
    found.verify()
    found.check_names()
    digest = hashlib.sha256("".join(found.state["shards"].values()).encode()).hexdigest()
    rows, width = found.config.d_sae, len(Folded(found).norms[part == "decoder"].mean)
    return Side(str(found.folder.absolute()), part, unit, rows, width, digest, False)


def as_side(settings: dict[str, Any]) -> Side:
    return Side(**settings)


def _shape(path: Path, shape: tuple[int, ...]) -> tuple[int, int]:
    if len(shape) != 2 or 0 in shape:
        raise DataError(f"{path} must hold one matrix [rows, width]; its shape is {list(shape)}")
    return shape[0], shape[1]


def read_matrix(path: str | Path) -> Tensor:
    """A whole matrix in a .npy or .safetensors file, as float32."""
    side = open_side(path)
    if side.part != "matrix":
        raise DataError(f"{path} must be a .npy or .safetensors file")
    return torch.cat([side.tile(start) for start in range(0, side.rows, COLUMNS)])


@lru_cache(4)  # a worker serves tasks of one job, whose sides and map are files that do not change
def _reader(path: str, part: str, digest: str) -> Callable[[int, int], Tensor]:
    """A function that reads rows [start, stop) of the file or folder that has this digest."""
    if path.endswith(".npy"):
        array = _array(path)
        return lambda start, stop: torch.from_numpy(np.array(array[start:stop], np.float32))
    if path.endswith(".safetensors"):
        file = TensorFile(Path(path))
        [name] = file.specs
        return lambda start, stop: file.read(name, start, stop)
    if (Path(path) / "cfg.json").exists():
        matrix = _loaded(path, digest)[part]
        return lambda start, stop: matrix[start:stop]
    folded, name = Folded(find(Path(path))), {"encoder": "W_enc", "decoder": "W_dec"}[part]
    return lambda start, stop: folded.rows(start, stop)[name]


@lru_cache(2)
def _loaded(path: str, digest: str) -> dict[str, Tensor]:
    found = read_foreign(Path(path), mapped=True)
    return {"encoder": found.W_enc, "decoder": found.W_dec}


def _array(path: str) -> np.ndarray:
    try:
        array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not a readable .npy file: {error}") from error
    if array.dtype.kind not in "fiu":
        raise DataError(f"{path} must hold real numbers; its type is {array.dtype}")
    return array
