"""torch.compile traces an adapted model as one graph, and follows the adapter that runs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from transformers import PreTrainedModel

from lora_hf import inject, set_adapter, use_adapter
from lora_hf.core.config.schema import LoraConfig
from tests import tolerances
from tests.support.gradients import assert_same, loss_and_gradients
from tests.support.small_models import CLASSIFIERS, randomize_lora_b, small_model, token_ids

pytestmark = pytest.mark.full


@pytest.fixture(autouse=True)
def _compiled_code_is_dropped() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def adapted(kind: str) -> PreTrainedModel:
    model = inject(small_model(kind, 3 if kind in CLASSIFIERS else None), LoraConfig(r=2, targets=("all",)))
    randomize_lora_b(model)
    return model.eval()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch traces a Function so
@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])
def test_one_graph_gives_the_same_logits_and_gradients(kind: str) -> None:
    model = adapted(kind)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(token_ids()).logits, model(token_ids()).logits)
    assert_same(loss_and_gradients(model, compiled), loss_and_gradients(model))


@torch.no_grad()
def test_compiled_code_runs_the_adapter_that_is_chosen() -> None:
    model = adapted("llama")
    compiled = torch.compile(model, backend="eager")
    with_adapter = compiled(token_ids()).logits
    torch.testing.assert_close(with_adapter, model(token_ids()).logits)
    with use_adapter(model, None):
        bare = compiled(token_ids()).logits
        torch.testing.assert_close(bare, model(token_ids()).logits)
    assert (bare - with_adapter).abs().max() > 100 * tolerances.PADDING_FREE_FP32
    torch.testing.assert_close(compiled(token_ids()).logits, with_adapter)
    set_adapter(model, None)
    torch.testing.assert_close(compiled(token_ids()).logits, bare)
