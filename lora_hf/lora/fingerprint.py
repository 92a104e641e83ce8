"""The fingerprint of a base model: it shows whether an adapter was trained on these weights.

Without it, an adapter would load onto other weights of the same shape and silently give wrong answers. The fingerprint
consists of a hash, to compare bases of the same precision; random projections of whole tensors, to compare bases of
different precisions; and the config settings that change what the weights compute.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lora_hf.core.errors import AdapterError, ModelError
from lora_hf.lora.heads import base_prefix, new_parameters
from lora_hf.lora.layers import LoraWeights
from lora_hf.lora.quantization import QuantisedLinear, is_torchao
from lora_hf.lora.variants.biases import Bias
from lora_hf.lora.variants.tokens import TokenRows

SAMPLES = 4
# A base in another precision differs by one rounding: bf16 keeps 8 bits (2^-8 relative), fp16 has 2^-24 as its smallest
# step. Other weights differ by about their own size.
RELATIVE, ABSOLUTE = 2.0**-7, 2.0**-23
BLOCK = 4096  # numbers that share the sign of a block in a projection
# Rounding n numbers to bf16 moves a projection by about 2^-9 / sqrt(3) of the tensor's norm; another order or other
# numbers move it by about the norm itself.
PROJECTION_TOLERANCE = 2.0**-5

# Settings that change what the same weights compute, over all model types.
SETTINGS = (
    *("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "hidden_activation"),
    *("activation_function", "layer_norm_eps", "layer_norm_epsilon", "rms_norm_eps", "norm_eps", "rope_theta"),
    *("rope_parameters", "rotary_pct", "rotary_dim", "partial_rotary_factor", "sliding_window"),
    *("layer_types", "local_attention", "attn_logit_softcapping", "final_logit_softcapping", "alibi"),
    *("query_pre_attn_scalar", "attention_multiplier", "residual_multiplier", "embedding_multiplier"),
    *("logits_scaling", "logit_scale", "scale_attn_weights", "relative_attention_num_buckets", "multi_query"),
    *("new_decoder_architecture", "parallel_attn", "use_parallel_residual"),
)
STORED = "lora_hf_stored_fingerprint"  # the attribute of a model that `store_fingerprint` sets

# What was computed from the tensors of each model, and their `_state` then. Copied and pickled models are not in it.
_computed: WeakKeyDictionary[nn.Module, dict[Callable[..., Any], tuple[Any, Any]]] = WeakKeyDictionary()


def fingerprint(model: PreTrainedModel) -> dict[str, Any]:
    """Hash, precision and `SAMPLES` evenly spaced values of each tensor of the base model, without LoRA and head.

    The base is hashed again only if one of its tensors has changed. A quantized base keeps the fingerprint that
    `store_fingerprint` stored, as long as its packed weights stay the same. Adapters therefore fit both forms.

    Raises:
        ModelError: a weight is NaN or infinite.
    """
    stored = getattr(model, STORED, None)
    if stored is not None and stored["packed"] == _once(model, _digest, _packed_tensors(model)):
        return stored["fingerprint"] | {"settings": _settings(model)}
    return _once(model, _fingerprint, base_tensors(model)) | {"settings": _settings(model)}


def store_fingerprint(model: PreTrainedModel, before: dict[str, Any]) -> None:
    """Stores the fingerprint of the model before its weights are packed or sharded."""
    setattr(model, STORED, {"fingerprint": before, "packed": _once(model, _digest, _packed_tensors(model))})


def check_base(model: PreTrainedModel, recorded: dict[str, Any], adapter: str) -> None:
    """Raises AdapterError if the model's base weights are not the recorded ones."""
    current = fingerprint(model)
    other = {
        name: (value, current["settings"][name])
        for name, value in recorded.get("settings", {}).items()
        if current["settings"].get(name, value) != value
    }
    if other:
        name, (expected, found) = next(iter(other.items()))
        raise AdapterError(
            f"{adapter} was trained on another base: expected {name}={expected!r} in its config, found {found!r}. Load "
            "the base that its adapter_config.json names"
        )
    if current["dtype"] == recorded["dtype"]:
        same = current["sha256"] == recorded["sha256"]
    else:
        same = current["tensors"] == recorded["tensors"] and _close(current, recorded)
    if not same:
        raise AdapterError(
            f"{adapter} was trained on another base: expected weights {recorded['sha256'][:12]} "
            f"({recorded['tensors']} tensors, {recorded['dtype']}), found {current['sha256'][:12]} "
            f"({current['tensors']} tensors, {current['dtype']}). Load the base that its adapter_config.json names"
        )


def base_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """The parameters of the base model by their names in the plain model, sorted.

    Parameters that no checkpoint filled are left out: they differ in each process, and the adapter has its own copy.
    """
    tensors, new = _packed_tensors(model), new_parameters(model) or frozenset()
    prefix = base_prefix(model)
    for path, module in model.base_model.named_modules():
        if isinstance(module, (LoraWeights, Bias, TokenRows)) or ".modules_to_save." in path:
            continue
        for name, parameter in module.named_parameters(path, recurse=False):
            name = name.replace(".base_layer.", ".").replace(".original_module.", ".")
            if f"{prefix}{name}" not in new:
                for part, tensor in _parts(name, parameter):
                    tensors.setdefault(part, tensor)
    return dict(sorted(tensors.items()))


