"""Checkpoints: one safetensors file for each tensor-parallel rank, and state.json.

::

    run/checkpoints/step-00000400/
        shard-0-of-2.safetensors      latents [0, n/2): parameters, their average, Adam's moments, firing counts
        shard-1-of-2.safetensors      latents [n/2, n)
        state.json                    settings, step, data cursor, normalisation scale, SHA-256 of the shards

A checkpoint is written under a name that no reader looks for, made durable, and renamed: it is there whole or not
at all, whenever the process dies.  Tensors that are not split (b_dec and its moments, mean, threshold) are in shard 0.
Moments in 8 bits are there as they are held: codes, and the scales of their blocks.  Replicas send the first, which
writes, their rows of the moments as these are written.
No rank ever holds another's parameters: to resume on another number of ranks, each reads its rows from the files
that have them.  On the same number of ranks, a resumed run is bitwise the run that never stopped.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from actshuffle.errors import words_of
from actshuffle.units import counted
from saetrain.compute.mesh import Mesh
from saetrain.config import Config
from saetrain.errors import CheckpointError, NoCheckpointError
from saetrain.model import WHOLE, Model
from saetrain.norms import Norm, spread
from saetrain.tensors import Spec, TensorFile, sha256, write
from saetrain.training.average import PREFIX
from saetrain.training.optim import CODED, FULL, Optimizer
from saetrain.variants.table import VARIANTS
from saetrain.writing import put_json

FORMAT = 1
WHOLE_TENSORS = {
    *WHOLE,
    "mean",
    "mean_out",
    "window",
    "threshold",
}  # the same on every rank; all others are split by latent


def step_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def save(run: Path, model: Model, optimizer: Optimizer, step: int, cursor: dict[str, Any]) -> Path:
    """Publish a checkpoint, and remove old ones beyond `keep`.  All ranks call this."""
    mesh, target = model.mesh, step_folder(run, step)
    building = target.with_name(f".{target.name}")
    with _together(mesh, f"checkpoint {target}"):
        if mesh.rank == 0:
            for left_behind in target.parent.glob(".*step-*"):  # left by a process that died
                shutil.rmtree(left_behind, ignore_errors=True)
            building.mkdir(parents=True)
    name = f"shard-{mesh.tp_index}-of-{mesh.tp}.safetensors"
    digest = b"\0" * 32
    with _together(mesh, f"checkpoint {target}"):
        held = _held(model, optimizer, mesh.tp_index == 0)
        blocks = _blocks(held, model)
        if mesh.dp_index == 0:
            specs = {
                n: Spec(t.dtype, (model.latents, *t.shape[1:]) if _is_shared(n) else tuple(t.shape))
                for n, t in held.items()
            }
            try:
                digest = bytes.fromhex(write(building / name, specs, blocks, {"format": "saetrain"}))
            except Exception:
                deque(blocks, 0)  # the other replicas must not wait for one that cannot write
                raise
        deque(blocks, 0)
    digests = mesh.gather(torch.tensor(list(digest), dtype=torch.uint8, device=mesh.device), "tp")
    with _together(mesh, f"checkpoint {target}"):
        if mesh.rank == 0:
            names = [f"shard-{i}-of-{mesh.tp}.safetensors" for i in range(mesh.tp)]
            state = {
                "format": FORMAT,
                "step": step,
                "config": model.config.to_json(),
                "d_in": model.d_in,
                **_facts(model.norm, "scale"),
                **(_facts(model.out_norm, "scale_out") if model.transcodes else {}),
                "tile": model.tile,
                "cursor": cursor,
                "shards": {n: bytes(d.tolist()).hex() for n, d in zip(names, digests, strict=True)},
            }
            put_json(building / "state.json", state)
            _sync(building)
            if target.exists():  # damaged: a sound one would have been resumed
                _remove(target)
            building.rename(target)
            _sync(target.parent)
            for old in sorted(target.parent.glob("step-*"))[: -model.config.keep]:
                _remove(old)
    return target


def _remove(folder: Path) -> None:
    """Remove a checkpoint in such a way that a half-deleted one does not look like a checkpoint."""
    gone = folder.rename(folder.with_name(f".gone-{folder.name}"))
    shutil.rmtree(gone, ignore_errors=True)


def _held(model: Model, optimizer: Optimizer, whole: bool) -> dict[str, Tensor]:
    """The tensors of this rank's file: its rows of those that are split, and on the first rank (`whole`) the others."""
    found = {**model.params, **optimizer.kept(), **model.state, "mean": model.norm.mean}
    if model.transcodes:
        found["mean_out"] = model.out_norm.mean
    return {n: t for n, t in found.items() if whole or _is_split(n)}


