"""The two files of an adapter folder: written atomically, checked on reading, never pickled.

`peft` reads and writes the same `adapter_config.json` and `adapter_model.safetensors`. The header of the safetensors
file also holds what PEFT does not record: the fingerprint of the base, the identity of the tokenizer, the label names,
the task, and which columns of a fused projection each A and B belong to.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from lora_hf.core.atomic_io import atomic_path
from lora_hf.core.errors import AdapterError
from lora_hf.core.git_lfs import explain_pointer
from lora_hf.core.parsing import parse_json, read_json

if TYPE_CHECKING:
    import torch

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
HEADER = "lora_hf"
FLOAT32_MAX = 3.4e38
TOO_LARGE = "does not fit into the memory of this process; expected LoRA's A and B and a head, of some megabytes"
PICKLED_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

# Fields of PEFT's LoraConfig that leave the outputs of a finished adapter alone: they concern its training, or what
# `init_lora_weights` names.
IGNORED = (
    *("auto_mapping", "ensure_weight_tying", "eva_config", "corda_config", "inference_mode", "loftq_config"),
    *("lora_ga_config", "megatron_config", "megatron_core", "peft_type", "peft_version", "qalora_group_size"),
    *("runtime_config", "lora_dropout"),
)

# Names in PEFT's init_lora_weights that keep the base weights, or change them in a way that can be computed again.
KNOWN_INITS = ("gaussian", "eva", "olora", "orthogonal", "pissa", "true", "false", "none")

# Names under which PEFT trains on a changed base that cannot be computed again.
LOST_BASE_INITS = ("pissa_niter", "corda", "loftq", "lora_ga")

Check = Callable[[Any], bool]


def _is_str(value: Any) -> bool:
    return isinstance(value, str)


def _is_hex(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]*", value) is not None


def _is_decimal(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"-?\d+(\.\d+)?(e[+-]?\d+)?", value) is not None


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_alpha(value: Any) -> bool:
    return _is_number(value) and 0 < value < FLOAT32_MAX


def _is_init(value: Any) -> bool:
    names = (*KNOWN_INITS, *LOST_BASE_INITS)
    return value is None or isinstance(value, bool) or (isinstance(value, str) and value.lower().startswith(names))


def _is_fingerprint(value: Any) -> bool:
    checks = {"sha256": _is_hex, "dtype": _is_str, "tensors": _is_rank, "samples": _is_hex}
    if not isinstance(value, dict) or not isinstance(value.get("settings", {}), dict):
        return False
    pairs = value.get("projections", [])
    if not _list_of(lambda pair: isinstance(pair, list) and len(pair) == 2 and all(map(_is_decimal, pair)))(pairs):
        return False
    return not value or all(key in value and checks[key](value[key]) for key in checks)


def _is_tokenizer(value: Any) -> bool:
    keys = {"name": _is_str, "sha256": _is_hex}
    return isinstance(value, dict) and (not value or all(key in value and keys[key](value[key]) for key in keys))


def _is_slice(value: Any) -> bool:
    return isinstance(value, list) and len(value) in (2, 4) and all(type(edge) is int for edge in value)


def are_named(labels: Sequence[str]) -> bool:
    """Whether the labels have real names, not transformers' defaults LABEL_0, LABEL_1, ..."""
    return any(label != f"LABEL_{index}" for index, label in enumerate(labels))


def _list_of(check: Check) -> Check:
    return lambda value: isinstance(value, list) and all(map(check, value))


def _dict_of(check: Check) -> Check:
    return lambda value: isinstance(value, dict) and all(map(check, value.values()))


def _is_names(value: Any) -> bool:
    return _is_str(value) or _list_of(_is_str)(value)


def _is_numbers(value: Any) -> bool:
    return type(value) is int or _list_of(lambda each: type(each) is int)(value)


def _is_tokens(value: Any) -> bool:
    ids = _list_of(lambda each: type(each) is int and each >= 0)
    return ids(value) or _dict_of(ids)(value)


def _optional(check: Check) -> Check:
    return lambda value: value is None or check(value)


# The fields of adapter_config.json that lora_hf reads: the expected value in words, and its check.
CONFIG_FIELDS: dict[str, tuple[str, Check]] = {
    "alpha_pattern": ("names with numbers > 0", _optional(_dict_of(_is_alpha))),
    "base_model_name_or_path": ("a name", _optional(_is_str)),
    "exclude_modules": ("an expression or a list of names", _optional(_is_names)),
    "layers_pattern": ("a name or a list of names", _optional(_is_names)),
    "layers_to_transform": ("a number or a list of numbers", _optional(_is_numbers)),
    "lora_bias": ("true or false", _optional(_is_bool)),
    "target_modules": ("an expression or a list of names", _is_names),
    "target_parameters": ("a list of names", _optional(_list_of(_is_str))),
    "trainable_token_indices": ("token ids, or names with token ids", _optional(_is_tokens)),
    "bias": ("one of none, all, lora_only", lambda value: value in ("none", "all", "lora_only")),
    "fan_in_fan_out": ("true or false", _optional(_is_bool)),
    "inference_mode": ("true or false", _optional(_is_bool)),
    "init_lora_weights": (f"true, false or one of {', '.join(KNOWN_INITS[:5])}", _is_init),
    "lora_alpha": ("a number > 0", _is_alpha),
    "lora_dropout": ("a number >= 0 and < 1", lambda value: _is_number(value) and 0 <= value < 1),
    "modules_to_save": ("a list of names", _optional(_list_of(_is_str))),
    "r": ("a whole number >= 1", _is_rank),
    "rank_pattern": ("names with whole numbers >= 1", _optional(_dict_of(_is_rank))),
    "revision": ("a name", _optional(_is_str)),
    "task_type": ("a name", _optional(_is_str)),
    "use_dora": ("true or false", _optional(_is_bool)),
    "use_rslora": ("true or false", _optional(_is_bool)),
}

