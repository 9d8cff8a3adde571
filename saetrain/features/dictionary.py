"""A dictionary in the units of the raw rows, a range of latents at a time: runs of ours, and other tools' folders."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saetrain.compute.screen import Screen
from saetrain.errors import CheckpointError
from saetrain.foreign import check_finite, read_foreign
from saetrain.model import Model
from saetrain.sae import BLOCK, SAE, Folded
from saetrain.tensors import sha256
from saetrain.training.checkpoint import Checkpoint, find
from saetrain.variants.table import VARIANTS


@dataclass(frozen=True)
class Dictionary:
    """`path` is a run, a checkpoint, or a folder that SAELens or sparsify wrote."""

    path: str

    @cached_property
    def _foreign(self) -> SAE | None:
        folder = Path(self.path)
        return read_foreign(folder, mapped=True) if (folder / "cfg.json").exists() else None

    @cached_property
    def _folded(self) -> Folded:
        return Folded(find(Path(self.path)))

    @cached_property
    def checkpoint(self) -> Checkpoint | None:
        return self._folded.checkpoint if self._foreign is None else None

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the SHA-256 of the files: the identity of what the dictionary computes."""
        if (checkpoint := self.checkpoint) is not None:
            files: Any = sorted(checkpoint.state["shards"].items()), checkpoint.state["scale"]
        else:
            files = sorted((path.name, sha256(path)) for path in Path(self.path).iterdir() if path.is_file())
        return hashlib.sha256(json.dumps(files).encode()).hexdigest()

    @property
    def variant(self) -> type[Model]:
        """The variant that tells which latents of a finished dictionary are active."""
        return VARIANTS[self._foreign.activation if self._foreign else self._folded.variant.activation]

    @property
    def k(self) -> int:
        """Active latents of a token; 0 where thresholds decide."""
        found = self._foreign.k if self._foreign else self._folded.checkpoint.config.k
        return found if self.variant.takes_k else 0

    @property
    def latents(self) -> int:
        return len(self._foreign.b_enc) if self._foreign else self._folded.checkpoint.config.d_sae

    @property
    def field(self) -> str:
        """The arrays on which a run was trained, where its settings name several or those of a transcoder."""
        config = self.checkpoint.config if self.checkpoint is not None else None
        return config.field if config is not None and self._folded.arrays else ""

    @property
    def d_in(self) -> int:
        return self._foreign.W_enc.shape[1] if self._foreign else int(self._folded.checkpoint.state["d_in"])

    @property
    def d_out(self) -> int:
        """The width of what is rebuilt."""
        return self._foreign.d_out if self._foreign else len(self._folded.norms[1].mean)

    @property
    def transcodes(self) -> bool:
        """True if other arrays than those that go in are rebuilt."""
        return self._foreign.transcodes if self._foreign else self._folded.transcodes

    def check_finite(self) -> None:
        """Refuse another tool's numbers that are none; tasks, which read a part each, rely on it."""
        if (found := self._foreign) is not None:
            held = {name: getattr(found, name) for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")}
            check_finite(Path(self.path), {name: tensor for name, tensor in held.items() if tensor is not None})

    def firing_rates(self) -> Tensor | None:
        """Share of tokens on which each latent was last seen active in training, float64 [latents], where known."""
        if self.checkpoint is None or not int(window := self.checkpoint.read("window")):
            return None
        return self.checkpoint.read("fired").double() / int(window)

    def offset(self) -> Tensor:
        """What is subtracted from raw rows before the encoder, [d_in]."""
        if self._foreign is not None:
            found = self._foreign
            return found.b_dec if found.subtract_b_dec else found.b_dec.new_zeros(found.d_in)
        b_dec = self._folded.b_dec()
        return b_dec if self._folded.subtracts else b_dec.new_zeros(self.d_in)

    def rows(self, lo: int, hi: int) -> dict[str, Tensor]:
        """W_enc [latents, d_in], W_dec, b_enc and threshold [latents] of latents [lo, hi).

        The same bits whatever the range; a variant without thresholds has zeros.
        """
        if (sae := self._foreign) is not None:
            part = {"W_enc": sae.W_enc[lo:hi], "b_enc": sae.b_enc[lo:hi], "W_dec": sae.W_dec[lo:hi]}
            threshold = None if sae.threshold is None else sae.threshold[lo:hi]
        else:
            part = self._folded.rows(lo, hi)
            threshold = part.get("threshold")
        return part | {"threshold": torch.zeros_like(part["b_enc"]) if threshold is None else threshold}


@dataclass(frozen=True)
class Shard:
    """Latents [lo, hi) of a dictionary on a device, float32."""

    lo: int
    hi: int
    weight: Tensor
    bias: Tensor
    threshold: Tensor
    offset: Tensor
    decoder: Tensor | None  # where effects on the loss are asked for
    screen: Screen | None  # of the same weights, on a CPU


@lru_cache(maxsize=1)  # a worker keeps the shard of its last task: tasks come shard by shard
def shard_of(path: str, digest: str, lo: int, hi: int, device: str, decoder: bool) -> Shard:
    found = Dictionary(path)
    if found.digest != digest:
        raise CheckpointError(f"{path} changed since this run began: start again with another OUT")
    weight = torch.empty(hi - lo, found.d_in, device=device)
    bias, threshold = torch.empty(hi - lo, device=device), torch.empty(hi - lo, device=device)
    rows = torch.empty_like(weight) if decoder else None
    for at in range(lo, hi, BLOCK):  # a part at a time, so that no second copy of all is held
        end = min(at + BLOCK, hi)
        part, here = found.rows(at, end), slice(at - lo, end - lo)
        weight[here], bias[here], threshold[here] = part["W_enc"], part["b_enc"], part["threshold"]
        if rows is not None:
            rows[here] = part["W_dec"]
    screen = Screen(weight, bias, None if found.k else threshold) if weight.device.type == "cpu" else None
    return Shard(lo, hi, weight, bias, threshold, found.offset().to(device, torch.float32), rows, screen)
