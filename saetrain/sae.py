"""A finished autoencoder in the units of the raw rows: the result of a run, and the content of other tools' files.

Normalisation is folded away.  With x = (raw - mean) * scale, dividing all activations by scale gives

    with `pre_bias`    pre = W_enc (raw - b) + b_enc / scale               b = mean + b_dec / scale
    without            pre = W_enc raw + b_enc / scale - W_enc mean
                       raw^ = sum f_i W_dec[i] + b;                        thresholds too are divided by scale

and where training leaves decoder norms free, they go into the encoder, so that every decoder row has norm 1.

A transcoder has the scale of its output in the place of `scale`, and W_enc times the input's scale over it; its
W_skip likewise.  Several arrays side by side are folded alike, each with its own scale: `scale` is then that of the
first array of the output, and rows of W_dec have norm 1 (the sum over arrays) in normalised units.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from actshuffle.jobs import hold
from saetrain.config import Config
from saetrain.errors import ExchangeError
from saetrain.model import Model
from saetrain.norms import Norm
from saetrain.settings import split_names
from saetrain.tensors import Spec, write
from saetrain.training.checkpoint import Checkpoint
from saetrain.variants.table import VARIANTS
from saetrain.writing import put_json

BLOCK = 1024  # latents read at a time
OWN_FILE = "weights.safetensors"  # of a transcoder or crosscoder, rows by latent
OWN_FORMAT = 1  # of its cfg.json
SAELENS_VERSION = "6.0.0"  # the layout of cfg.json that is written

Rows = TypeVar("Rows", Tensor, np.ndarray[Any, Any])


class SAE(nn.Module):
    """A finished autoencoder: rows [..., d_in] in the units of the store, activations [..., d_sae].

    `activation` is relu, topk (with `k`) or jumprelu (with `threshold` [d_sae]).  Rows may be tensors or numpy
    arrays; the answer is of the same kind.  The tensors are parameters that need no gradient: `requires_grad_()` makes
    them trainable.  `config` holds the settings of the run, or None for another tool's autoencoder.

    A transcoder gives rows [..., d_out] of other arrays.  Where several arrays go in or are rebuilt, they lie side by
    side in a row: `join` puts them together, `split` takes them apart.
    """

    W_enc: nn.Parameter
    b_enc: nn.Parameter
    W_dec: nn.Parameter
    b_dec: nn.Parameter
    W_skip: nn.Parameter | None
    threshold: Tensor | None

    def __init__(
        self,
        activation: str,
        W_enc: Tensor,
        b_enc: Tensor,
        W_dec: Tensor,
        b_dec: Tensor,
        subtract_b_dec: bool,
        k: int = 0,
        threshold: Tensor | None = None,
        config: Config | None = None,
        W_skip: Tensor | None = None,
        arrays: Mapping[str, Any] | None = None,
    ) -> None:
        """W_enc is [d_sae, d_in], W_dec [d_sae, d_out]; with `subtract_b_dec`, b_dec is taken from the encoder's input.

        W_skip [d_out, d_in] maps the input to a part of the output.  `arrays` describes several arrays, or those of a
        transcoder: "inputs" and "outputs" are lists of (name, width), "scales" the factors of the outputs.
        """
        super().__init__()
        self.activation, self.subtract_b_dec, self.k, self.config = activation, subtract_b_dec, k, config
        self.arrays = {name: list(value) for name, value in (arrays or {}).items()}
        self.register_parameter("W_skip", None if W_skip is None else nn.Parameter(W_skip, requires_grad=False))
        for name, tensor in (("W_enc", W_enc), ("b_enc", b_enc), ("W_dec", W_dec), ("b_dec", b_dec)):
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        self.register_buffer("threshold", threshold)

    @property
    def d_in(self) -> int:
        return self.W_enc.shape[1]

    @property
    def d_out(self) -> int:
        return self.W_dec.shape[1]

    @property
    def inputs(self) -> dict[str, int]:
        """Names and widths of the arrays that go in, where they are several, or a transcoder's."""
        return dict(self.arrays.get("inputs", ()))

    @property
    def outputs(self) -> dict[str, int]:
        """Names and widths of the arrays that are rebuilt, likewise."""
        return dict(self.arrays.get("outputs", ()))

    @property
    def transcodes(self) -> bool:
        """True if other arrays are rebuilt than go in."""
        return self.inputs != self.outputs or self.d_in != self.d_out

    @property
    def array_norms(self) -> Tensor:
        """[d_sae, arrays]: the norm of each decoder row in each array that is rebuilt, in normalised units.

        Of a crosscoder, a latent of one model or layer alone has a norm there, and next to none elsewhere.
        """
        widths = list(self.outputs.values()) or [self.d_out]
        scales = torch.tensor(self.arrays.get("scales", [1.0]), dtype=self.W_dec.dtype, device=self.W_dec.device)
        norms = torch.stack([part.norm(dim=1) for part in torch.split(self.W_dec, widths, 1)], 1)
        return norms * (scales / scales[0])

    def join(self, rows: Mapping[str, Rows]) -> Rows:
        """Rows [..., d_in] of all inputs side by side, from those of each array by its name."""
        if set(rows) != set(self.inputs):
            raise ExchangeError(f"rows of {', '.join(self.inputs) or 'one array'} are due, got {', '.join(rows)}")
        parts: list[Any] = [rows[name] for name in self.inputs]
        joined: Any = np.concatenate(parts, -1) if isinstance(parts[0], np.ndarray) else torch.cat(parts, -1)
        return cast(Rows, joined)

    def split(self, rows: Rows) -> dict[str, Rows]:
        """The rows of each output, from rows [..., d_out] of all of them."""
        found, at = {}, 0
        for name, width in self.outputs.items():
            found[name] = rows[..., at : at + width]
            at += width
        return found

    @property
    def d_sae(self) -> int:
        return self.W_dec.shape[0]

    def encode(self, raw: Rows) -> Rows:
        """Activations [..., d_sae] of raw rows [..., d_in]."""
        if isinstance(raw, np.ndarray):
            return self.encode(self._tensor(raw)).numpy(force=True)
        self._check(raw, self.d_in, "rows")
        x = raw.to(self.W_enc.dtype) - (self.b_dec if self.subtract_b_dec else 0)
        pre = (x @ self.W_enc.T + self.b_enc).view(-1, self.d_sae)
        acts = VARIANTS[self.activation].activate(pre, self.k, self.threshold)
        return acts.view(*raw.shape[:-1], self.d_sae)

    def decode(self, acts: Rows) -> Rows:
        """Raw rows [..., d_out] rebuilt from activations [..., d_sae], without a skip map."""
        if isinstance(acts, np.ndarray):
            return self.decode(self._tensor(acts)).numpy(force=True)
        self._check(acts, self.d_sae, "activations")
        return acts.to(self.W_dec.dtype) @ self.W_dec + self.b_dec

    def forward(self, raw: Rows) -> Rows:
        """Rows [..., d_in] as the autoencoder rebuilds them; rows [..., d_out] of a transcoder's output."""
        if isinstance(raw, np.ndarray):
            return cast(Tensor, self(self._tensor(raw))).numpy(force=True)
        out = self.decode(self.encode(raw))
        return out if self.W_skip is None else out + raw.to(out.dtype) @ self.W_skip.T

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write cfg.json and a safetensors file into a new or empty folder, which `load` reads.

        SAELens reads it too, if it is of one array; transcoders and crosscoders are written in a form of our own.
        """
        to = Path(folder)
        with hold(to):
            if to.exists() and any(to.iterdir()):
                raise ExchangeError(f"{to} exists and is not empty: name another folder")
            to.mkdir(parents=True, exist_ok=True)
            self._save(to)

    def _save(self, to: Path) -> None:
        variant = VARIANTS[self.activation]
        held = {name: tensor.detach().cpu() for name, tensor in self.named_parameters()}
        if self.arrays or self.transcodes:
            own = held | ({} if self.threshold is None else {"threshold": self.threshold.detach().cpu()})
            self._save_own(to, own)
            return
        held["W_enc"] = held["W_enc"].T
        if variant.has_thresholds and self.threshold is not None:
            held["threshold"] = self.threshold.detach().cpu()
        specs = {name: Spec(tensor.dtype, tuple(tensor.shape)) for name, tensor in held.items()}
        write(to / "sae_weights.safetensors", specs, held.items(), {"format": "pt"})
        made = self.config.arch if self.config else self.activation
        cfg = saelens_settings(variant, self.d_in, self.d_sae, self.W_dec.dtype, made, self.k)
        put_json(to / "cfg.json", {**cfg, "apply_b_dec_to_input": self.subtract_b_dec})

    def _save_own(self, to: Path, held: dict[str, Tensor]) -> None:
        specs = {name: Spec(tensor.dtype, tuple(tensor.shape)) for name, tensor in held.items()}
        write(to / OWN_FILE, specs, held.items(), {"format": "pt"})
        about = {
            "saetrain": OWN_FORMAT,
            "activation": self.activation,
            "k": self.k,
            "subtract_b_dec": self.subtract_b_dec,
            "arrays": self.arrays,
            "config": None if self.config is None else self.config.to_json(),
        }
        put_json(to / "cfg.json", about)

    def extra_repr(self) -> str:
        wide = f"d_in={self.d_in}" + (f", d_out={self.d_out}" if self.transcodes else "")
        return f"{self.activation}, {wide}, d_sae={self.d_sae}" + (f", k={self.k}" if self.k else "")

    def _tensor(self, rows: np.ndarray[Any, Any]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(rows)).to(self.W_dec.device)

    def _check(self, given: Tensor, width: int, what: str) -> None:
        if not given.dim() or given.shape[-1] != width:
            raise ValueError(f"{what} of shape {tuple(given.shape)}: the last axis of this autoencoder's is {width}")


@dataclass(frozen=True)
class Folded:
    """A checkpoint in raw units, a block of latents at a time."""

    checkpoint: Checkpoint

    @property
    def variant(self) -> type[Model]:
        return VARIANTS[self.checkpoint.config.arch]

    @cached_property
    def norms(self) -> tuple[Norm, Norm]:
        """Of the input and of the output."""
        norm, out = self.checkpoint.norms()
        return norm, out or norm

    @property
    def transcodes(self) -> bool:
        return "scale_out" in self.checkpoint.state

    @property
    def subtracts(self) -> bool:
        """True if b_dec is taken from the encoder's input."""
        return self.variant.pre_bias and not self.transcodes

    @property
    def arrays(self) -> dict[str, Any] | None:
        """As `SAE` takes them."""
        config, (norm, out) = self.checkpoint.config, self.norms
        if not self.transcodes and not norm.widths:
            return None
        inputs, outputs = split_names(config.field), split_names(config.output)
        inputs = inputs or ["input"]  # where the store has one array, which no setting names
        outputs = outputs if self.transcodes else inputs
        both = [list(zip(names, n.parts, strict=True)) for names, n in ((inputs, norm), (outputs, out))]
        return {"inputs": both[0], "outputs": both[1], "scales": out.scales}

    def skip(self) -> Tensor | None:
        if not self.checkpoint.config.skip:
            return None
        norm, out = self.norms
        skip = self.checkpoint.weight("W_skip")
        return (skip * norm.scale / _column(out.scale)).to(skip.dtype)

    def b_dec(self) -> Tensor:
        norm, out = self.norms
        found, skip = out.mean + self.checkpoint.weight("b_dec") / out.scale, self.skip()
        return (found if skip is None else found - skip @ norm.mean).to(out.mean.dtype)

    def blocks(self) -> Iterator[dict[str, Tensor]]:
        """W_enc, b_enc, W_dec and any threshold, rows one block after the other."""
        running = self.checkpoint.threshold()
        for lo in range(0, self.checkpoint.config.d_sae, BLOCK):
            yield self._block(lo, running)

    def rows(self, lo: int, hi: int) -> dict[str, Tensor]:
        """The same of latents [lo, hi) alone; each has the same bits in any range, since whole blocks are folded."""
        running = self.checkpoint.threshold()
        first = lo // BLOCK * BLOCK
        parts = [self._block(at, running) for at in range(first, hi, BLOCK)]
        return {n: torch.cat([p[n] for p in parts])[lo - first : hi - first] for n in parts[0]}

    def _block(self, lo: int, running: float) -> dict[str, Tensor]:
        c, variant, (norm, out) = self.checkpoint, self.variant, self.norms
        hi, scale = min(lo + BLOCK, c.config.d_sae), out.scales[0]
        part = {n: c.weight(n, lo, hi) for n in ("W_enc", "b_enc", "W_dec", *variant.extra)}
        part = variant.fold(part, running, scale)
        if not variant.unit_rows:
            part = _with_unit_rows(part, list(out.parts))
        if self.transcodes or norm.widths:
            part["W_enc"] = (part["W_enc"] * (norm.scale / scale)).to(part["W_enc"].dtype)
            part["W_dec"] = (part["W_dec"] * (scale / out.scale)).to(part["W_dec"].dtype)
        if not self.subtracts:
            part["b_enc"] = part["b_enc"] - part["W_enc"] @ norm.mean
        return part

    def whole(self) -> SAE:
        parts = list(self.blocks())
        joined = {n: torch.cat([p[n] for p in parts]) for n in parts[0]}
        return SAE(
            self.variant.activation,
            joined["W_enc"],
            joined["b_enc"],
            joined["W_dec"],
            self.b_dec(),
            self.subtracts,
            self.checkpoint.config.k,
            joined.get("threshold"),
            self.checkpoint.config,
            self.skip(),
            self.arrays,
        )


def _column(scale: float | Tensor) -> float | Tensor:
    return scale[:, None] if isinstance(scale, Tensor) else scale


def _with_unit_rows(part: dict[str, Tensor], widths: list[int]) -> dict[str, Tensor]:
    """The same autoencoder with decoder norms moved into the encoder and the thresholds."""
    norms = [rows.norm(dim=1) for rows in torch.split(part["W_dec"], widths, 1)]
    norm = torch.stack(norms).sum(0).clamp_min(1e-12)
    scaled = {n: t * (norm[:, None] if t.dim() == 2 else norm) for n, t in part.items() if n != "W_dec"}
    return scaled | {"W_dec": part["W_dec"] / norm[:, None]}


def saelens_settings(
    variant: type[Model], d_in: int, d_sae: int, dtype: torch.dtype, arch: str, k: int
) -> dict[str, Any]:
    """The content of SAELens' cfg.json; `arch` names the variant that was trained."""
    return {
        "architecture": variant.saelens,
        "d_in": d_in,
        "d_sae": d_sae,
        "dtype": str(dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": variant.pre_bias,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": SAELENS_VERSION,
            "sae_lens_training_version": None,
            "trained_with": "saetrain",
            "variant": arch,
        },
        **variant.saelens_settings(k),
    }
