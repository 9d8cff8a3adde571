"""Reading other tools' folders: SAELens (cfg.json, sae_weights.safetensors) and sparsify (cfg.json, sae.safetensors).

Every key, value and tensor that a folder may hold is in a table here.  A folder with anything else is refused, and the
refusal names it: a setting that nobody here knows may change the function that the weights compute.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from actshuffle.errors import words_of
from saetrain.config import Config
from saetrain.errors import CheckpointError, ExchangeError
from saetrain.sae import OWN_FILE, OWN_FORMAT, SAE
from saetrain.tensors import TensorFile
from saetrain.variants.table import SAELENS, VARIANTS

PART = 1 << 20  # numbers of a tensor that are looked at together


@dataclass(frozen=True)
class Accepted:
    """Values that a key of cfg.json may have; `words` describes them in a refusal."""

    words: str
    allows: Callable[[Any], bool]


def _one_of(*values: Any) -> Accepted:
    kinds = [(type(value), value) for value in values]  # JSON's true is no 1
    return Accepted(", ".join(map(repr, values)), lambda value: (type(value), value) in kinds)


_ANYTHING = Accepted("anything", lambda value: True)  # describes how the model was made, or where it was applied
_COUNT = Accepted("an integer of 1 or more", lambda value: type(value) is int and value > 0)
_SWITCH = Accepted("true or false", lambda value: type(value) is bool)
_OFF = _one_of(False, None)
_FLOATS = ("float64", "float32", "float16", "bfloat16")
_KWARGS = Accepted(
    "{} or {'k': an integer of 1 or more}",
    lambda value: (
        value is None or (isinstance(value, dict) and all(n == "k" and _COUNT.allows(value[n]) for n in value))
    ),
)

_ABOUT = """
    metadata device model_name model_class_name model_from_pretrained_kwargs hook_name hook_point hook_layer
    hook_point_layer hook_head_index hook_point_head_index hf_hook_name context_size prepend_bos seqpos_slice
    exclude_special_tokens dataset_path dataset_trust_remote_code is_dataset_tokenized neuronpedia_id
    sae_lens_version sae_lens_training_version

    seed expansion_factor b_dec_init_method from_pretrained_path l1_coefficient lp_norm lr lr_scheduler_name
    lr_warm_up_steps train_batch_size store_batch_size n_batches_in_buffer total_training_tokens tokens_per_buffer
    use_cached_activations cached_activations_path use_ghost_grads feature_sampling_window feature_sampling_method
    resample_batches feature_reinit_scale dead_feature_window dead_feature_threshold dead_feature_estimation_method
    log_to_wandb wandb_project wandb_entity wandb_log_frequency eval_frequency n_checkpoints checkpoint_path run_name
    verbose
