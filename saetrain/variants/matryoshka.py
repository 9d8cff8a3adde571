"""matryoshka: batchtopk with nested dictionaries, each of which rebuilds the token from its own latents alone.

::

    latents     0 ... w_1 ...... w_2 ............ w_3        widths (w_1, w_2, w_3)
    segments    |  0  |    1     |       2        |
    x^_1        =====                                        dictionary g is the sum of segments up to g
    x^_2        ================
    x^_3        =================================

(Bussmann, Nabeshima, Karvonen, Nanda 2025, arXiv 2503.17547.)
"""

from __future__ import annotations

import torch

from saetrain.compute.kernels import Codes
from saetrain.errors import ConfigError
from saetrain.variants.batchtopk import BatchTopK


class Matryoshka(BatchTopK):
    name = "matryoshka"

    @classmethod
    def nested_widths(cls, given: tuple[int, ...], d_sae: int) -> tuple[int, ...]:
        widths = given or tuple(sorted({max(d_sae >> s, 1) for s in range(5)}))
        if widths[-1] > d_sae:
            raise ConfigError(f"--widths {','.join(map(str, widths))} go beyond --d-sae {d_sae}")
        return widths if widths[-1] == d_sae else (*widths, d_sae)

    def segmented(self, codes: Codes) -> Codes:
        widths = self.config.widths
        if len(widths) == 1:
            return codes
        edges = torch.tensor(widths, device=codes.latent.device)
        segment = torch.bucketize(codes.latent + self.lo, edges, right=True)
        bag, order = torch.sort(segment * codes.bags + codes.bag, stable=True)
        bags = codes.bags * len(widths)
        return Codes(codes.latent[order], codes.value[order], bag, bags, codes.latents)
