"""Rows that begin alike are computed once, and nothing changes but the time."""

from __future__ import annotations

import pytest
import torch

from lora_hf.data.sampling import PromptSampler, number_prompts
from lora_hf.lora.architectures import ARCHITECTURES
from lora_hf.lora.kernels.prefixes import share_prefixes
from lora_hf.lora.unpadding import _layout, enable_unpadding
from tests import tolerances
from tests.lora.test_unpadding import adapted, gradients
from tests.support.small_models import small_model

PROMPT = [11, 12, 13, 14, 15, 16]
ROWS = [[*PROMPT, 20, 21], [30, 31, 32], [*PROMPT, 20, 25, 26], PROMPT[:], [*PROMPT, 40]]
WIDE = 32  # the hidden size of the small models


def padded(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    """A batch padded on the right, with labels behind the prompt."""
    length = max(map(len, rows))
    ids = torch.tensor([row + [1] * (length - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    labels = ids.where(mask.bool() & (torch.arange(length) >= 2), -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def test_a_shared_beginning_is_kept_once() -> None:
    trees = share_prefixes(ROWS, WIDE)
    assert trees is not None
    assert sorted(trees.lengths) == [3, 11], "the prompt, 20 21, 25 26 behind the same 20, 40"
    flat = [token for row in ROWS for token in row]
    kept = [flat[place] for place in trees.first]
    assert [kept[place] for place in trees.copies] == flat
    sees = next(each for each in trees.sees if each is not None)
    tree = kept[trees.lengths[0] :] if trees.sees[0] is None else kept[: trees.lengths[0]]
    seen_by_26 = [token for token, seen in zip(tree, sees[tree.index(26)].tolist(), strict=True) if seen]
    assert seen_by_26 == [*PROMPT, 20, 25, 26]


def test_rows_that_share_little_stay_apart() -> None:
    assert share_prefixes([[1, 2, 3], [4, 5, 6]], WIDE) is None
    long = list(range(1000, 1400))
    assert share_prefixes([[1, *long], [1, *reversed(long)]], WIDE) is None, "one token does not pay 800 of attention"


@pytest.mark.parametrize(
    "kind", [kind for kind, entry in ARCHITECTURES.items() if entry.causal and not entry.padded_because]
)
def test_loss_and_every_gradient_are_those_of_the_rows_one_by_one(kind: str) -> None:
    inputs = padded(ROWS)
    losses, found = [], []
    for free in (False, True):
        model = adapted(kind, None)
        if free:
            enable_unpadding(model)
            layout = _layout(model.base_model, inputs)
            assert layout is not None
            assert layout.copies is not None, "the rows do share"
        loss = model(**inputs).loss
        loss.backward()
        losses.append(loss.detach())
        found.append(gradients(model))
    torch.testing.assert_close(losses[1], losses[0], atol=tolerances.PADDING_FREE_FP32, rtol=0)
    for name, gradient in found[0].items():
        atol = tolerances.PADDING_FREE_GRADIENTS * max(1, float(gradient.abs().max()))
        torch.testing.assert_close(found[1][name], gradient, atol=atol, rtol=0, msg=name)


@pytest.mark.parametrize("change", ["position_ids", "inputs_embeds", "left", "encoder"])
def test_what_depends_on_more_than_the_tokens_is_not_shared(change: str) -> None:
    model = small_model("roberta" if change == "encoder" else "gpt2")
    inputs = {name: tensor for name, tensor in padded(ROWS).items() if name != "labels"}
    if change == "position_ids":
        inputs["position_ids"] = torch.arange(inputs["input_ids"].shape[1]).expand_as(inputs["input_ids"])
    if change == "inputs_embeds":
        inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
    if change == "left":
        inputs = {name: tensor.flip(1) for name, tensor in inputs.items()}
    layout = _layout(model.base_model, inputs)
    assert layout is not None
    assert layout.copies is None


def test_rows_of_a_prompt_come_together_and_in_another_order_each_epoch() -> None:
    ids = [[1, 2, 9], [3, 9], [1, 2, 8], [3, 7], [1, 2, 7]]
    labels = [[-100, -100, 9], [-100, 9], [-100, -100, 8], [-100, 7], [-100, -100, 7]]
    prompts = number_prompts(labels, ids)
    assert prompts == [0, 1, 0, 1, 0]
    sampler = PromptSampler(prompts * 4, seed=3)
    orders = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert sorted(orders[0]) == list(range(20))
    assert orders[0] == orders[2] != orders[1]
    changes = sum(prompts[a % 5] != prompts[b % 5] for a, b in zip(orders[0], orders[0][1:], strict=False))
    assert changes == 1
