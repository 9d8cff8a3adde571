"""A transformers model that is asked for hidden states and outputs of modules, and gives nothing else."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actshuffle.arraytypes import U8
from actshuffle.building.gradients import LOGITS, check_causal, gradients
from actshuffle.errors import ActshuffleError, RequestError, SourceError
from actshuffle.executors.cluster import worker_name
from actshuffle.extras import need, quietly
from actshuffle.units import counted

DTYPES = {"float32": 4, "float16": 2, "bfloat16": 2}  # bytes of a number
PROBES = ((3, 5), (2, 7))  # windows and tokens of trial passes: unequal, so that no axis is taken for another


class Model:
    """A transformers model that gives some of its activations for windows of equal length.

    ``layers`` are numbers of ``hidden_states``; ``hooks`` names of modules, whose (first) output is taken.  Of an
    encoder-decoder the encoder runs, of a model of text and pictures the part for text.  With ``gradients``, the loss
    of a causal language model gives those of each layer, in a pass of its own.  All is tried out first: what does not
    give one vector for each token, once in a pass, is refused.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._torch = torch = need("torch", "collect")
        self.name = settings["model"]
        self.device, dtype = _device(settings["device"]), settings["model_dtype"]
        self._causal = load_causal(self.name, dtype).eval().to(self.device) if settings.get("gradients") else None
        self.model = load_model(self.name, dtype) if self._causal is None else self._causal.base_model
        self.model.eval().to(self.device)
        config = self.model.config
        self._config = config.get_text_config() if hasattr(config, "get_text_config") else config
        self._encoder = bool(getattr(config, "is_encoder_decoder", False))
        self._runs = self.model.get_encoder() if self._encoder else self.model
        positions = getattr(self._config, "max_position_embeddings", None)  # -1: any number
        self._longest = int(positions) if positions is not None and positions > 0 else 1 << 20
        cached = "use_cache" in inspect.signature(self._runs.forward).parameters
        self._options = {"use_cache": False} if cached else {}
        self._layers: dict[str, int] = {f"layer_{n}": n for n in settings["layers"]}
        self._hooks = {name: self._module(name) for name in settings["hooks"]}
        self._dtype = getattr(torch, settings["dtype"])
        self._blocks: Any = None
        self.layers = self._try_out(settings["probe"])
        self.identity = {
            "name": self.name,
            "class": type(self.model).__name__,
            "layers": self.layers,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "dtype": settings["model_dtype"],
            "fingerprint": fingerprint(self.model),
        } | ({"part": "encoder"} if self._encoder else {})
        if self._causal is not None:
            self.identity["head"] = fingerprint(self._causal)
            check_causal(self._causal, torch.tensor([[*settings["probe"]]] * 2).to(self.device), self.name)
        self._blocks = self._early_exit(settings["probe"]) if self._layers else None

    def __call__(self, tokens: NDArray[Any]) -> dict[str, U8]:
        """Activations of windows, tokens int64 ``(windows, length)``: uint8 ``(windows, length, bytes)``."""
        found = {name: self._bits(name, value, self._dtype) for name, value in self.raw(tokens).items()}
        return found | {name: self._bits(name, v, self._torch.float32) for name, v in self._gradients(tokens).items()}

    def raw(self, tokens: NDArray[Any]) -> dict[str, Any]:
        """The same as the model's own tensors."""
        inputs = self._torch.from_numpy(np.ascontiguousarray(tokens)).to(self.device)
        with self._torch.inference_mode():
            found = self._stopping(inputs) if self._blocks is not None else self._plain(inputs)[0]
        return {name: self._one(name, outputs, tokens.shape) for name, outputs in found.items()}

    def _gradients(self, tokens: NDArray[Any]) -> dict[str, Any]:
        """The gradients of the windows' losses; none unless they were asked for."""
        if self._causal is None:
            return {}
        inputs = self._torch.from_numpy(np.ascontiguousarray(tokens)).to(self.device)
        found = gradients(self._causal, inputs, list(self._layers.values()), **self._options)
        for n, value in found.items():
            if value is None:
                raise RequestError(f"no gradient of the loss reaches layer {n} of {self.name}")
        return {f"grad_layer_{n}": self._one(f"grad_layer_{n}", [v], tokens.shape) for n, v in found.items()}

    def batch_tokens(self, wanted: int) -> int:
        """The tokens of one pass: as wanted, or with gradients as many as have `LOGITS` logits."""
        return wanted if self._causal is None else min(wanted, max(1, LOGITS // int(self._config.vocab_size)))

    def most_tokens(self, tokenizer: Any) -> int:
        """The longest window that model and tokenizer say they take."""
        return min(self._longest, *(int(n) for n in [tokenizer.model_max_length] if n > 0))

    def widths(self, probe: Sequence[int], length: int) -> dict[str, int]:
        """The bytes of a row of each array, found with one window of so many tokens."""
        window = np.resize(np.array(probe), (1, length))
        found = self._trial(partial(self, window), f"a window of {counted(length, 'token')}")
        return {name: value.shape[2] for name, value in found.items()}

    def _plain(self, inputs: Any) -> tuple[dict[str, list[Any]], Sequence[Any]]:
        """All outputs of what was asked for in one pass, by name; and the hidden states."""
        held: dict[str, list[Any]] = {name: [] for name in self._hooks}
        hooks = [_keep(module, held[name]) for name, module in self._hooks.items()]
        with ExitStack() as stack:
            for hook in hooks:
                stack.callback(hook.remove)
            output = self._runs(input_ids=inputs, output_hidden_states=bool(self._layers), **self._options)
        states = getattr(output, "hidden_states", None) or () if self._layers else ()
        return held | {name: [states[n]] for name, n in self._layers.items() if 0 <= n < len(states)}, states

    def _stopping(self, inputs: Any) -> dict[str, list[Any]]:
        """As `_plain`, but the model is left as soon as the last layer asked for has been seen."""
        held: dict[str, list[Any]] = {name: [] for name in (*self._hooks, *self._layers)}
        wanted = {n: name for name, n in self._layers.items()}
        hooks = [_keep(module, held[name]) for name, module in self._hooks.items()]

        def keep_input(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            held[wanted[0]].append(_first(args or tuple(kwargs.values())))

        if 0 in wanted:
            hooks.append(self._blocks[0].register_forward_pre_hook(keep_input, with_kwargs=True))
        for n in sorted(set(wanted) - {0}):
            hooks.append(_keep(self._blocks[n - 1], held[wanted[n]]))
        if not self._hooks:
            hooks.append(self._blocks[max(*wanted, 1) - 1].register_forward_hook(_leave))
        with ExitStack() as stack, suppress(_EnoughError):
            for hook in hooks:
                stack.callback(hook.remove)
            self._runs(input_ids=inputs, **self._options)
        return held

    def _early_exit(self, probe: Sequence[int]) -> Any:
        """The model's blocks, if their outputs are its hidden states: tried out on a few tokens."""
        count = self.layers
        if max(self._layers.values()) >= count:
            return None  # the last one may be normed after its block
        lists = [m for m in self._runs.modules() if isinstance(m, self._torch.nn.ModuleList) and len(m) == count]
        if len(lists) != 1 or count == 0:
            return None
        tokens = np.array([list(probe)])
        plain = self.raw(tokens)
        self._blocks = lists[0]
        try:
            found = self.raw(tokens)
        except Exception:  # a model whose blocks are called in some other way
            return None
        same = set(found) == set(plain) and all(self._torch.equal(found[k], plain[k]) for k in plain)
        return lists[0] if same else None

    def _try_out(self, probe: Sequence[int]) -> int:
        """Run as few tokens as tell axes apart, refuse what cannot be collected; the number of the last layer."""
        widths: dict[str, int] = {}
        for windows, length in PROBES:
            tokens = np.resize(np.array(probe), (windows, min(length, self._longest)))
            inputs = self._torch.from_numpy(tokens).to(self.device)
            with self._torch.inference_mode():
                found, states = self._trial(partial(self._plain, inputs), "tokens alone")
            fit = [n for n, state in enumerate(states) if _shape(state)[:-1] == tokens.shape]
            for name, n in self._layers.items():
                if not 0 <= n < len(states):
                    has = f"hidden states 0 to {len(states) - 1}" if states else "no hidden states"
                    raise RequestError(f"no layer {n}: {self.name} has {has}")
                if n not in fit:
                    raise RequestError(f"{self._misfit(name, states[n], tokens.shape)}; hidden states {fit} do")
            for name, outputs in found.items():
                value = self._one(name, outputs, tokens.shape)
                if widths.setdefault(name, value.shape[2]) != value.shape[2]:
                    raise RequestError(f"{name!r} gives vectors whose width is not the same for all windows")
        return len(states) - 1 if states else int(getattr(self._config, "num_hidden_layers", 0))

    def _trial(self, action: Callable[[], Any], on: str) -> Any:
        try:
            return action()
        except ActshuffleError:
            raise
        except Exception as err:  # of as many kinds as there are models
            why = (str(err).splitlines() or [""])[0]
            raise SourceError(f"{self.name} ({type(self._runs).__name__}) cannot run on {on}: {why}") from err

    def _one(self, name: str, outputs: list[Any], shape: tuple[int, ...]) -> Any:
        """The one output of a pass, which must be a vector for each token."""
        if not outputs:
            part = "only the encoder of this model runs" if self._encoder else "it has no part in reading text"
            raise RequestError(f"module {name!r} does not run: {part}")
        if len(outputs) > 1:
            raise RequestError(
                f"module {name!r} runs {len(outputs)} times in a pass, so no single output is its own; take hidden "
                "states (--layers), or a module that runs once"
            )
        value = outputs[0]
        if len(_shape(value)) != 3 or _shape(value)[:2] != shape or not value.is_floating_point():
            raise RequestError(self._misfit(name, value, shape))
        return value

    def _misfit(self, name: str, value: Any, shape: tuple[int, ...]) -> str:
        found = f"{value.dtype} of shape {tuple(value.shape)}" if _shape(value) else type(value).__name__
        return (
            f"{name!r} gives {found} for {counted(shape[0], 'window')} of {counted(shape[1], 'token')}: "
            "not one vector for each token"
        )

    def _module(self, name: str) -> Any:
        modules = dict(self.model.named_modules())
        inner = name.removeprefix(f"{getattr(self.model, 'base_model_prefix', '')}.")
        for known in (name, inner):
            if known and known in modules:
                return modules[known]
        close = [m for m in modules if m.endswith(name.rsplit(".", 1)[-1])][:5] or list(modules)[1:6]
        raise RequestError(f"no module {name!r} in {type(self.model).__name__}; there is {', '.join(close)}, ...")

    def _bits(self, name: str, value: Any, dtype: Any) -> U8:
        torch = self._torch
        rounded = value.to(dtype)
        if not bool(torch.isfinite(rounded).all()):
            whose = "the model gives" if not bool(torch.isfinite(value).all()) else f"in {dtype} there are"
            raise SourceError(
                f"{whose} values in {name} that are not finite (largest {float(value.abs().max()):.3g}); "
                "collect with --dtype bfloat16 or float32"
            )
        return rounded.contiguous().view(torch.uint8).cpu().numpy()  # type: ignore[no-any-return]


class _EnoughError(Exception):
    """All that was asked for has been seen."""


def _leave(*_: Any) -> None:
    raise _EnoughError


def _keep(module: Any, held: list[Any]) -> Any:
    return module.register_forward_hook(lambda _, __, output: held.append(_first(output)))


def _first(output: Any) -> Any:
    """The first of several outputs: of a tuple, a list, or a ModelOutput of transformers."""
    while isinstance(output, tuple | list) or hasattr(output, "to_tuple"):
        output = next(iter(output.to_tuple() if hasattr(output, "to_tuple") else output), None)
    return output


def _shape(value: Any) -> tuple[int, ...]:
    """The shape of a tensor, none of anything else."""
    return tuple(getattr(value, "shape", ()))


def load_model(name: str, dtype: str) -> Any:
    """The model without its head, in evaluation; safe weights only, no code from its repository."""
    torch = need("torch", "collect")
    with _loading(f"cannot load the model {name}") as transformers:
        return transformers.AutoModel.from_pretrained(name, dtype=getattr(torch, dtype))


def load_causal(name: str, dtype: str) -> Any:
    """The model with its head, in evaluation, its weights frozen; safe weights only, no code from its repository.

    Raises `RequestError` for an encoder-decoder, and for a model whose files hold no head.
    """
    torch, needs = need("torch", "collect"), "--gradients needs a causal language model"
    with _loading(f"{needs}; cannot load {name} as one") as transformers:
        if transformers.AutoConfig.from_pretrained(name).is_encoder_decoder:
            raise RequestError(f"{needs}, and {name} is an encoder-decoder")
        model, loading = transformers.AutoModelForCausalLM.from_pretrained(
            name, dtype=getattr(torch, dtype), output_loading_info=True
        )
    if missing := sorted(loading["missing_keys"]):
        raise RequestError(f"{needs}, with its head; the files of {name} have no {missing[0]}")
    return model.requires_grad_(False)


def load_tokenizer(name: str) -> Any:
    if name.startswith((".", "/", "~")) and not Path(name).is_dir():  # no name on any hub
        raise SourceError(f"cannot load the model {name}: there is no such folder")
    here = "" if Path(name).is_dir() else ", of which no folder is here"
    with _loading(f"cannot load the tokenizer {name}{here}") as transformers:
        return transformers.AutoTokenizer.from_pretrained(name)


@contextmanager
def _loading(fault: str) -> Iterator[Any]:
    """transformers, whose errors, of many kinds and most of them about the name, become ours with their first line."""
    transformers = need("transformers", "collect")
    try:
        with quietly(transformers):
            yield transformers
    except ActshuffleError:
        raise
    except Exception as err:
        raise SourceError(f"{fault}: {str(err).splitlines()[0]}") from err


def _device(name: str) -> str:
    """The device of this process; of several GPUs, each worker takes its own."""
    torch = need("torch", "collect")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name != "cuda" or torch.cuda.device_count() < 2:
        return name
    number = worker_name() or ""
    return f"cuda:{int(number) % torch.cuda.device_count()}" if number.isdecimal() else name


def fingerprint(model: Any) -> str:
    """Digest of the names, shapes, types and some bytes of all weights: which model this is."""
    torch, seal = need("torch", "collect"), hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        seal.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        flat = tensor.detach().reshape(-1)
        some = torch.cat([flat[:256], flat[-256:]]).contiguous()
        seal.update(some.view(torch.uint8).cpu().numpy().tobytes())
    return seal.hexdigest()[:32]


def model_of(run: Mapping[str, Any]) -> Model:
    """The model for some settings: one per process, since loading takes longer than many a task."""
    return _model(json.dumps(run, sort_keys=True))


@lru_cache(maxsize=1)
def _model(run: str) -> Model:
    return Model(json.loads(run))
