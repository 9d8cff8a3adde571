"""Training from Python: `fit` a store, with one autoencoder or a sweep of them, and `resume` a run.

>>> run = saetrain.fit("shuffled.zarr", k=32)     # doctest: +SKIP
>>> run.sae, run.metrics, run.report()            # doctest: +SKIP
"""

from __future__ import annotations

import difflib
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TextIO, overload

from actshuffle.units import counted
from saetrain.compute.mesh import Mesh
from saetrain.config import Config, resolve
from saetrain.data import Source, Store
from saetrain.errors import ConfigError, DivergedError
from saetrain.exchange.folders import weights_of
from saetrain.probing.closing import Closing
from saetrain.runs.sweeps import combinations, with_texts
from saetrain.runs.trained import Run, Sweep, recorded
from saetrain.training import train
from saetrain.training.log import read_log
from saetrain.training.start import with_inherited

ZARR = ("zarr.json", ".zgroup", ".zarray")  # files of a folder that is a Zarr store
Say = Callable[[str], None]
Texts = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]  # files and folders of text


@overload
def fit(
    source: str | os.PathLike[str],
    runs: None = None,
    mesh: None = None,
    *,
    heldout: str | os.PathLike[str] | None = None,
    say: Say | None = None,
    out: str | os.PathLike[str] | None = None,
    progress: bool = True,
    sweep: None = None,
    evaluate: Texts | None = None,
    model: str | None = None,
    model_dtype: str | None = None,
    layer: int | None = None,
    prefix: str | None = None,
    windows: int | None = None,
    **settings: Any,
) -> Run: ...


@overload
def fit(
    source: str | os.PathLike[str],
    runs: None = None,
    mesh: None = None,
    *,
    heldout: str | os.PathLike[str] | None = None,
    say: Say | None = None,
    out: str | os.PathLike[str] | None = None,
    progress: bool = True,
    sweep: Mapping[str, Sequence[Any]],
    evaluate: Texts | None = None,
    model: str | None = None,
    model_dtype: str | None = None,
    layer: int | None = None,
    prefix: str | None = None,
    windows: int | None = None,
    **settings: Any,
) -> Sweep: ...


@overload
def fit(
    source: Source, runs: Mapping[Path, Config], mesh: Mesh, *, heldout: Source | None = None, say: Say | None = None
) -> dict[Path, dict[str, Any]]: ...


def fit(
    source: Any,
    runs: Mapping[Path, Config] | None = None,
    mesh: Mesh | None = None,
    *,
    heldout: Any = None,
    say: Say | None = None,
    out: str | os.PathLike[str] | None = None,
    progress: bool = True,
    sweep: Mapping[str, Sequence[Any]] | None = None,
    evaluate: Texts | None = None,
    model: str | None = None,
    model_dtype: str | None = None,
    layer: int | None = None,
    prefix: str | None = None,
    windows: int | None = None,
    **settings: Any,
) -> Any:
    """Train one autoencoder on a finished actshuffle store, or go on with a run that was stopped; returns its `Run`.

    `settings` are those of `Config`, which are also the flags of `saetrain fit`.  `out` is the folder of the run, and
    else lies beside the store.  `heldout` is a store to evaluate on, in place of the tail of this one, which is then
    trained on too.  With `progress`, lines go to `say`, or to stdout beside a bar.  An interrupt finishes the step
    under way, writes a checkpoint and returns; the same call again goes on.  Raises `ConfigError` or `DataError` before
    anything is written, and `DivergedError` if the model is worthless.

    `sweep` has a list of values for some settings, as {"lr": [1e-3, 2e-3], "seed": [0, 1]}: all combinations train over
    one read of the store, each in a folder of its own in `out`, and the answer is their `Sweep`.  Members that diverge
    are in `Sweep.diverged`, and the others go on; `DivergedError` is raised if none is left.

    `evaluate` names files and folders of text that the store has not seen: when training ends, `model`, the causal
    language model that the rows came from, reads them with its `layer` put through the autoencoder, and
    `Run.evaluation` says what it loses.  `layer`, `model_dtype`, `prefix` and `windows` are as in `saetrain fit`.

    With `runs` and `mesh`, it trains several runs of one source of rows, and returns the last metrics of each: see
    `saetrain.training.train.fit`.
    """
    closing = {
        "evaluate": evaluate,
        "model": model,
        "model_dtype": model_dtype,
        "layer": layer,
        "prefix": prefix,
        "windows": windows,
    }
    if runs is not None or mesh is not None:
        if runs is None or mesh is None or settings or out is not None or sweep is not None or any(closing.values()):
            raise ConfigError("fit takes a store and settings, or a source, runs and a mesh")
        return train.fit(source, runs, mesh, heldout=heldout, say=say or (lambda text: None), opened=weights_of)
    folder = Path(out) if out is not None else beside(Path(source))
    known = with_inherited(_known(settings), weights_of)
    if sweep is not None:
        members = combinations(known, with_texts(_known(sweep)))
        _all({folder / name: config for name, config in members.items()}, source, heldout, progress, say, closing)
        return Sweep(folder)
    return _one(folder, Config(**known), source, heldout, progress, say, closing, extend=False)


