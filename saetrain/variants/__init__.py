"""The variants: one file each, and the table that lists them.

============  =======================================================  ========================================
variant       active latents                                           paper
============  =======================================================  ========================================
relu          pre > 0                                                  Anthropic, Circuits Updates, April 2024
topk          the k largest positive of each token                     Gao et al. 2024, arXiv 2406.04093
batchtopk     the k B largest positive of the batch; at inference      Bussmann et al. 2024, arXiv 2412.06410
              pre > threshold, the running mean of the smallest chosen
matryoshka    as batchtopk, with nested reconstructions                Bussmann et al. 2025, arXiv 2503.17547
jumprelu      pre > exp(log_threshold)                                 Rajamanoharan et al. 2024, arXiv
                                                                       2407.14435; Anthropic, January 2025
gated         gate > 0, by an encoder that shares its directions with  Rajamanoharan et al. 2024, arXiv
              the one that gives the values                            2404.16014
============  =======================================================  ========================================

`saetrain.training.losses` states the losses and gradients of all of them.
"""
