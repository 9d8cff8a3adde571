"""`features`: `saetrain features` beside the bare encoder product, timed in the same run.

Unless a store is given, it holds random tokens, documents of 300 rows, and activations that depend on the token.
Dictionaries are random, with k active latents a token; one that was trained on the store may come first.  The product
is torch's, in tiles of 512 rows, in as many processes of one thread as the run has workers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr

from actshuffle.units import format_bytes
from benchmarks import measure, plots
from benchmarks.results import Bench, table
from saetrain.config import Config
from saetrain.data import Store
from saetrain.features.dictionary import Dictionary
from saetrain.sae import SAE

DOCUMENT, VOCABULARY = 300, 30_000
PRODUCT = """
import sys, time, torch
from multiprocessing import Barrier, Process, Queue

def work(rows, width, latents, start, out):
    torch.set_num_threads(1)
    x, w, b = torch.randn(8192, width), torch.randn(latents, width), torch.zeros(latents)
    torch.addmm(b, x[:512], w.T)
    start.wait()
    began = time.perf_counter()
    for at in range(0, rows, 512):
        torch.addmm(b, x[at % 8192 : at % 8192 + min(512, rows - at)], w.T)
    out.put(time.perf_counter() - began)

if __name__ == "__main__":
    rows, width, latents, count = map(int, sys.argv[1:])
    start, out = Barrier(count), Queue()
    crew = [Process(target=work, args=(rows // count, width, latents, start, out)) for _ in range(count)]
    for one in crew:
        one.start()
    print(max(out.get() for _ in crew))
"""

IDLE = """
import os
import distributed
import saetrain.features.pipeline
from benchmarks.measure import peak_of

print(peak_of(os.getpid()))
"""


def run(
    bench: Bench,
    *,
    rows: int,
    width: int,
    latents: list[int],
    k: int,
    workers: int,
    rounds: int,
    store: Path | None = None,
    trained: Path | None = None,
) -> None:
    if store is None:
        store = make_store(bench.work / "rows.zarr", rows, width)
    else:
        data = Store(store, Config(incomplete=True))
        rows, width = data.rows, data.d_in
    dictionaries = {bench.work / f"sae-{count}": count for count in latents}
    for path, count in dictionaries.items():
        make_dictionary(count, width, k).save(path)
    if trained is not None:
        dictionaries = {trained: Dictionary(str(trained)).latents} | dictionaries
    bench.plan(len(dictionaries) * rounds)
    found, start = [], idle()
    for dictionary, count in dictionaries.items():
        for number in range(rounds):
            product = [bare(rows, width, count, max(workers, 1), bench.work)]
            one = describe(dictionary, store, bench.work / f"out-{dictionary.name}-{number}", workers)
            product.append(bare(rows, width, count, max(workers, 1), bench.work))
            one |= {
                "latents": count,
                "trained": dictionary == trained,
                "product": product,
                "of_product": one["seconds"] / (sum(product) / 2),
            }
            found.append(one)
            bench.did(f"{count:,} latents{', trained' * one['trained']}: {one['of_product']:.2f} bare products")
    images = plots.draw(bench, lambda folder: [_draw(folder, found)])
    bench.publish({"summary": found, "rows": rows, "start": start}, page(found, rows, width, k, workers, start), images)


def _draw(folder: Path, found: list[dict[str, Any]]) -> str:
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(4.6, 3.2))
    axis.plot([r["latents"] for r in found], [r["of_product"] for r in found], "o", color=plots.BLUE)
    axis.set(title="Seconds of the run, in bare encoder products", xlabel="latents", xscale="log", ylim=(0, None))
    axis.grid(axis="y")
    figure.savefig(folder / "features.png")
    plt.close(figure)
    return "features.png"


def make_store(path: Path, rows: int, width: int) -> Path:
    rng = np.random.default_rng(0)
    group = zarr.create_group(path)
    token = np.minimum(rng.zipf(1.3, rows), VOCABULARY).astype("<i4")
    centres = rng.standard_normal((VOCABULARY + 1, width), np.float32)
    each = 8192
    x = group.create_array("x", shape=(rows, width), dtype="<f4", chunks=(min(each, rows), width), compressors=None)
    for at in range(0, rows, each):
        part = token[at : at + each]
        x[at : at + each] = centres[part] + rng.standard_normal((len(part), width), np.float32)
    group.create_array("token", data=token, chunks=(min(each, rows),), compressors=None)
    document = (np.arange(rows) // DOCUMENT).astype("<i4")
    group.create_array("document", data=document, chunks=(min(each, rows),), compressors=None)
    return path


def make_dictionary(latents: int, width: int, k: int) -> SAE:
    w = torch.randn(latents, width, generator=torch.Generator().manual_seed(0))
    unit = w / w.norm(dim=1, keepdim=True)
    return SAE("topk", unit.clone(), torch.zeros(latents), unit, torch.zeros(width), True, k)


def bare(rows: int, width: int, latents: int, count: int, work: Path) -> float:
    """Seconds of the encoder product alone."""
    script = work / "product.py"
    script.write_text(PRODUCT)
    words = [str(n) for n in (rows, width, latents, count)]
    return float(_run(measure.python(str(script), *words)).stdout)


def describe(dictionary: Path, store: Path, out: Path, workers: int) -> dict[str, Any]:
    words = ["features", str(dictionary), str(store), str(out), "--json", "--workers", str(workers), "--incomplete"]
    measured = _run(measure.python("-m", "saetrain", *words))
    told = json.loads(measured.stdout)
    found = {name: told[name] for name in ("seconds", "tasks")}
    return found | {"command": measured.seconds, "memory": measured.resident}


def idle() -> int:
    """Bytes of a worker that has imported what tasks need, and done none."""
    return int(_run(measure.python("-c", IDLE)).stdout)


def _run(command: list[str]) -> measure.Measured:
    found = measure.run(command, environment={"OMP_NUM_THREADS": "1"}, seconds=3000)
    if found.outcome != "done":
        raise RuntimeError(f"{found.outcome}: {found.message}")
    return found


def page(found: list[dict[str, Any]], rows: int, width: int, k: int, workers: int, start: int) -> Iterator[str]:
    yield (
        f"`saetrain features` on {rows:,} rows of {width} numbers, TopK with k = {k}, {workers} workers of a thread. "
        "*Trained* dictionaries are of these rows, the others random. "
        "*Features* is the time of its tasks; *command* adds imports and the start of the workers. "
        f"A worker that has imported what tasks need, and done none, takes {format_bytes(start)}: its *start*. Memory "
        "is the kernel's count of the peak, with the pages of mapped files."
    )
    yield ""
    yield from table(
        [
            "latents",
            "bare product, before and after",
            "features",
            "of the product",
            "command",
            "rows/s",
            "latents/s",
            "largest process",
            "above its start",
        ],
        (
            [
                f"{r['latents']:,}" + ", trained" * r["trained"],
                " and ".join(f"{s:.1f} s" for s in r["product"]),
                f"{r['seconds']:.1f} s",
                f"{r['of_product']:.2f}",
                f"{r['command']:.1f} s",
                f"{rows / r['seconds']:,.0f}",
                f"{r['latents'] / r['seconds']:,.0f}",
                format_bytes(r["memory"]),
                format_bytes(max(r["memory"] - start, 0)),
            ]
            for r in found
        ),
    )
