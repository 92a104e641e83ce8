"""The fingerprint follows every change of the base, and an unchanged base is hashed once."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from lora_hf import eject, inject, load_adapter, merge, save_adapter, set_adapter, unmerge
from lora_hf.core.config.schema import LoraConfig
from lora_hf.core.errors import AdapterError, ModelError
from lora_hf.lora import fingerprint as module
from lora_hf.lora.fingerprint import fingerprint, store_fingerprint
from lora_hf.models.load import dequantise, quantise
from tests.support.small_models import randomize_lora_b, small_model
from tests.tolerances import PARITY_FP32


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of tensors of each hash that is computed."""
    sizes: list[int] = []

    class Counted:
        def __init__(self) -> None:
            self.digest = plain()
            self.updates = 0
            self.update = self._update

        def _update(self, data: Any) -> None:
            self.updates += 1
            self.digest.update(data)

        def hexdigest(self) -> str:
            sizes.append(self.updates // 2)
            return self.digest.hexdigest()

    plain = module.hashlib.sha256
    monkeypatch.setattr(module.hashlib, "sha256", Counted)
    return sizes


def adapted(kind: str = "roberta") -> PreTrainedModel:
    model = inject(small_model(kind, 2), LoraConfig(r=2, targets=("all",), bias="all"))
    randomize_lora_b(model)
    return model


def weight_of(model: PreTrainedModel) -> nn.Parameter:
    return model.base_model.encoder.layer[1].attention.self.query.base_layer.weight


def add(model: PreTrainedModel) -> None:
    with torch.no_grad():
        weight_of(model)[3, 5] += 1e-3


def write_through_data(model: PreTrainedModel) -> None:
    weight_of(model).data[3, 5] += 1e-3


def negate_through_data(model: PreTrainedModel) -> None:
    weight_of(model).data.neg_()


def replace(model: PreTrainedModel) -> None:
    layer = model.base_model.encoder.layer[1].attention.self.query.base_layer
    layer.weight = nn.Parameter(layer.weight + 1e-3)


def write_where_nothing_is_adapted(model: PreTrainedModel) -> None:
    nn.init.ones_(model.base_model.embeddings.word_embeddings.weight)


def cast(model: PreTrainedModel) -> None:
    model.to(torch.bfloat16)


@pytest.mark.parametrize(
    "change", [add, write_through_data, negate_through_data, replace, write_where_nothing_is_adapted, cast]
)
def test_every_change_of_the_base_changes_it(change: Callable[[PreTrainedModel], None]) -> None:
    model = adapted()
    before = fingerprint(model)
    change(model)
    after = fingerprint(model)
    assert after["sha256"] != before["sha256"]
    assert after == fingerprint(copy.deepcopy(model)), "which computes it anew"


def test_an_unchanged_base_is_hashed_once(hashed: list[int], tmp_path: Path) -> None:
    model = adapted()
    first = fingerprint(model)
    for step in range(3):
        randomize_lora_b(model, seed=step)
        save_adapter(model, tmp_path / str(step))
    assert fingerprint(model) == first
    assert len(hashed) == 1
    fingerprint(model)["sha256"] = "changed by the caller"
    assert fingerprint(model) == first
    load_adapter(model, tmp_path / "0", "again")
    assert len(hashed) == 1


def test_merging_and_ejecting_hash_what_has_changed(hashed: list[int]) -> None:
    model = adapted()
    before = fingerprint(model)
    assert fingerprint(merge(model)) == before, "as before the merge"
    assert fingerprint(unmerge(model)) == before
    assert fingerprint(set_adapter(model, None)) == before
    assert len(hashed) == 1, "a merge leaves the base as it was"
    assert fingerprint(eject(merge(set_adapter(model, "default")))) != before
    assert len(hashed) == 2


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])  # noqa: S301
def test_a_copy_computes_its_own(duplicate: Callable[[PreTrainedModel], PreTrainedModel], hashed: list[int]) -> None:
    model = adapted()
    before = fingerprint(model)
    other = duplicate(model)
    assert fingerprint(other) == before
    assert len(hashed) == 2
    add(other)
    assert fingerprint(other) != before
    assert fingerprint(model) == before


def test_the_packed_weights_of_a_quantized_base_are_hashed_once(hashed: list[int]) -> None:
    model = small_model("gpt2", 2)
    before = fingerprint(model)
    quantise(model, "int8")
    count = len(hashed)
    for _ in range(3):
        assert fingerprint(model) == before
    assert len(hashed) == count
    model.base_model.h[0].attn.c_attn.scales.mul_(2)
    assert fingerprint(model)["sha256"] != before["sha256"]
    assert fingerprint(dequantise(model))["dtype"] == "float32"


