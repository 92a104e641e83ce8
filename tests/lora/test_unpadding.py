"""A batch without padding gives the padded batch's logits, losses and gradients."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, DynamicCache, PreTrainedModel

from lora_hf.core.config.schema import LoraConfig
from lora_hf.lora.architectures import ARCHITECTURES
from lora_hf.lora.inject import inject
from lora_hf.lora.kernels import attention
from lora_hf.lora.kernels.attention import Rows, attend_rows
from lora_hf.lora.unpadding import ATTENTION, _filling, _register_attention, cache_argument, enable_unpadding
from lora_hf.training.trainer import enable_optimizations
from tests import tolerances
from tests.support.small_models import CLASSIFIERS, randomize_lora_b, small_model, token_ids

UNPADDED = [kind for kind, entry in ARCHITECTURES.items() if not entry.padded_because]
HEADS = [(kind, "classes") for kind in UNPADDED if kind in CLASSIFIERS]
HEADS += [(kind, "tokens") for kind in UNPADDED if ARCHITECTURES[kind].causal]
LENGTHS = (7, 3, 5)


def batch(labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    mask = torch.arange(7) < torch.tensor(LENGTHS)[:, None]
    ids = token_ids().where(mask, 1)
    return {"input_ids": ids, "attention_mask": mask.long()} | ({} if labels is None else {"labels": labels})


def adapted(kind: str, num_labels: int | None = 3) -> PreTrainedModel:
    model = inject(small_model(kind, num_labels), LoraConfig(r=2, targets=("all",)))
    randomize_lora_b(model)
    return model


def gradients(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("kind", "heads"), HEADS)
def test_loss_and_every_gradient_are_the_padded_batchs(kind: str, heads: str) -> None:
    inputs = batch(torch.tensor([2, 0, 1]))
    if heads == "tokens":
        inputs["labels"] = inputs["input_ids"].where(inputs["attention_mask"].bool(), -100)
    losses, found = [], []
    for free in (False, True):
        model = adapted(kind, 3 if heads == "classes" else None)
        if free:
            assert enable_unpadding(model) is None
            assert enable_unpadding(model) is None, "twice is once"
        loss = model(**inputs).loss
        loss.backward()
        losses.append(loss.detach())
        found.append(gradients(model))
    torch.testing.assert_close(losses[1], losses[0], atol=tolerances.PADDING_FREE_FP32, rtol=0)
    assert found[0].keys() == found[1].keys()
    assert len(found[0]) > 4
    for name, gradient in found[0].items():
        assert gradient.any(), name
        atol = tolerances.PADDING_FREE_GRADIENTS * max(1, float(gradient.abs().max()))
        torch.testing.assert_close(found[1][name], gradient, atol=atol, rtol=0, msg=name)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "gpt_neox"])
def test_autocast_trains_as_with_padding(kind: str) -> None:
    """As full fine-tuning in bf16 does; rotary positions leave q and k in fp32 there, and v in bf16."""
    losses, found = [], []
    for free in (False, True):
        model = small_model(kind, 3)
        if free:
            assert enable_unpadding(model) is None
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch(torch.tensor([2, 0, 1]))).loss
        loss.backward()
        losses.append(loss.detach())
        found.append(gradients(model))
    torch.testing.assert_close(losses[1], losses[0], atol=0, rtol=tolerances.BF16_BATCH_LOSS_RTOL)
    assert found[0].keys() == found[1].keys()
    norms = {name: float(gradient.norm()) for name, gradient in found[0].items()}
    assert max(norms.values()) > 0
    for name, gradient in found[0].items():
        error = float((found[1][name] - gradient).norm())
        assert error <= tolerances.AUTOCAST_GRADIENTS * max(norms[name], max(norms.values()) / 100), name


def test_rows_see_only_themselves() -> None:
    """The tolerance can fail: attention over the whole concatenation is far away."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 4, 15, 8)
    together = attend_rows(q, k, v, Rows([15]))
    apart = attend_rows(q, k, v, Rows(LENGTHS))
    assert (together - apart).abs().max() > 1000 * tolerances.PADDING_FREE_FP32


