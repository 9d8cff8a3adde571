"""Gradients of a causal language model's loss with respect to its residual stream.

A window of tokens x_0 ... x_{T-1}, prefix and special tokens included, has the loss

    L = sum over t = 0 ... T-2 of  -log softmax(z_t)[x_{t+1}]        in nats, computed in float32

where z_t are the logits that the model gives after x_t.  ``grad_layer_n`` holds dL / d hidden_states[n] of that window
alone, a vector for each token, in float32 whatever the dtype of the rows: gradients span many orders of magnitude.
At the last token of a window, which predicts none, it is 0 in the last layers and in all others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from actshuffle.errors import RequestError
from actshuffle.extras import need

LOGITS = 1 << 27  # of one pass, at most: 512 MiB in float32, three times that while they are used
CLOSE = 1e-4  # of the largest logit: a later token that changes a logit by more was seen


def check_causal(model: Any, tokens: Any, name: str) -> None:
    """Refuse a model in which a token sees later ones, so that its loss is none of predictions."""
    torch, other = need("torch", "collect"), tokens.clone()
    other[:, -1] = (tokens[:, -1] + 1) % model.get_input_embeddings().num_embeddings
    with torch.inference_mode():
        logits, changed = (model(input_ids=x).logits[:, :-1] for x in (tokens, other))
    close = max(CLOSE, 8 * torch.finfo(logits.dtype).eps)  # experts add in another order, if they get other tokens
    if float((logits - changed).abs().max()) > close * float(logits.abs().max()):
        raise RequestError(
            f"--gradients needs a causal language model; in {name} ({type(model).__name__}) a token sees later ones"
        )


def gradients(model: Any, tokens: Any, layers: Sequence[int], **options: Any) -> dict[int, Any]:
    """dL / d hidden_states[n] for each layer n, float32 ``(windows, length, width)``; tokens ``(windows, length)``.

    None stands for a layer that no gradient reaches.  Weights must be frozen: the graph begins at the embedding.
    """
    torch = need("torch", "collect")
    begin = model.get_input_embeddings().register_forward_hook(lambda _, __, output: output.requires_grad_())
    try:
        with torch.enable_grad():
            output = model(input_ids=tokens, output_hidden_states=True, **options)
            logits, predicted = output.logits[:, :-1].float(), tokens[:, 1:].reshape(-1)
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), predicted, reduction="sum")
            found = torch.autograd.grad(loss, [output.hidden_states[n] for n in layers], allow_unused=True)
    finally:
        begin.remove()
    return {n: None if grad is None else grad.float() for n, grad in zip(layers, found, strict=True)}
