"""Export to other tools' folders, and runs made of them; `saetrain.foreign` reads them.

==========  ===========================================  ===========================================
variant     SAELens                                      sparsify
==========  ===========================================  ===========================================
topk        topk                                         topk
batchtopk   jumprelu, all thresholds equal               refused: it has no thresholds
matryoshka  the same
relu        standard                                     refused
jumprelu    jumprelu                                     refused
gated       gated, the magnitudes' factor in W_enc       refused
==========  ===========================================  ===========================================

Export goes block by block: the whole dictionary is never in memory (SAELens keeps W_enc as [d_in, d_sae], so
that file is written in stripes of columns, each collected by one pass over the checkpoint).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from actshuffle.jobs import hold
from saetrain.config import Config
from saetrain.errors import ExchangeError
from saetrain.exchange import modelcard
from saetrain.foreign import read_foreign
from saetrain.norms import Norm
from saetrain.sae import Folded, saelens_settings
from saetrain.tensors import Spec, write
from saetrain.training import checkpoint
from saetrain.training.start import Weights
from saetrain.variants.table import VARIANTS
from saetrain.writing import put_json

STRIPE_BYTES = 256 << 20

Part = dict[str, Tensor]  # tensors of a block of latents


def export(
    run: Path, to: Path, format: str = "saelens", *, model: str | None = None, hook: str | None = None
) -> dict[str, Any]:
    """Write a run, or one of its checkpoints, for SAELens or sparsify: a folder as the hub has it, with a README.

    `model` and `hook` name the model and the place in it, where config.json does not or says it otherwise.  Returns
    the names that were written.
    """
    found = checkpoint.find(run)
    found.verify()
    found.check_names()
    with hold(to):
        _refuse_content(to)
        to.mkdir(parents=True, exist_ok=True)
        cfg = (_export_sparsify if format == "sparsify" else _export_saelens)(Folded(found), to)
        facts = modelcard.about(run)
        named = modelcard.origin(facts, model, hook)
        if format == "saelens":
            cfg["metadata"] |= named
            out = modelcard.hooks(str(facts.get("output", "")), facts.get("model") or {})
            if "hook_name_out" in cfg and out:
                cfg["hook_name_out"] = out["hook_name"]
        put_json(to / "cfg.json", cfg)
        (to / modelcard.CARD).write_text(modelcard.card(run, to, format, cfg, named, found.state["step"]))
    return named


def row_shape(run: Path) -> list[int]:
    """The shape of the rows of a run or checkpoint if it has several axes, which training flattened; else empty."""
    return [int(n) for n in modelcard.about(run).get("row_shape", [])]


def _refuse_content(folder: Path) -> None:
    if folder.exists() and any(folder.iterdir()):
        raise ExchangeError(f"{folder} exists and is not empty: name another folder")


def _shapes(folded: Folded) -> tuple[int, int, int, torch.dtype]:
    """Latents, widths of input and output, and data type."""
    found = folded.checkpoint
    widths = (len(norm.mean) for norm in folded.norms)
    return found.config.d_sae, *widths, found.files[0].specs["W_enc"].dtype  # type: ignore[return-value]


def _export_sparsify(folded: Folded, to: Path) -> dict[str, Any]:
    """Write the tensors; returns the content of cfg.json."""
    config, (n, d, out, dtype) = folded.checkpoint.config, _shapes(folded)
    _refuse_several(folded, "sparsify")
    if d != out:
        raise ExchangeError(f"sparsify's transcoders have one width, and this one has {d:,} and {out:,}")
    if not folded.variant.sparsify:
        holds = ", ".join(name for name, variant in VARIANTS.items() if variant.sparsify)
        raise ExchangeError(f"sparsify holds {holds} models only, and this is {config.arch}; SAELens holds it")
    names = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "W_dec": "W_dec"}
    rows, one = Spec(dtype, (n, d)), Spec(dtype, (n,))
    specs = {"b_dec": Spec(dtype, (d,)), **_skip(folded, dtype)}
    specs |= {"encoder.weight": rows, "encoder.bias": one, "W_dec": rows}
    write(to / "sae.safetensors", specs, _tensors(folded, names, dtype), {"format": "pt"})
    return {
        "activation": folded.variant.activation,
        "expansion_factor": max(n // d, 1),
        "normalize_decoder": True,
        "num_latents": n,
        "k": config.k,
        "multi_topk": False,
        "skip_connection": config.skip,
        "transcode": folded.transcodes,
        "d_in": d,
    }


def _export_saelens(folded: Folded, to: Path) -> dict[str, Any]:
    """Write the tensors; returns the content of cfg.json."""
    config, variant, (n, d, out, dtype) = folded.checkpoint.config, folded.variant, _shapes(folded)
    _refuse_several(folded, "SAELens")
    if folded.transcodes:
        variant = VARIANTS[variant.activation]  # SAELens has transcoders of two activations only
        if not variant.transcoder:
            raise ExchangeError(f"SAELens has no {variant.name} transcoder; sparsify has, and `SAE.save` writes ours")
    names = [*variant.saelens_vectors, "W_dec", "W_enc"]
    rows, one = Spec(dtype, (n, out)), Spec(dtype, (n,))
    specs = {"b_dec": Spec(dtype, (out,)), **_skip(folded, dtype)}
    specs |= {name: rows if name == "W_dec" else one for name in names}
    specs["W_enc"] = Spec(dtype, (d, n))
    blocks = _tensors(folded, {name: name for name in names}, dtype, variant.to_saelens)
    write(to / "sae_weights.safetensors", specs, blocks, {"format": "pt"})
    cfg = saelens_settings(variant, d, n, dtype, config.arch, config.k)
    if not folded.transcodes:
        return cfg
    more = {"architecture": ("skip_" if config.skip else "") + "transcoder", "d_out": out}
    if variant.transcoder != "transcoder":
        more["architecture"] = f"jumprelu_{more['architecture']}"
    hooks = {"hook_name_out": config.output, "hook_layer_out": 0, "hook_head_index_out": None}
    return cfg | more | hooks | {"apply_b_dec_to_input": False}


def _refuse_several(folded: Folded, tool: str) -> None:
    if any(norm.widths for norm in folded.norms):
        raise ExchangeError(
            f"{tool} has no format for crosscoders, of several arrays; saetrain.load(run).save(folder) writes ours"
        )


def _skip(folded: Folded, dtype: torch.dtype) -> dict[str, Spec]:
    skip = folded.skip()
    return {} if skip is None else {"W_skip": Spec(dtype, tuple(skip.shape))}


def _tensors(
    folded: Folded, names: dict[str, str], dtype: torch.dtype, arranged: Callable[[Part], Part] = lambda part: part
) -> Iterator[tuple[str, Tensor]]:
    """b_dec and the others in order; W_enc in SAELens' layout if it goes under its own name."""
    yield "b_dec", folded.b_dec().to(dtype)
    if (skip := folded.skip()) is not None:
        yield "W_skip", skip.to(dtype)
    for theirs, ours in names.items():
        if theirs != "W_enc":
            for part in folded.blocks():
                yield theirs, arranged(part)[ours].to(dtype)
            continue
        n, d, _, _ = _shapes(folded)
        width = max(STRIPE_BYTES // (n * dtype.itemsize), 1)
        for at in range(0, d, width):
            stripe = torch.cat([arranged(part)["W_enc"][:, at : at + width] for part in folded.blocks()])
            yield "W_enc", stripe.T.to(dtype)


# --- import


@dataclass(frozen=True)
class Brought:
    """Another tool's autoencoder as the parameters of a run on rows that are not normalised."""

    config: Config
    held: Part

    @classmethod
    def read(cls, folder: Path) -> Brought:
        found = read_foreign(folder)
        if found.arrays or found.transcodes:
            raise ExchangeError(
                f"{folder} holds a transcoder or crosscoder; runs are made of autoencoders of one array"
            )
        n, d = found.W_dec.shape
        config = Config(arch=found.activation, d_sae=n, k=max(found.k, 1), widths=(n,), batch_size=1, steps=1)
        variant = VARIANTS[config.arch]
        b_enc: Tensor = found.b_enc
        if found.subtract_b_dec != variant.pre_bias:  # the bias takes over from the subtraction, or gives it back
            b_enc = b_enc + (found.W_enc @ found.b_dec) * (1 if variant.pre_bias else -1)
        held = {
            "W_enc": found.W_enc,
            "b_enc": b_enc,
            "W_dec": found.W_dec,
            "b_dec": found.b_dec,
            "mean": torch.zeros(d, dtype=found.W_enc.dtype),
            "window": torch.zeros(1, dtype=torch.int64),
            "threshold": torch.zeros(1, dtype=torch.float64),
            "quiet": torch.zeros(n, dtype=torch.int64),
            "fired": torch.zeros(n, dtype=torch.int64),
            **variant.unfold(found.threshold),
        }
        return cls(config, held)

    def weight(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        return self.held[name] if name == "b_dec" else self.held[name][start:stop]

    def threshold(self) -> float:
        return float(self.held["threshold"])

    def norms(self) -> tuple[Norm, None]:
        return Norm(self.held["mean"], 1.0), None


def weights_of(path: Path) -> Weights:
    """The weights of a run or checkpoint, or of a folder that SAELens or sparsify wrote."""
    if (path / "cfg.json").exists():
        return Brought.read(path)
    found = checkpoint.find(path)
    found.verify()
    found.check_names()
    return found


def bring(folder: Path, run: Path) -> None:
    """Make a run, with one checkpoint at step 0, of another tool's autoencoder."""
    found = Brought.read(folder)
    with hold(run):
        _refuse_content(run)
        _write_run(run, found, {"imported": str(folder)})


def _write_run(run: Path, found: Brought, about: dict[str, Any]) -> None:
    """A run of one checkpoint."""
    config, held = found.config, found.held
    target = checkpoint.step_folder(run, 0)
    target.mkdir(parents=True)
    specs = {name: Spec(t.dtype, tuple(t.shape)) for name, t in held.items()}
    name = "shard-0-of-1.safetensors"
    digest = write(target / name, specs, held.items(), {"format": "saetrain"})
    state = {
        "format": checkpoint.FORMAT,
        "step": 0,
        "config": config.to_json(),
        "d_in": len(held["mean"]),
        "scale": 1.0,
        "tile": 0,
        "cursor": {},
        "shards": {name: digest},
    }
    put_json(target / "state.json", state)
    put_json(run / "config.json", {"config": config.to_json(), "about": about})
