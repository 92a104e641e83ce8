"""Published scores, and whether a run may be compared with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lora_hf.core.config.loader import RECIPE_FOLDERS, load_config
from lora_hf.core.config.schema import RunConfig
from lora_hf.models.model_ids import HUB_IDS

FROM_MNLI = ("mrpc", "rte", "stsb")  # tasks that start from the MNLI run: LoRA paper, section 5.2

# `scores`: score and spread of LoRA in percent, by base and task. GLUE: median of 5 seeds on the development set (MNLI
# over both splits, Matthews correlation for CoLA, Pearson correlation for STS-B, accuracy for the others). Generation:
# BLEU on the test set. `rows`: of the complete data sets, for the splits that a run uses; for `test` the inputs, each
# of which has several rows.
PUBLISHED = json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))


def hub_id(model: str) -> str:
    return HUB_IDS.get(model, model)


def published_recipe(task: str, model: str) -> Path | None:
    """The recipe in `configs/` with the paper's hyperparameters for this base, or None."""
    prefix = {"e2e_nlg": "e2e", "web_nlg": "webnlg", "dart": "dart"}.get(task, f"glue_{task}")
    for file in (file for folder in RECIPE_FOLDERS for file in sorted(folder.glob(f"{prefix}*.yaml"))):
        if not file.stem.endswith("_repo"):  # the authors' code, which differs from the paper
            config = load_config(file)
            if (config.task.name, hub_id(config.model.name)) == (task, hub_id(model)):
                return file
    return None


def compare_published(config: RunConfig, rows: dict[str, int], score: float, from_mnli: bool = False) -> dict[str, Any]:
    """The published score and the gap to it in percent, or in `why_not` what differs from the published setup.

    Args:
        rows: number of rows by split; for a split with generated texts, the number of inputs.
        score: the mean over the seeds, as a fraction.
        from_mnli: whether the run started from an MNLI run.
    """
    model, task = config.model, config.task.name
    scores = PUBLISHED["scores"].get(hub_id(model.name), {})
    if task not in scores or model.init != "pretrained" or model.quantised or model.revision or model.tokenizer:
        return {"why_not": "other base"}
    recipe = published_recipe(task, model.name)
    if recipe is None or _hyperparameters(config) != _hyperparameters(load_config(recipe)):
        return {"why_not": "other recipe"}
    if from_mnli != (task in FROM_MNLI):
        return {"why_not": "other start"}
    complete = PUBLISHED["rows"][task]
    if rows != complete:
        subset = all(rows.get(split, 0) <= count for split, count in complete.items())
        return {"why_not": "part of the data" if subset else "other rows"}
    published, spread = scores[task]
    return {"score": published, "spread": spread, "source": PUBLISHED["source"], "gap": 100 * score - published}


def _hyperparameters(config: RunConfig) -> dict[str, Any]:
    """Those that a paper publishes."""
    values = config.to_dict()
    for key in ("seed", "start_from", "eval_batch_size"):
        del values["train"][key]
    del values["generate"]["batch_size"]
    used = {section: values[section] for section in ("train", "lora", "generate")}
    return used | {"max_length": config.task.max_length, "dropout": config.model.dropout}
