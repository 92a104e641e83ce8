"""All eight GLUE adapters on one tiny base: rows of all tasks in the same batches score as each adapter alone does."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_hf import inject, save_adapter
from lora_hf.adapters.resolve import SavedModel, find_saved_model
from lora_hf.cli.main import main
from lora_hf.core.config.schema import LoraConfig, ModelConfig
from lora_hf.core.errors import AdapterError
from lora_hf.data.tasks.glue import GLUE
from lora_hf.inference.classify import MultiAdapterPredictor, Predictor
from lora_hf.models.load import load_base
from tests import tolerances
from tests.support.small_models import randomize_lora_b

pytestmark = pytest.mark.full

ROWS = 24


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, SavedModel]:
    """Untrained but far from zero, with ranks and targets of their own: what they answer does not matter here."""
    folder, saved = tmp_path_factory.mktemp("adapters"), {}
    for number, task in enumerate(GLUE):
        model = load_base(ModelConfig(name="tiny-roberta", precision="fp32"), task, seed=number)
        inject(model, LoraConfig(r=2 + number, targets=("all",) if number % 2 else ("q", "v")))
        randomize_lora_b(model, seed=number, std=0.1)
        save_adapter(model, folder / task.name, task=task.name)
        saved[task.name] = find_saved_model(folder / task.name)
    return saved


def test_scores_of_a_mixed_run_are_those_of_the_single_runs(adapters: dict[str, SavedModel], data_dir: str) -> None:
    rows: list[tuple[str, dict[str, str]]] = []
    alone, labels = {}, {}
    for task in GLUE:
        split = task.evaluation_splits[0]
        part = task.load(data_dir, [split])[split].select(range(ROWS))
        columns = {column: list(part[column]) for column in task.text_columns}
        alone[task.name] = Predictor.load(adapters[task.name], "fp32").logits(columns)
        labels[task.name] = np.asarray(part["label"])
        rows += [(task.name, {key: columns[key][row] for key in columns}) for row in range(ROWS)]
    # Row by row another task, so that every batch holds all of them.
    order = [task * ROWS + row for row in range(ROWS) for task in range(len(GLUE))]
    mixed = MultiAdapterPredictor.load(adapters, "fp32").logits([rows[place] for place in order])
    for number, task in enumerate(GLUE):
        found = np.stack([logits for place, logits in zip(order, mixed, strict=True) if place // ROWS == number])
        np.testing.assert_allclose(found, alone[task.name], atol=tolerances.MIXED_FP32, rtol=0)
        scores = task.score(alone[task.name], labels[task.name])
        assert task.score(found, labels[task.name]) == pytest.approx(scores, abs=tolerances.MIXED_FP32)


def test_the_command_answers_each_row_under_the_adapter_it_names(
    adapters: dict[str, SavedModel], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.jsonl"
    lines: list[dict[str, Any]] = [
        {"adapter": "sst2", "sentence": "a warm film"},
        {"adapter": "mnli", "premise": "it rains", "hypothesis": "it is wet"},
        {"adapter": "stsb", "sentence1": "a man eats", "sentence2": "a man is eating"},
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    words = [word for name in ("sst2", "mnli", "stsb") for word in ("--adapter", f"{name}={adapters[name].folder}")]
    assert main([*words, "--input", str(file), "--json"], verb="predict") == 0
    answers = json.loads(capsys.readouterr().out)["predictions"]
    assert [answer["adapter"] for answer in answers] == ["sst2", "mnli", "stsb"]
    assert len(answers[1]["probabilities"]) == 3
    single = ["--adapter", str(adapters["sst2"].folder), "--text", "a warm film", "--json"]
    assert main(single, verb="predict") == 0
    alone = json.loads(capsys.readouterr().out)["predictions"][0]
    assert answers[0]["probabilities"] == pytest.approx(alone["probabilities"], abs=0.01)
    assert set(answers[2]) == {"adapter", "sentence1", "sentence2", "score"}


@pytest.mark.parametrize(
    ("words", "line", "message"),
    [
        (["x={a}", "{b}"], {}, "NAME=DIR"),
        (["x={a}", "x={b}"], {}, "NAME=DIR"),
        (["x={a}", "y={b}"], {"adapter": "z"}, "no adapter 'z' was given; expected one of x, y"),
        (["x={a}", "y={b}"], {"sentence": "no adapter named"}, "'adapter'"),
    ],
)
def test_mistakes_with_several_adapters(
    adapters: dict[str, SavedModel],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    line: dict[str, str],
    message: str,
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(line) + "\n", encoding="utf-8")
    folders = {"a": adapters["sst2"].folder, "b": adapters["cola"].folder}
    given = [part for word in words for part in ("--adapter", word.format(**folders))]
    assert main([*given, "--input", str(file)], verb="predict") == 2
    assert message in capsys.readouterr().err


def test_adapters_of_different_bases_do_not_mix(adapters: dict[str, SavedModel]) -> None:
    other = replace(adapters["rte"], model=ModelConfig(name="roberta-base"))
    with pytest.raises(AdapterError, match="adapters of one batch need one base"):
        MultiAdapterPredictor.load({"sst2": adapters["sst2"], "rte": other})
