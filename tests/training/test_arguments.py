"""`train.hf` and the variables of a launcher: what cannot work ends with one message that names the setting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lora_hf.cli.main import main
from lora_hf.core.config.loader import load_config
from lora_hf.core.config.schema import RunConfig
from lora_hf.core.errors import ConfigError
from lora_hf.data.tasks.registry import get_task
from lora_hf.training.arguments import training_arguments
from lora_hf.training.run import train
from lora_hf.training.trainer import Optimizations
from lora_hf.training.validation import check_run
from tests.support.kills import small_config, small_rows

PLAIN = Optimizations(scores_labels_only=False, padded_because=None)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("greater_is_better", "false"),
        ("metric_for_best_model", "eval_loss"),
        ("load_best_model_at_end", "false"),
        ("push_to_hub", "true"),
        ("hub_model_id", "someone/x"),
        ("do_eval", "true"),
        ("resume_from_checkpoint", "x"),
        ("save_only_model", "true"),
        ("prediction_loss_only", "true"),
        ("batch_eval_metrics", "true"),
        ("label_names", "[x]"),
        ("remove_unused_columns", "false"),
        ("auto_find_batch_size", "true"),
        ("data_seed", "1"),
    ],
)
def test_fields_that_contradict_the_task_or_publish_are_refused(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=rf"train\.hf: {name}: .*leave it out"):
        load_config("rule_sentiment.yaml", [f"train.hf.{name}={value}"])


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("adam_epsilon=x", "expected float, found 'x'"),
        ("adam_epsilon=1e-8", r"write 1\.0e-8"),
        ("save_total_limit=x", r"expected int \| None"),
        ("save_total_limit=0", ">= 1, found 0"),
        ("eval_accumulation_steps=0", ">= 1"),
        ("eval_steps=0", "found 0"),
        ("save_steps=-1", "found -1"),
        ("neftune_noise_alpha=-1", ">= 0"),
        ("ddp_timeout=x", "expected int"),
        ("gradient_checkpointing=x", "expected bool"),
        ("run_name=5", r"expected str \| None, found 5"),
        ("train_sampling_strategy=nonsense", "expected one of random"),
        ("torch_compile_mode=nonsense", "expected one of default"),
        ("nonsense=1", "is not a field"),
    ],
)
def test_values_that_fail_in_the_middle_of_a_run_are_refused_before(word: str, said: str) -> None:
    name = word.partition("=")[0]
    with pytest.raises(ConfigError, match=rf"train\.hf: {name}.*{said}"):
        check_run(load_config("rule_sentiment.yaml", [f"train.hf.{word}"]))


def test_values_that_work_pass() -> None:
    hf = "{adam_beta2: 0.98, eval_strategy: no, optim: adafactor, logging_steps: 0.1, save_total_limit: null, "
    hf += "lr_scheduler_kwargs: {}, accelerator_config: {}, report_to: [tensorboard]}"
    config = load_config("rule_sentiment.yaml", [f"train.hf={hf}"])
    check_run(config)


@pytest.mark.parametrize(
    "hf",
    [
        {"adam_beta1": 2},
        {"lr_scheduler_kwargs": {"nonsense": 1}},
        {"dataloader_num_workers": -1},
        {"report_to": "nonsense"},
        {"optim_args": "nonsense"},
        {"accelerator_config": "nofile"},
    ],
)
def test_what_transformers_refuses_is_one_message(hf: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"train\.hf: {next(iter(hf))}="):
        train(small_config(tmp_path, hf=hf, max_steps=1), rows=small_rows())


def test_an_error_of_the_training_itself_is_not_blamed_on_the_arguments(tmp_path: Path) -> None:
    from transformers import TrainerCallback

    class Broken(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        train(small_config(tmp_path, max_steps=1), rows=small_rows(), callbacks=[Broken()])


@pytest.mark.parametrize(("ratio", "steps"), [(1.0, 100), (0.0, 0), (0.5, 50), (0.999, 100)])
def test_the_warmup_is_a_share_of_all_steps(ratio: float, steps: int, tmp_path: Path) -> None:
    config = RunConfig.from_dict({"model": {"precision": "fp32"}, "train": {"warmup_ratio": ratio}})
    arguments = training_arguments(config, get_task("sst2"), tmp_path, PLAIN)
    assert arguments.get_warmup_steps(100) == steps


@pytest.mark.parametrize(
    "variables",
    [
        {"RANK": "1"},
        {"LOCAL_RANK": "0"},
        {"RANK": "x", "WORLD_SIZE": "2"},
        {"RANK": "2", "WORLD_SIZE": "2"},
        {"WORLD_SIZE": "2"},
        {"RANK": "0", "WORLD_SIZE": "0"},
    ],
)
def test_stray_variables_of_a_launcher_are_refused(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="expected RANK and WORLD_SIZE together"):
        check_run(load_config("rule_sentiment.yaml"))


@pytest.mark.parametrize("rank", ["1", "x"])
def test_the_command_refuses_a_stray_rank(
    rank: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", rank)
    assert main(["train", "--config", "rule_sentiment.yaml", f"output.dir={tmp_path / 'out'}"]) == 2
    assert f"found RANK={rank}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
