"""The table of model types: what the role table and transformers say of each."""

from __future__ import annotations

from pathlib import Path

from transformers import CONFIG_MAPPING
from transformers.models.auto import modeling_auto as auto

from lora_hf.core.formatting import table
from lora_hf.lora.architectures import ARCHITECTURES, Architecture

# The classes of tests/adapters/test_model_classes.py besides the bare base, by the word of the table.
CLASSES = {
    "classes": auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "tokens": auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "answers": auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    "choice": auto.MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES,
    "text": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "seq2seq": auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "masked": auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
}


def model_types(_: Path) -> str:
    """For each model type its roles and fused projections, the fast paths, and the classes that tests adapt."""
    rows = [
        [
            f"`{kind}`",
            ", ".join(entry.projections),
            _fused(entry),
            f"no: {entry.padded_because}" if entry.padded_because else "yes",
            "yes" if entry.plain_logits else "no" if kind in CLASSES["text"] else "-",
            ", ".join(["base", *(word for word, mapping in CLASSES.items() if kind in mapping)]),
        ]
        for kind, entry in sorted(ARCHITECTURES.items())
        if kind in CONFIG_MAPPING
    ]
    head = ["model type", "roles", "fused", "runs without padding", "logits at labels only", "classes tested"]
    return table(head, rows, text_columns=6)


def _fused(entry: Architecture) -> str:
    return ", ".join(role for role, projection in entry.projections.items() if projection.columns) or "-"
