"""The logit lens: what a direction of the residual stream adds to the logits, if it reaches the unembedding as it is.

    logit[v] = <gain * (w - mean(w)), U[v] - mean over the vocabulary of U>          mean(w) for a LayerNorm only

for a decoder row w, the final norm's gain and the unembedding U [vocabulary, d].  The scale of the norm is left out,
since it depends on the token, and so are biases and a soft cap, which move no token past another.  Subtracting the
mean over the vocabulary changes no probability, and makes values of different rows comparable.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from saetrain.errors import DataError
from saetrain.products.tiles import COLUMNS, Kept, products
from saetrain.tensors import TensorFile

BINS = 50  # of a histogram, from -REACH to REACH standard deviations; the outer bins hold all that is beyond
REACH = 5.0


class Family(NamedTuple):
    """Names of the tensors in the files of a kind of model."""

    unembedding: tuple[str, ...]  # the first that is there; the last is the embedding, where they are tied
    norm: str
    layer_norm: bool = False  # else RMSNorm


FAMILIES = {
    "GPT-2": Family(("lm_head.weight", "transformer.wte.weight", "wte.weight"), "ln_f.weight", True),
    "GPT-NeoX": Family(("embed_out.weight", "gpt_neox.embed_in.weight"), "final_layer_norm.weight", True),
    "Llama": Family(("lm_head.weight", "model.embed_tokens.weight"), "model.norm.weight"),
    "Llama in a larger model": Family(
        ("language_model.lm_head.weight", "language_model.model.embed_tokens.weight"),
        "language_model.model.norm.weight",
    ),
}
ONE_PLUS = ("gemma",)  # model types whose RMSNorm multiplies by 1 + weight


@dataclass(frozen=True)
class Lens:
    """Where a model's unembedding and final gain are, and a digest of their bytes; all plain values."""

    file: str
    unembedding: str
    norm_file: str
    norm: str
    layer_norm: bool
    one_plus: bool
    vocabulary: int
    width: int
    digest: str

    def tile(self, start: int) -> Tensor:
        """Rows [start, start + COLUMNS) of the unembedding, float32."""
        return TensorFile(Path(self.file)).read(self.unembedding, start, start + COLUMNS).float()

    def directions(self, rows: Tensor) -> Tensor:
        """Decoder rows [n, d] as the final norm passes them on, without its scale."""
        gain = TensorFile(Path(self.norm_file)).read(self.norm).float() + self.one_plus
        rows = rows.float()
        return (rows - rows.mean(1, keepdim=True) if self.layer_norm else rows) * gain


def open_lens(model: str | Path, width: int) -> Lens:
    """The lens of a causal model's folder, as transformers saves it; its unembedding must take rows of `width`."""
    folder = Path(model).absolute()
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{folder} is not the folder of a model: config.json is unreadable ({error})") from error
    where = {name: path for path in sorted(folder.glob("*.safetensors")) for name in TensorFile(path).specs}
    for family in FAMILIES.values():
        found = next((name for name in family.unembedding if name in where), None)
        norm = next((name for name in where if name == family.norm or name.endswith(f".{family.norm}")), None)
        if found is None or norm is None:
            continue
        shape = TensorFile(where[found]).specs[found].shape
        if len(shape) != 2 or shape[1] != width:
            raise DataError(f"{where[found]}: {found} has shape {list(shape)}, and rows have width {width}")
        digest = hashlib.sha256()
        for name in (found, norm):
            file = TensorFile(where[name])
            for block in file.blocks(name):
                digest.update(block.contiguous().view(torch.uint8).numpy().data)
        one_plus = str(config.get("model_type", "")).startswith(ONE_PLUS)
        return Lens(
            str(where[found]), found, str(where[norm]), norm, family.layer_norm, one_plus, *shape, digest.hexdigest()
        )
    raise DataError(
        f"{folder} has no unembedding that is known here, in safetensors files: known are {', '.join(FAMILIES)} "
        f"({', '.join(f.unembedding[-1] for f in FAMILIES.values())}); it has {', '.join(sorted(where)[:5]) or 'none'}"
    )


class Logits(NamedTuple):
    """Of some directions: the largest and smallest logits, their histogram; of each token, the best directions."""

    rows: Kept
    histogram: Tensor  # int64 [n, BINS]
    tokens: Kept


def project(lens: Lens, rows: Tensor, start: int, mean: Tensor, std: Tensor, k: int, promoters: int) -> Logits:
    """The logits of directions [n, d], the first of which has the number `start`, a multiple of ROWS.

    `mean` and `std` [n], float64, are of each direction's logits before the mean over the vocabulary is taken away.
    """
    centre, half = mean.float()[:, None], (REACH * std).float().clamp_min(1e-30)[:, None]
    kept = Kept.empty(len(rows), min(k, lens.vocabulary), True, 0)
    tokens = Kept.empty(lens.vocabulary, promoters, False, 0)
    histogram = torch.zeros(len(rows), BINS, dtype=torch.int64)
    for at in range(0, lens.vocabulary, COLUMNS):
        for low, product in products(rows, lens.tile(at)):
            pre = product - centre[low : low + len(product)]
            kept.add(low, pre, at, (), None)
            tokens.add(at, pre.T, start + low, (), None)
            scaled = (pre / half[low : low + len(pre)] + 1) * (BINS / 2)
            bins = scaled.floor().clamp_(0, BINS - 1).long()
            bins += torch.arange(len(pre))[:, None] * BINS
            histogram[low : low + len(pre)] += torch.bincount(bins.view(-1), minlength=len(pre) * BINS).view(-1, BINS)
    return Logits(kept, histogram, tokens)
