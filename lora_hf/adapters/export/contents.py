"""What an export reads: A and B of each module, and whatever else the adapter trained. The base's weights stay unread.

Slices of a fused projection need no care: the file holds them as one LoRA with zeros outside the slices.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from lora_hf.adapters.fit import check_shapes
from lora_hf.adapters.format import WEIGHTS_FILE, AdapterFile, base_of, read_adapter
from lora_hf.adapters.infer_task import AUTO_CLASSES, auto_class
from lora_hf.adapters.peft_config import (
    PREFIX,
    TARGET_FIELDS,
    base_dependent_init,
    expected_shapes,
    factor_keys,
    read_layers,
)
from lora_hf.adapters.resolve import fetch_adapter, run_config
from lora_hf.core.config.schema import ModelConfig
from lora_hf.core.errors import AdapterError
from lora_hf.lora.target_modules import adaptable_modules
from lora_hf.lora.variants.tokens import FILE_KEY
from lora_hf.models.load import read_config

# What an adapter may hold besides A and B of projections.
DORA = "DoRA magnitudes"
BIASES = "trained biases"
TOKENS = "trained rows of single tokens"
EMBEDDINGS = "adapted embeddings"
OUTPUT_HEAD = "an adapted output head"
TIED = "adapted embeddings that are the output head too"
WHOLE_MODULES = "fully trained modules"

_UNMERGEABLE = (TOKENS, TIED)
SHOWN = 3  # modules that a message names


@dataclass(frozen=True)
class Layer:
    """`scaling * b @ a` is added to the `(out, in)` weight of the module: a `(r, in)` and b `(out, r)` in fp32.

    `magnitude` is DoRA's, `(out,)`.
    """

    path: str
    a: Tensor
    b: Tensor
    scaling: float
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        return len(self.a)

    def with_scaling(self, scaling: float) -> Layer:
        """The same update with another scaling: B takes up the difference."""
        if scaling == self.scaling:
            return self
        return replace(self, b=self.b * (self.scaling / scaling), scaling=scaling)

    def with_rank(self, rank: int) -> Layer:
        """The same update with a higher rank: zeros are added to A and B."""
        more = rank - self.rank
        pad = nn.functional.pad
        return replace(self, a=pad(self.a, (0, 0, 0, more)), b=pad(self.b, (0, more)))


@dataclass(frozen=True)
class Contents:
    """An adapter and its base without weights: `model` has the modules of the base, on the meta device.

    `extras` gives, for each constant above that applies, the modules with it.
    """

    file: AdapterFile
    base: str
    model: PreTrainedModel
    layers: Sequence[Layer]
    extras: dict[str, list[str]]

    @property
    def config(self) -> PretrainedConfig:
        return self.model.config

    def uniform_layers(self) -> list[Layer]:
        """The layers with one rank, the highest, and one scaling, the most common."""
        rank = max(layer.rank for layer in self.layers)
        scaling = most_common([layer.scaling for layer in self.layers])
        return [layer.with_scaling(scaling).with_rank(rank) for layer in self.layers]

    def check(self, target: str, model_types: Collection[str], holds: Collection[str] = ()) -> None:
        """Raises AdapterError if a target cannot hold all of the adapter.

        Args:
            model_types: the model types that the target knows.
            holds: which of the `extras` the target can hold.
        """
        source, kind = self.file.folder, self.config.model_type
        if kind not in model_types:
            raise AdapterError(
                f"{source}: its base {self.base} is a {kind}; {target} adapters are written for "
                f"{', '.join(sorted(model_types))}. {self._next_step([])}"
            )
        dropped = [name for name in self.extras if name not in holds]
        if dropped:
            listed = "; ".join(f"{name} ({_shorten(self.extras[name])})" for name in dropped)
            raise AdapterError(f"{source}: {target} would drop {listed}. {self._next_step(dropped)}")
        if not self.layers:
            raise AdapterError(f"{source}: no module has A and B, so there is nothing to export to {target}")

    def _next_step(self, dropped: Sequence[str]) -> str:
        if any(name in _UNMERGEABLE for name in dropped):
            return "They cannot be merged either: serve the adapter unmerged, with lora-hf serve or PEFT"
        return "to=merged writes a plain model that holds everything"


def read_contents(folder: str | Path, model: str | None = None) -> Contents:
    """Reads an adapter, and the config of its base.

    Args:
        folder: an adapter folder, or the hub id of an adapter.
        model: where the base is now, a folder or a hub id; by default where the adapter says.

    Raises:
        AdapterError: no readable adapter; it does not fit its base, or does not name one that other programs can load.
        ModelError, HubError: the config of the base cannot be read.
    """
    file = read_adapter(fetch_adapter(folder))
    base = model or base_of(file.config, file.metadata)
    if not base:
        raise AdapterError(f"{file.folder}: does not name its base; set model=NAME_OR_FOLDER")
    run = run_config(file.folder)
    if run is not None and run.model.init == "random":
        raise AdapterError(
            f"{file.folder}: its base has random weights, generated from a seed, which other programs do not have; "
            "to=merged writes them"
        )
    init, holds_init = base_dependent_init(file)
    if init and not holds_init:
        raise AdapterError(
            f"{file.folder}: init_lora_weights={init!r}: its A and B belong to a base that PEFT changes on loading. "
            "lora_hf.load_adapter and lora_hf.save_adapter rewrite it for the unchanged base"
        )
    empty = _empty_model(base, file)
    layers, extras = _split(file, empty)
    return Contents(file, base, empty, layers, extras)


def _empty_model(base: str, file: AdapterFile) -> PreTrainedModel:
    kind, labels = file.config.get("task_type"), file.metadata.num_labels
    if (name := auto_class(kind)) is None:
        raise AdapterError(f"{file.folder}: task_type: expected one of {', '.join(AUTO_CLASSES)}, found {kind!r}")
    config = read_config(ModelConfig(name=base), {} if labels is None else {"num_labels": labels})
    try:
        with torch.device("meta"):
            return getattr(transformers, name).from_config(config)
    except ValueError as error:  # the auto class does not know this config
        raise AdapterError(
            f"{file.folder}: its task_type is {kind}, and no such model of {base} ({config.model_type}) exists. Name "
            "the base with model=NAME_OR_FOLDER"
        ) from error


def _split(file: AdapterFile, model: PreTrainedModel) -> tuple[list[Layer], dict[str, list[str]]]:
    """A and B of each module, and the rest of the file by kind."""
    modules, use_dora = adaptable_modules(model), bool(file.config.get("use_dora"))
    rest = {key.removeprefix(PREFIX): tensor for key, tensor in file.tensors.items()}
    layers, extras = [], dict[str, list[str]]()
    saved_layers = read_layers(modules, file) if any(map(file.config.get, TARGET_FIELDS)) else []
    shapes: dict[str, tuple[int, ...]] = {}
    for saved in saved_layers:
        expected = expected_shapes(modules[saved.path], saved.r, use_dora)
        shapes |= {f"{saved.path}.{key}": shape for key, shape in expected.items()}
    check_shapes(
        shapes, {key: tensor for key, tensor in rest.items() if key in shapes}, f"{file.folder}/{WEIGHTS_FILE}"
    )
    for saved in saved_layers:
        scaling = saved.lora_alpha / (math.sqrt(saved.r) if file.config.get("use_rslora") else saved.r)
        a, b = (rest.pop(f"{saved.path}.{key}").float() for key in factor_keys(modules[saved.path]))
        magnitude = rest.pop(f"{saved.path}.lora_magnitude_vector").float() if use_dora else None
        layers.append(Layer(saved.path, a, b, scaling, magnitude))
        for kind in _kinds_of_layer(model, modules[saved.path]):
            extras.setdefault(kind, []).append(saved.path)
    if use_dora and layers:
        extras[DORA] = [layer.path for layer in layers]
    for key in rest:
        kind, path = _kind_of_key(file, key)
        if path not in extras.setdefault(kind, []):
            extras[kind].append(path)
    return layers, extras


def _kinds_of_layer(model: PreTrainedModel, module: nn.Module) -> list[str]:
    head = model.get_output_embeddings()
    if not isinstance(module, nn.Embedding) and module is not head:
        return []
    if head is not None and model.config.get_text_config().tie_word_embeddings:
        return [TIED]
    return [OUTPUT_HEAD if module is head else EMBEDDINGS]


def _kind_of_key(file: AdapterFile, key: str) -> tuple[str, str]:
    """The kind of a tensor that is no A or B, and the module that it belongs to."""
    if key.endswith(FILE_KEY):
        return TOKENS, key.removesuffix(f".{FILE_KEY}")
    if key.endswith((".base_layer.bias", ".lora_B.bias")):
        return BIASES, key.rsplit(".", 2)[0]
    path = key.rpartition(".")[0]
    owned = [name for name in file.config.get("modules_to_save") or () if _is_within(path, name)]
    if key.endswith(".bias") and not owned:
        return BIASES, path
    return WHOLE_MODULES, owned[0] if owned else path


def _is_within(path: str, name: str) -> bool:
    return f".{path}.".find(f".{name}.") >= 0


def most_common(values: Sequence[float]) -> float:
    return Counter(values).most_common(1)[0][0]


def _shorten(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{', '.join(names[:SHOWN])}{more}"
