"""The config loader: what it accepts, and its message for every kind of mistake."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from lora_hf.core.config.fields import field_types
from lora_hf.core.config.hints import KEY_ALIASES
from lora_hf.core.config.loader import load_config
from lora_hf.core.config.schema import LoraConfig, RunConfig
from lora_hf.core.errors import ConfigError

REPO = Path(__file__).parents[2]
RECIPES = sorted((REPO / "configs").glob("*.yaml"))


def problem(path: Path | str, *overrides: str) -> str:
    """The message about a config that the loader must refuse."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return tmp_path / "mine.yaml"


def test_a_path_begins_at_home_and_holds_no_variable(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(recipe.parent))
    recipe.write_text("output: {dir: ~/runs}\nmodel: {name: gpt2}\n")
    assert load_config(recipe).output.dir == str(recipe.parent / "runs")
    assert load_config(recipe, ["model.name=~/base"]).model.name == str(recipe.parent / "base")
    for value in ("$OUT/runs", "${OUT}"):
        recipe.write_text(f"output: {{dir: '{value}'}}\n")
        assert problem(recipe).startswith(f"output.dir: expected a path, found the variable in {value!r}")


# --- messages ---


def test_one_message_reports_all_problems(recipe: Path) -> None:
    recipe.write_text(
        "modl: {name: x}\nlora: {rank: 8, targets: []}\ntrain: {lr: -1, schedule: liner}\ngenerate: [8]\ntask: fast\n"
    )
    schedules = "linear, cosine, constant, constant_with_warmup"
    assert problem(recipe).splitlines() == [
        f"{recipe}: 7 problems",
        "  modl: unknown section (did you mean 'model'?); expected model, task, lora, train, generate, output",
        "  lora.rank: unknown key (did you mean 'r'?)",
        "  lora.targets: expected at least one target, found none",
        "  train.lr: expected a number > 0, found -1",
        f"  train.schedule: expected one of {schedules}, found 'liner' (did you mean 'linear'?)",
        "  generate.*: expected keys and values, found a list",
        "  task.*: expected keys and values, found 'fast'",
    ]


@pytest.mark.parametrize(
    ("override", "expected", "found"),
    [
        ("lora.r=true", "a whole number >= 1", "true"),
        ("lora.r=8.0", "a whole number >= 1", "8.0"),
        ("lora.r=0", "a whole number >= 1", "0"),
        ("lora.lora_dropout=1", "a number >= 0 and <= 0.99", "1"),
        ("train.lr=false", "a number > 0", "false"),
        ("train.lr=fast", "a number > 0", "'fast'"),
        ("train.lr=.nan", "a number > 0", "nan"),
        ("train.lr=", "a number > 0", "nothing"),
        ("task.name=1", "text", "1"),
        ("output.overwrite=1", "true or false", "1"),
        ("train.max_grad_norm=-1", "a number >= 0", "-1"),
        ("generate.length_penalty=11", "a number >= -10 and <= 10", "11"),
        ("generate.temperature=0", "a number > 0", "0"),
        ("generate.top_p=0", "a number > 0 and <= 1", "0"),
        ("generate.seed=-1", "a whole number >= 0 and <= 4294967295", "-1"),
        ("model.precision=int4", "one of auto, fp32, bf16, fp16", "'int4'"),
        ("train.hf=fast", "keys and values", "'fast'"),
        ("lora.rank_pattern={q: 0}", "a whole number >= 1", "0"),
        ("lora.targets=[]", "at least one target", "none"),
    ],
)
def test_a_wrong_value(override: str, expected: str, found: str) -> None:
    message = problem("glue_mnli.yaml", override)
    assert message.startswith(f"glue_mnli.yaml: 1 problem\n  {override.partition('=')[0]}: ")
    assert message.endswith(f"expected {expected}, found {found}")


@pytest.mark.parametrize("key", ["lora.lora_alpha", "train.lr"])
def test_a_whole_number_beyond_floats_is_a_wrong_value(key: str) -> None:
    assert f"{key}: expected a number > 0, found 999" in problem("glue_mnli.yaml", f"{key}={'9' * 400}")


def test_a_trainer_argument_with_its_own_key_points_there() -> None:
    assert "train.hf: learning_rate: set train.lr instead" in problem("glue_mnli.yaml", "train.hf.learning_rate=1e-3")


def test_a_config_holds_no_token() -> None:
    assert "HF_TOKEN" in problem("glue_mnli.yaml", "train.hf.hub_token=secret")


def test_a_quantized_base_cannot_be_trained_in_full() -> None:
    message = problem("glue_mnli.yaml", "train.method=full", "model.quantised=int8")
    assert "model.quantised=int8: train.method=full" in message


