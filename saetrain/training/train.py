"""The training loop: from a batch of rows to the loss, the update, the log line and the checkpoint.

Several autoencoders can share one read of the data (a sweep): each batch goes to one after the other.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from actshuffle.errors import DestinationInUseError
from saetrain.compute.mesh import Mesh
from saetrain.config import Config, resolve
from saetrain.data import Batch, Cursor, Source, check_finite, norms_of, sample, stream, target_of
from saetrain.errors import ConfigError, DataError, DivergedError, SaetrainError
from saetrain.model import Model
from saetrain.training import checkpoint, metrics
from saetrain.training.clock import Clock
from saetrain.training.heldout import Heldout
from saetrain.training.lines import brief, opening
from saetrain.training.lock import locked
from saetrain.training.log import Log, read_log
from saetrain.training.losses import Step, step
from saetrain.training.optim import Optimizer, ramps
from saetrain.training.outcome import diverged, mark, marked
from saetrain.variants.table import VARIANTS
from saetrain.writing import put_json

INIT_ROWS = 8192
# Settings that may change when a run resumes; with any other changed it would be a different run.
FREE = {"device", "tensor_parallel", "log_every", "eval_every", "checkpoint_every", "keep"}
# Settings that runs of one sweep have in common.
SHARED = ("batch_size", "steps", "holdout", "seed", "buffer_rows", "log_every", "eval_every", "checkpoint_every")


@dataclass
class Member:
    """One autoencoder in training."""

    run: Path
    model: Model
    optimizer: Optimizer
    log: Log | None  # on rank 0


def fit(
    source: Source,
    runs: Mapping[Path, Config],
    mesh: Mesh,
    *,
    heldout: Source | None = None,
    say: Callable[[str], None] = lambda text: None,
    tick: Callable[[int], None] = lambda step: None,
    extend: bool = False,
) -> dict[Path, dict[str, Any]]:
    """Train one autoencoder for each (folder, settings), or resume these runs where they stopped.

    Returns the last line of metrics of each run.  Evaluation is on `heldout` instead of the source's own tail.
    `say` gets lines for people, `tick` the number of each step that is done.  With `extend`, `steps` may be more than
    those of a run that is resumed.

    On SIGTERM or SIGINT this finishes the step under way, writes a checkpoint, and returns: "stopped" is then true, and
    "signal" the number.  "diverged" gives the reason where a model is worthless; the other runs of a sweep go on.
    """
    runs = {run: resolve(config, source.d_in, source.rows) for run, config in runs.items()}
    config = next(iter(runs.values()))
    for other in runs.values():
        _same(config, other, SHARED, "runs of one sweep")
    if config.batch_size % mesh.world:
        raise ConfigError(f"batch_size {config.batch_size} is not a multiple of the number of ranks, {mesh.world}")

    if heldout is not None and _widths(heldout) != _widths(source):
        raise DataError(
            f"{heldout.name} is {_widths(heldout)} wide and cannot evaluate a model of {source.name}, "
            f"{_widths(source)} wide"
        )

    cursor = source.batches(source.rows - config.holdout, config, mesh)  # refuses a store before a folder is made
    with locked(runs, mesh) as ours:
        return _trained(source, cursor, runs, mesh, heldout, say, tick, extend, ours)


def _trained(
    source: Source,
    cursor: Cursor,
    runs: Mapping[Path, Config],
    mesh: Mesh,
    heldout: Source | None,
    say: Callable[[str], None],
    tick: Callable[[int], None],
    extend: bool,
    ours: Callable[[], None],
) -> dict[Path, dict[str, Any]]:
    """`fit` on folders that are ours, with settings that leave no choice open."""
    config = next(iter(runs.values()))
    members, at, state = _begin(source, runs, mesh, say, heldout, extend)
    if state is not None:
        cursor.load_state_dict(state)
    batches = stream(source, cursor, mesh)
    test = Heldout(heldout or source, config.holdout if heldout is None else heldout.rows, mesh)
    clock = Clock(cursor, config, mesh)
    read = [source] if heldout is None else [source, heldout]
    last: dict[Path, dict[str, Any]] = {run: (read_log(run) or [{"step": at}])[-1] for run in runs}
    ends = {run: marked(run, other) for run, other in runs.items()}
    number, first, began = 0, at, time.monotonic()
    if at < config.steps:
        say(opening(source, runs, at))
    with _asked_to_stop() as asked:
        while at < config.steps:
            batch = next(batches)
            x = members[0].model.norm(batch.rows)
            y = x if batch.targets is None else members[0].model.out_norm(batch.targets)
            at += 1
            done, due = at == config.steps, at % config.eval_every == 0
            number = int(mesh.max(torch.tensor([asked[-1] if asked else 0], device=mesh.device), "world"))
            stop = number > 0
            lines: list[tuple[Member, dict[str, Any]]] = []
            for m in list(members):
                lr, ramp = ramps(m.model.config, at - 1)
                out = step(m.model, x, ramp, y)
                if not math.isfinite(out.losses["loss"]):
                    ends[m.run] = _explain(out, batch, source, config, mesh, at)
                    members.remove(m)
                    _leave(m, runs[m.run], ends[m.run], mesh, len(runs), say)
                    continue
                norms = m.optimizer.apply(out.grads, lr)
                if at % config.log_every == 0 or done or due or stop:
                    lines.append((m, _line(m, out, y, batch, lr, norms, at)))
                del out  # or its gradients would lie beside those of the next step
            if not members:
                raise DivergedError("; ".join(ends[run] for run in runs))
            saves = at % config.checkpoint_every == 0 or done or stop
            with clock.read(at) if lines or saves else nullcontext():
                for m, line in lines:
                    line |= clock.rates(m.model, line["l0"], again=due or done)
                    if due or done:
                        line |= test.evaluate(m.model) | metrics.cosines(m.model)
                        m.model.state["fired"].zero_()
                        m.model.state["window"].zero_()
                if due or saves:
                    _check_unchanged(read, ours, mesh)
                for m, line in lines:
                    last[m.run] = line
                    if m.log is not None:
                        m.log.write(line)
                    if due or done:
                        left = (time.monotonic() - began) / (at - first) * (config.steps - at)
                        say(brief(m.run, line, config.steps, left))
                if saves:
                    for m in members:
                        checkpoint.save(m.run, m.model, m.optimizer, at, cursor.state_dict())
            tick(at)
            if at % config.log_every == 0:
                clock.restart(at)
            if stop:
                say(f"stopped at step {at:,} of {config.steps:,}; run again to go on")
                break
    for m in members:
        if m.log is not None:
            m.log.close()
    for m in members:
        ends[m.run] = diverged(last[m.run]) if at == config.steps else ""
    more = {"stopped": at < config.steps, "signal": number}
    return {run: line | more | {"diverged": ends[run]} for run, line in last.items()}


def _widths(source: Source) -> tuple[int, int]:
    """Of what goes in and of what is rebuilt."""
    return source.d_in, int(getattr(source, "d_out", source.d_in))  # a source need not have it


def _leave(m: Member, config: Config, reason: str, mesh: Mesh, of: int, say: Callable[[str], None]) -> None:
    """Close the run of a member that diverged; in a sweep, record that the others go on without it."""
    if m.log is not None:
        m.log.close()
    if of > 1:
        if mesh.rank == 0:
            mark(m.run, config, reason)
        say(f"{m.run.name}: {reason}; the others go on")


def _begin(
    source: Source,
    runs: Mapping[Path, Config],
    mesh: Mesh,
    say: Callable[[str], None],
    heldout: Source | None,
    extend: bool,
) -> tuple[list[Member], int, dict[str, Any] | None]:
    """The members at their last common checkpoint, or new ones; the step reached; and the data cursor, if any.

    Members that have diverged are left out.
    """
    lost = {run: reason for run, config in runs.items() if (reason := marked(run, config))}
    for run, reason in lost.items():
        say(f"{run.name} is left out: it {reason}; remove {run} to try again")
    if len(lost) == len(runs):
        raise DivergedError("; ".join(lost.values()))
    runs = {run: config for run, config in runs.items() if run not in lost}
    for run, config in runs.items():
        if found := checkpoint.published(run):
            old = checkpoint.open_checkpoint(found[0])
            if old.state["d_in"] != source.d_in:
                raise DataError(f"{source.name} is {source.d_in} wide; {run} was trained on {old.state['d_in']}")
            longer = extend and config.steps > old.config.steps
            names = [f.name for f in fields(Config) if f.name not in FREE and not (longer and f.name == "steps")]
            _same(old.config, config, names, f"{run} was started with other settings")
    loaded = checkpoint.load_latest(list(runs), mesh, say)
    if loaded is None:
        if any(checkpoint.published(run) for run in runs):
            raise SaetrainError("there is no step for which all runs have a checkpoint: remove the runs to start again")
        (norm, out), members, target = norms_of(source), [], target_of(source)
        for run, config in runs.items():
            model = VARIANTS[config.arch](config, norm, mesh, out)
            wanted = sample(source, model.out_norm, INIT_ROWS, mesh, target) if target else None
            model.initialise(sample(source, model.norm, INIT_ROWS, mesh), wanted)
            model.measure_tile(config.batch_size // mesh.dp)
            members.append(Member(run, model, Optimizer(model), None))
        at, state = 0, None
    else:
        both = zip(runs, loaded, strict=True)
        members = [Member(run, x.model, x.optimizer, None) for run, x in both]
        for m in members:
            m.model.config = runs[m.run]  # with what may change: the steps, how often to save
        at, state = loaded[0].state["step"], loaded[0].state["cursor"]
        say(f"going on from step {at:,}")
    for m in members:
        if mesh.rank == 0:
            m.run.mkdir(parents=True, exist_ok=True)
            about: dict[str, Any] = {
                "store": source.name,
                "location": getattr(source, "location", source.name),
                "heldout": heldout and getattr(heldout, "location", heldout.name),
                "field": source.field,
                "rows": source.rows,
                "d_in": source.d_in,
                "ranks": mesh.world,
                "tile": m.model.tile,
                "device": str(mesh.device),
                "torch": torch.__version__,
            }
            shape = getattr(source, "row_shape", ())  # a source need not have it
            if len(shape) > 1:
                about["row_shape"] = list(shape)
            about |= {"input": source.field, "output": target_of(source) or source.field, "d_out": m.model.d_out}
            written = {"config": runs[m.run].to_json(), "about": about}
            put_json(m.run / "config.json", written)
            m.log = Log(m.run, at)
    return members, at, state


def _same(one: Config, other: Config, names: Any, context: str) -> None:
    """Refuse settings that differ; `context` begins the message."""
    pairs = [(n, getattr(one, n), getattr(other, n)) for n in names]
    if different := [f"{n} {a!r} / {b!r}" for n, a, b in pairs if a != b]:
        raise ConfigError(f"{context}: {'; '.join(different)}")


def _line(m: Member, out: Step, y: Tensor, batch: Batch, lr: float, norms: dict[str, float], at: int) -> dict[str, Any]:
    model, mesh = m.model, m.model.mesh
    line: dict[str, Any] = {
        "step": at,
        "tokens": at * model.config.batch_size,
        **out.losses,
        "l0": out.active,
        "fvu": metrics.batch_fvu(y, out.residual, mesh),
        "lr": lr,
        **metrics.latent_summary(model),
        **metrics.threshold_summary(model),
        **{f"gradient_norm.{n}": v for n, v in norms.items()},
        **{f"update_norm.{n}": v for n, v in m.optimizer.update_norms().items()},
    }
    if batch.documents is not None:
        whole = mesh.gather(batch.documents.to(mesh.device), "world").view(-1)
        line["document_entropy"] = metrics.document_entropy(whole)
    return line


def _explain(out: Step, batch: Batch, source: Source, config: Config, mesh: Mesh, at: int) -> str:
    """The loss is not finite: refuse the row to blame, on every rank, or say that training diverged."""
    first = (at - 1) * config.batch_size + mesh.dp_index * len(batch.rows)
    name = source.name + (", in reading order" if at * config.batch_size > source.rows else "")
    fault: DataError | None = None
    try:
        check_finite(batch.rows, name, source.field, first)
        if batch.targets is not None:
            check_finite(batch.targets, name, target_of(source), first)
    except DataError as error:
        fault = error
    if mesh.any(fault is not None):
        raise fault or DataError(f"{name}: another rank met a row with a NaN or an infinite number")
    return f"diverged: the loss is {out.losses['loss']} in step {at:,} (is lr too high?)"


def _check_unchanged(sources: list[Source], ours: Callable[[], None], mesh: Mesh) -> None:
    """Refuse, on every rank, to go on with a store that was written to since it was opened, or a run that was taken."""
    fault: Exception | None = None
    try:
        ours()
        for source in sources:
            getattr(source, "check_unchanged", lambda: None)()  # a source need not have it
    except (DataError, DestinationInUseError) as error:
        fault = error
    if mesh.any(fault is not None):
        raise fault or DataError("another rank met a store that changed while it was read, or another writer")


@contextmanager
def _asked_to_stop() -> Iterator[list[int]]:
    """A list to which SIGTERM and SIGINT append their numbers; a second signal acts as usual."""
    asked: list[int] = []
    before: dict[int, Any] = {}

    def note(number: int, frame: Any) -> None:
        asked.append(number)
        signal.signal(number, before[number])

    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.signal(number, note)
    except ValueError:  # not the main thread: the caller handles signals
        pass
    try:
        yield asked
    finally:
        for caught, handler in before.items():
            signal.signal(caught, handler)
