"""The search space of a sweep: what its words mean, and all errors in one message."""

from __future__ import annotations

import subprocess
import sys

import optuna
import pytest

from lora_hf.core.config.loader import load_config
from lora_hf.core.errors import ConfigError
from lora_hf.experiments.sweep.space import Choice, Multiple, Range, read_sweep, with_values

RECIPE = "rule_sentiment.yaml"
SCHEDULES = "linear, cosine, constant, constant_with_warmup"


def drawn(*words: str, trials: int = 60) -> list[dict]:
    """The values of trials that a random sampler draws."""
    _, space = read_sweep(RECIPE, words)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    found = []
    for _ in range(trials):
        trial = study.ask()
        space.draw(trial)
        found.append(space.values(trial.params))
    return found


def problems(*words: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read_sweep(RECIPE, words)
    return str(caught.value).split("\n  ")


def test_every_form_of_a_word() -> None:
    config, space = read_sweep(
        RECIPE,
        [
            "lora.r=4..64:log2",
            "train.lr=1e-5..1e-3:log",
            "train.epochs=1..3",
            "lora.targets=[q, v]|all",
            "train.batch_size=8,16",
            "lora.lora_alpha=2*lora.r",
            "train.seed=7",
            "train.hf={eval_strategy: steps, eval_steps: 2}",
            "task.data_dir=../data",
        ],
    )
    assert space.dimensions == (
        Range("lora.r", 4, 64, "log2", is_int=True),
        Range("train.lr", 1e-5, 1e-3, "log", is_int=False),
        Range("train.epochs", 1.0, 3.0, "linear", is_int=False),
        Choice("lora.targets", ("[q, v]", "all")),
        Choice("train.batch_size", ("8", "16")),
    )
    assert space.multiples == (Multiple("lora.lora_alpha", 2, "lora.r"),)
    assert (config.train.seed, config.task.data_dir) == (7, "../data")
    assert config.train.hf == {"eval_strategy": "steps", "eval_steps": 2}
    assert space.words()[0] == "lora.lora_alpha=2*lora.r"


def test_powers_of_two_lie_between_the_ends_and_reach_both() -> None:
    values = drawn("lora.r=3..64:log2", "lora.lora_alpha=2*lora.r")
    assert {each["lora.r"] for each in values} == {4, 8, 16, 32, 64}
    assert all(each["lora.lora_alpha"] == 2 * each["lora.r"] for each in values)
    assert all(type(each["lora.r"]) is int for each in values)
    assert {each["lora.lora_alpha"] for each in drawn("lora.lora_alpha=0.5..2:log2")} == {0.5, 1, 2}


def test_a_number_is_whole_where_its_field_is() -> None:
    assert {each["train.batch_size"] for each in drawn("train.batch_size=2..4")} == {2, 3, 4}
    assert {type(each["train.epochs"]) for each in drawn("train.epochs=1..3")} == {float}
    assert {each["lora.rank_pattern.q"] for each in drawn("lora.rank_pattern.q=1..2")} == {1, 2}
    assert {each["train.hf.eval_steps"] for each in drawn("train.hf.eval_steps=1..2")} == {1, 2}


def test_a_log_range_spreads_over_its_decades() -> None:
    low = [each["train.lr"] for each in drawn("train.lr=1e-5..1e-1:log", trials=200)]
    assert 60 < sum(value < 1e-3 for value in low) < 140, "half of them lie below the middle of four decades"
    flat = [each["train.lr"] for each in drawn("train.lr=1e-5..1e-1", trials=200)]
    assert sum(value < 1e-3 for value in flat) < 20


def test_values_make_a_config_and_choices_are_yaml() -> None:
    config, space = read_sweep(RECIPE, ["lora.targets=[q, v]|all", "lora.use_rslora=true,false"])
    values = space.values({"lora.targets": "[q, v]", "lora.use_rslora": "true"})
    made = with_values(config, values, "trial 0")
    assert (made.lora.targets, made.lora.use_rslora) == (("q", "v"), True)
    assert config == load_config(RECIPE)


def test_all_problems_are_in_one_message() -> None:
    assert problems(
        "lora.rank=4..8",
        "lora.r=0..8",
        "train.lr=0..1e-3:log",
        "train.epochs=3..1",
        "lora.lora_dropout=0..1.5",
        "train.batch_size=1.5..4",
        "train.schedule=linear,cosin",
        "lora.lora_alpha=2*lora.s",
        "train.seed=many",
        "output.name=x",
        "output.plots=true,false",
        "task.name=sst2,rte",
        "task.metric=accuracy,macro_f1",
        "generate.num_beams=1..4",
        "r",
        "model.dropout=0.1..0.2:ln",
        "train.max_steps=5..7:log2",
        "train.patience=1,,2",
    ) == [
        "sweep of rule_sentiment.yaml: 18 problems",
        "train.lr=0..1e-3:log: expected low > 0 for :log, found 0",
        "train.epochs=3..1: expected low < high, found 3 and 1",
        "output.name: a sweep sets the output folder itself; use the options of the sweep",
        "output.plots: cannot be swept: pictures change no score",
        "task.name: cannot be swept: scores of different tasks cannot be compared",
        "task.metric: cannot be swept: scores by different metrics cannot be compared",
        "generate.num_beams: cannot be swept: decoding has no effect on the score on the development rows",
        "'r': expected section.key=low..high, section.key=a,b or section.key=value",
        "model.dropout=0.1..0.2:ln: expected :log or :log2, found :ln",
        "train.max_steps=5..7:log2: expected at least two powers of two between low and high",
        "train.patience=1,,2: a choice is empty",
        "train.seed: expected a whole number >= 0 and <= 4294967295, found 'many'",
        "lora.lora_alpha=2*lora.s: lora.s is not swept (did you mean 'lora.r'?)",
        "lora.rank: unknown key (did you mean 'r'?)",
        "lora.r: expected a whole number >= 1, found 0",
        "lora.lora_dropout: expected a number >= 0 and <= 0.99, found 1.5",
        "train.batch_size: expected a whole number >= 1, found 1.5",
        f"train.schedule: expected one of {SCHEDULES}, found 'cosin' (did you mean 'cosine'?)",
    ]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["lora.r=8", "lora.r=4..8"], "lora.r: given twice"),
        (["lora.r=8"], "nothing to sweep: give at least one key=low..high or key=a,b, such as lora.r=4..64:log2"),
        (["lora.r=4..many"], "lora.r: expected a whole number >= 1, found '4..many'"),
        (["lora.targets=[q,v]|q|[q, v]"], "lora.targets=[q,v]|q|[q, v]: a choice is given twice"),
        (["lora.targets=[q|v]"], "a choice is not valid YAML; separate choices that contain commas with |"),
        (["lora.bias=none,all", "lora.r=2*lora.bias"], "lora.r=2*lora.bias: expected numbers in lora.bias"),
        (["lora.r.x=1..2"], "'lora.r.x': r is 16 and has no keys"),
        (["train.method=lora,full", "model.quantised=int8"], "leave model.quantised out, or set train.method=lora"),
    ],
)
def test_one_problem(words: list[str], line: str) -> None:
    assert any(found.endswith(line) for found in problems(*words)), problems(*words)


def test_words_are_checked_before_torch_and_optuna_are_imported() -> None:
    code = (
        "import sys; from lora_hf.experiments.sweep.space import read_sweep; "
        "read_sweep('rule_sentiment.yaml', ['lora.r=4..8', 'train.lr=1e-5..1e-3:log']); "
        "sys.exit(', '.join({'torch', 'optuna', 'transformers'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("word", ["task.train_on=all,last", "task.drop_unlearnable=true,false"])
def test_what_changes_the_scored_tokens_is_not_swept(word: str) -> None:
    with pytest.raises(ConfigError, match=r"cannot be swept: .* cannot be compared"):
        read_sweep("rule_sentiment.yaml", [word])
