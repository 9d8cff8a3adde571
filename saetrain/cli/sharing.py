"""The command that writes descriptions of latents for other tools."""

from __future__ import annotations

from pathlib import Path

import click

from actshuffle.executors import executor_for
from actshuffle.units import counted
from saetrain.cli.options import LOOK, print_json
from saetrain.cli.values import COUNT, FOLDER, PLACE, POSITIVE, TEXT
from saetrain.sharing.export import FORMATS, LENGTH, export_features
from saetrain.sharing.naming import Names


@click.command("export-features")
@click.argument("features", type=PLACE)
@click.argument("to", type=FOLDER)
@click.option("--format", type=click.Choice([*FORMATS]), required=True, help="Tool to write for.")
@click.option("--model-id", type=TEXT, required=True, help="Name of the model there: gpt2-small.")
@click.option("--layer", type=COUNT, required=True, help="Layer of the model.")
@click.option("--set", "set_name", type=TEXT, required=True, help="Name of the set of dictionaries: res-16k.")
@click.option("--suffix", type=TEXT, help="Names this one of several dictionaries of a set and layer.")
@click.option(
    "--hook", type=TEXT, default="hook_resid_post", show_default=True, help="Where in the layer the rows are from."
)
@click.option("--dataset", type=TEXT, help="Name of the text.")
@click.option("--creator", type=TEXT, help="Who made the dictionary.")
@click.option("--store", type=PLACE, help="The store of activations, if it has moved.")
@click.option("--length", type=POSITIVE, default=LENGTH, help="Tokens of a sequence of delphi.")
@click.option("--workers", type=COUNT, default=0, help="Worker processes; 0 works in this one.")
@click.option("--overwrite", is_flag=True, help="Replace what another run of this command left in TO.")
@LOOK
def _export_features(
    features: Path | str,
    to: Path,
    format: str,
    model_id: str,
    layer: int,
    set_name: str,
    suffix: str | None,
    hook: str,
    dataset: str | None,
    creator: str | None,
    store: Path | str | None,
    length: int,
    workers: int,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write FEATURES, a result of `saetrain features`, to the folder TO for another tool.

    \b
    saedashboard   batch files, 128 latents each
    neuronpedia    tables for its bulk import
    graph          a file a latent, as pages of attribution graphs read them
    delphi         its cache of activations; FEATURES must keep codes

    The same command again resumes.

    \b
    Example:
      saetrain export-features acts.features out --format saedashboard --model-id gpt2 --layer 6 --set res-16k
    """
    names = Names(model_id, layer, set_name, suffix or "", hook, dataset or "", creator or "")
    with executor_for(workers) as executor:
        done = export_features(
            features, to, format, names, store=store, length=length, overwrite=overwrite, executor=executor
        )
    print_json({"to": str(to), "format": format, "tasks": done.tasks, "resumed": done.resumed}, as_json)
    if not as_json:
        state = "already finished" if done.already_finished else f"{counted(done.tasks, 'task')}, {done.seconds:.1f} s"
        click.echo(f"{to}: {state}")


COMMANDS = (_export_features,)
