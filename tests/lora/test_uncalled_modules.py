"""Projections that a model reads and never calls: an adapter there would have no effect and get no gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import linear
from transformers import SiglipVisionConfig, SiglipVisionModel, WavLMConfig, WavLMModel

from lora_hf.core.config.schema import LoraConfig
from lora_hf.core.errors import ConfigError
from lora_hf.lora.inject import inject, lora_layers
from lora_hf.lora.uncalled_modules import uncalled_modules

SMALL: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}


class Reads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.read, self.called, self.both, self.passed, self.within = (nn.Linear(2, 2) for _ in range(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = linear(x, self.read.weight, self.read.bias)
        x = self.called(x).to(self.both.weight.dtype)
        weights = [linear(each, self.within.weight) for each in x[None]]
        return self.run(self.passed, self.both(x)) + weights[0] + self.passed.weight.sum()

    def run(self, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return layer(x)


class ReadsToo(Reads):
    """The methods of a base class count."""


@pytest.mark.parametrize("kind", [Reads, ReadsToo])
def test_a_module_is_uncalled_if_only_its_weight_is_read(kind: type[Reads]) -> None:
    model = nn.ModuleDict({"part": kind()})
    paths = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert uncalled_modules(model, paths) == {"part.read": kind.__name__, "part.within": kind.__name__}


def test_all_linear_leaves_out_what_torchs_attention_reads_and_a_name_of_it_is_refused(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = SiglipVisionModel(SiglipVisionConfig(**SMALL, image_size=8, patch_size=4))
    inject(model, LoraConfig(r=2, targets=("all-linear",)))
    assert "head.attention.out_proj are not adapted: MultiheadAttention reads the weight" in caplog.text
    assert not any("head.attention" in path for path in lora_layers(model))
    model(torch.randn(2, 3, 8, 8)).pooler_output.sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "lora_B" in name)
    plain = SiglipVisionModel(SiglipVisionConfig(**SMALL, image_size=8, patch_size=4))
    with pytest.raises(ConfigError, match=r"head\.attention\.out_proj, where an adapter would have no effect"):
        inject(plain, LoraConfig(r=2, targets=("head.attention.out_proj",)))
    assert not lora_layers(plain)


def test_an_attention_that_reads_all_its_projections_is_refused_by_name(caplog: pytest.LogCaptureFixture) -> None:
    sizes: dict[str, Any] = {"conv_dim": (32,), "conv_kernel": (4,), "conv_stride": (2,), "num_conv_pos_embeddings": 4}
    model = WavLMModel(WavLMConfig(**SMALL, **sizes, num_conv_pos_embedding_groups=2))
    with pytest.raises(ConfigError, match=r"q_proj, where an adapter would have no effect: WavLMAttention reads"):
        inject(model, LoraConfig(r=2, targets=("q_proj", "v_proj")))
    inject(model, LoraConfig(r=2, targets=("all-linear",)))
    assert "encoder.layers.*.attention.k_proj" in caplog.text
    assert not any(path.endswith(("q_proj", "k_proj", "v_proj", "out_proj")) for path in lora_layers(model))
    assert any("feed_forward" in path for path in lora_layers(model))
