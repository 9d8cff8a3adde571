"""Sparse autoencoders with sharded parameters, trained from a shuffled activation store.

>>> import saetrain
>>> run = saetrain.fit("shuffled.zarr", k=32)     # doctest: +SKIP
>>> run.sae.encode(rows), run.metrics             # doctest: +SKIP
>>> sae = saetrain.load("shuffled.sae")           # doctest: +SKIP
>>> saetrain.open_features("store.features")[123] # doctest: +SKIP
"""

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
from saetrain.reading.latents import open_features
from saetrain.runs import Run, fit, resume
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
    "Turn",
    "ablate",
    "attribute",
    "build_features",
    "evaluate",
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
