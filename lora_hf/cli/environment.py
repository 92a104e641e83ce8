"""What lora_hf has here to work with: versions, hardware, what is chosen because of them, places, and what is missing.

Nothing in it names the machine or its user, and no token or address is read: it is made to be pasted into a report.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from lora_hf.core.records import cpuinfo, git_state, machine, version, versions
from lora_hf.lora.architectures import ARCHITECTURES

DISTRIBUTION = "lora-hf"
FOR_DEVELOPERS = ("dev", "docs", "test")  # extras that nobody misses who uses lora_hf
PEERS = ("loralib", "peft")
# Instructions that a matrix product is faster with, as Linux names them.
UNITS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
INTEGER_UNITS = ("avx512_vnni", "amx_int8")


@dataclass(frozen=True)
class Environment:
    """`versions` are of what a run needs, `optional` of what else it may meet, None where that is not installed.

    Memory is in bytes. `problem` says why torch cannot be imported; the machine and the choices then lack what only
    torch knows.
    """

    versions: dict[str, str]
    optional: dict[str, str | None]
    code: dict[str, Any]
    machine: dict[str, Any]
    chosen: dict[str, Any]
    places: dict[str, Any]
    missing: dict[str, list[str]]  # by extra
    problem: str | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def look_around() -> Environment:
    """Everything, in the seconds that importing torch takes; the network is not touched."""
    optional, missing = _extras()
    hardware: dict[str, Any] = machine() | {"usable_cores": _usable_cores(), "units": _units()}
    chosen: dict[str, Any] = {
        "padding_free": [kind for kind, entry in ARCHITECTURES.items() if entry.plain_attention],
        "padded": [kind for kind, entry in ARCHITECTURES.items() if not entry.plain_attention],
        "nf4": optional.get("bitsandbytes") is not None,
        "int8_units": [unit for unit in INTEGER_UNITS if unit in hardware["units"]],
        "java": shutil.which("java") is not None,
    }
    problem = None
    try:
        hardware |= _seen_by_torch()
        chosen |= _precision()
    except Exception as error:  # noqa: BLE001 - a torch that cannot be imported is what this is asked for
        problem = f"{type(error).__name__}: {_homeless(str(error))}"
    return Environment(versions(), optional, git_state(), hardware, chosen, _places(), missing, problem)


def _extras() -> tuple[dict[str, str | None], dict[str, list[str]]]:
    """The version of each package that an extra brings, and by extra those that are missing or too old."""
    found = {name: version(name) for name in PEERS}
    missing: dict[str, list[str]] = {}
    needed = [Requirement(line) for line in importlib.metadata.requires(DISTRIBUTION) or ()]
    extras = importlib.metadata.metadata(DISTRIBUTION).get_all("Provides-Extra") or ()
    for extra in (each for each in extras if each not in FOR_DEVELOPERS):
        for each in needed:
            marker = each.marker
            if marker is None or not marker.evaluate({"extra": extra}) or marker.evaluate({"extra": ""}):
                continue
            if each.name == DISTRIBUTION:  # extras of its own, which are looked at by themselves
                continue
            found[each.name] = version(each.name)
            if found[each.name] is None or not each.specifier.contains(found[each.name] or "", prereleases=True):
                missing.setdefault(extra, []).append(f"{each.name}{each.specifier}")
    return dict(sorted(found.items())), missing


def _usable_cores() -> int | None:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _units() -> list[str]:
    flags = cpuinfo("flags").split()
    return [unit for unit in UNITS if unit in flags]


def _seen_by_torch() -> dict[str, Any]:
    import torch

    gpus = []
    for index in range(torch.cuda.device_count()):
        known = torch.cuda.get_device_properties(index)
        capability = f"{known.major}.{known.minor}"
        gpus.append({"name": known.name, "memory": known.total_memory, "compute_capability": capability})
    return {"threads": torch.get_num_threads(), "cuda": torch.version.cuda, "gpus": gpus}


def _precision() -> dict[str, Any]:
    from lora_hf.lora.precision import FASTER, bf16_gain, resolve

    return {"auto_precision": resolve("auto"), "bf16_gain": bf16_gain(), "bf16_from": FASTER}


def _places() -> dict[str, Any]:
    """Where data and models are looked for; a path below the user's folder begins with `~`."""
    data = os.environ.get("LORA_HF_DATA_DIR") or None
    cache = os.environ.get("HF_HUB_CACHE") or os.environ.get("HF_HOME") or "~/.cache/huggingface"
    return {
        "data": data and _homeless(data),
        "data_is_there": bool(data) and Path(data).expanduser().is_dir(),
        "cache": _homeless(cache),
        "offline": [name for name in OFFLINE if os.environ.get(name)],
        "other_endpoint": bool(os.environ.get("HF_ENDPOINT")),
        "proxy": any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")),
    }


def _homeless(text: str) -> str:
    home = str(Path.home())
    return text.replace(home, "~") if len(home) > 1 else text
