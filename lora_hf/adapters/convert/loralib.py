"""Checkpoints of loralib (microsoft/LoRA): loaded onto a lora_hf model, and written for a model built with loralib.

A loralib checkpoint holds `<path>.lora_A`, `<path>.lora_B` and whatever else the script saved, usually the task head.
It records neither `lora_alpha` nor which slices of a fused projection (`lora.MergedLinear`) are adapted, so the caller
passes both. The tensors are the same as here: for n adapted slices `lora_A` is `(n * r, in)` and `lora_B`
`(n * width, r)`. Source: loralib 0.1.2, layers.py, `MergedLinear.merge_AB` and `zero_pad`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lora_hf.adapters.convert.checkpoint import lora_paths, read_loralib, write_loralib
from lora_hf.adapters.fit import check_shapes
from lora_hf.core.errors import AdapterError
from lora_hf.lora.heads import head_paths
from lora_hf.lora.inject import (
    adapter_heads,
    adapter_names,
    add_weights,
    inject_head,
    lora_layers,
    prepare_for_adapter,
    set_adapter,
)
from lora_hf.lora.layers import LoraLinear, LoraWeights, linear_shape
from lora_hf.lora.modules_to_save import ModulesToSaveWrapper
from lora_hf.lora.target_modules import projections


@dataclass(frozen=True)
class LoralibLayer:
    """The constructor arguments of a loralib layer: `lora.MergedLinear`, or `lora.Linear` without `enable_lora`."""

    in_features: int
    out_features: int
    r: int
    lora_alpha: float
    enable_lora: tuple[bool, ...] = ()
    fan_in_fan_out: bool = False

    def __str__(self) -> str:
        words = [str(self.in_features), str(self.out_features), f"r={self.r}", f"lora_alpha={self.lora_alpha:g}"]
        words += [f"enable_lora={list(self.enable_lora)}"] if self.enable_lora else []
        words += ["fan_in_fan_out=True"] if self.fan_in_fan_out else []
        return f"lora.{'MergedLinear' if self.enable_lora else 'Linear'}({', '.join(words)})"


def load_loralib(
    model: PreTrainedModel,
    file: str | Path,
    lora_alpha: float,
    enable_lora: Sequence[bool] | None = None,
    name: str = "default",
    partial: bool = False,
) -> PreTrainedModel:
    """Adds a loralib checkpoint to a plain or already adapted model as adapter `name`, and activates it.

    Args:
        lora_alpha: the alpha of the loralib layers.
        enable_lora: that of its `lora.MergedLinear` layers, if it has any.
        partial: accept a file without a head, or with some of the layers only; the head is then a copy of the model's.

    Raises:
        AdapterError: the file is no readable loralib checkpoint or does not fit this model. The model is unchanged.
    """
    prepare_for_adapter(model, name)
    tensors = _with_model_paths(model, read_loralib(file))
    layers = _read_layers(model, tensors, lora_alpha, enable_lora, str(file))
    adapter_tensors = _without_base(model, tensors, str(file))
    check_shapes(_expected_shapes(model, tensors, layers, partial), adapter_tensors, str(file))
    for path, layer in layers.items():
        weights = add_weights(model, path, name, _slices(layer), layer.r, lora_alpha)
        with torch.no_grad():
            weights.lora_A.copy_(tensors[f"{path}.lora_A"])
            weights.lora_B.copy_(tensors[f"{path}.lora_B"])
    inject_head(model, name)
    for path, head in adapter_heads(model).items():
        state = {key.removeprefix(f"{path}."): tensors[key] for key in tensors if key.startswith(f"{path}.")}
        if state:
            head.modules_to_save[name].load_state_dict(state)
    return set_adapter(model, name)


def loralib_state_dict(model: PreTrainedModel, name: str = "default") -> dict[str, torch.Tensor]:
    """Adapter `name` and its head, to be loaded with `strict=False` into a model with the layers of `loralib_layers`.

    Raises:
        AdapterError: as `loralib_layers`.
    """
    tensors, layers = {}, lora_layers(model)
    for path in loralib_layers(model, name):
        weights = layers[path].adapters[name]
        tensors |= {f"{path}.lora_A": weights.lora_A.detach(), f"{path}.lora_B": weights.lora_B.detach()}
    for path, head in adapter_heads(model).items():
        if name in head.modules_to_save:
            tensors |= {f"{path}.{key}": value for key, value in head.modules_to_save[name].state_dict().items()}
    return tensors


def loralib_layers(model: PreTrainedModel, name: str = "default") -> dict[str, LoralibLayer]:
    """The loralib layers that compute the same as adapter `name`, by module path.

    Raises:
        AdapterError: no such adapter, or one without a loralib counterpart: a variant of LoRA, a scaling other than
            lora_alpha / r, or slices that are not equal shares of the projection.
    """
    layers = {path: layer for path, layer in lora_layers(model).items() if name in layer.adapters}
    if not layers:
        raise AdapterError(
            f"no adapter {name!r} with LoRA on this model; it has: {', '.join(adapter_names(model)) or 'none'}"
        )
    return {path: _to_loralib(path, layer, name) for path, layer in layers.items()}


def save_loralib(model: PreTrainedModel, file: str | Path, name: str = "default") -> Path:
    """Writes `loralib_state_dict` to a file for `torch.load`.

    Raises:
        AdapterError: as `loralib_layers`; also a file that cannot be written.
    """
    write_loralib(Path(file), loralib_state_dict(model, name))
    return Path(file)


def num_labels(tensors: Mapping[str, torch.Tensor]) -> int | None:
    """The number of labels of the classification head among the tensors, or None without such a head."""
    for key in ("classifier.out_proj.weight", "classifier.weight", "score.weight"):
        if key in tensors and tensors[key].dim() == 2:
            return tensors[key].shape[0]
    return None


def _with_model_paths(model: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors by their names in this model: that of a bare base model lacks `roberta.` or `transformer.`."""
    modules, prefix = dict(model.named_modules()), f"{model.base_model_prefix}."

    def full_name(key: str) -> str:
        path = key.rpartition(".")[0]
        return prefix + key if path not in modules and prefix + path in modules else key

    return {full_name(key): tensor for key, tensor in tensors.items()}


