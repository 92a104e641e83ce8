"""The files of an adapter folder, for themselves: written whole, read strictly, nothing pickled.

`adapter_config.json` and `adapter_model.safetensors` are what `peft` writes and reads. The header of the safetensors
file also says what PEFT has no place for: the fingerprint of the base, the label names, the task, and which columns of
a fused projection belong to which A and B.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from lora_hf.core.errors import AdapterError

if TYPE_CHECKING:
    import torch

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
HEADER = "lora_hf"

# Fields of PEFT's LoraConfig that change what the adapter computes, with the value that means "not used".
UNSUPPORTED = {
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "ensure_weight_tying": False,
    "exclude_modules": None,
    "kasa_config": None,
    "layers_pattern": None,
    "layer_replication": None,
    "lora_bias": False,
    "monteclora_config": None,
    "target_parameters": None,
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_qalora": False,
    "velora_config": None,
}

# Values of PEFT's init_lora_weights that leave the base as it is, beside true and false.
STARTS = ("gaussian", "eva", "olora", "orthogonal", "pissa", "true", "false", "none")

# Values of PEFT's init_lora_weights under which PEFT trains on a changed base that nobody can compute again.
CHANGES_BASE = ("pissa_niter", "corda", "loftq", "lora_ga")


def _is_text(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _is_switch(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def _is_name(value: Any) -> bool:
    return isinstance(value, str)


def _is_hexadecimal(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]*", value) is not None


def _is_fingerprint(value: Any) -> bool:
    checks = {"sha256": _is_hexadecimal, "dtype": _is_name, "tensors": _is_rank, "samples": _is_hexadecimal}
    known = isinstance(value, dict) and all(key in value and fits(value[key]) for key, fits in checks.items())
    return known or value == {}


def _is_start(value: Any) -> bool:
    return isinstance(value, str) and (value == "" or value.startswith(("pissa", "olora")))


def _is_pairs(value: Any) -> bool:
    """Whether it is `[[0, 4], [8, 12]]`, or the like."""
    return (
        isinstance(value, list)
        and value != []
        and all(isinstance(pair, list) and [type(edge) for edge in pair] == [int, int] for pair in value)
    )


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_alpha(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < FLOAT32_MAX


def _is_share(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1


def _is_init(value: Any) -> bool:
    return _is_switch(value) or (isinstance(value, str) and value.lower().startswith((*STARTS, *CHANGES_BASE)))


def _is_pattern(value: Any, fits: Callable[[Any], bool]) -> bool:
    return value is None or (isinstance(value, dict) and all(map(fits, value.values())))


FLOAT32_MAX = 3.4e38

# What a field that lora_hf reads may hold, in words and as a check.
FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "alpha_pattern": ("names with numbers > 0", lambda value: _is_pattern(value, _is_alpha)),
    "base_model_name_or_path": ("a name", _is_text),
    "bias": ("one of none, all, lora_only", lambda value: value in ("none", "all", "lora_only")),
    "fan_in_fan_out": ("true or false", _is_switch),
    "inference_mode": ("true or false", _is_switch),
    "init_lora_weights": (f"true, false or one of {', '.join(STARTS[:5])}", _is_init),
    "lora_alpha": ("a number > 0", _is_alpha),
    "lora_dropout": ("a number >= 0 and < 1", _is_share),
    "modules_to_save": (
        "a list of names",
        lambda value: value is None or (isinstance(value, list) and all(isinstance(name, str) for name in value)),
    ),
    "r": ("a whole number >= 1", _is_rank),
    "rank_pattern": ("names with whole numbers >= 1", lambda value: _is_pattern(value, _is_rank)),
    "revision": ("a name", _is_text),
    "task_type": ("a name", _is_text),
    "use_dora": ("true or false", _is_switch),
    "use_rslora": ("true or false", _is_switch),
}

# The same of the header.
HEADER_FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "base": ("a name", _is_name),
    "revision": ("a name", _is_text),
    "task": ("a name", _is_text),
    "problem_type": ("a name", _is_text),
    "labels": ("a list of names", lambda value: isinstance(value, list) and all(map(_is_name, value))),
    "num_labels": ("a whole number >= 1", lambda value: value is None or _is_rank(value)),
    "fingerprint": ("sha256, dtype, tensors and samples", _is_fingerprint),
    "slices": (
        "pairs of columns by path",
        lambda value: isinstance(value, dict) and all(map(_is_pairs, value.values())),
    ),
    "start": (
        "pissa, olora or nothing",
        _is_start,
    ),
}


@dataclass(frozen=True)
class AdapterMetadata:
    """What the header of the weights says beyond PEFT's config; all of it is empty for a file that PEFT wrote."""

    base: str = ""
    revision: str | None = None
    task: str | None = None
    problem_type: str | None = None
    labels: tuple[str, ...] = ()
    num_labels: int | None = None
    fingerprint: dict[str, Any] = field(default_factory=dict)
    slices: dict[str, list[list[int]]] = field(default_factory=dict)
    start: str = ""  # where A and B are a trained pair over the pair it started from: `pissa`, `olora`, ...