def _blocks(held: dict[str, Tensor], model: Model) -> Iterator[tuple[str, Tensor]]:
    """On the first replica `held`, with all rows of what the replicas share, of which a block is there at a time.

    For the other replicas, which go through this at the same time, it is empty.
    """
    for name, tensor in held.items():
        if _is_shared(name):
            yield from ((name, block) for block in model.mesh.collect_own(tensor, model.latents, "checkpoints"))
        elif model.mesh.dp_index == 0:
            yield name, tensor


def _is_shared(name: str) -> bool:
    """True if each replica has some rows of it, as of moments."""
    return _is_split(name) and name.partition(".")[0] in (*FULL, *CODED)


def _facts(norm: Norm, name: str) -> dict[str, Any]:
    """The scale of one array, or scales and widths of several, as state.json has them."""
    return {name: norm.scales, f"{name}_widths": list(norm.widths)} if norm.widths else {name: norm.scale}


def _is_split(name: str) -> bool:
    return name.rpartition(".")[2] not in WHOLE_TENSORS


class _together:
    """A block that fails on all ranks if it fails on one, so that none waits for ever."""

    def __init__(self, mesh: Mesh, task: str) -> None:
        self.mesh, self.task = mesh, task

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None and not isinstance(error, Exception):
            return  # the process is leaving: do not wait for the others
        if self.mesh.any(error is not None) and error is None:
            raise CheckpointError(f"{self.task}: another rank failed")
        if isinstance(error, OSError):
            raise CheckpointError(f"{self.task}: {error}") from error


