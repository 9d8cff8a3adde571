"""Tiny causal models of random weights, with tokenizers that have a word per token, and dictionaries for them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saetrain.probing.causal import LanguageModel
from saetrain.sae import SAE

WORDS = [f"w{i}" for i in range(60)]
WIDTH, BLOCKS = 16, 3


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["[UNK]", "<s>", *WORDS])}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]", eos_token="<s>")


def tiny(layer: int = 2, kind: str = "llama", dtype: torch.dtype = torch.float32, **more: Any) -> LanguageModel:
    """A model of three blocks and 16 wide rows; weights are large, so that edits are felt."""
    import transformers

    torch.manual_seed(0)
    shape: dict[str, Any] = {"vocab_size": 62, **more}
    if kind == "llama":
        config = transformers.LlamaConfig(
            hidden_size=WIDTH,
            intermediate_size=32,
            num_hidden_layers=BLOCKS,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=64,
            initializer_range=0.5,
            attn_implementation=shape.pop("attention", None),
            **shape,
        )
        model = transformers.LlamaForCausalLM(config)
    else:
        config = transformers.GPT2Config(
            n_embd=WIDTH, n_layer=BLOCKS, n_head=2, n_positions=64, initializer_range=0.5, **shape
        )
        model = transformers.GPT2LMHeadModel(config)
    return LanguageModel(model.eval().to(dtype), tokenizer(), layer, kind)


def saved(folder: Path, **options: Any) -> Path:
    """The folder of a tiny model."""
    model = tiny(**options)
    model.model.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return folder


def dictionary(activation: str = "topk", latents: int = 48, dtype: torch.dtype = torch.float32, seed: int = 3) -> SAE:
    """A dictionary of random rows that rebuilds something of its input."""
    dice = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=dice, dtype=torch.float64)

    rows = draw(latents, WIDTH)
    rows /= rows.norm(dim=1, keepdim=True)
    return SAE(
        activation,
        (rows + 0.1 * draw(latents, WIDTH)).to(dtype),
        (0.1 * draw(latents)).to(dtype),
        rows.to(dtype),
        (0.2 * draw(WIDTH)).to(dtype),
        activation == "topk",
        8 if activation == "topk" else 0,
        draw(latents).abs().to(dtype) if activation == "jumprelu" else None,
    )


def texts(count: int, seed: int = 1, longest: int = 60) -> list[tuple[str, str]]:
    dice = random.Random(seed)
    return [
        (f"document {n}", " ".join(dice.choice(WORDS) for _ in range(dice.randrange(2, longest)))) for n in range(count)
    ]
