"""A transformers model that is asked for hidden states and outputs of modules, and gives nothing else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actshuffle.arraytypes import U8
from actshuffle.errors import RequestError, SourceError
from actshuffle.executors.cluster import worker_name
from actshuffle.extras import need

DTYPES = {"float32": 4, "float16": 2, "bfloat16": 2}  # bytes of a number


class Model:
    """A transformers model that gives some of its activations for windows of equal length.

    ``layers`` are numbers of ``hidden_states``; ``hooks`` names of modules, whose (first) output is taken.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._torch = torch = need("torch", "collect")
        self.model = load_model(settings["model"], settings["model_dtype"])
        self.device = _device(settings["device"])
        self.model.eval().to(self.device)
        self._layers: dict[str, int] = {f"layer_{n}": n for n in settings["layers"]}
        self._hooks = {name: self._module(name) for name in settings["hooks"]}
        self._dtype = getattr(torch, settings["dtype"])
        self.layers = int(getattr(self.model.config, "num_hidden_layers", 0))
        wrong = [n for n in self._layers.values() if not 0 <= n <= self.layers]
        if wrong:
            raise RequestError(f"no layer {wrong[0]}: {settings['model']} has hidden states 0 to {self.layers}")
        self.identity = {
            "name": settings["model"],
            "class": type(self.model).__name__,
            "layers": self.layers,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "dtype": settings["model_dtype"],
            "fingerprint": fingerprint(self.model),
        }
        self._blocks = self._early_exit(settings["probe"]) if self._layers else None

    def __call__(self, tokens: NDArray[Any]) -> dict[str, U8]:
        """Activations of windows, tokens int64 ``(windows, length)``: uint8 ``(windows, length, width)``."""
        return {name: self._bits(name, value) for name, value in self.raw(tokens).items()}

    def raw(self, tokens: NDArray[Any]) -> dict[str, Any]:
        """The same as the model's own tensors."""
        inputs = self._torch.from_numpy(np.ascontiguousarray(tokens)).to(self.device)
        with self._torch.inference_mode():
            return self._stopping(inputs) if self._blocks is not None else self._plain(inputs)

    def most_tokens(self, tokenizer: Any) -> int:
        """The longest window that model and tokenizer say they take."""
        told = (getattr(self.model.config, "max_position_embeddings", None), tokenizer.model_max_length)
        return min(int(n) for n in (*told, 1 << 20) if n is not None and n > 0)

    def _plain(self, inputs: Any) -> dict[str, Any]:
        held: dict[str, Any] = {}
        hooks = [_keep(module, held, name) for name, module in self._hooks.items()]
        try:
            output = self.model(input_ids=inputs, output_hidden_states=bool(self._layers), use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        return held | {name: output.hidden_states[n] for name, n in self._layers.items()}

    def _stopping(self, inputs: Any) -> dict[str, Any]:
        """As `_plain`, but the model is left as soon as the last layer asked for has been seen."""
        assert self._blocks is not None
        held: dict[str, Any] = {}
        wanted = {n: name for name, n in self._layers.items()}
        hooks = [_keep(module, held, name) for name, module in self._hooks.items()]
        last = max(wanted)
        if 0 in wanted:
            hooks.append(
                self._blocks[0].register_forward_pre_hook(
                    lambda _, args, kwargs: held.update({wanted[0]: _first(args or tuple(kwargs.values()))}),
                    with_kwargs=True,
                )
            )
        for n in sorted(set(wanted) - {0}):
            hooks.append(_keep(self._blocks[n - 1], held, wanted[n]))
        if not self._hooks:
            stop_at = self._blocks[max(last - 1, 0)]
            hooks.append(stop_at.register_forward_hook(_leave))
        try:
            self.model(input_ids=inputs, use_cache=False)
        except _EnoughError:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        return held

    def _early_exit(self, probe: Sequence[int]) -> Any:
        """The model's blocks, if their outputs are its hidden states: tried out on a few tokens."""
        count = self.layers
        if max(self._layers.values()) >= count:
            return None  # the last one may be normed after its block
        lists = [m for m in self.model.modules() if isinstance(m, self._torch.nn.ModuleList) and len(m) == count]
        if len(lists) != 1 or count == 0:
            return None
        inputs = self._torch.tensor([list(probe)], device=self.device)
        with self._torch.inference_mode():
            plain = self._plain(inputs)
            self._blocks = lists[0]
            try:
                found = self._stopping(inputs)
            except Exception:  # a model whose blocks are called in some other way
                return None
        same = set(found) == set(plain) and all(self._torch.equal(found[k], plain[k]) for k in plain)
        return lists[0] if same else None

    def _module(self, name: str) -> Any:
        modules = dict(self.model.named_modules())
        inner = name.removeprefix(f"{getattr(self.model, 'base_model_prefix', '')}.")
        for known in (name, inner):
            if known and known in modules:
                return modules[known]
        close = [m for m in modules if m.endswith(name.rsplit(".", 1)[-1])][:5] or list(modules)[1:6]
        raise RequestError(f"no module {name!r} in {type(self.model).__name__}; there is {', '.join(close)}, ...")

    def _bits(self, name: str, value: Any) -> U8:
        torch = self._torch
        if not isinstance(value, torch.Tensor) or value.ndim != 3:
            raise RequestError(f"{name!r} does not give one vector for each token")
        rounded = value.to(self._dtype)
        if not bool(torch.isfinite(rounded).all()):
            whose = "the model gives" if not bool(torch.isfinite(value).all()) else f"in {self._dtype} there are"
            raise SourceError(
                f"{whose} values in {name} that are not finite (largest {float(value.abs().max()):.3g}); "
                "collect with --dtype bfloat16 or float32"
            )
        return rounded.contiguous().view(torch.uint8).cpu().numpy()  # type: ignore[no-any-return]


class _EnoughError(Exception):
    """All that was asked for has been seen."""


def _leave(*_: Any) -> None:
    raise _EnoughError


def _keep(module: Any, held: dict[str, Any], name: str) -> Any:
    return module.register_forward_hook(lambda _, __, output: held.update({name: _first(output)}))


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple | list) else output


def load_model(name: str, dtype: str) -> Any:
    """The model without its head, in evaluation; safe weights only, no code from its repository."""
    transformers, torch = need("transformers", "collect"), need("torch", "collect")
    with quietly(transformers):
        try:
            return transformers.AutoModel.from_pretrained(name, dtype=getattr(torch, dtype))
        except Exception as err:  # of many kinds, most of them about the name
            raise SourceError(f"cannot load the model {name}: {str(err).splitlines()[0]}") from err


def load_tokenizer(name: str) -> Any:
    transformers = need("transformers", "collect")
    if name.startswith((".", "/", "~")) and not Path(name).is_dir():  # no name on any hub
        raise SourceError(f"cannot load the model {name}: there is no such folder")
    with quietly(transformers):
        try:
            return transformers.AutoTokenizer.from_pretrained(name)
        except Exception as err:
            raise SourceError(f"cannot load the tokenizer {name}: {str(err).splitlines()[0]}") from err


@contextmanager
def quietly(transformers: Any) -> Iterator[None]:
    """Without progress bars and advice on the terminal, which belongs to our own display."""
    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()


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
