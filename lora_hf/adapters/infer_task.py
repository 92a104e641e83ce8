"""The task of an adapter that records none, as PEFT's adapters do: inferred from its task_type, its head and its base.

Needs torch only for the config or the tokenizer of the base.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from lora_hf.adapters.format import WEIGHTS_FILE, AdapterMetadata
from lora_hf.core.config.schema import ModelConfig, TaskConfig
from lora_hf.core.records import RUN_CONFIG_FILE
from lora_hf.data.tasks.base import ModelKind, Task
from lora_hf.data.tasks.custom import custom_task
from lora_hf.data.tasks.generation import TextToText
from lora_hf.data.tasks.sources import NoSource
from lora_hf.data.tasks.tokens import check_tokens_config
from lora_hf.data.tasks.user_texts import encode_texts
from lora_hf.data.tasks.words import OUTSIDE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

UNRECORDED = "unrecorded"  # the name of such a task

# The class of the model by PEFT's task_type.
MODEL_KINDS: dict[str, ModelKind] = {
    "SEQ_CLS": "sequence-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "SEQ_2_SEQ_LM": "seq2seq-lm",
    "CAUSAL_LM": "causal-lm",
}
# transformers' class for the base by PEFT's task_type: names, because a model card needs no torch.
AUTO_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "FEATURE_EXTRACTION": "AutoModel",
}


@dataclass(frozen=True, kw_only=True)
class PlainText(TextToText):
    """Continues a text; nothing is put around it but what the tokenizer adds to every text."""

    def prompt_tokens(self, contexts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
        encoded: Any = encode_texts(tokenizer, list(contexts), verbose=False)
        return encoded["input_ids"]


def plain_text() -> Task:
    return PlainText(name=UNRECORDED, source=NoSource(), text_columns=("prompt", "completion"), metric="e2e_nlg")


def auto_class(task_type: str | None) -> str | None:
    """The class in `AUTO_CLASSES`, None for another task_type; PEFT users often give a causal language model none."""
    return AUTO_CLASSES.get(task_type or "CAUSAL_LM")


def infer_task(config: Mapping[str, Any], metadata: AdapterMetadata, folder: Path, base: ModelConfig) -> Task | None:
    """The task of the adapter in `folder`, also in a line of the log; None for a head that no task has.

    Args:
        config: its adapter_config.json.

    Raises:
        ModelError, HubError: the config or the tokenizer of the base cannot be read.
    """
    task_type = config.get("task_type") or ""
    if task_type not in MODEL_KINDS:
        return None
    kind, labels = _kind_and_labels(task_type, metadata, folder, base)
    described = TaskConfig(UNRECORDED, kind=kind, label_names=labels or None)
    if kind == "tokens" and (OUTSIDE not in labels or check_tokens_config(described)):
        described = replace(described, metric="accuracy")  # the labels mark no spans
    logger.info(
        "%s records no task; inferred from its task_type %s, its head and its base: %s%s. If this is wrong, put a %s "
        "with a section 'task' into the folder of the adapter",
        folder, task_type, kind or "a text that the model continues",
        f" with the labels {', '.join(labels)}" if labels else "", RUN_CONFIG_FILE,
    )  # fmt: skip
    return plain_text() if kind is None else custom_task(described)


def _kind_and_labels(
    task_type: str, metadata: AdapterMetadata, folder: Path, base: ModelConfig
) -> tuple[Any, tuple[str, ...]]:
    """The kind of the task, None for `PlainText`, and its labels."""
    if task_type in ("QUESTION_ANS", "SEQ_2_SEQ_LM"):
        return {"QUESTION_ANS": "question_answering", "SEQ_2_SEQ_LM": "seq2seq"}[task_type], ()
    from lora_hf.models.load import load_tokenizer, read_config

    if task_type == "CAUSAL_LM":
        return "chat" if load_tokenizer(base).chat_template else None, ()
    config = read_config(base, {})
    own = tuple(name for _, name in sorted((config.id2label or {}).items()))
    count = metadata.num_labels or _head_width(folder) or len(own)
    names = metadata.labels or own
    if len(names) != count or len(set(names)) < count:
        names = tuple(f"LABEL_{index}" for index in range(count))
    if task_type == "TOKEN_CLS":
        return "tokens", names
    if "multi_label_classification" in (metadata.problem_type, config.problem_type):
        return "multi_label", names
    return ("classification", names) if count > 1 else ("regression", ())


def _head_width(folder: Path) -> int | None:
    """The outputs of the head in an adapter's file: it may have more layers, and its last one is the narrowest."""
    with safe_open(folder / WEIGHTS_FILE, framework="np") as file:
        keys = [key for key in file.keys() if key.endswith("weight") and ".lora_" not in key]  # noqa: SIM118
        shapes = [file.get_slice(key).get_shape() for key in keys]
    return min((shape[0] for shape in shapes if len(shape) == 2), default=None)