"""  # where SAELens' activations come from; and how training went, which its first versions put into the same file
SAELENS_KEYS: Mapping[str, Accepted] = {
    "architecture": _one_of(*SAELENS),
    "d_in": _COUNT,
    "d_sae": _COUNT,
    "k": _COUNT,
    "dtype": _one_of(*_FLOATS, *(f"torch.{name}" for name in _FLOATS)),
    "apply_b_dec_to_input": _SWITCH,
    "normalize_activations": _one_of("none", False, None),  # SAELens can fold the others into the weights
    "reshape_activations": _one_of("none", None),
    "finetuning_scaling_factor": _OFF,
    "rescale_acts_by_decoder_norm": _SWITCH,
    # before version 6
    "activation_fn": _one_of("relu", "topk"),
    "activation_fn_str": _one_of("relu", "topk"),
    "activation_fn_kwargs": _KWARGS,
    **dict.fromkeys(_ABOUT.split(), _ANYTHING),
}
# (architecture, activation function before version 6): the architecture that computes the same
_SAELENS_KINDS = {
    ("standard", None): "standard",
    ("standard", "relu"): "standard",
    ("standard", "topk"): "topk",
    ("topk", None): "topk",
    ("topk", "topk"): "topk",
    ("jumprelu", None): "jumprelu",
    ("jumprelu", "relu"): "jumprelu",
    ("gated", None): "gated",
    ("gated", "relu"): "gated",
}
SPARSIFY_KEYS: Mapping[str, Accepted] = {
    "activation": _one_of("topk"),
    "d_in": _COUNT,
    "num_latents": Accepted("an integer of 0 or more", lambda value: type(value) is int and value >= 0),
    "k": _COUNT,
    "expansion_factor": _ANYTHING,  # num_latents, or the weights, say the number
    "normalize_decoder": _SWITCH,  # in training only
    "multi_topk": _SWITCH,  # a further term of the loss
    "signed": _OFF,
    "skip_connection": _OFF,
    "transcode": _OFF,
    "n_targets": _one_of(0),
    "n_sources": _one_of(0),
}


def read_foreign(folder: Path, *, mapped: bool = False) -> SAE:
    """An autoencoder that SAELens or sparsify wrote.  Refuses one that `SAE` would not compute identically.

    With `mapped`, its matrices stay in the pages of the file: for those who read a part of the rows at a time, and look
    themselves whether these are finite (`check_finite`).
    """
    if not (folder / "cfg.json").is_file():
        why = "it has no cfg.json" if folder.is_dir() else "there is no such folder"
        raise ExchangeError(f"{folder} is no dictionary of SAELens or sparsify: {why}")
    readers = {"sae_weights.safetensors": _saelens, "sae.safetensors": _sparsify, OWN_FILE: _own}
    try:
        cfg = json.loads((folder / "cfg.json").read_text())
        if not isinstance(cfg, dict):
            raise ExchangeError(f"{folder / 'cfg.json'} holds {type(cfg).__name__}, not an object of settings")
        there = [name for name in readers if (folder / name).exists()]
        if len(there) == 1:
            return readers[there[0]](folder, cfg, TensorFile(folder / there[0]), mapped)
    except (OSError, ValueError, CheckpointError) as error:
        raise ExchangeError(f"{folder} cannot be read: {type(error).__name__}: {words_of(error)}") from error
    raise ExchangeError(f"{folder} holds {' and '.join(there) or 'none'} of {', '.join(readers)}; one is read")


def _own(folder: Path, cfg: dict[str, Any], file: TensorFile, mapped: bool) -> SAE:
    """What `SAE.save` writes of transcoders and crosscoders."""
    if cfg.get("saetrain") != OWN_FORMAT:
        raise ExchangeError(f"{folder / 'cfg.json'} has the format {cfg.get('saetrain')!r}; this version reads 1")
    names = {"saetrain", "activation", "k", "subtract_b_dec", "arrays", "config"}
    if set(cfg) != names or cfg["activation"] not in VARIANTS or not isinstance(cfg["arrays"], dict):
        raise ExchangeError(f"{folder / 'cfg.json'} must hold {', '.join(sorted(names))}, got {', '.join(sorted(cfg))}")
    sides = [[(str(name), int(width)) for name, width in cfg["arrays"].get(s, ())] for s in ("inputs", "outputs")]
    sizes = {name: sum(width for _, width in side) or None for name, side in zip(("d_in", "d_out"), sides, strict=True)}
    shapes = {"W_enc": ("d_sae", "d_in"), "b_enc": ("d_sae",), "W_dec": ("d_sae", "d_out"), "b_dec": ("d_out",)}
    extra = {"threshold": ("d_sae",), "W_skip": ("d_out", "d_in")}
    held = _tensors(file, mapped, shapes, sizes, optional=extra)
    arrays = dict(zip(("inputs", "outputs"), sides, strict=True))
    return SAE(
        cfg["activation"],
        held["W_enc"],
        held["b_enc"],
        held["W_dec"],
        held["b_dec"],
        bool(cfg["subtract_b_dec"]),
        int(cfg["k"]),
        held.get("threshold"),
        Config.from_json(cfg["config"]) if cfg["config"] else None,
        held.get("W_skip"),
        {**arrays, "scales": [float(scale) for scale in cfg["arrays"].get("scales", [1.0])]},
    )


def _saelens(folder: Path, cfg: dict[str, Any], file: TensorFile, mapped: bool) -> SAE:
    _check_keys(folder, cfg, SAELENS_KEYS)
    named = {cfg[name] for name in ("activation_fn", "activation_fn_str") if cfg.get(name)}
    architecture = cfg.get("architecture", "standard")
    kind = _SAELENS_KINDS.get((architecture, named.pop() if named else None)) if len(named) < 2 else None
    if kind is None:
        told = cfg.get("activation_fn_str", cfg.get("activation_fn"))
        raise ExchangeError(f"{folder}: architecture {architecture!r} with activation_fn_str {told!r} is not supported")
    variant = SAELENS[kind]
    old = (cfg.get("activation_fn_kwargs") or {}).get("k")
    k = cfg.get("k", old) if variant.takes_k else 0
    if old is not None and (not variant.takes_k or old != k):
        raise ExchangeError(f"{folder}: activation_fn_kwargs {{'k': {old}}} contradicts {kind} with k {k}")
    rescale = cfg.get("rescale_acts_by_decoder_norm", False)
    if rescale and not variant.takes_k:
        raise ExchangeError(f"{folder}: rescale_acts_by_decoder_norm true is supported for topk only, not for {kind}")
    shapes = {"W_enc": ("d_in", "d_sae"), "W_dec": ("d_sae", "d_in"), "b_dec": ("d_in",)}
    shapes |= dict.fromkeys(variant.saelens_vectors, ("d_sae",))
    sizes = {"d_in": cfg.get("d_in"), "d_sae": cfg.get("d_sae")}
    held = _tensors(file, mapped, shapes, sizes, optional={"scaling_factor": ("d_sae",)})
    if "scaling_factor" in held and not bool((held["scaling_factor"] == 1).all()):
        raise ExchangeError(f"{file.path}: scaling_factor differs from 1: fold it into W_dec in SAELens first")
    by_latent = held["W_enc"].T
    part = variant.from_saelens({**held, "W_enc": by_latent if mapped else by_latent.contiguous()})
    found = SAE(
        variant.activation,
        part["W_enc"],
        part["b_enc"],
        part["W_dec"],
        held["b_dec"],
        cfg.get("apply_b_dec_to_input", True),
        _checked_k(folder, k, part["b_enc"]) if variant.takes_k else 0,
        part.get("threshold"),
    )
    if rescale:
        norm = found.W_dec.norm(dim=1).clamp_min(torch.finfo(found.W_dec.dtype).tiny)
        found.W_enc.mul_(norm[:, None])
        found.b_enc.mul_(norm)
        found.W_dec.div_(norm[:, None])
    return found


def _sparsify(folder: Path, cfg: dict[str, Any], file: TensorFile, mapped: bool) -> SAE:
    _check_keys(folder, cfg, SPARSIFY_KEYS)
    rows = ("num_latents", "d_in")
    shapes = {"encoder.weight": rows, "encoder.bias": rows[:1], "W_dec": rows, "b_dec": rows[1:]}
    held = _tensors(file, mapped, shapes, {"d_in": cfg.get("d_in"), "num_latents": cfg.get("num_latents") or None})
    k = _checked_k(folder, cfg.get("k"), held["encoder.bias"])
    return SAE("topk", held["encoder.weight"], held["encoder.bias"], held["W_dec"], held["b_dec"], True, k)


def _check_keys(folder: Path, cfg: Mapping[str, Any], keys: Mapping[str, Accepted]) -> None:
    for name, value in cfg.items():
        if name not in keys:
            raise ExchangeError(
                f"{folder / 'cfg.json'}: the setting {name!r} ({value!r}) is unknown here, and may change what the "
                "weights compute; remove it if it does not"
            )
        if not keys[name].allows(value):
            raise ExchangeError(f"{folder / 'cfg.json'}: {name} {value!r} is not supported, only {keys[name].words}")


def _checked_k(folder: Path, k: int | None, bias: Tensor) -> int:
    if k is None or k > len(bias):
        raise ExchangeError(f"{folder / 'cfg.json'}: k is {k}; topk needs one from 1 to {len(bias)}, the latents")
    return k


def _tensors(
    file: TensorFile,
    mapped: bool,
    shapes: Mapping[str, tuple[str, ...]],
    sizes: Mapping[str, int | None],
    optional: Mapping[str, tuple[str, ...]] | None = None,
) -> dict[str, Tensor]:
    """The tensors of a file, if they are those of `shapes`, of one floating type, and of the sizes given.

    And finite, unless they are mapped.
    """
    known = {**shapes, **(optional or {})}
    if missing := [name for name in shapes if name not in file.specs]:
        raise ExchangeError(f"{file.path} has no {', '.join(missing)}; it has {', '.join(sorted(file.specs))}")
    settled = {name: size for name, size in sizes.items() if size is not None}
    first = next(iter(shapes))
    for name, spec in file.specs.items():
        if name not in known:
            raise ExchangeError(f"{file.path}: the tensor {name!r} is unknown here; known are {', '.join(known)}")
        due = known[name]
        if len(spec.shape) == len(due):
            for axis, size in zip(due, spec.shape, strict=True):
                settled.setdefault(axis, size)
        if spec.shape != tuple(settled.get(axis) for axis in due):
            told = ", ".join(f"{axis} {settled[axis]}" for axis in due if axis in settled)
            raise ExchangeError(f"{file.path}: {name} has shape {list(spec.shape)}, not [{', '.join(due)}] ({told})")
        if spec.dtype != file.specs[first].dtype or not spec.dtype.is_floating_point:
            raise ExchangeError(
                f"{file.path}: {name} has type {spec.dtype}, {first} {file.specs[first].dtype}; "
                "all must have one floating-point type"
            )
    held = {name: file.mapped(name) if mapped else file.read(name) for name in file.specs}
    if not mapped:
        check_finite(file.path, held)
    return held


def check_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors, which may be transposed, of which a number is not finite."""
    for name, tensor in tensors.items():
        flat = (tensor if tensor.is_contiguous() else tensor.T).view(-1)
        if not all(bool(torch.isfinite(part).all()) for part in torch.split(flat, PART)):
            raise ExchangeError(f"{path}: {name} holds numbers that are not finite")
