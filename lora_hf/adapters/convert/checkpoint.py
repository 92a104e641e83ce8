"""The file of a loralib checkpoint. Only this module meets pickles: it reads tensors from them and runs no code."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from lora_hf.core.atomic_io import atomic_path
from lora_hf.core.errors import AdapterError

WRAPPER_KEYS = ("model_state_dict", "state_dict")  # the paper's GPT-2 code saves under the first
MAGIC_BYTES = (b"PK\x03\x04", b"\x80\x02")  # of torch.save: a zip archive, or the bare pickle before torch 1.6


def read_loralib(file: str | Path) -> dict[str, torch.Tensor]:
    """Reads the tensors of a loralib checkpoint by name, without a wrapping dict and DataParallel's `module.`.

    A pickle that asks for anything but tensors is refused before any of its code runs.

    Raises:
        AdapterError: the file is missing, damaged, holds more than tensors, or no `<path>.lora_A`.
    """
    value = _load_tensors(Path(file))
    for key in WRAPPER_KEYS:
        value = value.get(key, value) if isinstance(value, dict) else value
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise AdapterError(f"{file}: expected a dict of tensors by name, found {type(value).__name__}")
    tensors = {key.removeprefix("module."): tensor for key, tensor in value.items()}
    for key, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise AdapterError(f"{file}: {key}: expected a tensor, found {type(tensor).__name__}")
        if not tensor.isfinite().all():
            raise AdapterError(f"{file}: {key} holds NaN or infinity; the checkpoint is unusable")
    if any(re.search(r"\.lora_[AB]\.", key) for key in tensors):
        raise AdapterError(
            f"{file} is a checkpoint of PEFT, not of loralib. Load it with peft.PeftModel.from_pretrained and save it "
            "with save_pretrained; lora_hf.load_adapter reads the resulting folder"
        )
    if not lora_paths(tensors):
        raise AdapterError(
            f"{file} holds no <path>.lora_A: expected what torch.save(lora.lora_state_dict(model)) writes, found "
            f"{', '.join([*tensors][:3]) or 'nothing'}"
        )
    return tensors


def write_loralib(file: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes the tensors with torch.save, atomically.

    Raises:
        AdapterError: the file cannot be written.
    """
    try:
        with atomic_path(file) as tmp, tmp.open("wb") as stream:
            torch.save({key: tensor.detach().cpu().clone() for key, tensor in tensors.items()}, stream)
    except OSError as error:
        raise AdapterError(f"{file}: cannot be written: {error.strerror}") from error


def lora_paths(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """The path of every layer with a lora_A or a lora_B, in the order of the file."""
    return list(dict.fromkeys(key.rpartition(".")[0] for key in tensors if key.endswith((".lora_A", ".lora_B"))))


def _load_tensors(file: Path) -> Any:
    try:
        with file.open("rb") as stream:
            magic = stream.read(4)
            if not magic.startswith(MAGIC_BYTES):
                raise AdapterError(f"{file}: expected a file of torch.save, found one that begins with {magic!r}")
            stream.seek(0)
            return torch.load(stream, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it asks for {wanted[1]}" if wanted else "it is damaged, or no plain dict of tensors"
        raise AdapterError(
            f"{file}: refused: {reason}. None of its code was run; lora_hf reads only tensors. Save it again with "
            "torch.save(lora.lora_state_dict(model), file)"
        ) from error
    except OSError as error:
        raise AdapterError(f"{file}: cannot be read: {error.strerror}") from error
    except (RuntimeError, EOFError, ValueError, LookupError, AttributeError, TypeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise AdapterError(f"{file}: damaged checkpoint: {reason}. Copy it again from its source") from error