@dataclass(frozen=True)
class AdapterFile:
    """An adapter folder, read and checked for itself, not yet for a model."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    metadata: AdapterMetadata


def write_adapter(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], metadata: AdapterMetadata
) -> None:
    """Writes both files aside and renames them: a run that dies here leaves whole files, the old or the new."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    weights_aside, config_aside = folder / f"{WEIGHTS_FILE}.part", folder / f"{CONFIG_FILE}.part"
    plain = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    save_file(plain, weights_aside, metadata={"format": "pt", HEADER: json.dumps(asdict(metadata))})
    config_aside.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    weights_aside.replace(folder / WEIGHTS_FILE)
    config_aside.replace(folder / CONFIG_FILE)


def read_adapter_config(folder: str | Path) -> tuple[dict[str, Any], AdapterMetadata]:
    """The config and the header of an adapter, checked for themselves; torch is not needed, so it takes milliseconds.

    Raises:
        AdapterError: a file is missing or damaged, or the method is not the LoRA that lora_hf knows.
    """
    folder = Path(folder)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise AdapterError(
                f"{folder}: not an adapter folder: expected {name}, found {_there(folder)}{suggest_adapter(folder)}"
            )
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        with safe_open(folder / WEIGHTS_FILE, framework="np") as file:  # checks that every tensor lies in the file
            header = file.metadata() or {}
        metadata = _about(json.loads(header[HEADER])) if HEADER in header else AdapterMetadata()
    except (ValueError, TypeError, AttributeError, RecursionError, SafetensorError, OSError) as error:
        raise AdapterError(
            f"{folder}: damaged adapter: {error}. Copy it again from where it came, or train it again"
        ) from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else config
        raise AdapterError(
            f"{folder}/{CONFIG_FILE}: expected peft_type LORA, found {kind!r}; lora_hf loads LoRA adapters"
        )
    used = [key for key, neutral in UNSUPPORTED.items() if config.get(key, neutral) not in (neutral, None, [])]
    if used:
        values = ", ".join(f"{key}={config[key]!r}" for key in used)
        raise AdapterError(f"{folder}/{CONFIG_FILE}: {values} not supported")
    for key, (wanted, fits) in FIELDS.items():
        if key in config and not fits(config[key]):
            raise AdapterError(f"{folder}/{CONFIG_FILE}: {key}: expected {wanted}, found {config[key]!r:.100}")
    init = str(config.get("init_lora_weights", True)).lower()
    if init.startswith(CHANGES_BASE) or (config.get("use_dora") and init in ("pissa", "olora")):
        raise AdapterError(
            f"{folder}/{CONFIG_FILE}: init_lora_weights={init!r}: this adapter belongs to a base that PEFT "
            "changed and did not save. Save it in PEFT with path_initial_model_for_weight_conversion"
        )
    return config, metadata


def _there(folder: Path) -> str:
    if not folder.is_dir():
        return "a file" if folder.exists() else "no such folder"
    names = sorted(file.name for file in folder.iterdir())
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") or "nothing"


def suggest_adapter(folder: Path) -> str:
    """Returns `` (did you mean 'outputs/sst2/adapter'?)`` for the adapter in a run folder, or in one of a near name."""
    if (folder / "adapter" / CONFIG_FILE).is_file():
        return f" (did you mean {str(folder / 'adapter')!r}?)"
    if folder.exists():
        return ""
    above = next(parent for parent in folder.parents if parent.is_dir())
    first, *rest = folder.relative_to(above).parts
    near = {}
    with contextlib.suppress(OSError):  # a folder that may not be read
        for beside in above.iterdir():
            for adapter in (beside.joinpath(*rest), beside.joinpath(*rest, "adapter")):
                if (adapter / CONFIG_FILE).is_file():
                    near.setdefault(beside.name, adapter)
    close = difflib.get_close_matches(first, near, n=1)
    return f" (did you mean {str(near[close[0]])!r}?)" if close else ""


def read_adapter(folder: str | Path) -> AdapterFile:
    """An adapter folder with its tensors.

    Raises:
        AdapterError: as `read_adapter_config`; also a tensor of whole numbers or of fewer than 16 bits, or with a value
            that is no number.
    """
    import torch
    from safetensors.torch import load_file

    folder = Path(folder)
    config, metadata = read_adapter_config(folder)
    try:
        tensors = load_file(folder / WEIGHTS_FILE)
    except SafetensorError as error:  # a kind of number that torch packs otherwise
        raise AdapterError(f"{folder}/{WEIGHTS_FILE}: cannot be read: {error}") from error
    for key, tensor in tensors.items():
        if tensor.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            raise AdapterError(
                f"{folder}/{WEIGHTS_FILE}: {key}: expected floating point numbers of 16 bits or more, found "
                f"{tensor.dtype}"
            )
        if not tensor.isfinite().all():
            raise AdapterError(f"{folder}/{WEIGHTS_FILE}: {key} holds NaN or infinity; the adapter is unusable")
    return AdapterFile(folder, config, tensors, metadata)


def _about(header: Any) -> AdapterMetadata:
    """Raises TypeError, AttributeError or ValueError where the header is not what `save_adapter` writes."""
    for key, (wanted, fits) in HEADER_FIELDS.items():
        if key in header and not fits(header[key]):
            raise ValueError(f"{key}: expected {wanted}, found {header[key]!r:.100}")
    metadata = AdapterMetadata(**header)
    if metadata.num_labels is not None and len(metadata.labels) != metadata.num_labels:
        raise ValueError(f"labels: expected {metadata.num_labels} names, found {metadata.labels}")
    return replace(metadata, labels=tuple(metadata.labels))
