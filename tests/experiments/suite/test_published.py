"""A gap to a published number needs the published base, recipe, start and data; each that differs is told instead."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from lora_hf.core.config.loader import load_config
from lora_hf.core.config.schema import RunConfig
from lora_hf.experiments.suite.published import PUBLISHED, compare_published, published_recipe

REPO = Path(__file__).parents[3]
ROWS = PUBLISHED["rows"]


def recipe(task: str = "cola") -> RunConfig:
    return load_config(REPO / "configs" / f"glue_{task}.yaml")


def test_a_published_run_gets_its_gap() -> None:
    found = compare_published(recipe(), ROWS["cola"], 0.644)
    assert found["score"] == 63.4
    assert found["spread"] == 1.2
    assert found["gap"] == pytest.approx(1.0)
    assert "2106.09685" in found["source"]


def test_seed_precision_and_how_many_rows_are_scored_at_a_time_are_no_recipe() -> None:
    config = recipe()
    config = replace(config, train=replace(config.train, seed=7, eval_batch_size=8))
    config = replace(config, model=replace(config.model, name="roberta-base", precision="bf16"))
    assert compare_published(config, ROWS["cola"], 0.6)["gap"] == pytest.approx(-3.4)


@pytest.mark.parametrize(
    ("section", "key", "value", "why"),
    [
        ("model", "name", "tiny-roberta", "other base"),
        ("model", "init", "random", "other base"),
        ("model", "quantised", "int8", "other base"),
        ("model", "dropout", 0.0, "other recipe"),
        ("task", "max_length", 128, "other recipe"),
        ("lora", "r", 16, "other recipe"),
        ("train", "lr", 5e-4, "other recipe"),
        ("train", "method", "full", "other recipe"),
        ("train", "max_steps", 3, "other recipe"),
    ],
)
def test_what_differs_is_told(section: str, key: str, value: object, why: str) -> None:
    config = recipe()
    config = replace(config, **{section: replace(getattr(config, section), **{key: value})})
    assert compare_published(config, ROWS["cola"], 0.644) == {"why_not": why}


def test_part_of_the_data_is_told() -> None:
    assert compare_published(recipe(), {"train": 8551, "validation": 1042}, 0.6) == {"why_not": "part of the data"}
    assert compare_published(recipe(), {"train": 8552, "validation": 1043}, 0.6) == {"why_not": "other rows"}


@pytest.mark.parametrize(("task", "starts"), [("rte", True), ("cola", False)])
def test_the_start_is_the_published_one(task: str, starts: bool) -> None:
    config = recipe(task)
    assert "gap" in compare_published(config, ROWS[task], 0.8, from_mnli=starts)
    assert compare_published(config, ROWS[task], 0.8, from_mnli=not starts) == {"why_not": "other start"}


def test_the_authors_recipes_are_not_the_papers() -> None:
    config = load_config(REPO / "configs" / "glue_cola_repo.yaml")
    assert compare_published(config, ROWS["cola"], 0.6) == {"why_not": "other recipe"}


@pytest.mark.parametrize("model", PUBLISHED["scores"])
def test_every_published_number_has_its_recipe_which_says_the_same(model: str) -> None:
    for task, (score, spread) in PUBLISHED["scores"][model].items():
        file = published_recipe(task, model)
        assert file is not None, task
        text = file.read_text(encoding="utf-8")
        assert f"{score:.1f}±{spread:.1f}".replace("±0.", "±.") in text, file.name
        assert load_config(file).task.name == task
        assert set(ROWS[task]) >= {"train"}


def test_other_tasks_and_bases_have_none() -> None:
    assert published_recipe("rule-sentiment", "tiny-roberta") is None
    assert published_recipe("cola", "tiny-roberta") is None
