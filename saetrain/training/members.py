"""The autoencoders that one call trains: how each begins, what its folder says of it, and how one leaves the others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from actshuffle import format_bytes
from actshuffle.units import counted
from saetrain.compute.devices import free_bytes
from saetrain.compute.mesh import Mesh
from saetrain.config import Config
from saetrain.data import Source, norms_of, sample, target_of
from saetrain.errors import ConfigError, DataError, DivergedError, SaetrainError
from saetrain.memory import predict, together
from saetrain.model import Model
from saetrain.norms import Norm
from saetrain.training import checkpoint
from saetrain.training.log import Log, wanted
from saetrain.training.optim import Optimizer
from saetrain.training.outcome import mark, marked
from saetrain.training.start import Opened, Start
from saetrain.variants.table import VARIANTS
from saetrain.writing import put_json

INIT_ROWS = 8192
# Settings that may change when a run resumes; with any other changed it would be a different run.
FREE = {"device", "tensor_parallel", "log_every", "eval_every", "checkpoint_every", "keep", "log"}
# Settings that runs of one sweep have in common: all read the same batches, on the same ranks, and save together.
SHARED = (
    *("batch_size", "steps", "holdout", "order_seed", "buffer_rows", "log_every", "eval_every", "checkpoint_every"),
    *("field", "output", "document_field", "incomplete", "device", "tensor_parallel", "log"),
)


@dataclass
class Member:
    """One autoencoder in training."""

    run: Path
    model: Model
    optimizer: Optimizer
    log: Log | None  # on rank 0


def begin(
    source: Source,
    runs: Mapping[Path, Config],
    mesh: Mesh,
    say: Callable[[str], None],
    heldout: Source | None,
    extend: bool,
    opened: Opened,
) -> tuple[list[Member], int, dict[str, Any] | None]:
    """The members at their last common checkpoint, or new ones; the step reached; and the data cursor, if any.

    Members that have diverged are left out.
    """
    wanted(next(iter(runs.values())).log)
    lost = {run: reason for run, config in runs.items() if (reason := marked(run, config))}
    for run, reason in lost.items():
        say(f"{run.name} is left out: it {reason}; remove {run} to try again")
    if len(lost) == len(runs):
        raise DivergedError("; ".join(lost.values()))
    runs = {run: config for run, config in runs.items() if run not in lost}
    _check_memory(source, runs.values(), mesh)
    for run, config in runs.items():
        if found := checkpoint.published(run):
            old = checkpoint.open_checkpoint(found[0])
            if old.state["d_in"] != source.d_in:
                raise DataError(f"{source.name} is {source.d_in} wide; {run} was trained on {old.state['d_in']}")
            longer = extend and config.steps > old.config.steps
            names = [f.name for f in fields(Config) if f.name not in FREE and not (longer and f.name == "steps")]
            same(old.config, config, names, f"{run} was started with other settings")
    loaded = checkpoint.load_latest(list(runs), mesh, say)
    if loaded is None:
        if any(checkpoint.published(run) for run in runs):
            raise SaetrainError("there is no step for which all runs have a checkpoint: remove the runs to start again")
        norms = norms_of(source)
        members = [_new(source, norms, run, config, mesh, opened) for run, config in runs.items()]
        at, state = 0, None
    else:
        both = zip(runs, loaded, strict=True)
        members = [Member(run, x.model, x.optimizer, None) for run, x in both]
        for m in members:
            m.model.config = runs[m.run]  # with what may change: the steps, how often to save
        at, state = loaded[0].state["step"], loaded[0].state["cursor"]
        say(f"going on from step {at:,}")
    for m in members if mesh.rank == 0 else ():
        m.run.mkdir(parents=True, exist_ok=True)
        about = _about(source, m, heldout)
        put_json(m.run / "config.json", {"config": runs[m.run].to_json(), "about": about})
        m.log = Log(m.run, at, runs[m.run].log, runs[m.run].to_json())
    return members, at, state


def _new(
    source: Source, norms: tuple[Norm, Norm | None], run: Path, config: Config, mesh: Mesh, opened: Opened
) -> Member:
    """A member before its first step."""
    (norm, out), target = norms, target_of(source)
    model = VARIANTS[config.arch](config, norm, mesh, out)
    rows = sample(source, model.norm, INIT_ROWS, mesh)
    if config.init_from:
        Start(config.init_from, opened(Path(config.init_from))).fill(model, rows)
    else:
        model.initialise(rows, sample(source, model.out_norm, INIT_ROWS, mesh, target) if target else None)
    model.measure_tile(config.batch_size // mesh.dp)
    return Member(run, model, Optimizer(model), None)


def _about(source: Source, m: Member, heldout: Source | None) -> dict[str, Any]:
    """What config.json says beside the settings."""
    about: dict[str, Any] = {
        "store": source.name,
        "location": getattr(source, "location", source.name),
        "heldout": heldout and getattr(heldout, "location", heldout.name),
        "field": source.field,
        "rows": source.rows,
        "d_in": source.d_in,
        "ranks": m.model.mesh.world,
        "tile": m.model.tile,
        "device": str(m.model.mesh.device),
        "torch": torch.__version__,
    }
    shape = getattr(source, "row_shape", ())  # a source need not have it
    if len(shape) > 1:
        about["row_shape"] = list(shape)
    about |= {"input": source.field, "output": target_of(source) or source.field, "d_out": m.model.d_out}
    return about | getattr(source, "origin", {})  # nor this


def same(one: Config, other: Config, names: Iterable[str], context: str) -> None:
    """Refuse settings that differ; `context` begins the message."""
    pairs = [(n, getattr(one, n), getattr(other, n)) for n in names]
    if different := [f"{n} {a!r} / {b!r}" for n, a, b in pairs if a != b]:
        raise ConfigError(f"{context}: {'; '.join(different)}")


def _check_memory(source: Source, configs: Iterable[Config], mesh: Mesh) -> None:
    """Refuse, on every rank, what does not fit into the memory that is free here."""
    out = getattr(source, "d_out", source.d_in) if target_of(source) else 0
    here = [replace(config, device=mesh.device.type) for config in configs]
    each = [predict(config, source.d_in, out, tp=mesh.tp, dp=mesh.dp) for config in here]
    needed, free = together(each), free_bytes(mesh.device) // mesh.ranks_here
    if mesh.any(needed > free):
        those = "the run" if len(each) == 1 else f"{counted(len(each), 'run')} at once"
        way = "fewer latents or rows a step" if len(each) == 1 else "fewer runs at once"
        raise ConfigError(
            f"{those} would take {format_bytes(needed)} of memory on each rank, and {format_bytes(free)} are free: "
            f"choose {way}, or more ranks (--nproc) to share the parameters"
        )


def leave(m: Member, config: Config, reason: str, at: int, of: int, say: Callable[[str], None]) -> None:
    """Close the run of a member that diverged; in a sweep, record that the others go on without it."""
    if m.log is not None:
        m.log.write({"step": at, "tokens": at * config.batch_size, "diverged": reason})
        m.log.close()
    if of > 1:
        if m.log is not None:
            mark(m.run, config, reason)
        say(f"{m.run.name}: {reason}; the others go on")
