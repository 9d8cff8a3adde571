"""The table of variants.  Everything outside this folder that depends on the variant asks `VARIANTS[arch]`."""

from __future__ import annotations

from saetrain.model import Model
from saetrain.variants.batchtopk import BatchTopK
from saetrain.variants.jumprelu import JumpReLU
from saetrain.variants.matryoshka import Matryoshka
from saetrain.variants.relu import ReLU
from saetrain.variants.topk import TopK

_ROWS: tuple[type[Model], ...] = (TopK, BatchTopK, Matryoshka, ReLU, JumpReLU)
VARIANTS = {variant.name: variant for variant in _ROWS}
# By SAELens' architecture: the variants that a finished autoencoder can be.  The others fold into one of these.
SAELENS = {variant.saelens: variant for variant in _ROWS if variant.activation == variant.name}
