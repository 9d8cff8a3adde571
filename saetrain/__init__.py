"""Sparse autoencoders with sharded parameters, trained from a shuffled activation store.

>>> import saetrain
>>> sae = saetrain.load("store.sae")              # doctest: +SKIP
>>> sae.encode(rows), sae(rows)                   # doctest: +SKIP
"""

from saetrain.config import Config
from saetrain.opening import load
from saetrain.probing.causal import LanguageModel
from saetrain.probing.corpus import Corpus, Cutting
from saetrain.probing.fidelity import evaluate
from saetrain.sae import SAE
from saetrain.training.train import fit

__all__ = ["SAE", "Config", "Corpus", "Cutting", "LanguageModel", "evaluate", "fit", "load"]
