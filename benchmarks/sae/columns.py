"""The peers of the feature pipeline, each in its own process: a plain loop over columns, SAEDashboard and delphi.

    python columns.py loop|dashboard|delphi ROWS.npy TOKENS.npy DOCUMENTS.npy DICTIONARY FEATURES OUT.npz

`DICTIONARY` is a SAELens folder of a TopK autoencoder.  OUT holds the seconds that are spent once and on these
features, and the largest activations of the first FEATURES features.  Nothing of actshuffle is imported, so that this
runs under another Python.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

COLUMNS, TILE, TOP, WINDOW = 128, 512, 20, 128


def loop(rows: Any, tokens: Any, documents: Any, folder: Path, features: int) -> dict[str, Any]:
    """Two passes of products: the k-th largest of each row, then columns, with the top rows of each.

    As in `saetrain features`, a window of 128 rows of a document gives at most one of the top rows.
    """
    began = time.perf_counter()
    w, bias, offset, k = weights(folder)
    cut = torch.empty(len(rows))
    for at in range(0, len(rows), TILE):
        pre = torch.addmm(bias, part(rows, at) - offset, w.T)
        cut[at : at + TILE] = pre.topk(k, sorted=False).values.amin(1)
    once = time.perf_counter() - began
    first = np.flatnonzero(np.append(True, documents[1:] != documents[:-1]))
    inside = np.arange(len(rows)) - np.repeat(first, np.diff(np.append(first, len(rows))))
    begins = np.flatnonzero(inside % WINDOW == 0)
    values, where = np.zeros((features, TOP), np.float32), np.full((features, TOP), -1)
    counts = np.zeros(features, np.int64)
    for lo in range(0, features, COLUMNS):
        hi = min(lo + COLUMNS, features)
        acts = torch.empty(len(rows), hi - lo)
        for at in range(0, len(rows), TILE):
            pre = torch.addmm(bias[lo:hi], part(rows, at) - offset, w[lo:hi].T)
            acts[at : at + TILE] = pre * ((pre >= cut[at : at + TILE, None]) & (pre > 0))
        dense = acts.numpy()
        counts[lo:hi] = (dense > 0).sum(axis=0)
        best = torch.from_numpy(np.maximum.reduceat(dense, begins, axis=0)).T.topk(min(TOP, len(begins)), dim=1)
        values[lo:hi, : best.values.shape[1]] = best.values.numpy()
        for column in range(hi - lo):
            for slot, window in enumerate(best.indices[column].tolist()):
                end = begins[window + 1] if window + 1 < len(begins) else len(rows)
                where[lo + column, slot] = begins[window] + dense[begins[window] : end, column].argmax()
    each = time.perf_counter() - began - once
    return {"once": once, "seconds": each, "values": values, "rows": np.where(values > 0, where, -1), "counts": counts}


def weights(folder: Path) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    import json

    from safetensors.torch import load_file

    held, cfg = load_file(folder / "sae_weights.safetensors"), json.loads((folder / "cfg.json").read_text())
    offset = held["b_dec"] if cfg.get("apply_b_dec_to_input", True) else torch.zeros_like(held["b_dec"])
    return held["W_enc"].T.contiguous(), held["b_enc"], offset, int(cfg["k"])


def part(rows: Any, at: int) -> torch.Tensor:
    return torch.from_numpy(np.array(rows[at : at + TILE]))


def dashboard(rows: Any, tokens: Any, documents: Any, folder: Path, features: int) -> dict[str, Any]:
    """SAEDashboard's runner with Neuronpedia's 128 features at a time, on prompts of 128 rows, from cached rows."""
    from types import SimpleNamespace

    from sae_dashboard.sae_vis_data import SaeVisConfig  # type: ignore[import-not-found]
    from sae_dashboard.sae_vis_runner import SaeVisRunner  # type: ignore[import-not-found]
    from sae_lens import SAE  # type: ignore[import-not-found]

    prompts = len(rows) // WINDOW
    hook, many = "blocks.0.hook_resid_pre", 64
    ids = torch.from_numpy(np.array(tokens[: prompts * WINDOW])).long().view(prompts, WINDOW)
    cache = Path(tempfile.mkdtemp(dir=folder.parent))
    for number, at in enumerate(range(0, prompts, many)):
        held = torch.from_numpy(np.array(rows[at * WINDOW : min(at + many, prompts) * WINDOW]))
        torch.save({hook: held.view(-1, WINDOW, rows.shape[1])}, cache / f"model_activations_{number}.pt")
    unembedding = torch.randn(rows.shape[1], int(tokens.max()) + 1, generator=torch.Generator().manual_seed(0))
    model = SimpleNamespace(hook_dict={hook: None}, W_U=unembedding)
    sae = SAE.load_from_disk(folder)
    sae.fold_W_dec_norm = lambda: None  # decoder rows have norm 1, and SAELens refuses to fold those of TopK
    config = SaeVisConfig(
        hook_point=hook,
        features=list(range(features)),
        minibatch_size_features=COLUMNS,
        minibatch_size_tokens=many,
        cache_dir=cache,
    )
    began = time.perf_counter()
    found = SaeVisRunner(config).run(encoder=sae, model=model, tokens=ids)
    seconds = time.perf_counter() - began
    shutil.rmtree(cache)
    largest = np.zeros(features, np.float32)
    for feature, data in found.feature_data_dict.items():
        groups = data.sequence_data.seq_group_data
        acts = [max(one.feat_acts, default=0.0) for one in groups[0].seq_data]
        largest[feature] = max(acts, default=0.0)
    return {"largest": largest, "once": 0.0, "seconds": seconds}


def delphi(rows: Any, tokens: Any, documents: Any, folder: Path, features: int) -> dict[str, Any]:
    """delphi's cache of all latents, then its records of the first ones, with its defaults, from cached rows."""
    from types import SimpleNamespace

    from delphi.config import CacheConfig, ConstructorConfig, SamplerConfig  # type: ignore[import-not-found]
    from delphi.latents import LatentCache, LatentDataset  # type: ignore[import-not-found]

    length, hook = CacheConfig().cache_ctx_len, "rows"
    config = CacheConfig(batch_size=min(8, len(rows) // length))
    prompts = len(rows) // length // config.batch_size * config.batch_size
    ids = torch.from_numpy(np.array(tokens[: prompts * length])).long().view(prompts, length)
    w, bias, offset, k = weights(folder)

    class Replay(torch.nn.Module):
        """A model whose one module gives out the cached rows of the next tokens."""

        device = torch.device("cpu")

        def __init__(self) -> None:
            super().__init__()
            self.rows, self.at = torch.nn.Identity(), 0

        def forward(self, batch: torch.Tensor) -> None:
            self.at += batch.numel()
            held = torch.from_numpy(np.array(rows[self.at - batch.numel() : self.at]))
            self.rows(held.view(*batch.shape, -1))

    def encode(x: torch.Tensor) -> torch.Tensor:
        """Dense activations, as delphi makes them of sparsify's codes."""
        flat = x.reshape(-1, x.shape[-1])
        top = torch.addmm(bias, flat - offset, w.T).relu().topk(k, sorted=False)
        return flat.new_zeros(len(flat), len(bias)).scatter_(-1, top.indices, top.values).view(*x.shape[:-1], -1)

    raw = Path(tempfile.mkdtemp(dir=folder.parent))
    began = time.perf_counter()
    cache = LatentCache(Replay(), {hook: encode}, config.batch_size)
    cache.run(prompts * length, ids)
    cache.save_splits(config.n_splits, raw)
    cache.save_config(raw, config, "none")
    once = time.perf_counter() - began
    found = LatentDataset(
        raw,
        SamplerConfig(),
        ConstructorConfig(),
        tokenizer=SimpleNamespace(batch_decode=lambda ids: [str(int(i)) for i in ids]),
        modules=[hook],
        latents={hook: torch.arange(features)},
    )
    largest = np.full(features, np.nan, np.float32)
    for record in found:
        largest[record.latent.latent_index] = record.max_activation
    seconds = time.perf_counter() - began - once
    shutil.rmtree(raw)
    return {"largest": largest, "once": once, "seconds": seconds}


if __name__ == "__main__":
    what, *paths, count, out = sys.argv[1:]
    torch.set_num_threads(2)
    arrays = [np.load(path, mmap_mode="r") for path in paths[:3]]
    found = {"loop": loop, "dashboard": dashboard, "delphi": delphi}[what](*arrays, Path(paths[3]), int(count))
    np.savez(out, **found)
