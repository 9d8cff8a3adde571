"""The command that says how much memory a fit would take."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch

from actshuffle import format_bytes
from actshuffle.units import counted
from saetrain.cli.options import LOOK, print_json
from saetrain.cli.training import base_settings, given_settings, settings_options
from saetrain.cli.values import PATH, POSITIVE, TEXT
from saetrain.config import Config, parse_field, resolve
from saetrain.data import Store
from saetrain.errors import ConfigError
from saetrain.exchange.folders import weights_of
from saetrain.memory import predict
from saetrain.training.start import with_inherited

LINES = {
    "parameters": "parameters, and counts of firing",
    "moments": "Adam's moments",
    "average": "average of the parameters (--ema)",
    "gradients": "gradients",
    "rows": "rows of a batch and their errors",
    "step": "a tile of {tile:,} tokens in the step",
}


@click.command("plan")
@click.argument("store", type=TEXT)
@click.option("--config", type=PATH, help="JSON file of settings, as a run's config.json; other options win.")
@click.option("--nproc", metavar="N", type=POSITIVE, default=1, help="Ranks over all machines.")
@settings_options(lists=False)
@LOOK
def _plan(store: str, config: Path | None, nproc: int, as_json: bool, **more: Any) -> None:
    """Say how much memory `fit` with the same options takes on each rank.

    Nothing is trained or written.

    Counted are tensors, not the interpreter and its libraries, and not what the loader holds.

    \b
    Example:
      saetrain plan shuffled.zarr --arch jumprelu --d-sae 131072 --batch-size 32768 --nproc 8
    """
    given = {name: parse_field(name, text) for name, text in given_settings(more).items()}
    settings = Config(**with_inherited({**base_settings(config), **given}, weights_of))
    if settings.device == "auto":
        settings = replace(settings, device="cuda" if torch.cuda.is_available() else "cpu")
    source = Store(store, settings)
    found = resolve(settings, source.d_in, source.rows)
    tp = found.tensor_parallel or nproc
    if nproc % tp:
        raise ConfigError(f"--nproc {nproc} is not a multiple of --tensor-parallel {tp}")
    if found.batch_size % nproc:
        raise ConfigError(f"--batch-size {found.batch_size} is not a multiple of the number of ranks, {nproc}")
    memory = predict(found, source.d_in, source.d_out if source.target else 0, tp=tp, dp=nproc // tp)
    rank = memory.to_json()
    print_json(
        {"store": store, "ranks": nproc, "tensor_parallel": tp, "config": found.to_json(), "rank": rank}, as_json
    )
    if as_json:
        return
    wide = f"{source.d_in:,}" + (f" to {source.d_out:,}" if source.target else "")
    click.echo(
        f"{found.arch} of {counted(found.d_sae, 'latent')}, {wide} wide, {counted(found.batch_size, 'row')} a step"
    )
    click.echo(f"on each of {counted(nproc, 'rank')}, of which {tp} share the parameters:")
    for name, text in LINES.items():
        if name == "average" and not memory.average:
            continue
        click.echo(f"  {format_bytes(rank[name]):>10}  {text.format(tile=memory.tile)}")
    click.echo(f"  {format_bytes(memory.peak):>10}  at most")


COMMANDS = (_plan,)
