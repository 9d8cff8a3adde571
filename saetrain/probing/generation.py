"""Text from a causal model, token by token, with an edit of its hidden state.

The noise of a sampled token is a function of the seed and of its place alone.  The same seed, plain and steered, draws
the same noise, so the two texts part where the edit changes a choice and not where the dice fell otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actshuffle.units import counted
from saetrain.errors import ConfigError
from saetrain.probing.causal import Edit, LanguageModel

REPLACEMENT = "\ufffd"  # what a decoder gives for the first bytes of a character whose others are still to come


@dataclass(frozen=True)
class Sampler:
    """How the next token is chosen.

    ``temperature`` 0 takes the likeliest one; otherwise tokens are drawn in proportion to exp(logit / temperature), by
    the Gumbel maximum.  ``repetition`` above 1 divides the logits of tokens that are there already, or multiplies those
    below 0 (Keskar et al. 2019, arXiv 1909.05858).
    """

    temperature: float = 0.0
    seed: int = 0
    repetition: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < 100 or not 0 < self.repetition < 100 or self.seed < 0:
            raise ConfigError(
                "a temperature is 0 (the likeliest token) to 100, a repetition penalty above 0 (1: none), a seed 0 or "
                f"more; got {self.temperature}, {self.repetition}, {self.seed}"
            )

    def choose(self, logits: Tensor, seen: Sequence[int]) -> int:
        """A token, from logits [vocabulary] and all tokens before it; equally likely ones go to the lowest."""
        scores = logits.detach().double().cpu().numpy().copy()
        if self.repetition != 1:
            again = np.unique(np.asarray(seen, np.int64))
            old = scores[again]
            scores[again] = np.where(old > 0, old / self.repetition, old * self.repetition)
        if self.temperature:
            dice = np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, len(seen)])))
            scores = scores / self.temperature + dice.gumbel(size=len(scores))
        return int(scores.argmax())


def generate(
    model: LanguageModel,
    prompt: Sequence[int],
    *,
    edit: Edit | None = None,
    tokens: int = 64,
    sampler: Sampler | None = None,
    cache: bool = True,
) -> Iterator[int]:
    """The tokens that follow ``prompt``, one after the other, until the model ends its text or there are so many.

    ``edit`` sees each position once with ``cache``, and all of them at every token without it; the text is the same.
    """
    _check_length(model, prompt, tokens)
    steps = _steps(model, prompt, [sampler or Sampler()], edit, tokens, cache)
    return (token for [token] in steps if token is not None)


def generate_many(
    model: LanguageModel,
    prompt: Sequence[int],
    samplers: Sequence[Sampler],
    *,
    edit: Edit | None = None,
    tokens: int = 64,
) -> list[list[int]]:
    """The texts that follow one ``prompt``, one for each sampler, written together in one pass a token.

    ``edit`` sees the texts as windows in the order of the samplers; one that has ended stays among them until all have.
    Each is the text of `generate`, but for the rounding of products of another shape.
    """
    _check_length(model, prompt, tokens)
    texts: list[list[int]] = [[] for _ in samplers]
    for chosen in _steps(model, prompt, samplers, edit, tokens, True):
        for text, token in zip(texts, chosen, strict=True):
            if token is not None:
                text.append(token)
    return texts


def _check_length(model: LanguageModel, prompt: Sequence[int], tokens: int) -> None:
    if isinstance(prompt, str):
        raise ConfigError("a prompt is a list of token ids: give model.tokens_of(text)")
    if not prompt or tokens < 1 or len(prompt) + tokens > model.longest:
        raise ConfigError(
            f"a prompt of {counted(len(prompt), 'token')} and {tokens} more: both must be 1 or more, and "
            "the model takes "
            f"{model.longest:,} in all"
        )


def _steps(
    model: LanguageModel,
    prompt: Sequence[int],
    samplers: Sequence[Sampler],
    edit: Edit | None,
    tokens: int,
    cache: bool,
) -> Iterator[list[int | None]]:
    """The next token of each text, None for those that have ended; the end is where all have."""
    ends, past = end_tokens(model), None
    seen = [list(prompt) for _ in samplers]
    fresh, ended = seen, [False] * len(samplers)
    for _ in range(tokens):
        with torch.no_grad():  # not around `yield`, which would leave it on in the caller
            step = model.run(torch.tensor(fresh if cache else seen), edit, past, cache=cache)
        past = step.past if cache else None
        chosen: list[int | None] = []
        for at, sampler in enumerate(samplers):
            token = prompt[0] if ended[at] else sampler.choose(step.logits[at, -1], seen[at])
            ended[at] = ended[at] or token in ends
            chosen.append(None if ended[at] else token)
            seen[at].append(token)
        if all(ended):
            return
        yield chosen
        fresh = [text[-1:] for text in seen]


def stream(model: LanguageModel, tokens: Iterator[int]) -> Iterator[str]:
    """The text of tokens, in pieces that are whole characters and add up to the text of all."""
    held: list[int] = []
    told = ""
    for token in tokens:
        held.append(token)
        text = model.text_of(held)
        if text.endswith(REPLACEMENT):
            continue
        yield text[len(told) :]
        told = text
    if held and (text := model.text_of(held)) != told:
        yield text[len(told) :]


def end_tokens(model: LanguageModel) -> set[int]:
    """The tokens with which the model ends a text."""
    named: Any = getattr(getattr(model.model, "generation_config", None), "eos_token_id", None)
    found = [model.tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])]
    return {int(token) for token in found if token is not None}


def prompt_tokens(model: LanguageModel, text: str, *, chat: bool = False) -> list[int]:
    """The tokens of a prompt: a user's turn in the model's chat template, or plain text as the tokenizer begins it."""
    if not chat:
        return [*model.special_tokens()[0], *model.tokens_of(text)]
    if not getattr(model.tokenizer, "chat_template", None):
        raise ConfigError(f"{model.name} has no chat template: give the prompt as plain text")
    turns = [{"role": "user", "content": text}]
    told = model.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    return model.tokens_of(str(told))