@pytest.fixture(params=[10, pytest.param(0, marks=pytest.mark.full), pytest.param(15, marks=pytest.mark.full)])
def _limit(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row alone, some together, and all together; weights of up to 5 tokens are saved, others computed again."""
    monkeypatch.setattr(attention, "TOGETHER", request.param)
    monkeypatch.setattr(attention, "SAVED", 5)


@pytest.mark.usefixtures("_limit")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("lengths", [(1, 9, 5), (5, 5, 4, 1), (15,)])
def test_the_attention_of_rows_is_torchs(causal: bool, key_heads: int, lengths: tuple[int, ...]) -> None:
    """Outputs and all three gradients against torch's own attention of each row, in float64."""
    torch.manual_seed(0)
    tensors = [torch.randn(heads, 15, 8) for heads in (4, key_heads, key_heads)]
    weight = torch.randn(15, 4, 8)

    def definition(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        k, v = (tensor.repeat_interleave(4 // key_heads, 0) for tensor in (k, v))
        parts = zip(*(tensor.split(lengths, 1) for tensor in (q, k, v)), strict=True)
        made = [scaled_dot_product_attention(*row, scale=0.3, is_causal=causal) for row in parts]
        return torch.cat(made, 1).transpose(0, 1)

    results = []
    for function in (lambda *x: attend_rows(*x, Rows(lengths), scale=0.3, is_causal=causal), definition):
        inputs = [tensor.to(torch.float64, copy=True).requires_grad_() for tensor in tensors]
        output = function(*inputs)
        (output * weight).sum().backward()
        results.append([output.detach(), *(tensor.grad for tensor in inputs)])
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-12, rtol=0)


@pytest.mark.parametrize("rows", ["plain", "causal", "trees"])
def test_padded_attention_is_the_same(rows: str) -> None:
    """What a GPU without a kernel for rows of any length runs: the output and all three gradients, in float64."""
    torch.manual_seed(0)
    tensors, weight = torch.randn(3, 2, 15, 8, dtype=torch.float64), torch.randn(15, 2, 8)
    tree = torch.ones(3, 3, dtype=torch.bool).tril_()
    tree[2, 1] = False
    layout = Rows(LENGTHS, sees=[None, tree, None] if rows == "trees" else None)
    results = []
    for attend in (attention._attend_padded, attend_rows):
        inputs = [tensor.clone().requires_grad_() for tensor in tensors]
        output = attend(*inputs, layout, 0.3, rows == "causal", 0.0)
        (output * weight).sum().backward()
        results.append([output.detach(), *(tensor.grad for tensor in inputs)])
    for padded, binned in zip(*results, strict=True):
        torch.testing.assert_close(padded, binned, atol=1e-12, rtol=0)


@pytest.mark.usefixtures("_limit")
def test_dropped_attention_has_the_right_mean() -> None:
    """Over many draws the mean is the undropped output."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 4, 15, 8)
    draws = torch.stack([attend_rows(q, k, v, Rows(LENGTHS), dropout=0.2) for _ in range(400)])
    assert not torch.equal(draws[0], draws[1])
    error = (draws.mean(0) - attend_rows(q, k, v, Rows(LENGTHS))).abs()
    assert (error < 6 * draws.std(0) / 400**0.5 + tolerances.PADDING_FREE_FP32).all()


@pytest.mark.usefixtures("_limit")
def test_dropped_attention_has_the_gradients_of_what_it_kept() -> None:
    torch.manual_seed(0)
    inputs = [tensor.requires_grad_() for tensor in torch.randn(3, 2, 15, 2, dtype=torch.float64)]

    def dropped(*tensors: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(1)
        return attend_rows(*tensors, Rows(LENGTHS), dropout=0.3)  # type: ignore[arg-type]

    assert torch.autograd.gradcheck(dropped, inputs, **tolerances.GRADCHECK)


@pytest.mark.parametrize("tokens", [1, 8, 15, 209, 256, 1069, 4000])
@pytest.mark.parametrize(("dtype", "smallest", "most"), [(torch.float32, 8, 65), (torch.bfloat16, 32, 33)])
def test_the_numbers_of_tokens_are_few(tokens: int, dtype: torch.dtype, smallest: int, most: int) -> None:
    filled = tokens + _filling(tokens, dtype)
    assert tokens <= filled < tokens + max(smallest, tokens / 16)
    assert _filling(filled, dtype) == 0
    assert len({size + _filling(size, dtype) for size in range(tokens, 2 * tokens)}) <= most


@pytest.mark.parametrize("kind", ["gpt2", "bert", "roberta", "llama"])
def test_padding_in_front_moves_no_position(kind: str) -> None:
    inputs = batch()
    model = small_model(kind)
    alone = [model(ids[None, :length]).logits[0] for ids, length in zip(inputs["input_ids"], LENGTHS, strict=True)]
    enable_unpadding(model)
    left = {
        name: [row.roll(7 - length) for row, length in zip(rows, LENGTHS, strict=True)] for name, rows in inputs.items()
    }
    for side in (inputs, {name: torch.stack(rows) for name, rows in left.items()}):
        inside = side["attention_mask"].bool()
        free = model(**side).logits[inside]
        torch.testing.assert_close(free, torch.cat(alone), atol=tolerances.PADDING_FREE_FP32, rtol=0)


def test_a_padding_token_in_a_text_has_the_models_own_position() -> None:
    inputs = batch()
    inputs["input_ids"][0, 3] = 1  # RoBERTa counts positions by this id, not by the mask
    model = small_model("roberta", 2)
    padded = model(**inputs).logits
    enable_unpadding(model)
    torch.testing.assert_close(model(**inputs).logits, padded, atol=tolerances.PADDING_FREE_FP32, rtol=0)


def test_generation_is_left_alone() -> None:
    inputs = {name: tensor.flip(1) for name, tensor in batch().items()}
    model = small_model("gpt2", bos_token_id=0, eos_token_id=0)
    before = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    enable_unpadding(model)
    assert torch.equal(model.generate(**inputs, max_new_tokens=5, do_sample=False), before)


def test_a_cache_that_is_still_empty_is_filled() -> None:
    model, caches = small_model("gpt2").eval(), [DynamicCache(), DynamicCache()]
    inputs = [batch() | {cache_argument(model): cache} for cache in caches]
    padded = model(**inputs[0]).logits
    enable_unpadding(model)
    torch.testing.assert_close(model(**inputs[1]).logits, padded)
    assert [cache.get_seq_length() for cache in caches] == [7, 7]


def hooks_of(model: PreTrainedModel) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


@pytest.mark.parametrize(
    ("kind", "attention", "reason"),
    [
        ("deberta-v2", None, "relative positions"),
        ("roberta", "flex_attention", "flex_attention"),
        ("roberta", "fixed", "RobertaForSequenceClassification"),
    ],
)
def test_an_unsupported_model_is_left_unchanged(
    kind: str, attention: str | None, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_model(kind, 2)
    if attention == "fixed":
        monkeypatch.setattr(type(model), "_can_set_attn_implementation", lambda *_: False)
    elif attention is not None:
        model.config._attn_implementation = attention
    before, hooks = model.config._attn_implementation, hooks_of(model)
    assert reason in (enable_unpadding(model) or "")
    assert (model.config._attn_implementation, hooks_of(model)) == (before, hooks)


def test_the_attention_is_registered_when_it_is_first_needed() -> None:
    """By `enable_unpadding`, or by the hooks of a model that another process pickled."""
    AttentionInterface._global_mapping.pop(ATTENTION, None)
    _register_attention.cache_clear()
    model = small_model("roberta", 2)
    padded = model(**batch()).logits
    assert ATTENTION not in AttentionInterface()
    assert enable_unpadding(model) is None
    assert ATTENTION in AttentionInterface()
    pickled = pickle.dumps(model)
    AttentionInterface._global_mapping.pop(ATTENTION)
    _register_attention.cache_clear()
    free = pickle.loads(pickled)(**batch()).logits  # noqa: S301
    torch.testing.assert_close(free, padded, atol=tolerances.PADDING_FREE_FP32, rtol=0)


def test_another_model_of_the_same_config_gets_hooks_of_its_own() -> None:
    first = small_model("roberta", 2)
    before = hooks_of(first)
    enable_unpadding(first)
    second = type(first)(first.config)
    assert enable_unpadding(second) is None
    assert hooks_of(second) == hooks_of(first) > before


def test_the_way_of_attending_is_not_saved(tmp_path) -> None:
    model = small_model("roberta", 2)
    enable_unpadding(model)
    model.save_pretrained(tmp_path)
    assert ATTENTION not in (tmp_path / "config.json").read_text()


def test_the_trainer_groups_rows_where_padding_stays(caplog: pytest.LogCaptureFixture) -> None:
    plain = enable_optimizations(small_model("roberta", 2))
    assert plain.training_arguments()["train_sampling_strategy"] == "random"
    assert not caplog.text
    padded = enable_optimizations(small_model("deberta-v2", 2), label_smoothing=0.1)
    assert padded.training_arguments(0.1) == {
        "train_sampling_strategy": "group_by_length",
        "label_smoothing_factor": 0.1,
    }
    assert "batches stay padded" in caplog.text
    language_model = enable_optimizations(small_model("gpt2").requires_grad_(False), label_smoothing=0.1)
    assert language_model.training_arguments(0.1)["label_smoothing_factor"] == 0.0
