from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM

from lora_hf.core.config.schema import PRESETS, LoraConfig
from lora_hf.core.errors import AdapterError, ConfigError
from lora_hf.lora.active_adapter import AdapterState
from lora_hf.lora.fingerprint import fingerprint
from lora_hf.lora.inject import eject, inject, lora_layers, merge, unmerge
from lora_hf.lora.layers import LoraLinear
from lora_hf.lora.target_modules import plan
from lora_hf.lora.variants.embedding import EmbeddingWeights
from tests.support.small_models import CLASSIFIERS, small_config, small_model, token_ids
from tests.tolerances import MERGE_FP32, PARITY_FP32


def adapted(dtype: torch.dtype = torch.float32) -> LoraLinear:
    torch.manual_seed(0)
    layer = LoraLinear(torch.nn.Embedding(20, 6, padding_idx=1).to(dtype).requires_grad_(False), AdapterState())
    layer.adapters["default"] = EmbeddingWeights(20, [(0, 6)], 3, 5)
    layer.adapter_state.active_adapter = "default"
    return layer


def test_the_layer_is_its_definition_with_every_gradient() -> None:
    layer, ids = adapted(), torch.tensor([[4, 1, 4], [0, 19, 7]])
    weights = layer.adapters["default"]
    assert torch.equal(layer(ids), layer.base_layer(ids)), "A is zero at first"
    torch.nn.init.normal_(weights.lora_A)
    a, b = (parameter.detach().clone().requires_grad_(True) for parameter in (weights.lora_A, weights.lora_B))
    chosen = torch.nn.functional.one_hot(ids, 20).float()
    expected = chosen @ (layer.original_weight() + 5 / 3 * b @ a).T
    assert torch.allclose(layer(ids), expected, atol=PARITY_FP32)
    layer(ids).square().sum().backward()
    expected.square().sum().backward()
    assert torch.allclose(weights.lora_B.grad, b.grad, atol=PARITY_FP32 * float(b.grad.abs().max()))
    assert not weights.lora_A.grad[:, 1].any(), "the padding token learns nothing"
    a.grad[:, 1] = 0
    assert torch.allclose(weights.lora_A.grad, a.grad, atol=PARITY_FP32 * float(a.grad.abs().max()))
    weights.lora_alpha = 3
    assert not torch.allclose(layer(ids), expected, atol=PARITY_FP32), "the test could not fail"


@pytest.mark.parametrize("kind", [kind for kind in CLASSIFIERS if "gemma" not in kind])  # whose embeddings are scaled
def test_merge_is_exact_and_unmerge_restores_bit_for_bit(kind: str) -> None:
    model = small_model(kind, 3)
    before, mark, plain = {k: v.clone() for k, v in model.state_dict().items()}, fingerprint(model), model(token_ids())
    inject(model, LoraConfig(r=4, targets=("embeddings",)))
    assert torch.equal(model(token_ids()).logits, plain.logits)
    layer = next(iter(lora_layers(model).values()))
    torch.nn.init.normal_(layer.adapters["default"].lora_A, std=0.1)
    logits = model(token_ids()).logits
    assert not torch.allclose(logits, plain.logits, atol=100 * MERGE_FP32)
    assert torch.allclose(merge(model)(token_ids()).logits, logits, atol=MERGE_FP32)
    assert fingerprint(model) == mark
    assert torch.equal(unmerge(model)(token_ids()).logits, logits)
    after = eject(model).state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_tied_embeddings_are_not_merged_and_stay_tied() -> None:
    model = inject(small_model("gpt2"), LoraConfig(r=4, targets=("q", "embeddings")))
    layers = lora_layers(model)
    assert layers["transformer.wte"].weight is model.lm_head.weight
    with pytest.raises(
        AdapterError, match=r"transformer.wte: the input embeddings and the output head share its weight"
    ):
        merge(model)
    assert not any(layer.merged for layer in layers.values())
    assert eject(model).lm_head.weight is model.transformer.wte.weight


def test_a_bf16_base_has_fp32_factors() -> None:
    layer = adapted(torch.bfloat16)
    assert layer(torch.tensor([3])).dtype == torch.bfloat16
    assert {parameter.dtype for parameter in layer.adapters.parameters()} == {torch.float32}


def test_the_shared_embeddings_of_an_encoder_decoder_are_refused_with_those_that_run() -> None:
    """T5's encoder and decoder have modules of their own: at `shared` nothing would be trained."""
    for kind, prefix in (("t5", ""), ("bart", "model.")):
        model = AutoModelForSeq2SeqLM.from_config(small_config(kind)).eval()
        running = f"name {prefix}encoder.embed_tokens or {prefix}decoder.embed_tokens"
        for target in ("embeddings", "shared") if kind == "t5" else ():  # BART's are refused, because they scale
            with pytest.raises(ConfigError, match=rf"'{target}' names {prefix}shared, which .* never calls.*{running}"):
                inject(model, LoraConfig(targets=("q", target)))
        with pytest.raises(ConfigError, match=rf"modules_to_save: .* never calls {prefix}shared.*{running}"):
            inject(model, LoraConfig(targets=("q",), modules_to_save=("shared",)))
        assert not lora_layers(model)
    model = AutoModelForSeq2SeqLM.from_config(small_config("t5"))
    inject(model, LoraConfig(r=2, targets=("encoder.embed_tokens", "decoder.embed_tokens")))
    model(token_ids(), labels=token_ids()).loss.backward()
    assert all(layer.adapters["default"].lora_A.grad.any() for layer in lora_layers(model).values())


def test_no_preset_holds_embeddings_and_what_they_cannot_do_is_refused() -> None:
    assert not any("embeddings" in roles for roles in PRESETS.values())
    sites = plan(small_model("llama"), LoraConfig(targets=("embeddings",)))
    assert [(site.path, site.role, site.layout) for site in sites] == [
        ("model.embed_tokens", "embeddings", "embedding")
    ]
    for lora, key in (({"use_dora": True}, "lora.use_dora"), ({"init_lora_weights": "olora"}, "=olora")):
        with pytest.raises(ConfigError, match=f"{key} cannot adapt embeddings"):
            inject(small_model("llama"), LoraConfig(targets=("embeddings", "q"), **lora))
    with pytest.raises(ConfigError, match="target 'embeddings' has no module in the layers 0"):
        plan(small_model("llama"), LoraConfig(targets=("embeddings",), layers=(0,)))
