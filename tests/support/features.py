"""A small store in document order, dictionaries of every activation, and their dense activations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from saetrain import tensors
from saetrain.describing.slots import Slots
from support.finished import finish
from support.stores import group

WIDTH, LATENTS, K = 12, 40, 5
TINY: dict[str, Any] = {"tile_rows": 16, "tile_latents": 8, "granule": 4, "chunk": 16, "slots": Slots(4, 3, 2, 3, 3)}


def store(
    path: Path, rows: int = 300, *, token: bool = True, document: bool = True, gradient: bool = False, seed: int = 3
) -> Path:
    """Documents of 1 to 60 rows with Zipf-like tokens; the activations depend on the token, so that latents do."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 61, rows)
    sizes = sizes[: int(np.searchsorted(np.cumsum(sizes), rows)) + 1]
    documents = np.repeat(np.arange(len(sizes)), sizes)[:rows].astype("<i4")
    tokens = np.minimum(rng.zipf(1.5, rows), 50).astype("<i4")
    centres = rng.normal(0, 2, (51, WIDTH))
    x = (centres[tokens] + rng.normal(0, 0.7, (rows, WIDTH))).astype("<f4")
    arrays = {"x": x} | ({"token": tokens} if token else {}) | ({"document": documents} if document else {})
    if gradient:
        arrays["grad_x"] = rng.normal(0, 0.1, (rows, WIDTH)).astype("<f4")
    group(path, arrays)
    finish(path, rows, list(arrays))
    return path


def dictionary(path: Path, activation: str, *, seed: int = 5, latents: int = LATENTS, width: int = WIDTH) -> Path:
    """A SAELens folder of a random dictionary; some latents are dead, one is nearly always active, two are equal."""
    rng = torch.Generator().manual_seed(seed)
    w = torch.randn(latents, width, generator=rng)
    bias = torch.randn(latents, generator=rng) * 0.3 - 1.5
    if latents > 9:
        bias[[3, 7]] = -1e4
        w[9], bias[9] = w[8], bias[8]
        bias[5] = 6.0
    held = {"W_enc": w.T.contiguous(), "b_enc": bias, "W_dec": w / w.norm(dim=1, keepdim=True)}
    held["b_dec"] = torch.randn(width, generator=rng) * 0.1
    cfg: dict[str, Any] = {"architecture": activation, "d_in": width, "d_sae": latents, "dtype": "float32"}
    cfg["apply_b_dec_to_input"] = activation == "topk"
    if activation == "topk":
        cfg["k"] = K
    if activation == "jumprelu":
        held["threshold"] = torch.rand(latents, generator=rng) * 2
    path.mkdir(parents=True)
    (path / "cfg.json").write_text(json.dumps(cfg))
    specs = {name: tensors.Spec(t.dtype, tuple(t.shape)) for name, t in held.items()}
    tensors.write(path / "sae_weights.safetensors", specs, held.items(), {})
    return path


def content(out: Path) -> dict[str, bytes]:
    """All arrays of a result and their metadata, byte for byte; without what tells how it was made."""
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name not in ("done.json", "job.json")
    }


# --- the oracle: dense activations, and plain numpy a latent at a time ----------------------------


def dense(dictionary: Path, x: np.ndarray) -> np.ndarray:
    """Activations float32 [rows, latents] of the sparse code, each an inner product of its own, by plain sorting."""
    held = tensors.TensorFile(dictionary / "sae_weights.safetensors")
    cfg = json.loads((dictionary / "cfg.json").read_text())
    w, bias = held.read("W_enc").T.contiguous(), held.read("b_enc")
    rows = torch.from_numpy(x) - (held.read("b_dec") if cfg["apply_b_dec_to_input"] else 0)
    everywhere = torch.ones(len(x), len(bias)).to_sparse_csr()
    pre = torch.sparse.sampled_addmm(everywhere, rows, w.T, beta=0.0).values().view(len(x), -1) + bias
    found = pre.numpy()
    if cfg["architecture"] == "topk":
        kept = np.zeros_like(found)
        for r, row in enumerate(found):
            best = sorted(range(len(row)), key=lambda i: (-row[i], i))[: cfg["k"]]
            kept[r, best] = np.maximum(row[best], 0)
        return kept
    floor = held.read("threshold").numpy() if cfg["architecture"] == "jumprelu" else 0.0
    return np.where(found > floor, found, 0).astype(np.float32)