def resume(
    run: str | os.PathLike[str],
    *,
    steps: int | None = None,
    store: str | os.PathLike[str] | None = None,
    progress: bool = True,
    say: Say | None = None,
    evaluate: Texts | None = None,
    model: str | None = None,
    model_dtype: str | None = None,
    layer: int | None = None,
    prefix: str | None = None,
    windows: int | None = None,
) -> Run:
    """Go on with a run that was stopped, with the settings and the store that its config.json names.

    `steps` may be more than before: the learning rate then follows the schedule of the longer run from here on, while
    all else stays as it was chosen.  `store` names the same store where it was moved.  `evaluate`
    and what belongs to it are as in `fit`.
    """
    folder = Path(run)
    config, about = extended(folder, steps, store)
    closing = {
        "evaluate": evaluate,
        "model": model,
        "model_dtype": model_dtype,
        "layer": layer,
        "prefix": prefix,
        "windows": windows,
    }
    return _one(folder, config, about["location"], about.get("heldout"), progress, say, closing, extend=True)


def extended(
    run: Path, steps: int | None, store: str | os.PathLike[str] | None = None
) -> tuple[Config, dict[str, Any]]:
    """The same, with more steps if they are given, and with the place to which the store was moved."""
    config, about = recorded(run)
    if store is not None:
        about["location"] = os.fspath(store)
    if not about["location"]:
        raise ConfigError(f"{run} was imported from {about.get('imported')}, and was trained on no store of ours")
    if steps is None:
        return config, about
    if steps < config.steps:
        raise ConfigError(f"{run} has {counted(config.steps, 'step')}; steps may be more, got {steps:,}")
    return replace(config, steps=steps), about


def reached(runs: Iterable[Path]) -> int:
    """The step that the logs of all runs have reached, but for those that diverged."""
    last = [(read_log(run) or [{"step": 0}])[-1] for run in runs]
    return min((int(line["step"]) for line in last if "diverged" not in line), default=0)


def beside(store: Path) -> Path:
    """Where the run of a store goes unless told."""
    return store.with_name(store.name.removesuffix(".zarr") + ".sae")


def refuse_stores(runs: Iterable[Path]) -> None:
    """A run inside a Zarr store would become part of it."""
    for out, folder in ((run, folder) for run in runs for folder in (run, *run.parents)):
        if found := next((name for name in ZARR if (folder / name).exists()), None):
            raise ConfigError(
                f"--out {out} would be inside the Zarr store {folder} (it has {found}); name another folder"
            )


@contextmanager
def bar(steps: int, at: int, *, drawn: bool, out: TextIO | None = None) -> Iterator[tuple[Say, Callable[[int], None]]]:
    """Functions that print a line to `out` (stdout unless given), and that move a bar to a step.

    The bar is `drawn` on terminals and in notebooks, by tqdm where that is installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # in a notebook without ipywidgets the bar is one of text
            from tqdm.auto import tqdm
    except ImportError:
        yield (lambda text: print(text, file=out or sys.stdout, flush=True)), (lambda step: None)
        return
    silent = False if type(sys.stderr).__module__.startswith("ipykernel.") else None  # None: where it is no terminal
    with tqdm(total=steps, initial=at, unit="step", disable=silent if drawn else True, leave=False) as shown:
        yield (
            (lambda text: shown.write(text, file=out or sys.stdout)),
            (lambda step: None if shown.disable else (shown.update(step - shown.n), None)[1]),
        )


def _one(
    folder: Path,
    config: Config,
    store: Any,
    heldout: Any,
    progress: bool,
    say: Say | None,
    closing: dict[str, Any],
    *,
    extend: bool,
) -> Run:
    found = _all({folder: config}, store, heldout, progress, say, closing, extend=extend)
    if reason := found[folder]["diverged"]:
        raise DivergedError(f"{folder}: {reason}")
    return Run(folder)


def _all(
    runs: Mapping[Path, Config],
    store: Any,
    heldout: Any,
    progress: bool,
    say: Say | None,
    closing: dict[str, Any],
    *,
    extend: bool = False,
) -> dict[Path, dict[str, Any]]:
    """Train on the ranks that are there, with a bar; returns the last line of each run."""
    refuse_stores(runs)
    config = next(iter(runs.values()))
    source = Store(store, config)
    other = None if heldout is None else Store(heldout, config)
    last = Closing.of(closing, source.field, source.d_in)
    mesh = Mesh.start(config.device, config.tensor_parallel)
    try:
        total = resolve(config, source.d_in, source.rows, heldout=other is not None).steps
        shown = progress and mesh.rank == 0
        with bar(total, reached(runs), drawn=shown) as (printed, tick):
            tell = say or (printed if shown else lambda text: None)
            for text in filter(None, (source.flattening(), source.warning())):
                tell(text)
            found = train.fit(source, runs, mesh, heldout=other, say=tell, tick=tick, extend=extend, opened=weights_of)
            sound = [run for run, line in found.items() if not (line["stopped"] or line["diverged"])]
            if last and sound and mesh.rank == 0:
                last.run(sound, str(mesh.device), tell)
            return found
    finally:
        mesh.close()


def _known(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The same, without lists where settings are tuples; refuses a name that is no setting, with the nearest one."""
    names = [field.name for field in fields(Config)]
    for name in settings:
        if name not in names:
            near = difflib.get_close_matches(name, names, 1)
            hint = f"; did you mean {near[0]}?" if near else f"; the settings are {', '.join(names)}"
            raise ConfigError(f"{name} is no setting{hint}")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
