from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from lora_hf.adapters.format import AdapterMetadata, read_adapter_config
from lora_hf.adapters.infer_task import MODEL_KINDS, auto_class
from lora_hf.adapters.model_card import Facts, model_card
from lora_hf.adapters.resolve import run_config
from lora_hf.core.config.schema import TaskConfig
from lora_hf.core.records import RECORD_FILE, RunRecord, ScoreRecord
from lora_hf.models.load import AUTO_CLASSES
from tests.support.adapters_on_disk import run_folder

NAME = "someone/a-lora"


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> Facts:
    adapter = run_folder(tmp_path_factory.mktemp("run"))
    return Facts(*read_adapter_config(adapter), run_config(adapter), RunRecord.load(adapter.parent / RECORD_FILE))


def card_data(card: str) -> Any:
    return ModelCard(card).data


def test_the_card_says_what_the_record_says(facts: Facts) -> None:
    card = model_card(NAME, facts)
    data = card_data(card)
    assert (data.library_name, data.pipeline_tag, data.metrics) == ("peft", "text-classification", ["accuracy"])
    assert data.tags == ["lora", "lora-hf", "rule-sentiment"]
    (result,) = data.eval_results
    assert (result.dataset_split, result.metric_type, result.metric_value) == ("validation", "accuracy", 0.8125)
    assert data.license is None, "nobody said which"
    assert data.base_model is None, "a base of this package is not on the hub"
    for said in (
        "on `tiny-roberta`, a small base that comes with lora_hf, for the task `rule-sentiment`: r=4, lora_alpha=8.0.",
        "| validation | accuracy | 0.8125 | 0.5000 |",
        "One run, seed 3, of the checkpoint at step 61, chosen by eval_validation_accuracy.",
        "**Note:** validation: something that a person should not overlook",
        "2,000 train, 500 validation rows",
        "| `lora.targets` | q, v |",
        "41,234 of 5,000,000 parameters were trained (0.82 %): 40,000 LoRA, 1,234 head.",
        "python 3.11.7, lora-hf 0.1.0, torch 2.13.0; lora_hf at commit `0123456789ab` and changes since.",
        "Labels, in the order of the logits: `negative`, `positive`.",
    ):
        assert said in card


def test_the_header_says_what_the_hub_needs_to_run_it(facts: Facts) -> None:
    data = card_data(model_card(NAME, on_base(facts, "roberta-base")))
    assert (data["task_type"], data.pipeline_tag) == ("SEQ_CLS", "text-classification")
    assert data["base_model_relation"] == "adapter"
    assert data["widget"] == [{"text": "A moving, funny and wise film."}]
    metadata = replace(facts.metadata, task="e2e_nlg")
    written = Facts({**facts.config, "task_type": "CAUSAL_LM"}, metadata)
    assert card_data(model_card(NAME, written))["widget"] == [
        {"text": "name : The Vaults | Type : pub | food : Italian"}
    ]
    tagger = Facts({**facts.config, "task_type": "TOKEN_CLS"}, AdapterMetadata())
    assert card_data(model_card(NAME, tagger)).pipeline_tag == "token-classification"
    assert "widget" not in card_data(model_card(NAME, tagger)).to_dict(), "nobody knows what it reads"


def on_base(facts: Facts, name: str) -> Facts:
    return replace(facts, config={**facts.config, "base_model_name_or_path": name})


@pytest.mark.parametrize(("name", "hub_id"), [("roberta-base", "FacebookAI/roberta-base"), ("a/b", "a/b")])
def test_a_base_and_a_data_set_of_the_hub_are_linked(name: str, hub_id: str, facts: Facts) -> None:
    metadata = replace(facts.metadata, task="sst2", revision="abc123")
    card = model_card(NAME, replace(on_base(facts, name), metadata=metadata))
    data = card_data(card)
    assert (data.base_model, data.datasets, data["base_model_relation"]) == (hub_id, ["nyu-mll/glue"], "adapter")
    assert data.eval_results[0].dataset_config == "sst2"
    assert f'from_pretrained("{hub_id}", dtype="float32", num_labels=2, revision="abc123")' in card


