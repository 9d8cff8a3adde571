"""Sparse autoencoders with sharded parameters, trained from a shuffled activation store.

>>> import saetrain
>>> run = saetrain.fit("shuffled.zarr", k=32)     # doctest: +SKIP
>>> run.sae.encode(rows), run.metrics             # doctest: +SKIP
>>> sae = saetrain.load("shuffled.sae")           # doctest: +SKIP
"""

from saetrain.config import Config
from saetrain.opening import load
from saetrain.probing.causal import LanguageModel
from saetrain.probing.corpus import Corpus, Cutting
from saetrain.probing.fidelity import evaluate
from saetrain.runs import Run, fit, resume
from saetrain.sae import SAE

__all__ = ["SAE", "Config", "Corpus", "Cutting", "LanguageModel", "Run", "evaluate", "fit", "load", "resume"]
