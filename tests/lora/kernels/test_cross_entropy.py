"""The chunked loss of a language model's head against torch's cross-entropy over all logits."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy, linear

from lora_hf.lora.kernels.cross_entropy import token_losses


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(11, 6, dtype=torch.float64, requires_grad=True)
    return hidden, torch.randn(13, 6, dtype=torch.float64), torch.randint(13, (11,))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("chunk", [1, 4, 512])
def test_losses_and_gradient_are_those_of_all_logits(smoothing: float, chunk: int) -> None:
    hidden, weight, targets = inputs()
    upstream = torch.randn(11, dtype=torch.float64)
    losses, nll = token_losses(hidden, weight, targets, smoothing, chunk)
    (losses * upstream).sum().backward()
    found, hidden.grad = hidden.grad, None
    logits = linear(hidden, weight)
    wanted = cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
    (wanted * upstream).sum().backward()
    # The losses themselves are fp32.
    torch.testing.assert_close(losses, wanted.float())
    torch.testing.assert_close(nll, cross_entropy(logits, targets, reduction="none").float())
    torch.testing.assert_close(found, hidden.grad, rtol=1e-5, atol=1e-6)
    wrong = cross_entropy(logits, targets, reduction="none", label_smoothing=0.2).float()
    assert not torch.allclose(losses, wrong)


def test_without_a_gradient_nothing_is_kept() -> None:
    hidden, weight, targets = inputs()
    with torch.no_grad():
        losses, nll = token_losses(hidden, weight, targets)
    assert not losses.requires_grad
    assert torch.equal(losses, nll)


def test_no_matrix_of_all_logits_is_ever_there() -> None:
    """Of 300 tokens times 5,000 words nothing larger than a chunk of 10 is made."""
    hidden = torch.randn(300, 4, requires_grad=True)
    weight, targets = torch.randn(5000, 4), torch.randint(5000, (300,))
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            made = func(*args, **(kwargs or {}))
            if isinstance(made, torch.Tensor):
                largest = max(largest, made.numel())
            return made

    with Watch():
        token_losses(hidden, weight, targets, 0.1, chunk=10)[0].sum().backward()
    assert largest <= max(10 * 5000, weight.numel())
