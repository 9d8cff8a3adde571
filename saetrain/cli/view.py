"""The command that shows latents in a browser."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import Any

import click

from actshuffle.units import counted
from saetrain.cli.models import open_both
from saetrain.cli.options import LOOK, print_json
from saetrain.cli.values import COUNT, DEVICE, FOLDER, ORIGIN, PATH, TEXT
from saetrain.errors import ConfigError
from saetrain.probing.causal import DTYPES
from saetrain.products.reading import open_interactions
from saetrain.reading.latents import Features, open_features
from saetrain.view.labels import Labels
from saetrain.view.live import Live
from saetrain.view.pairs import Pairs
from saetrain.view.server import Server
from saetrain.view.site import Site

PORT = 8765


@click.command("view")
@click.argument("features", type=TEXT, metavar="FEATURES")
@click.option(
    "--store", type=TEXT, metavar="STORE", help="The store of activations, where it was moved: texts come from it."
)
@click.option("--run", type=FOLDER, help="The run, for its metrics.  [default: the one that was described]")
@click.option("--model", type=TEXT, metavar="NAME", help="Causal model of transformers, to paste texts and to steer.")
@click.option("--layer", type=COUNT, metavar="N", help="Hidden state of the dictionary.  [default: that of its rows]")
@click.option("--tokenizer", type=TEXT, metavar="NAME", help="The model's tokenizer, if it lies elsewhere.")
@click.option("--model-dtype", type=click.Choice(DTYPES), default="float32", help="Of the model's computation.")
@click.option("--device", type=DEVICE, default="auto", help="cpu, cuda or auto.")
@click.option("--labels", type=PATH, help="File of labels.  [default: FEATURES with .labels.json]")
@click.option("--interactions", type=PATH, multiple=True, metavar="OUT", help="Product to look through; repeatable.")
@click.option(
    "--beside", type=TEXT, multiple=True, metavar="FEATURES", help="Describes the other side of a product; repeatable."
)
@click.option(
    "--allow-origin", "origins", type=ORIGIN, multiple=True, metavar="URL", help="Page that may read features as JSON."
)
@click.option("--port", type=click.IntRange(0, 65535), default=PORT, help=f"0 takes a free one.  [default: {PORT}]")
@click.option("--open/--no-open", "opened", default=True, help="Open a browser.  [default: open]")
@LOOK
def _view(
    features: str,
    store: str | None,
    run: Path | None,
    labels: Path | None,
    interactions: tuple[Path, ...],
    beside: tuple[str, ...],
    origins: tuple[str, ...],
    port: int,
    opened: bool,
    as_json: bool,
    **model: Any,
) -> None:
    """Look at the latents in FEATURES, the result of `saetrain features`, in a browser.

    The page is served on 127.0.0.1, to this machine alone, until Ctrl-C.  With --model it reads texts that you paste,
    and writes steered ones.  Labels are kept in a file beside FEATURES.

    \b
    Examples:
      saetrain view activations.features
      saetrain view activations.features --model smollm2/
      saetrain view layer16.features --interactions out --beside layer12.features
    """
    found = open_features(features, store=store)
    described = [found, *map(open_features, beside)]
    products = [Pairs(open_interactions(path), described) for path in interactions]
    held = Labels(labels or _beside(features))
    site = Site(found, held, _run(found, run), _live(found, model), products, frozenset(origins))
    server = Server(site, port)
    print_json({"url": server.url, "latents": len(found)}, as_json)
    if not as_json:
        click.echo(f"{counted(len(found), 'feature')} of {features} at {server.url}   (Ctrl-C ends)")
    if opened:
        webbrowser.open(server.url)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()


def _beside(features: str) -> Path:
    if "://" in features:
        raise ConfigError(f"--labels must name a file of this machine, since {features} is a URL")
    path = Path(features)
    return path.with_name(f"{path.name}.labels.json")


def _run(features: Features, run: Path | None) -> Path | None:
    """The folder with the metrics of the dictionary, if there is one."""
    if run is not None:
        if not (run / "metrics.jsonl").exists():
            raise ConfigError(f"{run} has no metrics.jsonl")
        return run
    folder = Path(features.facts["dictionary"])
    found = (at for at in (folder, *folder.parents[:2]) if (at / "metrics.jsonl").exists())
    return next(found, None)


def _live(features: Features, options: dict[str, Any]) -> Live | None:
    if options["model"] is None:
        return None
    folder = Path(features.facts["dictionary"])
    if not folder.exists():
        raise ConfigError(f"the dictionary {folder} is gone, and --model needs it")
    sae, model = open_both(folder, options)
    prefix, drop_norm = _filtered(features)
    return Live(sae, model, features.median_norm, prefix=prefix, drop_norm=drop_norm)


def _filtered(features: Features) -> tuple[list[int], float]:
    """The prefix of the windows that were described, and the multiple of the norm beyond which rows were dropped."""
    recorded = features.store.attributes.get("row_filter") if features.store is not None else None
    if not isinstance(recorded, dict):
        return [], 0.0
    prefix, heavy = (recorded.get(name) or {} for name in ("prefix", "drop_norm"))
    return [int(prefix["id"])] if "id" in prefix else [], float(heavy.get("multiple", 0.0))


COMMANDS = (_view,)
