"""Every auto class of transformers over small models: inputs, a little training, and loading in a new process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

from lora_hf.adapters.save_load import load_adapter
from tests.support.small_models import token_ids

AUTO_CLASSES = (
    "AutoModel",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
    "AutoModelForMultipleChoice",
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForMaskedLM",
)


def has_class(kind: str, auto: str) -> bool:
    """Whether transformers has this class for the model type."""
    return transformers.CONFIG_MAPPING[kind] in getattr(transformers, auto)._model_mapping


def from_base(auto: str, base: Path, seed: int) -> PreTrainedModel:
    """The class on the weights of a bare base; the seed draws its head."""
    torch.manual_seed(seed)
    options = {"is_decoder": True} if auto == "AutoModelForCausalLM" else {}
    config = transformers.AutoConfig.from_pretrained(base)
    if config.is_encoder_decoder or not hasattr(config, "is_decoder"):
        options = {}
    return getattr(transformers, auto).from_pretrained(base, **options).eval()


def inputs_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """A batch that every class of the model's type takes, without labels."""
    ids = token_ids(rows=4)
    if model.config.is_encoder_decoder:
        ids[:, -1] = model.config.eos_token_id  # their classifiers read the last token of this id
    if type(model).__name__.endswith("ForMultipleChoice"):
        ids = ids.view(2, 2, -1)
    config: PretrainedConfig = model.config
    needs_decoder = config.is_encoder_decoder and type(model).__name__.endswith(
        ("Model", "ForConditionalGeneration", "MTModel")
    )
    if not needs_decoder:
        return {"input_ids": ids}
    return {"input_ids": ids, "decoder_input_ids": ids[:, :5].contiguous()}


def outputs_of(model: PreTrainedModel) -> torch.Tensor:
    """All outputs of the model that depend on its inputs, in one tensor."""
    output: Any = model(**inputs_of(model))
    names = ("logits", "start_logits", "end_logits", "last_hidden_state", "pooler_output")
    found = [output[name].flatten() for name in names if output.get(name) is not None]
    return torch.cat(found)


def train(model: PreTrainedModel, steps: int = 2) -> None:
    """Moves everything that is trainable."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.5)
    generator = torch.Generator().manual_seed(3)
    for _ in range(steps):
        outputs = outputs_of(model)
        (outputs * torch.randn(outputs.shape, generator=generator)).mean().backward()
        for parameter in trained:  # a part that the outputs do not reach would stay as it is
            noise = torch.randn(parameter.shape, generator=generator).to(parameter) * 0.02
            parameter.grad = noise if parameter.grad is None else parameter.grad + noise
        optimizer.step()
        optimizer.zero_grad()


def reload(folder: Path) -> None:
    """Loads every adapter under `folder` onto a fresh base with another head, and writes what it computes."""
    transformers.logging.set_verbosity_error()
    for adapter in sorted(folder.glob("*/*/adapter_config.json")):
        kind, auto = adapter.parts[-3:-1]
        try:
            model = load_adapter(from_base(auto, folder / kind / "base", seed=99), adapter.parent)
            with torch.no_grad():
                torch.save(outputs_of(model), adapter.parent / "reloaded.pt")
        except Exception as error:  # noqa: BLE001 - the test shows it
            (adapter.parent / "error.txt").write_text(f"{type(error).__name__}: {error}")
