"""The model behind the page: the features of a text that somebody pastes, and text steered while it is written."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from actshuffle.units import counted
from saetrain.errors import ConfigError
from saetrain.probing.causal import LanguageModel
from saetrain.probing.generation import Sampler, generate, prompt_tokens, stream
from saetrain.probing.turning import METHODS, UNITS, Steering, Turn, strength
from saetrain.sae import SAE

LONGEST_TEXT = 512  # tokens of a pasted text
MOST_TOKENS = 256  # of a steered text
EACH = 6  # features told of each token


class Live:
    """A dictionary inside its model.  One request at a time computes; the others wait."""

    def __init__(
        self,
        sae: SAE,
        model: LanguageModel,
        median_norm: float | None,
        *,
        prefix: Sequence[int] = (),
        drop_norm: float = 0.0,
    ) -> None:
        """Texts are read behind the tokens ``prefix``, and rows beyond ``drop_norm`` times the median norm (0: none)
        are left out, as those were that the dictionary learned from."""
        self.sae, self.model, self.median_norm, self.prefix = sae, model, median_norm, [*prefix]
        self.limit = drop_norm * median_norm if drop_norm and median_norm else math.inf
        self._lock = threading.Lock()

    def facts(self) -> dict[str, Any]:
        return {
            "name": self.model.name,
            "layer": self.model.layer,
            "median_norm": self.median_norm,
            "chat": bool(getattr(self.model.tokenizer, "chat_template", None)),
            "methods": METHODS,
            "units": UNITS,
            "most_tokens": MOST_TOKENS,
        }

    def length(self, feature: int) -> float:
        """The norm of a decoder row: how far one unit of activation moves a row of the layer."""
        return float(self.sae.W_dec[feature].double().norm())

    def text(self, text: str) -> dict[str, Any]:
        """The tokens of a text, the features that are most active on each, and those most active on the whole.

        The text is read behind the prefix and the special tokens that the tokenizer puts before a text, and these are
        not told of.  ``heavy`` are the places of rows that are left out.
        """
        before = self.prefix + self.model.special_tokens()[0]
        tokens = self.model.tokens_of(text)
        if not tokens:
            raise ConfigError("the text has no tokens")
        if len(tokens) > LONGEST_TEXT or len(before) + len(tokens) > self.model.longest:
            raise ConfigError(f"the text has {counted(len(tokens), 'token')}; at most {LONGEST_TEXT} are read")
        with self._lock, torch.no_grad():
            x = self.model.hidden(torch.tensor([before + tokens]))[0, len(before) :]
            acts = self.sae.encode(x.to(self.sae.W_dec.dtype))
            heavy = x.float().norm(dim=1) > self.limit
            acts[heavy] = 0
            value, latent = acts.topk(min(EACH, acts.shape[1]), dim=1)
            best, at = acts.max(0)
            whole = best.topk(min(4 * EACH, len(best))).indices
        rows = zip(value.tolist(), latent.tolist(), strict=True)
        held = [[[i, round(v, 4)] for v, i in zip(vs, ls, strict=True) if v > 0] for vs, ls in rows]
        over = [
            {"id": i, "value": float(best[i]), "at": int(at[i]), "acts": [round(a, 4) for a in acts[:, i].tolist()]}
            for i in whole.tolist()
            if best[i] > 0
        ]
        pieces = [self.model.text_of([token]) for token in tokens]
        return {"tokens": pieces, "features": held, "whole": over, "heavy": heavy.nonzero()[:, 0].tolist()}

    def steer(self, asked: dict[str, Any], largest: dict[int, float]) -> Iterator[dict[str, Any]]:
        """Pieces of the plain and of the steered text, as they are written in turn; the last one tells the cost.

        `asked` has turns [{feature, method, value, unit}], prompt, chat, tokens, seed and temperature; `largest` the
        largest activation of each feature that is turned.  Refuses what cannot be done before the first piece.
        """
        try:
            turns = [self._turn(turn, largest) for turn in asked["turns"]]
            tokens, seed = int(asked.get("tokens", 48)), int(asked.get("seed", 0))
            sampler = Sampler(float(asked.get("temperature", 0.0)), seed, float(asked.get("repetition", 1.15)))
            prompt = prompt_tokens(self.model, str(asked["prompt"]), chat=bool(asked.get("chat", False)))
        except ConfigError:  # a ValueError too, whose words are for the page as they are
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"this is no request to steer: {type(error).__name__}: {error}") from error
        if not 1 <= tokens <= MOST_TOKENS:
            raise ConfigError(f"1 to {MOST_TOKENS} tokens can be written, not {tokens}")
        first = max(1, len(self.model.special_tokens()[0]))
        steering = Steering(self.sae, turns, first=first, limit=self.limit)
        texts = {
            "plain": stream(self.model, generate(self.model, prompt, tokens=tokens, sampler=sampler)),
            "steered": stream(self.model, generate(self.model, prompt, edit=steering, tokens=tokens, sampler=sampler)),
        }
        return self._pieces(texts, steering)

    def _pieces(self, texts: dict[str, Iterator[str]], steering: Steering) -> Iterator[dict[str, Any]]:
        while texts:
            for name in list(texts):
                with self._lock:
                    piece = next(texts[name], None)
                if piece is None:
                    del texts[name]
                else:
                    yield {"which": name, "text": piece}
        yield {"which": "end", "moved": steering.moved}

    def _turn(self, asked: dict[str, Any], largest: dict[int, float]) -> Turn:
        feature, method, value = int(asked["feature"]), str(asked.get("method", "clamp")), float(asked["value"])
        if method in ("scale", "ablate"):
            return Turn(feature, method, value)
        unit = str(asked.get("unit", "norm"))
        found = strength(
            self.sae, feature, value, unit, median_norm=self.median_norm, largest=largest.get(feature) or None
        )
        return Turn(feature, method, found.activation)
