"""Published scores, and whether a run may be compared with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora_hf.core.config.loader import RECIPE_FOLDERS, load_config
from lora_hf.core.config.schema import RunConfig
from lora_hf.models.model_ids import HUB_IDS

FROM_MNLI = ("mrpc", "rte", "stsb")  # tasks that start from the MNLI run: LoRA paper, section 5.2

ROBERTA, LARGE, XXL = "FacebookAI/roberta-base", "FacebookAI/roberta-large", "microsoft/deberta-v2-xxlarge"
MEDIUM, LARGER = "openai-community/gpt2-medium", "openai-community/gpt2-large"
SOURCE = "arXiv 2106.09685, Tables 2, 3, 13 and 14"

# Score and spread of LoRA in percent. GLUE: median of 5 seeds on the development set (MNLI over both splits, Matthews
# correlation for CoLA, Pearson correlation for STS-B, accuracy for the others). Generation: BLEU on the test set.
PUBLISHED: dict[str, dict[str, tuple[float, float]]] = {
    ROBERTA: {
        "mnli": (87.5, 0.3), "sst2": (95.1, 0.2), "mrpc": (89.7, 0.7), "cola": (63.4, 1.2),
        "qnli": (93.3, 0.3), "qqp": (90.8, 0.1), "rte": (86.6, 0.7), "stsb": (91.5, 0.2),
    },
    LARGE: {
        "mnli": (90.6, 0.2), "sst2": (96.2, 0.5), "mrpc": (90.9, 1.2), "cola": (68.2, 1.9),
        "qnli": (94.9, 0.3), "qqp": (91.6, 0.1), "rte": (87.4, 2.5), "stsb": (92.6, 0.2),
    },
    XXL: {
        "mnli": (91.9, 0.2), "sst2": (96.9, 0.2), "mrpc": (92.6, 0.6), "cola": (72.4, 1.1),
        "qnli": (96.0, 0.1), "qqp": (92.9, 0.1), "rte": (94.9, 0.4), "stsb": (93.0, 0.2),
    },
    MEDIUM: {"e2e_nlg": (70.4, 0.1), "dart": (47.1, 0.2), "web_nlg": (55.3, 0.2)},
    LARGER: {"e2e_nlg": (70.4, 0.1), "dart": (47.5, 0.1), "web_nlg": (57.0, 0.1)},
}  # fmt: skip

# Rows of the complete data sets, for the splits that a run uses. For `test`: inputs, each of which has several rows.
ROWS: dict[str, dict[str, int]] = {
    "cola": {"train": 8551, "validation": 1043},
    "sst2": {"train": 67349, "validation": 872},
    "mrpc": {"train": 3668, "validation": 408},
    "qqp": {"train": 363846, "validation": 40430},
    "stsb": {"train": 5749, "validation": 1500},
    "mnli": {"train": 392702, "validation_matched": 9815, "validation_mismatched": 9832},
    "qnli": {"train": 104743, "validation": 5463},
    "rte": {"train": 2490, "validation": 277},
    "e2e_nlg": {"train": 42061, "validation": 4672, "test": 630},
    "dart": {"train": 30526, "validation": 2768, "test": 4159},
    "web_nlg": {"train": 6940, "validation": 872, "test": 1862},
}

# File names of the recipes in configs/. Those ending in `_repo` are from the authors' code and differ from the paper.
_PREFIXES = {"e2e_nlg": "e2e_", "dart": "dart_", "web_nlg": "webnlg_"} | {
    task: f"glue_{task}" for task in ("cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte")
}


def hub_id(model: str) -> str:
    return HUB_IDS.get(model, model)


def published_recipe(task: str, model: str) -> Path | None:
    """The recipe in `configs/` with the paper's hyperparameters for this base, or None."""
    if task not in _PREFIXES:
        return None
    for folder in RECIPE_FOLDERS:
        for file in sorted(folder.glob(f"{_PREFIXES[task]}*.yaml")):
            if file.stem.endswith("_repo"):
                continue
            config = load_config(file)
            if (config.task.name, hub_id(config.model.name)) == (task, hub_id(model)):
                return file
    return None


def compare_published(
    config: RunConfig, rows: dict[str, int], score: float | None, from_mnli: bool = False
) -> dict[str, Any]:
    """The published score and the gap to it in percent, or in `why_not` what differs from the published setup.

    Args:
        rows: number of rows by split; for a split with generated texts, the number of inputs.
        score: the mean over the seeds, as a fraction; None if no run is finished.
        from_mnli: whether the run started from an MNLI run.
    """
    scores = PUBLISHED.get(hub_id(config.model.name), {})
    task = config.task.name
    if task not in scores or not _same_base(config):
        return {"why_not": "other base"}
    recipe = published_recipe(task, config.model.name)
    if recipe is None or _recipe(config) != _recipe(load_config(recipe)):
        return {"why_not": "other recipe"}
    if from_mnli != (task in FROM_MNLI):
        return {"why_not": "other start"}
    if rows != ROWS[task]:
        subset = all(rows.get(split, 0) <= count for split, count in ROWS[task].items())
        return {"why_not": "part of the data" if subset else "other rows"}
    if score is None:
        return {"why_not": "no run"}
    published, spread = scores[task]
    return {"score": published, "spread": spread, "source": SOURCE, "gap": 100 * score - published}


def _same_base(config: RunConfig) -> bool:
    model = config.model
    return model.init == "pretrained" and model.quantised is None and model.revision is None and not model.tokenizer


def _recipe(config: RunConfig) -> dict[str, Any]:
    """The hyperparameters that a paper publishes."""
    values = config.to_dict()
    unpublished = ("seed", "start_from", "eval_batch_size")
    return {
        "train": {key: value for key, value in values["train"].items() if key not in unpublished},
        "lora": values["lora"],
        "generate": {key: value for key, value in values["generate"].items() if key != "batch_size"},
        "max_length": config.task.max_length,
        "dropout": config.model.dropout,
    }
