"""The masks of dropout, and the dropout of a base."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lora_hf.core.config.schema import ModelConfig
from lora_hf.data.tasks.registry import get_task
from lora_hf.lora.kernels.dropout import STEPS, MaskedDropout, dropout_mask
from lora_hf.models.load import load_base
from tests import tolerances

CPU = torch.device("cpu")


@pytest.mark.parametrize("dropout", [1 / STEPS, 0.1, 0.5, 1 - 1 / STEPS])
def test_what_is_kept_is_drawn_with_its_probability_and_independently(dropout: float) -> None:
    torch.manual_seed(0)
    count, keep = 400 * 1001, 1 - round(dropout * STEPS) / STEPS
    drawn = dropout_mask((400, 1001), dropout, CPU).double()
    assert drawn.unique().tolist() in ([0, 1], [1], [0])
    deviation = (keep * (1 - keep) / count) ** 0.5
    assert abs(drawn.mean() - keep) < 5 * deviation
    for shift in (1, 2, 3, 4, 1001):
        flat = drawn.flatten() - keep
        together = (flat[shift:] * flat[:-shift]).mean()
        assert abs(together) < 5 * keep * (1 - keep) / count**0.5 + 1e-9, f"elements {shift} apart depend on each other"
    assert not torch.equal(dropout_mask((400, 1001), 0.5, CPU), dropout_mask((400, 1001), 0.5, CPU))


def test_what_is_dropped_has_no_gradient_and_what_is_kept_is_scaled() -> None:
    layer, x = MaskedDropout(0.25), torch.ones(50, 40, dtype=torch.float64, requires_grad=True)

    def dropped(tensor: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(0)
        return layer(tensor)

    assert torch.autograd.gradcheck(dropped, x[:4].detach().requires_grad_(), **tolerances.GRADCHECK)
    assert dropped(x).unique().tolist() == [0, 4 / 3]
    assert layer.eval()(x) is x, "an evaluation drops nothing"


def test_a_base_drops_as_its_config_says() -> None:
    model = load_base(ModelConfig("tiny-roberta", dropout=0.3), get_task("sst2"))
    found = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    assert {type(module) for module in found} == {MaskedDropout}
    assert {module.p for module in found} == {0.3}