def _parts(name: str, tensor: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensor by its name; the plain tensors within one of torchao, which cannot be read as numbers."""
    if not is_torchao(tensor):
        yield name, tensor
        return
    for part in tensor.__tensor_flatten__()[0]:
        yield from _parts(f"{name}.{part}", getattr(tensor, part))


def _packed_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """The tensors of quantized weights by their names in the plain model, sorted."""
    named = {
        f"{path.removesuffix('.base_layer')}.{name}": tensor
        for path, module in model.base_model.named_modules()
        if isinstance(module, QuantisedLinear)
        for name, tensor in module.packed().items()
    }
    return dict(sorted(named.items()))


def _once(model: nn.Module, compute: Callable[[dict[str, Tensor]], Any], tensors: dict[str, Tensor]) -> Any:
    """`compute(tensors)`, or its last result for this model if no tensor has changed since."""
    results, state = _computed.setdefault(model, {}), _state(tensors)
    if compute not in results or results[compute][0] != state:
        results[compute] = (state, compute(tensors))
    return results[compute][1]


def _state(tensors: Mapping[str, Tensor]) -> list[tuple[Any, ...]]:
    """What changes when a tensor does.

    The version counter alone would miss writes through `tensor.data` and another tensor at the same address, so a
    checksum is part of it. It reads the weights ten times faster than the hash does.

    Raises:
        ModelError: a tensor is on the meta device.
    """
    if unloaded := next((name for name, tensor in tensors.items() if tensor.is_meta), None):
        raise ModelError(
            f"{unloaded} is on the meta device, which holds no numbers: expected a base whose weights are in memory; "
            "load it with from_pretrained, without offloading to disk"
        )
    return [
        (name, tensor.data_ptr(), None if tensor.is_inference() else tensor._version, tensor.dtype, _checksum(tensor))
        for name, tensor in tensors.items()
    ]


def _checksum(tensor: Tensor) -> int:
    data = tensor.detach().reshape(-1).view(torch.uint8)
    if data.storage_offset() % 8:
        data = data.clone()
    aligned = len(data) // 8 * 8
    return int(data[:aligned].view(torch.int64).sum() + data[aligned:].sum())


def _fingerprint(tensors: dict[str, Tensor]) -> dict[str, Any]:
    samples: list[float] = []
    for tensor in tensors.values():
        flat = tensor.detach().reshape(-1)
        positions = torch.linspace(0, flat.numel() - 1, min(SAMPLES, flat.numel()), dtype=torch.float64).long()
        samples += flat[positions.to(flat.device)].to(torch.float32).tolist()
    # As hexadecimal bf16, 800 tensors take 13 KB.
    packed = torch.tensor(samples, dtype=torch.float32).to(torch.bfloat16).view(torch.uint8).numpy().tobytes().hex()
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    projections = [_project(tensor) for tensor in tensors.values()]
    for name, pair in zip(tensors, projections, strict=True):
        if not all(map(math.isfinite, pair)):
            raise ModelError(
                f"{name} of the base holds NaN or infinity in {dtype}, so no adapter can be matched to it. "
                "Download the base again, or load it in fp32"
            )
    return {
        "sha256": _digest(tensors),
        "dtype": dtype,
        "tensors": len(tensors),
        "samples": packed,
        "projections": [[f"{number:.6g}" for number in pair] for pair in projections],
    }


def _settings(model: PreTrainedModel) -> dict[str, Any]:
    config = model.config.get_text_config()
    values = {name: getattr(config, name, None) for name in SETTINGS}
    return {name: json.loads(json.dumps(value)) for name, value in values.items() if value is not None}


def _project(tensor: Tensor) -> tuple[float, float]:
    """The sum of all numbers with fixed random signs, and the norm of the tensor.

    The signs are those of a block times those within each block: a matrix product, not a random number for each.
    """
    flat = tensor.detach().reshape(-1).float()
    whole = len(flat) // BLOCK
    blocks, rest = flat[: whole * BLOCK].view(whole, BLOCK), flat[whole * BLOCK :]
    within, between = _signs(whole + 1)
    within = within.to(flat.device)
    sums = torch.cat([blocks @ within, (rest @ within[: len(rest)]).reshape(1)])
    norms = torch.cat([torch.linalg.vector_norm(part, dim=-1).reshape(-1) for part in (blocks, rest)])
    norm = float(norms.cpu().double().norm())
    if not math.isfinite(norm):  # in fp32, the squares of huge numbers are not
        norm = float(flat.cpu().double().norm())
    return float(sums.cpu().double() @ between), norm


@lru_cache(maxsize=32)
def _signs(blocks: int) -> tuple[Tensor, Tensor]:
    """The signs within each block, as fp32, and those of the blocks, as fp64."""
    generator = torch.Generator().manual_seed(0)
    within = torch.randint(0, 2, (BLOCK,), generator=generator).float() * 2 - 1
    between = torch.randint(0, 2, (blocks,), generator=generator).double() * 2 - 1
    return within, between


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(name.encode())
        digest.update(tensor.detach().reshape(-1).cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _close(current: Mapping[str, Any], recorded: Mapping[str, Any]) -> bool:
    """Whether two fingerprints are those of the same weights in different precisions."""
    samples = [bytearray.fromhex(each["samples"]) for each in (current, recorded)]
    if len(samples[0]) != len(samples[1]):
        return False
    a, b = (torch.frombuffer(each, dtype=torch.uint8).view(torch.bfloat16).float() for each in samples)
    if not torch.allclose(a, b, rtol=RELATIVE, atol=ABSOLUTE):
        return False
    pairs = zip(current["projections"], recorded.get("projections", current["projections"]), strict=False)
    return all(
        abs(float(here[0]) - float(there[0])) <= PROJECTION_TOLERANCE * max(float(here[1]), ABSOLUTE)
        for here, there in pairs
    )
