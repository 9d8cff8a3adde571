"""`view`: how long the page's server takes for a feature, out of a result of a million.

A result of a few thousand features is described as always, and its chunks are copied under the numbers of all the
others, so every byte is on the disk; neighbours and companions get numbers from all over the result.  A feature is
asked for over HTTP on loopback, from a server that has answered what the page asks before, in three states:

    cold     the result and the store are out of the page cache, and the server has shown no feature yet
    warm     the files are in the page cache, and the server has shown another feature, but not this one
    again    the server has shown it
"""

from __future__ import annotations

import http.client
import json
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import zarr

import saetrain
from actshuffle.units import format_bytes
from benchmarks import cache, plots
from benchmarks.results import Bench, spread, table
from benchmarks.sae.describe import VOCABULARY, describe, make_dictionary, make_store
from saetrain.reading.latents import Features
from saetrain.view.labels import Labels
from saetrain.view.server import Server
from saetrain.view.site import Site

STATES = ("cold", "warm", "again")
COMPANIONS = ("near/id", "together/id", "hard/latent")  # arrays that name other features


def run(bench: Bench, *, latents: int, described: int, rows: int, width: int, k: int, asked: int) -> None:
    store = make_store(bench.work / "rows.zarr", rows, width)
    make_tokenizer(bench.work / "tokenizer")
    zarr.open_group(store).attrs["tokenizer"] = {"name": str(bench.work / "tokenizer")}
    dictionary = bench.work / "sae"
    make_dictionary(described, width, k).save(dictionary)
    describe(dictionary, store, bench.work / "few", 0)
    few = saetrain.open_features(bench.work / "few")
    bench.plan(asked)
    many, size = copied(few, bench.work / "many", latents)
    dice = np.random.default_rng(1)
    cache.evict([Path(many.path)])  # once: a feature's own chunks are in no cache until it is asked for
    alive = np.flatnonzero(few.array("stat/count") > 0)
    found: dict[str, list[float]] = {state: [] for state in STATES}
    served: dict[str, list[float]] = {state: [] for state in STATES}
    processor: dict[str, list[float]] = {state: [] for state in STATES}
    for _ in range(asked):
        feature = int(dice.choice(alive) + described * dice.integers(latents // described))
        for state, asked_once in look(many, store, feature, bench.work / "labels.json").items():
            found[state].append(1000 * asked_once.seconds)
            served[state].append(asked_once.server)
            processor[state].append(1000 * asked_once.processor)
        told = ", ".join(f"{state} {found[state][-1]:.1f} ms" for state in STATES)
        bench.did(f"feature {feature:,}: {told}")
    images = plots.draw(bench, lambda folder: [_draw(folder, found)])
    summary = {
        state: spread(values)
        | {"worst": max(values), "ms": values}
        | {"server_ms": spread(served[state]), "processor_ms": spread(processor[state])}
        for state, values in found.items()
    }
    bench.publish({"summary": summary, "latents": len(many), "bytes": size}, page(summary, len(many), size), images)


class Asked(NamedTuple):
    """One question: seconds until the answer is there, the server's own milliseconds, and processor seconds of both."""

    seconds: float
    server: float
    processor: float


def look(many: Features, store: Path, feature: int, labels: Path) -> dict[str, Asked]:
    """One feature in each state; a server of its own has not shown it before."""
    seconds = {}
    for state in STATES[:2]:
        features = Features(many.path, many.facts, str(store), None)
        server = Server(Site(features, Labels(labels)))
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        ask(server, "/api/facts")
        if state == "cold":
            cache.evict([store, *Path(many.path).glob("*/zarr.json"), *Path(many.path).glob("*/*/zarr.json")])
        else:
            ask(server, f"/api/feature/{feature - 1 if feature else 1}")
        seconds[state] = ask(server, f"/api/feature/{feature}")
        if state == "warm":
            seconds["again"] = ask(server, f"/api/feature/{feature}")
        server.shutdown()
        server.server_close()
    return seconds


def ask(server: Server, path: str) -> Asked:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    began, before = time.perf_counter(), time.process_time()
    connection.request("GET", path)
    answer = connection.getresponse()
    json.loads(answer.read())
    seconds, processor = time.perf_counter() - began, time.process_time() - before
    connection.close()
    if answer.status != 200:
        raise RuntimeError(f"{path}: {answer.status}")
    return Asked(seconds, float(str(answer.getheader("Server-Timing")).rpartition("=")[2]), processor)


def copied(few: Features, out: Path, latents: int) -> tuple[Features, int]:
    """A result of so many latents, rounded down to whole copies, and its bytes."""
    source, times, each = Path(few.path), latents // len(few), len(few) // few.facts["chunk"]
    dice, size = np.random.default_rng(2), 0
    for described in sorted(source.rglob("zarr.json")):
        about, name = json.loads(described.read_text()), described.parent.relative_to(source)
        (out / name).mkdir(parents=True, exist_ok=True)
        if about["node_type"] == "array" and about["shape"][0] == len(few):
            about["shape"][0] *= times
            for file in sorted(path for path in (source / name / "c").rglob("*") if path.is_file()):
                first, *rest = file.relative_to(source / name / "c").parts
                data = np.fromfile(file, about["data_type"] if str(name) in COMPANIONS else np.uint8)
                for copy in range(times):
                    to = (out / name / "c" / str(copy * each + int(first))).joinpath(*rest)
                    to.parent.mkdir(parents=True, exist_ok=True)
                    if str(name) in COMPANIONS:
                        moved = data + len(few) * dice.integers(times, size=data.shape)
                        np.where(data >= 0, moved, data).astype(data.dtype).tofile(to)
                    else:
                        data.tofile(to)
                    size += data.nbytes
        elif about["node_type"] == "array":
            shutil.copytree(source / name, out / name, dirs_exist_ok=True)
        (out / name / "zarr.json").write_text(json.dumps(about))
    cache.settle([out])
    return Features(str(out), few.facts | {"latents": times * len(few)}, str(few.facts["store"]), None), size


def make_tokenizer(folder: Path) -> None:
    """A word for each token, as a tokenizer of transformers."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"[UNK]": 0} | {f"word{i}": i for i in range(1, VOCABULARY + 1)}
    core = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]").save_pretrained(folder)


def _draw(folder: Path, found: dict[str, list[float]]) -> str:
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(5.4, 3.2))
    for place, (state, values) in enumerate(found.items()):
        axis.plot(values, np.full(len(values), place) + np.linspace(-0.2, 0.2, len(values)), "o", label=state, ms=4)
    axis.set(title="Milliseconds for a feature", xscale="log", yticks=range(len(STATES)), yticklabels=STATES)
    axis.grid(axis="x")
    figure.savefig(folder / "view.png")
    plt.close(figure)
    return "view.png"


def page(summary: dict[str, Any], latents: int, size: int) -> Iterator[str]:
    yield f"One feature of {latents:,} ({format_bytes(size)}) from the page's server, over HTTP on loopback."
    yield ""
    yield from table(
        ["state", "median", "from", "to", "of it in the server"],
        (
            [
                state,
                *(f"{found[name]:.1f} ms" for name in ("median", "low", "high")),
                f"{found['server_ms']['median']:.1f} ms",
            ]
            for state, found in summary.items()
        ),
    )
    yield ""
    yield "Cold: files out of the page cache, and a server that has shown no feature; warm: files in the page cache,"
    yield "and a server that has shown another feature; again: a feature that the server has shown."
