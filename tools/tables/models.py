"""The tables of model types: what the role table and transformers say of each, and what the tests cover."""

from __future__ import annotations

from pathlib import Path

from transformers import CONFIG_MAPPING
from transformers.models.auto import modeling_auto as auto

from lora_hf.core.formatting import table
from lora_hf.lora.architectures import ARCHITECTURES, Architecture
from tests.support.left_out import LEFT_OUT
from tests.support.small_models import SHAPES, UNKNOWN_SHAPES

# The classes of tests/support/model_classes.py, by the word of the table.
CLASSES = {
    "base": auto.MODEL_MAPPING_NAMES,
    "classes": auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "tokens": auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "answers": auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    "choice": auto.MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES,
    "text": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "seq2seq": auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "masked": auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
}


def model_types(_: Path) -> str:
    """For each model type its roles and fused projections, and the fast paths."""
    rows = [
        [
            f"`{kind}`",
            ", ".join(entry.projections),
            _fused(entry),
            f"no: {entry.padded_because}" if entry.padded_because else "yes",
            "yes" if entry.plain_logits else "no" if kind in CLASSES["text"] else "-",
        ]
        for kind, entry in sorted(ARCHITECTURES.items())
        if kind in CONFIG_MAPPING
    ]
    head = ["model type", "roles", "fused", "runs without padding", "logits at labels only"]
    return table(head, rows, text_columns=5)


def model_classes(_: Path) -> str:
    """Which classes of each model type the tests adapt, and what is left out of them."""
    notes = [(f"({index})", each) for index, each in enumerate(LEFT_OUT, 1)]
    rows = []
    for kind in sorted(SHAPES | UNKNOWN_SHAPES):
        marks = [number for number, each in notes if kind in each.model_types]
        cells = [" ".join(["yes", *marks]) if kind in mapping else "-" for mapping in CLASSES.values()]
        rows.append([f"`{kind}`", *cells])
    reasons = [
        [number, ", ".join(f"`{kind}`" for kind in each.model_types), each.writer, each.setting, each.reason]
        for number, each in notes
    ]
    matrix = table(["model type", *CLASSES], rows, text_columns=1 + len(CLASSES))
    return matrix + "\n\n" + table(["", "model types", "written by", "setting", "reason"], reasons, text_columns=5)


def _fused(entry: Architecture) -> str:
    return ", ".join(role for role, projection in entry.projections.items() if projection.columns) or "-"
