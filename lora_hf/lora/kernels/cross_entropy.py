"""Cross-entropy of chosen tokens with a large vocabulary, without a matrix of all logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

CHUNK = 256  # tokens whose logits are in memory at once: 50 MB in fp32 with the vocabulary of GPT-2


def token_losses(
    hidden: Tensor, weight: Tensor, targets: Tensor, smoothing: float = 0.0, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """The smoothed loss and the negative log-likelihood (nll) of each token.

    `nll = logsumexp(z) - z[target]` with `z = hidden W^T`, and with smoothing `(1 - s) nll + s mean(logsumexp(z) - z)`
    (Szegedy et al. 2016, arXiv 1512.00567, section 7; the mean over the vocabulary as in transformers' LabelSmoother).

    Args:
        hidden: `(tokens, hidden)`, the input of the language model's head; the only one that gets a gradient.
        weight: `(vocabulary, hidden)`, frozen.
        targets: `(tokens,)`, none of them -100.
        smoothing: s, at least 0 and less than 1.
        chunk: the number of tokens whose logits are computed at once.

    Returns:
        `(tokens,)` losses and `(tokens,)` nll, both fp32 in nats; the nll has no gradient.
    """
    return _TokenLosses.apply(hidden, weight, targets, smoothing, chunk)  # type: ignore[return-value]


class _TokenLosses(torch.autograd.Function):
    """Computes the gradient in the forward pass, so that nothing of the size of the vocabulary outlives its chunk."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, smoothing: float, chunk: int
    ) -> tuple[Tensor, Tensor]:
        losses = hidden.new_empty(len(targets), dtype=torch.float32)
        nll = torch.empty_like(losses)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(targets), chunk):
            part = slice(start, start + chunk)
            target = targets[part, None]
            # A single kernel keeps each row in the cache.
            log_p = linear(hidden[part], weight).log_softmax(1, dtype=torch.float32)
            nll[part] = -log_p.gather(1, target)[:, 0]
            losses[part] = (1 - smoothing) * nll[part] - (smoothing * log_p.mean(1) if smoothing else 0.0)
            if gradient is not None:
                # d loss / d z = softmax(z) - (1 - s) onehot - s / vocabulary
                slope = log_p.exp_()
                if smoothing:
                    slope -= smoothing / log_p.shape[1]
                slope.scatter_add_(1, target, torch.full_like(target, smoothing - 1, dtype=slope.dtype))
                gradient[part] = slope.to(weight.dtype) @ weight
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(nll)
        return losses, nll

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        if gradient is None:
            return None, None, None, None, None
        return gradient * gradients[0][:, None].to(gradient.dtype), None, None, None, None
