"""The table of variants.  Everything outside this folder that depends on the variant asks `VARIANTS[arch]`."""

from __future__ import annotations

from saetrain.model import Model
from saetrain.variants.batchtopk import BatchTopK
from saetrain.variants.gated import Gated
from saetrain.variants.jumprelu import JumpReLU
from saetrain.variants.matryoshka import Matryoshka
from saetrain.variants.relu import ReLU
from saetrain.variants.topk import TopK

_ROWS: tuple[type[Model], ...] = (TopK, BatchTopK, Matryoshka, ReLU, JumpReLU, Gated)
VARIANTS = {variant.name: variant for variant in _ROWS}
# By SAELens' architecture: the variant that is written and read so.  The others fold into one of these.
SAELENS = {v.saelens: v for v in _ROWS if v.name in (v.activation, v.saelens)}
