"""The command line.  Settings and their help come from `saetrain.config.Config`."""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from actshuffle.errors import ActshuffleError
from saetrain import exchange
from saetrain.compute.mesh import RENDEZVOUS, Mesh
from saetrain.config import Config, field_help, parse_field
from saetrain.data import Store
from saetrain.errors import ConfigError, SaetrainError
from saetrain.training.launch import launch
from saetrain.training.train import fit

SWEPT = ("arch", "d_sae", "k", "lr", "sparsity", "aux_coef")  # what runs of one sweep may differ in


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="saetrain", description="Sparse autoencoders from a shuffled activation store.")
    commands = top.add_subparsers(dest="command", required=True)
    fit = commands.add_parser("fit", help="train one, or go on where its run stopped")
    sweep = commands.add_parser("sweep", help="train several over one read of the data: give lists, as --k 16,32")
    for command in (fit, sweep):
        command.add_argument("store", type=Path, help="a finished actshuffle store")
        command.add_argument("--out", type=Path, help="folder of the run(s); the store's name with .sae if not given")
        command.add_argument("--nproc", type=int, default=1, help="ranks on this machine (or start with torchrun)")
        command.add_argument("--heldout", type=Path, help="evaluate on this store, not on the tail of the first")
        for field in fields(Config):
            flag, note = f"--{field.name.replace('_', '-')}", field_help()[field.name]
            many = command is sweep and field.name in SWEPT
            default = f"{field.default:.4g}" if isinstance(field.default, float) else field.default
            note += "" if field.default in (0, -1, "", ()) else f" [{default}]"
            metavar = "A,B" if many else "X"
            command.add_argument(flag, metavar=metavar, help=note.replace("%", "%%"))
    drawn = commands.add_parser("report", help="draw and compare runs: report.png and report.html")
    drawn.add_argument("runs", type=Path, nargs="+")
    drawn.add_argument("--out", type=Path, help="folder of the two files; the first run if not given")
    export = commands.add_parser("export", help="write a run for another tool")
    export.add_argument("run", type=Path, help="a run, or one of its checkpoints")
    export.add_argument("to", type=Path, help="folder to write")
    export.add_argument("--format", choices=("saelens", "sparsify"), default="saelens")
    note = "make a run of a folder that SAELens or sparsify wrote"
    bring = commands.add_parser("import", help=note)
    bring.add_argument("folder", type=Path)
    bring.add_argument("run", type=Path)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = parser().parse_args(arguments)
    try:
        if options.command in ("fit", "sweep"):
            return _train(options, arguments)
        if options.command == "report":
            from saetrain.training.report import report  # brings matplotlib

            for path in report(options.runs, options.out or options.runs[0]):
                say(str(path))
        elif options.command == "export":
            exchange.export(options.run, options.to, options.format)
        else:
            exchange.bring(options.folder, options.run)
    except (SaetrainError, ActshuffleError) as error:
        sys.stderr.write(f"saetrain: {error}\n")
        return error.exit_code
    return 0


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _train(options: argparse.Namespace, arguments: list[str]) -> int:
    if options.nproc < 1:
        raise ConfigError(f"--nproc must be 1 or more, got {options.nproc}")
    runs = runs_of(options)
    if options.nproc > 1 and RENDEZVOUS not in os.environ:
        return launch(arguments, options.nproc)
    config = next(iter(runs.values()))
    mesh = Mesh.start(config.device, config.tensor_parallel)
    try:
        source = Store(options.store, config)
        heldout = Store(options.heldout, config) if options.heldout else None
        fit(source, runs, mesh, heldout=heldout, say=say if mesh.rank == 0 else lambda text: None)
    except (SaetrainError, ActshuffleError) as error:
        if mesh.rank == 0 or (mesh.world > 1 and "another rank" not in str(error)):
            sys.stderr.write(f"saetrain: {error}\n")
        return error.exit_code
    finally:
        mesh.close()
    return 0


def runs_of(options: argparse.Namespace) -> dict[Path, Config]:
    """Folder and settings of each run: one for fit, the product of the lists for sweep."""
    given = {f.name: text for f in fields(Config) if (text := getattr(options, f.name)) is not None}
    out = options.out or options.store.with_name(options.store.name.removesuffix(".zarr") + ".sae")
    if options.command == "fit":
        return {out: Config(**{name: parse_field(name, text) for name, text in given.items()})}
    lists = {n: t.split(",") for n, t in given.items() if n in SWEPT and "," in t}
    if not lists:
        raise ConfigError("a sweep needs a list, as in --k 16,32")
    base = {n: parse_field(n, t) for n, t in given.items() if n not in lists}
    runs: dict[Path, Config] = {}
    for choice in itertools.product(*lists.values()):
        picked: dict[str, Any] = {n: parse_field(n, t) for n, t in zip(lists, choice, strict=True)}
        name = "-".join(f"{n}={t}" for n, t in zip(lists, choice, strict=True))
        runs[out / name] = Config(**base, **picked)
    return runs