# --- reading


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint: its state, and its tensors by row ranges."""

    folder: Path
    state: dict[str, Any]
    files: tuple[TensorFile, ...]

    @property
    def config(self) -> Config:
        return Config.from_json(self.state["config"])

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows [start, stop) of a tensor, from the files that have them."""
        if not _is_split(name):
            return self.files[0].read(name)
        each = self.state["config"]["d_sae"] // len(self.files)
        stop = self.state["config"]["d_sae"] if stop is None else stop
        parts = [
            file.read(name, max(start - i * each, 0), min(stop - i * each, each))
            for i, file in enumerate(self.files)
            if start < (i + 1) * each and stop > i * each
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def weight(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows of a parameter of the model as it is evaluated and exported: of the average, if one is kept."""
        return self.read(PREFIX + name if self.has(PREFIX + name) else name, start, stop)

    def threshold(self) -> float:
        """The running mean of the batch threshold."""
        return float(self.weight("threshold"))

    def norms(self) -> tuple[Norm, Norm | None]:
        """The norm of the input, and of the output of a transcoder."""
        out = self._norm("mean_out", "scale_out") if "scale_out" in self.state else None
        return self._norm("mean", "scale"), out

    def _norm(self, mean: str, scale: str) -> Norm:
        found, widths = self.state[scale], tuple(self.state.get(f"{scale}_widths", ()))
        return Norm(self.read(mean), spread(found, widths) if widths else found, widths)

    def has(self, name: str) -> bool:
        return name in self.files[0].specs

    def check_names(self) -> None:
        """Refuse tensors that are not of this variant: they may change what the others compute."""
        split = {"W_enc", "b_enc", "W_dec", *VARIANTS[self.config.arch].extra}
        params = split | {"b_dec"} | ({"W_skip"} if self.config.skip else set())
        known = params | {f"{kind}.{name}" for kind in (*FULL, *CODED) for name in params}
        known |= {PREFIX + name for name in params}
        known |= (WHOLE_TENSORS - set(WHOLE)) | {"quiet", "fired", f"{PREFIX}threshold"}
        for file in self.files:
            if unknown := sorted(set(file.specs) - known):
                raise CheckpointError(f"{file.path} holds {', '.join(unknown)}, which {self.config.arch} has not")

    def verify(self, files: set[int] | None = None) -> None:
        """Compare the files (all, or those with the given numbers) with the digests in state.json."""
        for i, file in enumerate(self.files):
            due = self.state["shards"][file.path.name]
            if (files is None or i in files) and sha256(file.path) != due:
                raise CheckpointError(f"{file.path} is damaged: its SHA-256 differs from state.json's")


def open_checkpoint(folder: Path) -> Checkpoint:
    try:
        state = json.loads((folder / "state.json").read_text())
        if state["format"] != FORMAT:
            raise CheckpointError(f"{folder} has format {state['format']}; this version reads {FORMAT}")
        if any("/" in name for name in state["shards"]):
            raise CheckpointError(f"{folder / 'state.json'} names files outside its folder")
        files = tuple(TensorFile(folder / name) for name in state["shards"])
        return Checkpoint(folder, state, files)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder} is not a checkpoint: {type(error).__name__}: {error}") from error


def published(run: Path) -> list[Path]:
    """The checkpoints of a run, the latest first."""
    return sorted((run / "checkpoints").glob("step-*"), reverse=True)


def find(path: Path) -> Checkpoint:
    """The checkpoint at `path`, or the latest of the run at `path`."""
    folders = [path] if (path / "state.json").exists() else published(path)
    if not folders:
        raise NoCheckpointError(f"no checkpoint in {path}{absence(path)}")
    return open_checkpoint(folders[0])


def absence(path: Path) -> str:
    """The rest of a sentence that says of a folder that it is no run: why, as far as that can be told."""
    if not path.exists():
        return ": there is no such folder"
    runs = sorted(found.parent for found in path.glob("*/checkpoints"))  # a model has a config.json too
    return f": it holds {counted(len(runs), 'run')}, such as {runs[0]}" if runs else ""


def load_latest(runs: Sequence[Path], mesh: Mesh, warn: Callable[[str], None]) -> list[Loaded] | None:
    """All runs of a sweep (or a single run) at the latest step for which every one has an undamaged checkpoint."""
    steps = [{folder.name for folder in published(run)} for run in runs]
    for name in sorted(set.intersection(*steps), reverse=True):
        found, trouble = [], ""
        try:
            for run in runs:
                found.append(load(open_checkpoint(run / "checkpoints" / name), mesh))
        except CheckpointError as error:
            trouble = words_of(error)
        if not mesh.any(bool(trouble)):
            return found
        warn(f"{trouble or name} cannot be used; trying the one before")
    return None


class Loaded(NamedTuple):
    model: Model
    optimizer: Optimizer
    state: dict[str, Any]


def load(checkpoint: Checkpoint, mesh: Mesh) -> Loaded:
    """This rank's model and optimizer; only the files that hold its latents are read and verified."""
    state, config = checkpoint.state, checkpoint.config
    lo, hi = mesh.share(config.d_sae, "d_sae")
    each = config.d_sae // len(checkpoint.files)
    checkpoint.verify({0} | set(range(lo // each, -(-hi // each))))
    norm, out = checkpoint.norms()
    model = VARIANTS[config.arch](config, norm, mesh, out)
    model.tile = state["tile"]
    for name, tensor in (model.params | model.state).items():
        tensor.copy_(checkpoint.read(name, lo, hi))
    optimizer = Optimizer(model)
    optimizer.steps = state["step"]
    for name, tensor in optimizer.kept().items():
        own = optimizer.own if _is_shared(name) else slice(0, hi - lo)
        tensor.copy_(checkpoint.read(name, lo + own.start, lo + own.stop))
    return Loaded(model, optimizer, state)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
