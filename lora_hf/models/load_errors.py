"""What went wrong where transformers could not load a base or its tokenizer."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError

from lora_hf.core.errors import ModelError
from lora_hf.core.git_lfs import explain_pointer
from lora_hf.core.hub_access import explain_hub_error, is_hub_error
from lora_hf.models.model_ids import suggest_model


def not_a_base(name: str) -> str:
    """What is wrong with a folder that holds an adapter, which transformers would load with the base it names."""
    folder, config = Path(name), "adapter_config.json"
    is_base = (folder / "config.json").is_file()
    if (folder / config).is_file():
        what = "holds an adapter beside a model" if is_base else "is an adapter, not a base"
        adapter = folder
    elif (folder / "adapter" / config).is_file() and not is_base:
        what, adapter = "is a run folder, not a base", folder / "adapter"
    else:
        return ""
    advice = f"Move {config} out of it" if is_base else f"Set model.name to the base that {adapter / config} names"
    return f"{name}: {what}. {advice}; to go on from the adapter, set train.start_from={adapter}"


def cannot_load(name: str, error: Exception, revision: str | None = None) -> ModelError:
    text = explain_hub_error(error, revision) if is_hub_error(error) else str(error).strip()
    reason = (text or type(error).__name__).splitlines()[0]
    if reason.rstrip().endswith(":"):  # a list follows
        reason = " ".join(text.split())[:400]
    if pointer := explain_pointer(sorted(Path(name).iterdir()) if Path(name).is_dir() else ()):
        return ModelError(f"{name}: cannot be loaded: {pointer}")
    if found := not_a_base(name):
        return ModelError(found)
    if isinstance(error, SafetensorError):
        return ModelError(f"{name}: its safetensors cannot be read ({reason}); copy or download them again")
    if not isinstance(error, (OSError, ValueError, ImportError)):  # the text of others assumes a reader of their code
        reason = f"check config.json, its values and the files it comes with ({type(error).__name__}: {reason})"
    return ModelError(f"{name}: cannot be loaded: {reason}{suggest_model(name)}")