@pytest.mark.parametrize("override", ["lora.r", "=16", "lora.=16", ".r=16", "lora..r=16", ""])
def test_a_malformed_override(override: str) -> None:
    expected = "expected an override of the form section.key=value, such as lora.r=16"
    assert problem("glue_mnli.yaml", override) == f"{override!r}: {expected}"


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("epochs=3", "train.epochs=3"),
        ("learning_rate=1e-3", "train.lr=1e-3"),
        ("gradient_checkpointing=true", "train.hf.gradient_checkpointing=true"),
        ("seed=1", "train.seed=1 or generate.seed=1"),
        ("nothing=1", "lora.r=16"),
    ],
)
def test_an_override_without_its_section(override: str, meant: str) -> None:
    assert problem("glue_mnli.yaml", override).endswith(f"of the form section.key=value, such as {meant}")


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("train.num_train_epochs", "epochs"),
        ("train.epoch", "epochs"),
        ("train.gradient_checkpointing", "train.hf.gradient_checkpointing"),
        ("train.max_seq_length", "task.max_length"),
        ("train.output_dir", "output.dir"),
        ("lora.lora_alfa", "lora_alpha"),
        ("lora.dropout", "lora_dropout"),
        ("lora.lr", "train.lr"),
    ],
)
def test_an_unknown_key_with_the_key_that_is_meant(key: str, meant: str) -> None:
    expected = f"glue_mnli.yaml: 1 problem\n  {key}: unknown key (did you mean {meant!r}?)"
    assert problem("glue_mnli.yaml", f"{key}=1").startswith(expected)


def test_an_unknown_key_of_train_points_to_the_trainer_arguments() -> None:
    assert "transformers.TrainingArguments go under train.hf" in problem("glue_mnli.yaml", "train.fsdp=true")


AXOLOTL = """
base_model: NousResearch/Llama-3.2-1B
load_in_8bit: true
datasets:
  - path: teknium/GPT4-LLM-Cleaned
    type: alpaca
val_set_size: 0.1
adapter: lora
sequence_len: 2048
lora_r: 16
lora_alpha: 32
lora_target_modules: [gate_proj, down_proj]
gradient_accumulation_steps: 2
micro_batch_size: 2
num_epochs: 1
optimizer: adamw_8bit
lr_scheduler: cosine
learning_rate: 0.0002
"""
LLAMA_FACTORY = """
model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
stage: sft
finetuning_type: lora
lora_rank: 8
lora_target: all
dataset: alpaca_en_demo
template: llama3
cutoff_len: 2048
max_samples: 1000
output_dir: saves/llama3-8b/lora/sft
per_device_train_batch_size: 1
num_train_epochs: 3.0
"""


@pytest.mark.parametrize("text", [AXOLOTL, LLAMA_FACTORY])
def test_a_config_of_another_tool_is_answered_with_the_key_for_each_of_its_own(recipe: Path, text: str) -> None:
    recipe.write_text(text)
    names = [line.partition(":")[0] for line in text.splitlines() if line[:1].isalpha()]
    problems = problem(recipe).splitlines()[1:]
    assert [line.strip().partition(": unknown section (did you mean the key '")[0] for line in problems] == names
    assert "  lora_r: unknown section (did you mean the key 'lora.r'?)" in problems or text is LLAMA_FACTORY


def test_every_alias_leads_to_a_key() -> None:
    from transformers import TrainingArguments

    keys = {f"{section}.{key}" for section, keys in RunConfig().to_dict().items() for key in keys}
    keys |= {f"train.hf.{field.name}" for field in dataclasses.fields(TrainingArguments)}
    assert set(KEY_ALIASES.values()) <= keys


def test_overrides_that_are_no_yaml_or_go_below_a_value() -> None:
    assert problem("glue_mnli.yaml", "lora.targets=[q").startswith("'lora.targets=[q': the value is not valid YAML: ")
    assert problem("glue_mnli.yaml", "lora.r.x=1") == "'lora.r.x=1': r is 8 and has no keys"


def test_a_missing_file_with_the_nearest_recipe(tmp_path: Path) -> None:
    assert problem("glue_sst.yaml") == (
        "glue_sst.yaml: no such config file in the current folder and configs/ (did you mean 'glue_sst2.yaml'?)"
    )
    elsewhere = tmp_path / "glue_sst2.yaml"
    assert problem(elsewhere) == f"{elsewhere}: no such config file in {tmp_path} (did you mean 'glue_sst2.yaml'?)"
    message = problem("qqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqq")
    assert message.partition("; recipes: ")[2].split(", ") == [file.name for file in RECIPES]