def _read_layers(
    model: PreTrainedModel,
    tensors: Mapping[str, torch.Tensor],
    lora_alpha: float,
    enable_lora: Sequence[bool] | None,
    source: str,
) -> dict[str, LoralibLayer]:
    """The layers in the file, by their paths in this model."""
    known, modules = projections(model), dict(model.named_modules())
    layers = {}
    for path in lora_paths(tensors):
        if path not in known:
            found = "no such module"
            if path in modules:
                kind = type(modules[path]).__name__
                found = f"{kind}; lora_hf has no counterpart of loralib's Embedding and Conv layers"
            raise AdapterError(f"{source}: {path}.lora_A: expected an nn.Linear or Conv1D of the model, found {found}")
        layers[path] = _read_layer(path, known[path], tensors, lora_alpha, enable_lora, source)
    if enable_lora and not any(layer.enable_lora for layer in layers.values()):
        raise AdapterError(
            f"{source}: enable_lora is given, but no layer in the file is a lora.MergedLinear: leave it out"
        )
    return layers


def _read_layer(
    path: str,
    projection: nn.Module,
    tensors: Mapping[str, torch.Tensor],
    lora_alpha: float,
    enable_lora: Sequence[bool] | None,
    source: str,
) -> LoralibLayer:
    """The layer that the shapes of A and B imply. `check_shapes` later reports shapes that contradict it."""
    in_features, out_features = linear_shape(projection)
    missing = torch.empty(0, 0)
    a, b = (tensors.get(f"{path}.lora_{part}", missing) for part in "AB")
    shapes = f"lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)}"
    r = (b.shape[1] or a.shape[0]) if a.dim() == b.dim() == 2 else 0
    if r == 0:
        raise AdapterError(f"{source}: {path}: expected two matrices of one rank, found {shapes}")
    plain = LoralibLayer(in_features, out_features, r, lora_alpha, (), isinstance(projection, Conv1D))
    if (a.shape[0], b.shape[0]) == (r, out_features) or a is missing or b is missing:
        return plain
    if enable_lora is not None:
        if not any(enable_lora) or out_features % len(enable_lora):
            raise AdapterError(
                f"{source}: {path}: expected an enable_lora with a True, of a length that divides {out_features}, "
                f"found {list(enable_lora)}"
            )
        return replace(plain, enable_lora=tuple(enable_lora))
    count, rest = divmod(a.shape[0], r)
    width = b.shape[0] // count if count else 0
    if not rest and width and not b.shape[0] % count and not out_features % width:
        raise AdapterError(
            f"{source}: {path}: {shapes} are those of a lora.MergedLinear that adapts {count} of "
            f"{out_features // width} slices, but the file does not record which: pass its enable_lora (in the paper's "
            "GPT-2 [True, False, True]: q and v)"
        )
    return plain


