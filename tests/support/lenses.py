"""Folders of models with the tensors that a logit lens needs, and no more."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from saetrain import tensors
from support.features import WIDTH

VOCABULARY = 1500


def model(folder: Path, family: str, *, tied: bool = False, kind: str = "") -> Path:
    """A folder with the tensors that a lens needs, and others."""
    head, embedding, norm = {
        "llama": ("lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"),
        "gpt2": ("lm_head.weight", "transformer.wte.weight", "transformer.ln_f.weight"),
        "neox": ("embed_out.weight", "gpt_neox.embed_in.weight", "gpt_neox.final_layer_norm.weight"),
    }[family]
    rng = torch.Generator().manual_seed(11)
    held = {
        embedding: torch.randn(VOCABULARY, WIDTH, generator=rng),
        norm: torch.rand(WIDTH, generator=rng) + 0.5,
        "model.layers.0.weight": torch.zeros(3),
    }
    if not tied:
        held[head] = torch.randn(VOCABULARY, WIDTH, generator=rng)
    folder.mkdir(parents=True)
    names = sorted(held)
    for number, part in enumerate((names[:1], names[1:])):  # a model in two files
        specs = {name: tensors.Spec(held[name].dtype, tuple(held[name].shape)) for name in part}
        tensors.write(folder / f"model-{number}.safetensors", specs, ((n, held[n]) for n in part), {})
    (folder / "config.json").write_text(json.dumps({"model_type": kind or family}))
    np.savez(folder / "truth.npz", head=held[embedding if tied else head].numpy(), gain=held[norm].numpy())
    return folder
