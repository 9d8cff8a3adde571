"""A sparse autoencoder in a minute, from the shuffled activations of shuffle_minilm.py, and what its latents do.

    python examples/train_minilm.py                   # or: make demo, which does both

5.  Train: 3,072 latents, 32 of them active for each token, twice over the 300,000 rows. The last 5%
    of the shuffled store are held out; they are a random sample of all rows.
6.  Look: the share of the activations' variance that stays unexplained (FVU), the number of latents
    active for a token (L0), the share of latents that are never active (dead), and a page with all curves.
7.  Describe each latent on the rows in document order: how often, on which tokens, with which examples.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from saetrain import open_features
from saetrain.training.log import read_log


def main() -> None:
    options = argparse.ArgumentParser(description="Train a sparse autoencoder, look.")
    options.add_argument("--out", type=Path, default=Path("demo"), help="folder (default: demo)")
    options.add_argument("--steps", type=int, default=550, help="of 1,024 rows (default: 550)")
    args = options.parse_args()
    store, run, features = (args.out / name for name in ("shuffled.zarr", "sae", "features"))
    for old in (run, features):
        shutil.rmtree(old, ignore_errors=True)  # otherwise it would be resumed, or refused as another's
    clock = time.perf_counter()

    heading("5  Train a sparse autoencoder on the shuffled rows")
    shape = ["--d-sae", "3072", "--k", "32", "--batch-size", "1024"]
    length = ["--steps", str(args.steps), "--eval-every", str(max(args.steps // 5, 1))]
    saetrain("fit", str(store), "--out", str(run), *shape, *length)

    heading("6  Look at what was learned")
    last = read_log(run)[-1]
    low, high = (last[f"eval_fvu_{end}"] for end in ("low", "high"))
    print(f"FVU, held-out variance not explained    {last['eval_fvu']:8.4f}   (95 %: {low:.4f} to {high:.4f})")
    print(f"active latents a token, L0              {last['eval_l0']:8.1f}   of 3,072")
    print(f"dead latents, held-out rows             {last['eval_dead']:8.1%}\n")

    heading("7  Describe every latent")
    saetrain("features", str(run), str(args.out / "activations.zarr"), str(features), "--incomplete")
    found = open_features(features)
    density = found.array("stat/density")
    middle = int(np.argsort(density)[len(density) // 2])
    print(f"\nThe latent of median density:\n\n{found[middle]}")
    print(f"\nDone in {time.perf_counter() - clock:.0f} s. Look at:")
    print(f"  {run / 'report.html'}   all curves of the run, in any browser")
    print(f"  saetrain view {features}   every latent, in any browser (.venv/bin/saetrain after make demo)")
    print(f"  {run}   the autoencoder: saetrain.load({str(run)!r}); `saetrain export` for SAELens")


def heading(text: str) -> None:
    print(f"\n{text}\n{'-' * len(text)}", flush=True)


def saetrain(*arguments: str) -> None:
    """Show a saetrain command as in a shell, and run it."""
    print(f"$ {shlex.join(['saetrain', *arguments])}", flush=True)
    code = subprocess.run([sys.executable, "-m", "saetrain", *arguments]).returncode
    if code:
        raise SystemExit(f"saetrain {arguments[0]} ended with exit code {code}")


if __name__ == "__main__":
    main()
