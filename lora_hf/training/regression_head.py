"""Initializes the head of a regression."""

from __future__ import annotations

import logging
import re
import statistics

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel

from lora_hf.data.tasks.base import Task
from lora_hf.lora.heads import new_parameters

logger = logging.getLogger(__name__)


@torch.no_grad()
def center_new_head(model: PreTrainedModel, task: Task, rows: Dataset) -> nn.Parameter | None:
    """Sets the bias of a regression's new head to the mean of the training labels, and returns it.

    If the bias starts at zero, the first steps use every weight they can to learn the mean. MiniLM on STS-B then
    predicts nearly the same score for all rows, and some runs never recover (`docs/results.md`).

    Returns:
        None if the task is no regression, the checkpoint has a head, or the head has no bias. Nothing changes then.
    """
    if task.problem_type != "regression":
        return None
    mean = statistics.fmean(rows["labels"])
    new = new_parameters(model) or frozenset()
    for name, parameter in model.named_parameters():
        plain = re.sub(r"\.modules_to_save\.[^.]+", "", name)
        if parameter.requires_grad and parameter.shape == (1,) and plain.endswith(".bias") and plain in new:
            parameter.fill_(mean)
            logger.info("%s starts at the mean of the training labels, %.4g", plain, mean)
            return parameter
    return None
