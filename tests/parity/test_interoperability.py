"""transformers, its pipelines and peft load what lora_hf saves, with equal outputs."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from lora_hf.adapters.format import WEIGHTS_FILE
from lora_hf.adapters.save_load import load_adapter, save_adapter
from lora_hf.core.config.schema import GenerateConfig, LoraConfig, ModelConfig
from lora_hf.core.errors import AdapterError, ConfigError
from lora_hf.data.tasks.generation import TextGeneration
from lora_hf.data.tasks.registry import get_task
from lora_hf.inference.classify import Predictor
from lora_hf.inference.generate import Generator
from lora_hf.lora.inject import count_parameters, eject, inject, merge
from lora_hf.models.load import load_base, load_tokenizer
from tests.support.small_models import randomize_lora_b, small_model, token_ids
from tests.tolerances import FILE_ROUNDTRIP, MERGE_FP32

CASES = {
    "roberta classifier": ("roberta", 3, LoraConfig(r=4, lora_alpha=6, targets=("all",))),
    "gpt2, slices of a fused Conv1D": ("gpt2", None, LoraConfig(r=4, lora_alpha=32, targets=("q", "v"))),
}
TEXTS = ["A moving, funny and wise film.", "A dull film.", "It is neither good nor bad, and much too long."]


def adapted(model: PreTrainedModel, lora: LoraConfig, std: float = 0.5) -> PreTrainedModel:
    """Adds LoRA, and gives it and the head random values."""
    randomize_lora_b(inject(model, lora), std=std)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if ".modules_to_save." in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def by_transformers(plain: PreTrainedModel, folder: Path) -> nn.Module:
    plain.load_adapter(str(folder))
    return plain.eval()


def by_peft(plain: PreTrainedModel, folder: Path) -> nn.Module:
    return peft.PeftModel.from_pretrained(plain, str(folder)).eval()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("load", [by_transformers, by_peft, load_adapter])
def test_a_saved_adapter_gives_equal_logits_in_other_libraries(load, case: str, tmp_path: Path) -> None:
    kind, num_labels, lora = CASES[case]
    ours, ids = adapted(small_model(kind, num_labels), lora), token_ids()
    save_adapter(ours, tmp_path)
    with torch.inference_mode():
        expected, plain = ours(ids).logits, small_model(kind, num_labels)(ids).logits
        found = load(small_model(kind, num_labels), tmp_path)(ids).logits
    assert torch.allclose(found, expected, atol=FILE_ROUNDTRIP, rtol=0)
    assert not torch.allclose(plain, expected, atol=1000 * FILE_ROUNDTRIP), "an unloaded adapter would pass"


@pytest.mark.parametrize(
    ("base", "task", "targets", "on_disk"),
    [("tiny-roberta", "sst2", "all", 1), ("tiny-gpt2", "e2e_nlg", ("q", "v"), 2)],
)
def test_the_file_contains_lora_the_head_and_little_else(
    base: str, task: str, targets: tuple[str, ...], on_disk: int, tmp_path: Path
) -> None:
    """In PEFT's format, two slices of GPT-2's fused projection are one LoRA, whose B is zero outside its blocks: we
    train A (2 r, d) and B (2 d, r), and the file contains A (2 r, d) and B (3 d, 2 r), which is twice as much.
    """
    model = adapted(load_base(ModelConfig(name=base, precision="fp32"), get_task(task)), LoraConfig(targets=targets))
    save_adapter(model, tmp_path)
    counts = count_parameters(model)
    size = (tmp_path / WEIGHTS_FILE).stat().st_size
    trained = 4 * (on_disk * counts.lora + counts.head)
    assert trained < size <= trained + 64 * 1024
    assert size < 4 * counts.total / 4, "the file must not contain the base"


def merged(model: PreTrainedModel, base: str, folder: Path) -> Path:
    """Merges the adapter and saves a plain model with its tokenizer, which transformers can load."""
    merge(model)
    eject(model).save_pretrained(folder)
    load_tokenizer(ModelConfig(name=base)).save_pretrained(folder)
    return folder


def test_the_classification_pipeline_gives_our_predictions(tmp_path: Path) -> None:
    task, config = get_task("rule-sentiment"), ModelConfig(name="tiny-roberta", precision="fp32")
    model = adapted(load_base(config, task), LoraConfig(r=4, targets=("all",)))
    ours = Predictor(model, load_tokenizer(config), task).predict({"sentence": TEXTS})
    folder = merged(model, config.name, tmp_path)
    theirs = transformers.pipeline("text-classification", model=str(folder), device="cpu")(TEXTS, top_k=None)
    for answer, scores in zip(ours, theirs, strict=True):
        assert answer["label"] == scores[0]["label"]
        for score in scores:
            assert score["score"] == pytest.approx(answer["probabilities"][score["label"]], abs=6e-5)
    assert len({answer["probabilities"]["positive"] for answer in ours}) == len(TEXTS), "constants would prove nothing"


def test_the_generation_pipeline_gives_our_texts(tmp_path: Path) -> None:
    task, config = get_task("rule-restaurants"), ModelConfig(name="tiny-gpt2", precision="fp32")
    assert isinstance(task, TextGeneration)
    tokenizer, decoding = load_tokenizer(config), GenerateConfig(max_new_tokens=16)
    tokenizer.padding_side = "left"
    contexts = [task.context(prompt) for prompt in ("name[The Vaults], eatType[pub]", "name[Aromi], food[Italian]")]

    def generate(model: PreTrainedModel) -> list[str]:
        generator = Generator(model, tokenizer, task, model.config.max_position_embeddings)
        return [text.text for text in generator.generate(contexts, decoding)]

    plain = generate(load_base(config, task).eval())
    model = adapted(load_base(config, task), LoraConfig(r=4, targets=("q", "v")), std=0.05)
    ours = generate(model)
    pipeline = transformers.pipeline("text-generation", model=str(merged(model, config.name, tmp_path)), device="cpu")
    prompts = [context + tokenizer.eos_token for context in contexts]
    theirs = pipeline(prompts, max_new_tokens=decoding.max_new_tokens, do_sample=False, return_full_text=False)
    assert [" ".join(texts[0]["generated_text"].split()) for texts in theirs] == ours
    assert all(ours)
    assert ours != plain, "otherwise an adapter that is not merged would pass"


def test_a_merged_model_gives_the_logits_of_the_adapter(tmp_path: Path) -> None:
    for kind, num_labels, lora in CASES.values():
        model, ids = adapted(small_model(kind, num_labels), lora), token_ids()
        expected = model(ids).logits
        merge(model)
        eject(model).save_pretrained(tmp_path / kind)
        found = type(model).from_pretrained(tmp_path / kind).eval()(ids).logits
        assert torch.allclose(found, expected, atol=MERGE_FP32, rtol=0), kind


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")  # these are PEFT's
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning")
@pytest.mark.parametrize("targets", [("lm_head",), ("all", "lm_head")])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_an_adapted_output_head_is_trained_saved_and_read(
    kind: str, tied: bool, targets: tuple[str, ...], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def base() -> PreTrainedModel:
        return small_model(kind, tie_word_embeddings=tied)

    ours, ids = inject(base(), LoraConfig(r=4, targets=targets, task_type="CAUSAL_LM")), token_ids()
    assert ("lm_head: the input embeddings and the output head share its weight" in caplog.text) == tied
    before = ours(ids).logits.detach()
    optimizer = torch.optim.AdamW([p for p in ours.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        ours(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    save_adapter(ours.eval(), tmp_path)
    with torch.inference_mode():
        expected = ours(ids).logits
        assert not torch.allclose(expected, before, atol=1e-2)
        assert torch.equal(load_adapter(base(), tmp_path)(ids).logits, expected)
        theirs = peft.PeftModel.from_pretrained(base(), str(tmp_path)).eval()
        assert torch.allclose(theirs(ids).logits, expected, atol=FILE_ROUNDTRIP, rtol=0)
        theirs.save_pretrained(tmp_path / "peft")
        assert torch.equal(load_adapter(base(), tmp_path / "peft")(ids).logits, expected)
        if tied:
            with pytest.raises(AdapterError, match=r"lm_head: .* share"):
                merge(ours)
        else:
            assert torch.allclose(eject(merge(ours))(ids).logits, expected, atol=MERGE_FP32)


def test_a_task_type_of_another_class_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"expected CAUSAL_LM, as LlamaForCausalLM is .* found SEQ_CLS"):
        inject(small_model("llama"), LoraConfig(task_type=peft.TaskType.SEQ_CLS))