def _expected_shapes(
    model: PreTrainedModel, tensors: Mapping[str, torch.Tensor], layers: Mapping[str, LoralibLayer], partial: bool
) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors that the file must hold."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path, layer in (layers if partial else _in_all_layers(layers, projections(model))).items():
        slices = _slices(layer)
        width = slices[0][1] - slices[0][0]
        shapes[f"{path}.lora_A"] = (len(slices) * layer.r, layer.in_features)
        shapes[f"{path}.lora_B"] = (len(slices) * width, layer.r)
    heads = {}
    for path in head_paths(model):
        head = model.get_submodule(path)
        plain: nn.Module = head.original_module if isinstance(head, ModulesToSaveWrapper) else head
        heads |= {f"{path}.{key}": tuple(value.shape) for key, value in plain.state_dict().items()}
    return shapes if partial and not heads.keys() & tensors.keys() else shapes | heads


def _in_all_layers(layers: Mapping[str, LoralibLayer], all_paths: Iterable[str]) -> dict[str, LoralibLayer]:
    """`layers`, extended to the same projection in every layer of the model.

    All shapes of a checkpoint fit a model with more layers of the same width; only the missing layers reveal it.
    """
    kinds = {_kind(path): layer for path, layer in layers.items()}
    return {path: layers.get(path) or kinds[_kind(path)] for path in all_paths if _kind(path) in kinds}


def _kind(path: str) -> str:
    return re.sub(r"\.\d+(?=\.)", ".*", path)


def _slices(layer: LoralibLayer) -> list[tuple[int, int]]:
    width = layer.out_features // (len(layer.enable_lora) or 1)
    return [(i * width, (i + 1) * width) for i, enabled in enumerate(layer.enable_lora or (True,)) if enabled]


def _to_loralib(path: str, layer: LoraLinear, name: str) -> LoralibLayer:
    weights = layer.adapters[name]
    if type(weights) is not LoraWeights or weights.scaling != weights.lora_alpha / weights.r:
        raise AdapterError(
            f"adapter {name!r}: {path} holds {type(weights).__name__}, scaled by {weights.scaling:g}: loralib "
            "supports only plain LoRA, scaled by lora_alpha / r"
        )
    out_features, width = layer.out_features, weights.slices[0][1] - weights.slices[0][0]
    transposed = isinstance(layer.base_layer, Conv1D)
    plain = LoralibLayer(layer.in_features, out_features, weights.r, weights.lora_alpha, (), transposed)
    if weights.slices == [(0, out_features)]:
        return plain
    enabled = tuple((start, start + width) in weights.slices for start in range(0, out_features, width))
    fused = replace(plain, enable_lora=enabled)
    if out_features % width or _slices(fused) != weights.slices:
        raise AdapterError(
            f"adapter {name!r}: {path} adapts the columns {weights.slices} of {out_features}: loralib's MergedLinear "
            "supports only equal shares in ascending order"
        )
    return fused


def _without_base(model: PreTrainedModel, tensors: Mapping[str, torch.Tensor], source: str) -> dict[str, torch.Tensor]:
    """`tensors` without copies of the base's own; raises AdapterError if one of them differs from the base."""
    base = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    base = {name.replace(".base_layer.", "."): tensor for name, tensor in base.items()}
    heads = tuple(f"{path}." for path in head_paths(model))
    copies = {key: tensor for key, tensor in tensors.items() if key in base and not key.startswith(heads)}
    changed = [key for key, tensor in copies.items() if not torch.equal(base[key].to("cpu", tensor.dtype), tensor)]
    if changed:
        raise AdapterError(
            f"{source}: {len(changed)} tensors of the base differ from this model ({', '.join(changed[:3])}). Either "
            "the base is another one, or its biases were trained (an adapter holds A, B and the head), or the "
            "checkpoint was saved after eval(), where loralib merges"
        )
    return {key: tensor for key, tensor in tensors.items() if key not in copies}
