"""The walk over a model without its adapters."""

from __future__ import annotations

import pytest
from torch import nn

from lora_hf import LoraConfig, inject
from lora_hf.lora.adapter_dict import modules_of_base
from tests.support.small_models import small_model


@pytest.mark.parametrize("remove_duplicate", [True, False])
def test_only_what_adapters_add_is_left_out(remove_duplicate: bool) -> None:
    model = small_model("bert")
    model.register_module("again", model.base_model.embeddings)
    before = dict(model.named_modules(remove_duplicate=remove_duplicate))
    assert dict(modules_of_base(model, remove_duplicate)) == before
    for name in ("a", "b"):
        inject(model, LoraConfig(r=2), name)
    found = dict(modules_of_base(model, remove_duplicate))
    everything = dict(model.named_modules(remove_duplicate=remove_duplicate))
    assert found == {
        path: each for path, each in everything.items() if ".adapters" not in path and ".modules_to_save" not in path
    }
    assert len(found) < len(everything)
    assert set(before.values()) <= set(found.values())


def test_a_module_of_the_models_own_that_is_called_adapters_is_walked() -> None:
    model = nn.ModuleDict({"adapters": nn.ModuleDict({"one": nn.Linear(2, 2)})})
    assert dict(modules_of_base(model)) == dict(model.named_modules())
