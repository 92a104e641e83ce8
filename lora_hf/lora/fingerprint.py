"""Tells whether an adapter meets the base it was trained on: a hash for the same precision, samples for another.

An adapter on other weights of the same shape loads without complaint and answers nonsense; this is what notices.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from transformers import PreTrainedModel

from lora_hf.core.errors import AdapterError
from lora_hf.lora.layers import LoraLinear, LoraWeights
from lora_hf.lora.quantization import Packed, QuantisedLinear
from lora_hf.lora.variants.biases import Bias

SAMPLES = 4
# A base held in another precision differs by one rounding: bf16 keeps 8 bits (2^-8 relative), fp16 has 2^-24 as its
# smallest step. Other weights differ by about their own size.
RELATIVE, ABSOLUTE = 2.0**-7, 2.0**-23
BEFORE = "before_quantising"  # the attribute of a model that holds its fingerprint from then


def fingerprint(model: PreTrainedModel) -> dict[str, Any]:
    """Hash, precision and `SAMPLES` evenly spaced values of each tensor of the base model, without LoRA and head.

    A base that was quantised has the fingerprint that it had before, as long as its packed weights are the ones then
    made: adapters trained on either find the other.
    """
    before = getattr(model, BEFORE, None)
    if before is not None and before["packed"] == _digest_packed(model):
        return dict(before["fingerprint"])
    digest = hashlib.sha256()
    samples: dict[str, list[float]] = {}
    tensors = base_tensors(model)
    for name, tensor in tensors.items():
        flat = tensor.detach().reshape(-1)
        digest.update(name.encode())
        digest.update(_bytes(flat))
        places = torch.linspace(0, flat.numel() - 1, min(SAMPLES, flat.numel()), dtype=torch.float64).long()
        samples[name] = flat[places.to(flat.device)].to(torch.float32).tolist()
    first = next(iter(tensors.values()))
    return {
        "sha256": digest.hexdigest(),
        "dtype": str(first.dtype).removeprefix("torch."),
        "tensors": len(samples),
        "samples": _packed(samples),
    }


def store_fingerprint(model: PreTrainedModel, before: dict[str, Any]) -> None:
    """Keeps the fingerprint that a model had before its weights were packed as they are now."""
    setattr(model, BEFORE, {"fingerprint": before, "packed": _digest_packed(model)})


def check_base(model: PreTrainedModel, recorded: dict[str, Any], adapter: str) -> None:
    """Raises AdapterError where the model's base weights are not the recorded ones."""
    found = fingerprint(model)
    if found["dtype"] == recorded["dtype"]:
        same = found["sha256"] == recorded["sha256"]
    else:
        same = found["tensors"] == recorded["tensors"] and _close(found["samples"], recorded["samples"])
    if not same:
        raise AdapterError(
            f"{adapter} was trained on another base: expected weights {recorded['sha256'][:12]} "
            f"({recorded['tensors']} tensors, {recorded['dtype']}), found {found['sha256'][:12]} "
            f"({found['tensors']} tensors, {found['dtype']}). Load the base model that its adapter_config.json names"
        )


def base_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The parameters of the base model by their names in the plain model, sorted; as they were before any merge."""
    tensors: dict[str, torch.Tensor] = {}
    for path, module in model.base_model.named_modules():
        if isinstance(module, (LoraWeights, Bias)) or ".modules_to_save." in path:
            continue
        for name, parameter in module.named_parameters(path, recurse=False):
            tensors[name.replace(".base_layer.", ".").replace(".original_module.", ".")] = parameter
    for path, module in model.base_model.named_modules():
        if isinstance(module, LoraLinear) and module.unmerged_weight is not None:
            tensors[f"{path}.weight"] = module.unmerged_weight
        if isinstance(module, LoraLinear) and module.unmerged_bias is not None:
            tensors[f"{path}.bias"] = module.unmerged_bias
    return dict(sorted((tensors | _packed_tensors(model)).items()))


def _packed_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """What holds the quantised weights, by its name in the plain model; as before any merge."""
    held: dict[str, Packed] = {}
    for path, module in model.base_model.named_modules():
        if isinstance(module, QuantisedLinear):
            held[path.removesuffix(".base_layer")] = module.packed()
    for path, module in model.base_model.named_modules():
        if isinstance(module, LoraLinear) and module.unmerged_packed is not None:
            held[path] = module.unmerged_packed
    return {f"{path}.{name}": tensor for path, packed in held.items() for name, tensor in packed.items()}


def _digest_packed(model: PreTrainedModel) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(_packed_tensors(model).items()):
        digest.update(name.encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.detach().reshape(-1).cpu().contiguous().view(torch.uint8).numpy().data


def _packed(samples: dict[str, list[float]]) -> str:
    # bf16 as hexadecimal, in the order of the sorted names: 800 tensors take 13 KB.
    values = torch.tensor([value for row in samples.values() for value in row], dtype=torch.float32)
    return values.to(torch.bfloat16).view(torch.uint8).numpy().tobytes().hex()


def _close(found: str, recorded: str) -> bool:
    if len(found) != len(recorded):
        return False
    a, b = (
        torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8).view(torch.bfloat16).float()
        for text in (found, recorded)
    )
    return torch.allclose(a, b, rtol=RELATIVE, atol=ABSOLUTE)