def test_a_stored_fingerprint_stands_for_a_base_without_packed_weights() -> None:
    """A sharded base: no process holds it."""
    model = small_model("gpt2", 2)
    store_fingerprint(model, {"sha256": "stored"})
    assert fingerprint(model)["sha256"] == "stored"


@pytest.mark.parametrize("size", [0, 1, 3, 8, 13])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_the_checksum_covers_every_byte(size: int, dtype: torch.dtype) -> None:
    values = torch.zeros(size + 1, dtype=dtype)[1:]  # not at the start of its storage
    plain = module._checksum(values)
    for index in range(size):
        values[index] = 1
        assert module._checksum(values) != plain
        values[index] = 0
    assert module._checksum(values) == plain


def shuffle_rows(model: PreTrainedModel) -> None:
    weight = model.base_model.embeddings.word_embeddings.weight
    weight.data = torch.cat([weight.data[:1], weight.data[1:-1].flip(0), weight.data[-1:]])


def scale_one_layer(model: PreTrainedModel) -> None:
    weight = model.base_model.encoder.layer[0].output.dense.weight
    weight.data[1:-1] *= 1.5


@pytest.mark.parametrize("other", [shuffle_rows, scale_one_layer])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_weights_are_noticed_in_another_precision(
    other: Callable[[PreTrainedModel], None], dtype: torch.dtype, tmp_path: Path
) -> None:
    save_adapter(adapted(), tmp_path)
    load_adapter(small_model("roberta", 2).to(dtype), tmp_path)  # the same weights, rounded
    changed = small_model("roberta", 2)
    other(changed)
    with pytest.raises(AdapterError, match="was trained on another base: expected weights"):
        load_adapter(changed.to(dtype), tmp_path)


@pytest.mark.parametrize(
    ("kind", "setting", "value"),
    [
        ("roberta", "num_attention_heads", 2),
        ("roberta", "layer_norm_eps", 1e-3),
        ("roberta", "hidden_act", "relu"),
        ("llama", "rms_norm_eps", 1e-2),
        ("llama", "rope_parameters", {"rope_theta": 500.0, "rope_type": "default"}),
    ],
)
def test_the_same_weights_that_compute_something_else_are_refused(
    kind: str, setting: str, value: Any, tmp_path: Path
) -> None:
    model = inject(small_model(kind, 2), LoraConfig(r=2))
    save_adapter(model, tmp_path)
    with pytest.raises(AdapterError, match=f"another base: expected {setting}=.* in its config, found"):
        load_adapter(small_model(kind, 2, **{setting: value}), tmp_path)


def test_a_fingerprint_without_projections_still_loads(tmp_path: Path) -> None:
    """As written before they were recorded."""
    model = adapted()
    recorded = {key: value for key, value in fingerprint(model).items() if key not in ("projections", "settings")}
    module.check_base(small_model("roberta", 2).to(torch.bfloat16), recorded, "adapter")


def test_a_base_without_weights_has_none(tmp_path: Path) -> None:
    lora = LoraConfig(r=2, targets=("q",))
    adapter = save_adapter(inject(small_model("llama"), lora), tmp_path)
    with pytest.raises(ModelError, match=r"embed_tokens\.weight is on the meta device"):
        load_adapter(small_model("llama").to("meta"), adapter)
    with pytest.raises(ModelError, match=r"embed_tokens\.weight is on the meta device"):
        save_adapter(inject(small_model("llama").to("meta"), lora), tmp_path / "other")


@pytest.mark.parametrize("size", [1, 4095, 4096, 4097, 9000])
@pytest.mark.parametrize("scale", [1.0, 1e30])
def test_projections_are_those_of_earlier_adapters(size: int, scale: float) -> None:
    """The sum with the signs of blocks of 4,096 numbers and of those within each, and the norm; here all in fp64."""
    tensor = torch.randn(size, generator=torch.Generator().manual_seed(1)) * scale
    generator, blocks = torch.Generator().manual_seed(0), -(-size // module.BLOCK)
    within, between = (
        torch.randint(0, 2, (count,), generator=generator).double() * 2 - 1 for count in (module.BLOCK, blocks)
    )
    signs = (between[:, None] * within).flatten()[:size]
    norm = float(tensor.double().norm())
    expected = (float(tensor.double() @ signs), norm)
    assert module._project(tensor) == pytest.approx(expected, abs=PARITY_FP32 * norm)


def test_a_base_with_nan_is_named() -> None:
    model = small_model("gpt2")
    model.transformer.wte.weight.data[3] = float("nan")
    with pytest.raises(ModelError, match=r"wte\.weight of the base holds NaN or infinity in float32"):
        fingerprint(model)