def test_the_scores_of_texts_are_told_with_how_they_were_written(facts: Facts) -> None:
    scores = ScoreRecord(
        task="e2e_nlg",
        model="gpt2",
        adapted=True,
        split="test",
        inputs=630,
        decoding={"num_beams": 10, "length_penalty": 0.9, "batch_size": 16},
        metrics={"all": {"BLEU": 0.6694, "METEOR": None}, "seen": {"BLEU": 0.7001}},
        precision="float32",
    )
    record = replace(facts.record, task="e2e_nlg", metrics={"validation": {"perplexity": 3.5}}, majority={})
    metadata = AdapterMetadata(base="gpt2", task="e2e_nlg")
    config = {**on_base(facts, "gpt2").config, "task_type": "CAUSAL_LM"}
    card = model_card(NAME, Facts(config, metadata, facts.run, record, [scores]))
    assert "| test | BLEU | 0.6694 |  |" in card
    assert "| test, seen | BLEU | 0.7001 |  |" in card
    assert "METEOR" not in card, "it was not measured"
    assert "The texts of test (630 inputs) were generated with num_beams 10, length_penalty 0.9." in card
    assert card_data(card).pipeline_tag == "text-generation"
    values = {(each.dataset_split, each.metric_name): each.metric_value for each in card_data(card).eval_results}
    assert values == {("validation", "perplexity"): 3.5, ("test", "BLEU"): 0.6694, ("test", "BLEU, seen"): 0.7001}


def test_a_file_of_peft_alone_says_what_is_not_known(facts: Facts) -> None:
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "gpt2",
        "r": 8,
        "lora_alpha": 16,
    }
    card = model_card(NAME, Facts(config, AdapterMetadata()))
    assert "**Not known:** no record of a run came with this adapter." in card
    assert "## Results" not in card
    assert "`lora-hf" not in card, "the command line needs to know the task"
    assert card_data(card).base_model == "openai-community/gpt2"
    assert card_data(card).eval_results is None


# The class of the base and the command by PEFT's task_type, and the kind of the task.
KINDS: dict[tuple[str, str], tuple[str, str]] = {
    ("SEQ_CLS", "classification"): ("AutoModelForSequenceClassification", "predict --text TEXT"),
    ("TOKEN_CLS", "tokens"): ("AutoModelForTokenClassification", "predict --text TEXT"),
    ("QUESTION_ANS", "question_answering"): ("AutoModelForQuestionAnswering", "predict --input FILE"),
    ("SEQ_2_SEQ_LM", "seq2seq"): ("AutoModelForSeq2SeqLM", "generate --input FILE"),
    ("CAUSAL_LM", "generation"): ("AutoModelForCausalLM", "generate --input FILE"),
}


@pytest.mark.parametrize(("task_type", "kind"), KINDS)
def test_the_code_loads_the_base_and_asks_for_what_the_task_answers(task_type: str, kind: Any, facts: Facts) -> None:
    auto_class, command = KINDS[task_type, kind]
    assert facts.run is not None
    labels = ("O", "B-X", "I-X") if task_type.endswith("_CLS") else None
    run = replace(facts.run, task=TaskConfig("mine", kind=kind, label_names=labels))
    config, metadata = {**facts.config, "task_type": task_type}, AdapterMetadata(task="mine")
    card = model_card(NAME, Facts(config, metadata, run))
    assert card.count(f"import {auto_class}\n") == card.count(f"model = {auto_class}.from_pretrained(") == 3
    assert f"`lora-hf {command} --adapter {NAME}`" in card
    assert "`lora-hf" not in model_card(NAME, Facts(config, metadata)), "without its run nobody knows the task"


def test_the_classes_are_those_that_the_commands_load() -> None:
    assert {name: auto_class(name) for name in MODEL_KINDS} == {
        name: AUTO_CLASSES[kind].__name__ for name, kind in MODEL_KINDS.items()
    }
    assert (auto_class("FEATURE_EXTRACTION"), auto_class(None)) == ("AutoModel", "AutoModelForCausalLM")
    assert auto_class("SOMETHING_ELSE") is None


def test_a_local_base_is_called_by_its_base_name(facts: Facts, tmp_path: Path) -> None:
    (tmp_path / "my-base").mkdir()
    card = model_card(NAME, on_base(facts, str(tmp_path / "my-base")))
    assert str(tmp_path) not in card
    assert "`my-base`, a base from a local folder that is not known on the hub," in card
    assert 'from_pretrained("path/to/my-base"' in card
    assert card_data(card).base_model is None


def test_a_random_base_is_not_promised_to_other_libraries(facts: Facts) -> None:
    assert facts.run is not None
    run = replace(facts.run, model=replace(facts.run.model, init="random"))
    card = model_card(NAME, replace(facts, run=run))
    assert "with random weights drawn from seed 0" in card
    assert "```python" not in card
