"""What `info --model` shows: the modules of a model that a config would adapt, without its weights."""

from __future__ import annotations

from typing import Any

from lora_hf.core.config.schema import LoraConfig, ModelConfig
from lora_hf.core.formatting import table


def describe_model(name: str, targets: tuple[str, ...], r: int) -> dict[str, Any]:
    """The model type, whether the role table has it, and for each kind of module its role, number and shape.

    Raises:
        ModelError, HubError: there is no such model.
        ConfigError: a target that matches nothing.
    """
    import torch
    from transformers import AutoModel

    from lora_hf.lora.architectures import ARCHITECTURES
    from lora_hf.lora.layers import linear_shape
    from lora_hf.lora.slices import slice_width
    from lora_hf.lora.target_modules import plan, with_stars
    from lora_hf.models.load import read_config

    config = read_config(ModelConfig(name=name), {})
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for site in plan(model, LoraConfig(r=r, targets=targets)):
        inputs, outputs = linear_shape(model.get_submodule(site.path))
        outputs = slice_width(site.slice) if site.slice else outputs
        row = {"modules": 0, "inputs": inputs, "outputs": outputs, "parameters": 0, "fused": site.slice is not None}
        row = rows.setdefault((with_stars(site.path), site.role), row)
        row["modules"] += 1
        row["parameters"] += r * (inputs + outputs)
    return {
        "model": name,
        "model_type": config.model_type,
        "known": config.model_type in ARCHITECTURES,
        "r": r,
        "sites": [{"path": path, "role": role, **row} for (path, role), row in rows.items()],
        "parameters": sum(row["parameters"] for row in rows.values()),
    }


def format_model(model: dict[str, Any]) -> str:
    """`describe_model` for a terminal."""
    sites = model["sites"]
    source = "in the role table" if model["known"] else "not in the role table: roles are guessed from names"
    head = ["module", "role", "modules", "inputs", "outputs", "parameters"]
    rows = [
        [site["path"] + (" (a part)" if site["fused"] else ""), site["role"]]
        + [f"{site[key]:,}" for key in ("modules", "inputs", "outputs", "parameters")]
        for site in sites
    ]
    lines = [f"{model['model']}: model type {model['model_type']}, {source}", "", table(head, rows, text_columns=2)]
    return "\n".join([*lines, "", f"LoRA parameters at r={model['r']}: {model['parameters']:,}, without the head"])