# The same for the fields of `AdapterMetadata`.
HEADER_FIELDS: dict[str, tuple[str, Check]] = {
    "base": ("a name", _is_str),
    "revision": ("a name", _optional(_is_str)),
    "task": ("a name", _optional(_is_str)),
    "problem_type": ("a name", _optional(_is_str)),
    "labels": ("a list of names", _list_of(_is_str)),
    "num_labels": ("a whole number >= 1", _optional(_is_rank)),
    "fingerprint": ("sha256, dtype, tensors and samples", _is_fingerprint),
    "tokenizer": ("name and sha256", _is_tokenizer),
    "slices": ("slices of columns by path", _dict_of(lambda value: value != [] and _list_of(_is_slice)(value))),
    "start": (
        "pissa, olora or nothing",
        lambda value: isinstance(value, str) and (value == "" or value.startswith(("pissa", "olora"))),
    ),
}


@dataclass(frozen=True)
class AdapterMetadata:
    """The header of the weights file, for what PEFT's config has no field. In PEFT's own files, all fields are empty.

    `slices` gives, by module path, the output columns that are adapted (`lora.slices`). `start` is `pissa` or
    `olora` if A and B hold the trained factors next to the negated initial ones, so that the base stays unchanged.
    """

    base: str = ""
    revision: str | None = None
    task: str | None = None
    problem_type: str | None = None
    labels: tuple[str, ...] = ()
    num_labels: int | None = None
    fingerprint: dict[str, Any] = field(default_factory=dict)
    tokenizer: dict[str, str] = field(default_factory=dict)
    slices: dict[str, list[list[int]]] = field(default_factory=dict)
    start: str = ""


@dataclass(frozen=True)
class AdapterFile:
    """The content of an adapter folder. It is valid, but not yet checked against a model."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    metadata: AdapterMetadata


def write_adapter(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], metadata: AdapterMetadata
) -> None:
    """Writes both files atomically: if the process dies, each file is complete, either old or new."""
    from safetensors.torch import save

    folder.mkdir(parents=True, exist_ok=True)
    plain = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    content = save(plain, metadata={"format": "pt", HEADER: json.dumps(asdict(metadata))})
    with atomic_path(folder / CONFIG_FILE) as config_tmp, atomic_path(folder / WEIGHTS_FILE) as weights_tmp:
        weights_tmp.write_bytes(_with_sorted_metadata(content))
        config_tmp.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _with_sorted_metadata(content: bytes) -> bytes:
    """Sorts the metadata of a safetensors file. safetensors writes it in random order, so equal runs would differ."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the tensors stay aligned
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


def read_adapter_config(folder: str | Path) -> tuple[dict[str, Any], AdapterMetadata]:
    """Reads and checks the config and the header of an adapter. This takes milliseconds and does not import torch.

    Raises:
        AdapterError: a file is missing or damaged, or the adapter uses a method that lora_hf does not support.
    """
    folder = Path(folder)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise AdapterError(
                f"{folder}: not an adapter folder: expected {name}, found {_contents(folder)}"
                f"{_weights_advice(folder)}{suggest_adapter(folder)}"
            )
    try:
        config = read_json(folder / CONFIG_FILE)
        with safe_open(folder / WEIGHTS_FILE, framework="np") as file:  # checks that the file holds every tensor
            header = file.metadata() or {}
        metadata = _parse_metadata(parse_json(header[HEADER])) if HEADER in header else AdapterMetadata()
    except MemoryError as error:
        raise AdapterError(f"{folder / WEIGHTS_FILE}: {TOO_LARGE}") from error
    except (ValueError, TypeError, AttributeError, SafetensorError, OSError) as error:
        reason = explain_pointer([folder / WEIGHTS_FILE, folder / CONFIG_FILE]) or error
        raise AdapterError(f"{folder}: damaged adapter: {reason}. Copy it again, or train it again") from error
    source = folder / CONFIG_FILE
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        method = config.get("peft_type") if isinstance(config, dict) else config
        raise AdapterError(f"{source}: expected peft_type LORA, found {method!r}; lora_hf loads only LoRA adapters")
    unknown = {key: value for key, value in config.items() if value and key not in CONFIG_FIELDS and key not in IGNORED}
    if config.get("ensure_weight_tying") and config.get("modules_to_save"):
        unknown["ensure_weight_tying"] = True
    if unknown:
        listed = ", ".join(f"{key}={value!r:.60}" for key, value in unknown.items())
        raise AdapterError(
            f"{source}: {listed} not supported, and ignoring it would change the outputs. Merge the adapter with the "
            "library that wrote it, and load the merged model"
        )
    for key, (expected, is_valid) in CONFIG_FIELDS.items():
        if key in config and not is_valid(config[key]):
            raise AdapterError(f"{source}: {key}: expected {expected}, found {config[key]!r:.100}")
    init = str(config.get("init_lora_weights", True)).lower()
    if init.startswith(LOST_BASE_INITS) or (config.get("use_dora") and init in ("pissa", "olora")):
        raise AdapterError(
            f"{source}: init_lora_weights={init!r}: this adapter belongs to a base that PEFT changed and did not save. "
            "Save the adapter in PEFT with path_initial_model_for_weight_conversion"
        )
    return config, metadata