@pytest.mark.parametrize("key", ["lora.r", "lora.targets", "model.precision", "model.name", "train.lr"])
def test_a_list_of_aliases_is_not_written_out(recipe: Path, key: str) -> None:
    """Four lines can stand for 1,000 words."""
    levels = ["a0: &a0 [x]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 4)]
    section, name = key.split(".")
    recipe.write_text("\n".join([*levels, f"{section}: {{{name}: *a3}}"]), encoding="utf-8")
    assert f"{key}: expected" in problem(recipe)
    assert problem(recipe).endswith("found a list")


@pytest.mark.parametrize(("text", "found"), [("- lora\n- train\n", "a list"), ("lora\n", "'lora'"), ("true\n", "true")])
def test_a_file_without_sections(recipe: Path, text: str, found: str) -> None:
    recipe.write_text(text)
    assert problem(recipe) == f"{recipe}: expected sections such as 'model:' and 'task:', found {found}"


@pytest.mark.parametrize("content", [b"lora: [q, v\ntrain:\n", b"lora:\n\tr: 8\n", b"lora: \xff\xfe\n"])
def test_a_file_that_is_no_yaml(recipe: Path, content: bytes) -> None:
    recipe.write_bytes(content)
    assert problem(recipe).startswith(f"{recipe}: not a readable YAML file: ")


# --- values ---


@pytest.mark.parametrize("text", ["5e-4", "0.0005", "'5e-4'"])
def test_a_learning_rate_is_read_however_it_is_written(text: str) -> None:
    assert load_config("glue_mnli.yaml", [f"train.lr={text}"]).train.lr == 5e-4


def test_overrides_replace_the_values_of_the_file_in_order() -> None:
    config = load_config("glue_mnli.yaml", ["lora.r=4", "train.lr=1e-3", "lora.r=16", "lora.targets=[q, k, v]"])
    assert (config.lora.r, config.train.lr, config.lora.targets) == (16, 1e-3, ("q", "k", "v"))
    assert config.train.epochs == 30
    assert load_config("glue_mnli.yaml", ["lora.targets=attention"]).lora.targets == ("attention",)
    assert load_config("glue_mnli.yaml", ["output.name=a=b"]).output.name == "a=b"
    assert load_config("glue_mnli.yaml", ["train.hf.adam_beta2=0.98"]).train.hf == {"adam_beta2": 0.98}


def test_the_base_keeps_its_own_dropout_by_default() -> None:
    assert load_config("glue_mnli.yaml").model.dropout is None
    assert load_config("glue_mnli.yaml", ["model.dropout=0"]).model.dropout == 0
    assert load_config("e2e_gpt2.yaml", ["model.dropout=null"]).model.dropout is None


def test_an_empty_file_means_the_defaults(recipe: Path) -> None:
    recipe.write_text("# nothing yet\n", encoding="utf-8")
    assert "found nothing" in problem(recipe)
    recipe.write_text("train:\n", encoding="utf-8")
    assert load_config(recipe) == RunConfig()


@pytest.mark.full
def test_the_resolved_config_of_a_run_loads_unchanged(tmp_path: Path) -> None:
    for file in RECIPES:
        resolved = tmp_path / file.name
        resolved.write_text(yaml.safe_dump(load_config(file).to_dict(), sort_keys=False), encoding="utf-8")
        assert load_config(resolved) == load_config(file)


def test_a_bare_name_is_found_in_configs_after_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config("glue_cola.yaml") == load_config(REPO / "configs" / "glue_cola.yaml")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "glue_cola.yaml").write_text("lora: {r: 3}", encoding="utf-8")
    assert load_config("glue_cola.yaml").lora.r == 3
    (tmp_path / "glue_cola.yaml").write_text("lora: {r: 2}", encoding="utf-8")
    assert load_config("glue_cola.yaml").lora.r == 2


def test_the_types_are_those_of_the_fields_alone() -> None:
    """On Python 3.10 `typing.get_type_hints` cannot evaluate PEFT's names, which are no fields."""
    types = field_types(LoraConfig)
    assert list(types) == [entry.name for entry in dataclasses.fields(LoraConfig)]
    assert types["r"] is int


def test_the_names_of_peft_work_in_python() -> None:
    theirs = LoraConfig(r=4, target_modules=["query", "value"], layers_to_transform=[0, 1], modules_to_save=None,
                        rank_pattern=None, init_lora_weights=True, task_type="SEQ_CLS", bias="lora_only")  # type: ignore[arg-type]  # fmt: skip
    assert theirs == LoraConfig(r=4, targets=("query", "value"), layers=(0, 1), bias="lora_only")
    assert replace(theirs, r=8).task_type == theirs.task_type == "SEQ_CLS"
    assert LoraConfig(target_modules="all-linear").targets == ("all-linear",)
    assert LoraConfig(target_modules={"q_proj"}).targets == ("q_proj",)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"targets": ("q",), "target_modules": ["query"]}, "targets and target_modules mean the same"),
        ({"init_lora_weights": False}, "draws B at random in PEFT"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights: expected one of default"),
        ({"bias": "lora"}, "bias: expected one of none, all, lora_only"),
        ({"task_type": "IMAGE_CLS"}, "task_type: expected one of SEQ_CLS"),
        ({"target_modules": []}, "targets: expected at least one target"),
    ],
)
def test_what_means_something_else_in_peft_is_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        LoraConfig(**values)
