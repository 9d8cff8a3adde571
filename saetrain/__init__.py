"""Sparse autoencoders with sharded parameters, trained from a shuffled activation store.

>>> import saetrain
>>> run = saetrain.fit("shuffled.zarr", k=32)     # doctest: +SKIP
>>> run.sae.encode(rows), run.metrics             # doctest: +SKIP
>>> sae = saetrain.load("shuffled.sae")           # doctest: +SKIP
>>> saetrain.open_features("store.features")[123] # doctest: +SKIP

A public name and what it needs, such as torch, are imported when a program first uses the name.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from saetrain.config import Config
    from saetrain.features.pipeline import build_features
    from saetrain.opening import load
    from saetrain.probing.attribution import attribute
    from saetrain.probing.causal import LanguageModel
    from saetrain.probing.corpus import Corpus, Cutting
    from saetrain.probing.curves import steer
    from saetrain.probing.fidelity import evaluate
    from saetrain.probing.generation import Sampler, generate, stream
    from saetrain.probing.removal import ablate
    from saetrain.probing.turning import Steering, Turn
    from saetrain.products.job import interactions
    from saetrain.products.reading import Interactions, open_interactions
    from saetrain.reading.expected import expected_attribution
    from saetrain.reading.latents import open_features
    from saetrain.runs.fitting import fit, resume
    from saetrain.runs.trained import Run, Sweep
    from saetrain.sae import SAE

__all__ = [
    "SAE",
    "Config",
    "Corpus",
    "Cutting",
    "Interactions",
    "LanguageModel",
    "Run",
    "Sampler",
    "Steering",
    "Sweep",
    "Turn",
    "ablate",
    "attribute",
    "build_features",
    "evaluate",
    "expected_attribution",
    "fit",
    "generate",
    "interactions",
    "load",
    "open_features",
    "open_interactions",
    "resume",
    "steer",
    "stream",
]


def _modules() -> tuple[ModuleType, ...]:
    """The modules that define the public names; they import torch."""
    from saetrain import config, opening, sae
    from saetrain.features import pipeline
    from saetrain.probing import attribution, causal, corpus, curves, fidelity, generation, removal, turning
    from saetrain.products import job, reading
    from saetrain.reading import expected, latents
    from saetrain.runs import fitting, trained

    probing = attribution, causal, corpus, curves, fidelity, generation, removal, turning
    return config, opening, fitting, trained, sae, pipeline, *probing, job, reading, expected, latents


if not TYPE_CHECKING:  # a type checker would take any name

    def __getattr__(name: str) -> object:
        for module in _modules() if name in __all__ else ():
            found = vars(module).get(name)
            if getattr(found, "__module__", None) == module.__name__:
                globals()[name] = found
                return found
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
