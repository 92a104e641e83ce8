"""The file of a loralib checkpoint, for itself. This is the one room that meets pickles: it reads tensors, no code."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from lora_hf.core.errors import AdapterError

WRAPPERS = ("model_state_dict", "state_dict")  # the first is what the paper's GPT-2 code saves
FORMATS = (b"PK\x03\x04", b"\x80\x02")  # of torch.save: a zip archive, and the bare pickle of torch before 1.6


def read_loralib(file: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a loralib checkpoint by their names, without a wrapping dict and DataParallel's `module.`.

    Only tensors are read: a pickle that wants to run code is refused, and nothing of it is run.

    Raises:
        AdapterError: the file is missing, damaged, holds more than tensors, or no `<path>.lora_A`.
    """
    value = _unpickled(Path(file))
    for wrapper in WRAPPERS:
        value = value.get(wrapper, value) if isinstance(value, dict) else value
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
            f"{file} comes from PEFT, not loralib. Load it with peft.PeftModel.from_pretrained and save_pretrained it "
            "again: lora_hf.load_adapter reads the folder that this writes"
        )
    if not lora_paths(tensors):
        raise AdapterError(
            f"{file} holds no <path>.lora_A: expected what torch.save(lora.lora_state_dict(model)) writes, found "
            f"{', '.join([*tensors][:3]) or 'nothing'}"
        )
    return tensors


def write_loralib(file: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes the tensors with torch.save, aside first and then renamed.

    Raises:
        AdapterError: the file cannot be written.
    """
    aside = file.with_name(f"{file.name}.part")
    try:
        with aside.open("wb") as stream:
            torch.save({key: tensor.detach().cpu().clone() for key, tensor in tensors.items()}, stream)
        aside.replace(file)
    except OSError as error:
        raise AdapterError(f"{file}: cannot be written: {error.strerror}") from error


def lora_paths(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """The path of every layer with a lora_A or a lora_B, in the order of the file."""
    ends = (".lora_A", ".lora_B")
    return list(dict.fromkeys(key.rpartition(".")[0] for key in tensors if key.endswith(ends)))


def _unpickled(file: Path) -> Any:
    try:
        with file.open("rb") as stream:
            start = stream.read(4)
            if not start.startswith(FORMATS):
                raise AdapterError(
                    f"{file}: expected a file that torch.save wrote, found one that begins with {start!r}"
                )
            stream.seek(0)
            return torch.load(stream, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"it asks for {wanted[1]}" if wanted else "it is no plain dict of tensors, or damaged"
        raise AdapterError(
            f"{file}: refused: {what}. Nothing of it was run; only tensors are read. Save it again with "
            "torch.save(lora.lora_state_dict(model), file)"
        ) from error
    except OSError as error:
        raise AdapterError(f"{file}: cannot be read: {error.strerror}") from error
    except (RuntimeError, EOFError, ValueError, LookupError, AttributeError, TypeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise AdapterError(f"{file}: damaged checkpoint: {reason}. Copy it again from where it came") from error
