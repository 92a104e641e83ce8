"""What a row gets must not depend on the rows that join and leave its batch."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from lora_hf.core.config.schema import GenerateConfig, LoraConfig
from lora_hf.inference import row_cache
from lora_hf.inference.running_batch import Row, RunningBatch
from lora_hf.lora.inject import inject
from lora_hf.lora.multi_adapter import mix_adapters
from tests.support.small_models import randomize_lora_b, small_model
from tests.tolerances import MIXED_FP32

END = 2
KINDS = ("llama", "gpt2", "gemma2", "gemma3_text", "bloom", "opt", "gpt_neo", "gptj", "falcon", "phi3", "qwen3_moe")


def prompt(seed: int, length: int) -> list[int]:
    return torch.randint(5, 100, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def batch_of(model: PreTrainedModel, adapters: Any = lambda _: nullcontext()) -> RunningBatch:
    return RunningBatch(model, [END], 1, adapters)


def run(batch: RunningBatch, arrivals: dict[int, list[Row]]) -> None:
    """Runs all rows to their ends; `arrivals` are the rows that join before a step."""
    step = 0
    while batch.rows or step <= max(arrivals):
        if step in arrivals:
            batch.join(arrivals[step])
        else:
            batch.step()
        batch.remove([row for row in batch.rows if row.finish_reason])
        step += 1


def alone(model: PreTrainedModel, row: Row, adapters: Any = lambda _: nullcontext()) -> Row:
    copy = Row(row.prompt, row.adapter, row.decoding, row.top_logprobs)
    run(batch_of(model, adapters), {0: [copy]})
    return copy


def rows(**decoding: Any) -> list[Row]:
    sizes = ((3, 9), (11, 4), (6, 14), (2, 3), (17, 12), (5, 8))
    return [
        Row(prompt(seed, length), None, GenerateConfig(max_new_tokens=new, seed=seed, **decoding), 2)
        for seed, (length, new) in enumerate(sizes)
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_join_and_leave_get_what_they_get_alone(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_cache, "HEADROOM", 3)  # so that the cache moves to larger buffers several times
    model = small_model(kind, initializer_range=0.5, **({"sliding_window": 8} if kind.startswith("gemma") else {}))
    made = rows()
    run(batch_of(model), {0: made[:2], 2: made[2:3], 5: made[3:5], 6: made[5:]})
    for row in made:
        wanted = alone(model, row)
        assert row.tokens == wanted.tokens
        assert row.log_probability == pytest.approx(wanted.log_probability, abs=MIXED_FP32 * len(row.tokens))
        by_transformers = model.generate(  # type: ignore[operator]
            torch.tensor([row.prompt]),
            generation_config=GenerationConfig(
                max_new_tokens=row.decoding.max_new_tokens, eos_token_id=END, pad_token_id=1, do_sample=False
            ),
        )
        assert row.tokens == by_transformers[0, len(row.prompt) :].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_reads_one_token_a_row(kind: str) -> None:
    model, widths = small_model(kind).eval(), []
    model.register_forward_pre_hook(lambda _, args, named: widths.append(named["input_ids"].shape[1]), with_kwargs=True)
    row = Row(prompt(0, 9), None, GenerateConfig(max_new_tokens=3, seed=0))
    run(RunningBatch(model, [], 1, lambda _: nullcontext()), {0: [row]})
    assert widths == [9, 1, 1]


def test_a_state_without_keys_and_values_is_read_anew() -> None:
    sizes = {"state_size": 4, "num_hidden_layers": 2, "hidden_size": 32, "vocab_size": 100, "pad_token_id": 1}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", **sizes)).eval()
    batch = batch_of(model)
    made = rows()
    run(batch, {0: made[:2], 2: made[2:]})
    assert [len(row.tokens) for row in made] == [len(alone(model, row).tokens) for row in made]


def test_a_sampled_text_depends_on_its_seed_alone() -> None:
    model = small_model("llama", initializer_range=0.2)
    made = rows(do_sample=True, temperature=1.3, top_k=40, top_p=0.9)
    run(batch_of(model), {0: made[:3], 3: made[3:]})
    for row in made:
        assert row.tokens == alone(model, row).tokens
    assert len({tuple(row.tokens[:2]) for row in made}) > 1


def test_each_row_runs_its_own_adapter() -> None:
    model = small_model("llama", initializer_range=0.2)
    for seed, name in enumerate("ab"):
        inject(model, LoraConfig(r=4, targets=("q", "v")), name)
        randomize_lora_b(model, seed)
    model.eval()

    def adapters(names: Any) -> Any:
        return mix_adapters(model, names)

    made = rows()
    for index, row in enumerate(made):
        row.adapter = ("a", None, "b")[index % 3]
    run(batch_of(model, adapters), {0: made[:3], 2: made[3:]})
    for row in made:
        assert row.tokens == alone(model, row, adapters).tokens


def test_what_is_not_finite_stays_in_its_row() -> None:
    """Masked keys that are NaN would make the row NaN that gets their place."""
    model = small_model("llama", initializer_range=0.2)
    inject(model, LoraConfig(r=4, targets=("q", "v")), "broken")
    randomize_lora_b(model, std=1e38)
    made = rows()
    made[4].adapter = "broken"  # the longest prompt
    batch = batch_of(model, lambda names: mix_adapters(model, names))
    run(batch, {0: [made[4], made[0]], 1: made[1:4], 3: made[5:]})
    assert made[4].finish_reason == "broken"
    long = Row(prompt(9, 30), None, GenerateConfig(max_new_tokens=3))
    run(batch, {0: [long]})
    for row in (*made[:4], made[5], long):
        assert row.tokens == alone(model, row, batch.adapters).tokens


def test_settings_that_leave_no_finite_logit_end_their_row_alone() -> None:
    model = small_model("llama", initializer_range=0.2)
    made = rows(do_sample=True, temperature=1.3)
    tiny = Row(prompt(9, 8), None, GenerateConfig(max_new_tokens=5, do_sample=True, temperature=1e-40))
    banned = Row(prompt(8, 8), None, GenerateConfig(max_new_tokens=200, no_repeat_ngram_size=1))  # of 100 words
    run(RunningBatch(model, [], 1, lambda _: nullcontext()), {0: [made[0], banned], 1: [tiny, made[1]], 3: made[2:]})
    assert (tiny.tokens, tiny.finish_reason) == ([], "broken")
    assert (sorted(banned.tokens), banned.finish_reason) == (list(range(100)), "broken")
    for row in made:
        wanted = Row(row.prompt, None, row.decoding)
        run(RunningBatch(model, [], 1, lambda _: nullcontext()), {0: [wanted]})
        assert row.tokens == wanted.tokens


@pytest.mark.parametrize("cause", ["a choice that fails", "no memory for the second layer"])
def test_a_join_that_fails_changes_nothing(cause: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model("llama", initializer_range=0.5)
    made, batch = rows(), batch_of(model)
    batch.join(made[:2])
    if cause == "a choice that fails":
        faulty = Row(prompt(9, 30), None, GenerateConfig(), top_logprobs=1000)  # of 100 words
        with pytest.raises(RuntimeError):
            batch.join([*made[2:], faulty])
    else:
        new_zeros, buffers = torch.Tensor.new_zeros, []

        def two_only(tensor: torch.Tensor, *sizes: int) -> torch.Tensor:
            buffers.append(sizes)
            if len(buffers) > 2:  # the keys and values of a layer
                raise MemoryError
            return new_zeros(tensor, *sizes)

        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "new_zeros", two_only)
            with pytest.raises(MemoryError):
                batch.join(made[2:])
    assert batch.rows == made[:2]
    assert not any(row.tokens for row in made[2:])
    run(batch, {2: made[2:]})
    for row in made:
        wanted = alone(model, row)
        assert row.tokens == wanted.tokens
        assert row.log_probability == pytest.approx(wanted.log_probability, abs=MIXED_FP32 * len(row.tokens))


def test_a_row_continues_with_the_tokens_that_it_has() -> None:
    model = small_model("llama", initializer_range=0.2)
    (wanted, row) = (rows()[4] for _ in range(2))
    run(batch_of(model), {0: [wanted]})
    row.tokens = wanted.tokens[:5]
    run(batch_of(model), {0: [row]})
    assert row.tokens == wanted.tokens


def test_recorded_log_probabilities_are_those_of_the_model() -> None:
    model = small_model("llama", initializer_range=0.2)
    row = rows()[0]
    run(batch_of(model), {0: [row]})
    with torch.no_grad():
        logits = model(torch.tensor([[*row.prompt, *row.tokens]])).logits[0, len(row.prompt) - 1 : -1]
    wanted = logits.log_softmax(-1)
    for position, recorded in enumerate(row.logprobs):
        assert recorded.logprob == pytest.approx(float(wanted[position, recorded.token]), abs=MIXED_FP32)
        assert [token for token, _ in recorded.top] == wanted[position].topk(2).indices.tolist()
