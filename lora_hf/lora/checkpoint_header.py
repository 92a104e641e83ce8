"""What `from_pretrained` would fill in a model, by the header of its checkpoint; no weights are read."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils import logging as transformers_logging

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Turns off the report and the progress bar of `from_pretrained`."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def loaded_from_header(model: PreTrainedModel) -> PreTrainedModel | None:
    """The model as loaded again from its own checkpoint, on the meta device.

    transformers itself maps the names in the file to those of the model, so renamed and converted tensors count.

    Returns:
        None if the checkpoint is quantized, or is no folder and not in the hub's cache, or has no safetensors files.
    """
    if getattr(model.config, "quantization_config", None):
        return None
    try:
        tensors = _tensors(_checkpoint_files(model.name_or_path or "", getattr(model.config, "_commit_hash", None)))
        if not tensors:
            return None
        with quiet_transformers(), torch.random.fork_rng(devices=[]):  # it draws what the file lacks
            return type(model).from_pretrained(
                None,
                config=copy.deepcopy(model.config),
                state_dict=tensors,
                device_map="meta",
                ignore_mismatched_sizes=True,
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:  # damaged, or of another kind
        logger.info("the checkpoint %s cannot be compared with the model: %s", model.name_or_path, error)
        return None


def _tensors(files: list[Path]) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118 - it is no mapping
                tensors[key] = torch.empty(opened.get_slice(key).get_shape(), device="meta")
    return tensors


def _checkpoint_files(name: str, revision: str | None) -> list[Path]:
    """The safetensors files of a checkpoint; none if one of them is not on this machine."""
    if index := _local_file(name, SAFE_WEIGHTS_INDEX_NAME, revision):
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        names = [SAFE_WEIGHTS_NAME]
    files = [_local_file(name, each, revision) for each in names]
    return [file for file in files if file] if all(files) else []


def _local_file(name: str, file: str, revision: str | None) -> Path | None:
    if name and Path(name).is_dir():
        path = Path(name, file)
        return path if path.is_file() else None
    try:
        cached = try_to_load_from_cache(name, file, revision=revision)
    except HFValidationError:  # no name of a repository
        return None
    return Path(cached) if isinstance(cached, str) else None
