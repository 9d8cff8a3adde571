"""The training loop: from a batch of rows to the loss, the update, the log line and the checkpoint.

Several autoencoders can share one read of the data (a sweep): each batch goes to one after the other.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from actshuffle.errors import DestinationInUseError
from saetrain.compute.ahead import Cursor, ahead
from saetrain.compute.mesh import Mesh
from saetrain.config import Config, resolve
from saetrain.data import Batch, Source, check_finite, stream, target_of
from saetrain.errors import ConfigError, DataError, DivergedError
from saetrain.training import checkpoint, metrics
from saetrain.training.clock import Clock
from saetrain.training.heldout import Heldout
from saetrain.training.lines import brief, opening
from saetrain.training.lock import agree, locked
from saetrain.training.log import read_log
from saetrain.training.losses import Step, step
from saetrain.training.members import SHARED, Member, begin, leave, same
from saetrain.training.optim import ramps
from saetrain.training.outcome import diverged, marked
from saetrain.training.start import Opened


def fit(
    source: Source,
    runs: Mapping[Path, Config],
    mesh: Mesh,
    *,
    heldout: Source | None = None,
    say: Callable[[str], None] = lambda text: None,
    tick: Callable[[int], None] = lambda step: None,
    extend: bool = False,
    opened: Opened = checkpoint.find,
) -> dict[Path, dict[str, Any]]:
    """Train one autoencoder for each (folder, settings), or resume these runs where they stopped.

    Returns the last line of metrics of each run.  Evaluation is on `heldout` instead of the source's own tail.
    `say` gets lines for people, `tick` the number of each step that is done.  With `extend`, `steps` may be more than
    those of a run that is resumed.  `opened` reads the weights that `init_from` names.

    On SIGTERM or SIGINT this finishes the step under way, writes a checkpoint, and returns: "stopped" is then true, and
    "signal" the number.  "diverged" gives the reason where a model is worthless; the other runs of a sweep go on.
    """
    runs = {run: resolve(config, source.d_in, source.rows, heldout=heldout is not None) for run, config in runs.items()}
    config = next(iter(runs.values()))
    for other in runs.values():
        same(config, other, SHARED, "runs of one sweep read the same batches, and differ in")
    if config.batch_size % mesh.world:
        raise ConfigError(f"--batch-size {config.batch_size} is not a multiple of the number of ranks, {mesh.world}")

    if heldout is not None and _widths(heldout) != _widths(source):
        raise DataError(
            f"{heldout.name} is {_widths(heldout)} wide and cannot evaluate a model of {source.name}, "
            f"{_widths(source)} wide"
        )

    agree(mesh, runs.values(), [source] if heldout is None else [source, heldout])
    reading = replace(config, seed=config.order_seed)  # of all members, whatever the seeds of their weights
    # Refuses a store before a folder is made.
    cursor = ahead(source.batches(source.rows - config.holdout, reading, mesh), mesh.device)
    with locked(runs, mesh) as ours:
        return _trained(source, cursor, runs, mesh, heldout, say, tick, extend, opened, ours)


def _trained(
    source: Source,
    cursor: Cursor,
    runs: Mapping[Path, Config],
    mesh: Mesh,
    heldout: Source | None,
    say: Callable[[str], None],
    tick: Callable[[int], None],
    extend: bool,
    opened: Opened,
    ours: Callable[[], None],
) -> dict[Path, dict[str, Any]]:
    """`fit` on folders that are ours, with settings that leave no choice open."""
    config = next(iter(runs.values()))
    members, at, state = begin(source, runs, mesh, say, heldout, extend, opened)
    if state is not None:
        cursor.load_state_dict(state)
    batches = stream(source, cursor, mesh)
    test = Heldout(heldout or source, config.holdout if heldout is None else heldout.rows, mesh)
    read = [source] if heldout is None else [source, heldout]
    last: dict[Path, dict[str, Any]] = {run: (read_log(run) or [{"step": at}])[-1] for run in runs}
    clock = Clock(cursor, config, mesh, max(line.get("seconds", 0.0) for line in last.values()))
    ends = {run: marked(run, other) for run, other in runs.items()}
    number, first, began = 0, at, time.monotonic()
    if at < config.steps:
        say(opening(source, runs, at))
    with _asked_to_stop() as asked:
        while at < config.steps:
            batch = next(batches)
            normed: dict[torch.dtype, tuple[Tensor, Tensor]] = {}  # once for all members of one precision
            at += 1
            done, due = at == config.steps, at % config.eval_every == 0
            # A fill, since a copy to a GPU would queue behind that of the next batch.
            number = int(mesh.max(torch.full((1,), asked[-1] if asked else 0, device=mesh.device), "world"))
            stop = number > 0
            lines: list[tuple[Member, dict[str, Any]]] = []
            for m in list(members):
                lr, ramp = ramps(m.model.config, at - 1)
                if m.model.dtype not in normed:
                    x = m.model.norm(batch.rows)
                    normed[m.model.dtype] = x, x if batch.targets is None else m.model.out_norm(batch.targets)
                x, y = normed[m.model.dtype]
                out = step(m.model, x, ramp, y)
                if not math.isfinite(out.losses["loss"]):
                    ends[m.run] = _explain(out, batch, source, config, mesh, at)
                    members.remove(m)
                    leave(m, runs[m.run], ends[m.run], at, len(runs), say)
                    continue
                norms = m.optimizer.apply(out.grads, lr)
                if at % config.log_every == 0 or done or due or stop:
                    lines.append((m, _line(m, out, y, batch, lr, norms, at)))
                del out  # or its gradients would lie beside those of the next step
            if not members:
                raise DivergedError("; ".join(ends[run] for run in runs))
            saves = at % config.checkpoint_every == 0 or done or stop
            with clock.read(at) if lines or saves else nullcontext():
                for place, (m, line) in enumerate(lines):
                    line |= clock.rates(m.model, line["l0"], again=(due or done) and not place)
                    if due or done:
                        with m.optimizer.finished():
                            with m.model.products():
                                line |= test.evaluate(m.model)
                            line |= metrics.cosines(m.model)
                        m.model.state["fired"].zero_()
                        m.model.state["window"].zero_()
                if due or saves:
                    _check_unchanged(read, ours, mesh)
                for m, line in lines:
                    line |= clock.now()
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
                where = members[0].run if len(members) == 1 else members[0].run.parent
                say(
                    f"stopped at step {at:,} of {config.steps:,}; its checkpoint is in {where}: the same command again "
                    "goes on"
                )
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