def base_of(config: Mapping[str, Any], metadata: AdapterMetadata) -> str:
    """The base that an adapter names, or an empty string. adapter_config.json comes first, as users may edit it."""
    return config.get("base_model_name_or_path") or metadata.base


def read_adapter(folder: str | Path) -> AdapterFile:
    """Reads and checks an adapter folder with its tensors.

    Raises:
        AdapterError: as `read_adapter_config`; or a tensor has integers, fewer than 16 bits, NaN or infinity.
    """
    import torch
    from safetensors.torch import load_file

    folder = Path(folder)
    config, metadata = read_adapter_config(folder)
    source = folder / WEIGHTS_FILE
    try:
        tensors = load_file(source)
    except MemoryError as error:
        raise AdapterError(f"{source}: {TOO_LARGE}") from error
    except SafetensorError as error:  # a dtype that torch has no counterpart for
        raise AdapterError(f"{source}: cannot be read: {error}") from error
    for key, tensor in tensors.items():
        if tensor.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            raise AdapterError(f"{source}: {key}: expected floats of 16 bits or more, found {tensor.dtype}")
        if not tensor.isfinite().all():
            raise AdapterError(f"{source}: {key} holds NaN or infinity; the adapter is unusable")
    return AdapterFile(folder, config, tensors, metadata)


def suggest_adapter(folder: Path) -> str:
    """Returns `` (did you mean 'outputs/sst2/adapter'?)``: the one around a file, in a run, or of a similar name.

    PEFT saves an adapter that is not called `default` in a folder of its name, and Trainer in one for each checkpoint.
    """
    if within := sorted(file.parent for file in folder.glob(f"*/{CONFIG_FILE}")):
        return f" (did you mean {' or '.join(repr(str(each)) for each in within[:3])}?)"
    if folder.exists():
        return f" (did you mean {str(folder.parent)!r}?)" if (folder.parent / CONFIG_FILE).is_file() else ""
    parent = next(parent for parent in folder.parents if parent.is_dir())
    first, *rest = folder.relative_to(parent).parts
    adapters = {}
    with contextlib.suppress(OSError):  # a folder without read permission
        for sibling in parent.iterdir():
            for adapter in (sibling.joinpath(*rest), sibling.joinpath(*rest, "adapter")):
                if (adapter / CONFIG_FILE).is_file():
                    adapters.setdefault(sibling.name, adapter)
    close = difflib.get_close_matches(first, adapters, n=1)
    return f" (did you mean {str(adapters[close[0]])!r}?)" if close else ""


def _weights_advice(folder: Path) -> str:
    """What to do with a folder whose weights are in parts, or pickled."""
    if next(folder.glob("adapter_model-*-of-*.safetensors"), None):
        return (
            ". The weights are in parts, which are not read: load them all with safetensors.torch.load_file, and save "
            f"them as one {WEIGHTS_FILE} with safetensors.torch.save_file"
        )
    pickled = sorted(file.name for file in folder.glob("*") if file.suffix in PICKLED_SUFFIXES)
    if not pickled:
        return ""
    return (
        f". Pickled files such as {pickled[0]} are not read, because they can run code. If you trust this one, save it "
        "again as safetensors: peft.PeftModel.from_pretrained(base, folder).save_pretrained(folder). For a checkpoint "
        "of loralib use convert"
    )


def _contents(folder: Path) -> str:
    if not folder.is_dir():
        return "a file" if folder.exists() else "no such folder"
    names = sorted(file.name for file in folder.iterdir())
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") or "nothing"


def _parse_metadata(header: Any) -> AdapterMetadata:
    """Raises TypeError, AttributeError or ValueError if the header is not what `save_adapter` writes."""
    for key, (expected, is_valid) in HEADER_FIELDS.items():
        if key in header and not is_valid(header[key]):
            raise ValueError(f"{key}: expected {expected}, found {header[key]!r:.100}")
    metadata = AdapterMetadata(**header)
    if metadata.num_labels is not None and len(metadata.labels) != metadata.num_labels:
        raise ValueError(f"labels: expected {metadata.num_labels} names, found {metadata.labels}")
    return replace(metadata, labels=tuple(metadata.labels))
