"""A causal language model whose hidden state at one layer can be read, replaced and differentiated.

Layer n is `hidden_states[n]` of transformers, as in `actshuffle collect`: 0 is the input of the first block, and n the
output of block n - 1.  One plain forward hook on that block (for layer 0 a hook before the first one) does all of it::

    tokens -> embedding -> block 0 -> ... -> block n-1 -> x -> edit(x) -> block n -> ... -> norm -> logits
                                                          ^ layer n

The last hidden state comes after the final norm, so no block gives it, and it is refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from actshuffle.extras import quietly
from actshuffle.units import counted
from saetrain.compute.devices import named_device
from saetrain.errors import ConfigError, DataError

Edit = Callable[[Tensor, int], Tensor]  # x [windows, tokens, d] and the position of its first token -> the new x
DTYPES = ("float32", "bfloat16", "float16", "float64")
TRIAL = 5  # tokens of the pass that checks the layer


class Step(NamedTuple):
    """The logits of a pass, and the keys and values to go on from."""

    logits: Tensor  # [windows, tokens, vocabulary]
    past: Any


class LanguageModel:
    """A causal model of transformers with its tokenizer, and one layer of it.

    ``model`` is in evaluation, on its device; ``layer`` as above.  Raises `ConfigError` for a layer that cannot be
    edited: one that is absent, or whose hidden state is not the output of a block.
    """

    def __init__(self, model: Any, tokenizer: Any, layer: int, name: str = "model") -> None:
        self.model, self.tokenizer, self.layer, self.name = model, tokenizer, layer, name
        model.requires_grad_(False)
        config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
        self.blocks = self._blocks(int(config.num_hidden_layers))
        self.width = int(config.hidden_size)
        self.longest = int(getattr(config, "max_position_embeddings", None) or 1 << 20)
        self._check_layer()

    @classmethod
    def load(
        cls,
        name: str,
        layer: int,
        *,
        tokenizer: str | None = None,
        dtype: str = "float32",
        device: str = "auto",
        attention: str | None = None,
    ) -> LanguageModel:
        """From a name or folder, as `AutoModelForCausalLM` takes it; safe weights only, no code from a repository.

        ``dtype`` is the model's computation; ``attention`` an implementation of transformers, such as "eager".
        """
        if dtype not in DTYPES:
            raise ConfigError(f"types of a model are {', '.join(DTYPES)}; got {dtype!r}")
        where = named_device(device)
        if name.startswith((".", "/", "~")) and not Path(name).is_dir():
            raise ConfigError(f"cannot load the model {name}: there is no such folder")
        try:
            import transformers
        except ImportError as error:
            raise ConfigError(
                "this needs transformers: in a checkout of actshuffle, pip install '.[collect]'"
            ) from error
        with quietly(transformers):
            try:
                how = {"attn_implementation": attention} if attention else {}
                model: Any = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype), **how)
                words = transformers.AutoTokenizer.from_pretrained(tokenizer or name)
            except Exception as error:  # of many kinds, most of them about the name
                why = (str(error).splitlines() or [""])[0]
                here = "" if Path(name).is_dir() else ", of which no folder is here,"
                raise ConfigError(f"cannot load the model {name}{here} as a causal language model: {why}") from error
        model.train(False)
        return cls(model.to(where), words, layer, name)

    @property
    def device(self) -> torch.device:
        return torch.device(next(iter(self.model.parameters())).device)

    # --- passes

    def run(self, tokens: Tensor, edit: Edit | None = None, past: Any = None, *, cache: bool = False) -> Step:
        """Logits of tokens int64 [windows, tokens], which follow those in ``past``."""
        start = 0 if past is None else int(past.get_seq_length())
        options: dict[str, Any] = {"use_cache": cache} if "use_cache" in self._parameters else {}
        if past is not None:
            options["past_key_values"] = past
        with self.editing(edit, start):
            found = self.model(input_ids=tokens.to(self.device), **options)
        return Step(found.logits, getattr(found, "past_key_values", None))

    def hidden(self, tokens: Tensor) -> Tensor:
        """The hidden state [windows, tokens, d]; the blocks after it do not run."""
        held: list[Tensor] = []

        def leave(x: Tensor, _: int) -> Tensor:
            held.append(x)
            raise _EnoughError

        try:
            with torch.no_grad():
                self.run(tokens, leave)
        except _EnoughError:
            pass
        return held[0]

    @contextmanager
    def editing(self, edit: Edit | None, start: int = 0) -> Iterator[None]:
        """Within, each pass of the model has its hidden state replaced by ``edit`` of it."""
        if edit is None:
            yield
            return
        if self.layer == 0:
            hook = self.blocks[0].register_forward_pre_hook(_before(edit, start), with_kwargs=True)
        else:
            hook = self.blocks[self.layer - 1].register_forward_hook(_after(edit, start))
        try:
            yield
        finally:
            hook.remove()

    # --- tokens

    def special_tokens(self) -> tuple[list[int], list[int]]:
        """What the tokenizer puts before and after a text."""
        bare = list(self.tokenizer("one", add_special_tokens=False)["input_ids"])
        full = list(self.tokenizer("one")["input_ids"])
        for at in range(len(full) - len(bare) + 1):
            if full[at : at + len(bare)] == bare:
                return full[:at], full[at + len(bare) :]
        raise ConfigError(f"the tokenizer of {self.name} changes a text when it adds special tokens")

    def token(self, name: str) -> int:
        """The id of one token: "bos", an id, or its spelling in the vocabulary, as for the prefix of `collect`."""
        if name == "bos" and self.tokenizer.bos_token_id is not None:
            return int(self.tokenizer.bos_token_id)
        known = self.tokenizer.get_vocab()
        found = int(name) if name.isdecimal() else known.get(name)
        if found is None or found not in known.values():
            raise ConfigError(f"{name!r} is no token of {self.name}: give bos, an id, or a token as it spells it")
        return int(found)

    def tokens_of(self, text: str) -> list[int]:
        """The tokens of a text, special ones in it included, without those that the tokenizer adds."""
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def text_of(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(tokens)))

    # --- the layer

    def _blocks(self, count: int) -> Any:
        lists = [m for m in self.model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == count]
        if len(lists) != 1:
            raise ConfigError(
                f"{self.name} has {len(lists)} lists of {counted(count, 'block')}; a causal language model "
                "with one is needed"
            )
        return lists[0]

    @property
    def _parameters(self) -> Any:
        return inspect.signature(self.model.forward).parameters

    @torch.no_grad()
    def _check_layer(self) -> None:
        """Refuse a layer whose hidden state is not what the hook sees."""
        count = len(self.blocks)
        if not 0 <= self.layer <= count:
            raise ConfigError(f"no layer {self.layer}: {self.name} has hidden states 0 to {count}")
        vocabulary = int(self.model.get_input_embeddings().weight.shape[0])
        tokens = (torch.arange(TRIAL, device=self.device) * 7919 % vocabulary)[None]
        found = self.model(input_ids=tokens, output_hidden_states=True).hidden_states
        if len(found) != count + 1:
            raise ConfigError(
                f"{self.name} gives {counted(len(found), 'hidden state')} for {counted(count, 'block')}; "
                "one more is expected"
            )
        if not torch.equal(self.hidden(tokens), found[self.layer]):
            raise ConfigError(
                f"hidden state {self.layer} of {self.name} is not the output of a block"
                + (" (the last one follows the final norm)" if self.layer == count else "")
                + f"; take a layer below {count}"
            )

    def check_width(self, width: int) -> None:
        if width != self.width:
            raise DataError(
                f"the dictionary takes rows of {counted(width, 'number')}, and layer {self.layer} of "
                f"{self.name} has {self.width}"
            )


class _EnoughError(Exception):
    """The hidden state has been seen."""


def _after(edit: Edit, start: int) -> Callable[..., Any]:
    def hook(_: Any, __: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (edit(output[0], start), *output[1:])
        return edit(output, start)

    return hook


def _before(edit: Edit, start: int) -> Callable[..., Any]:
    def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (edit(args[0], start), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": edit(kwargs["hidden_states"], start)}

    return hook
