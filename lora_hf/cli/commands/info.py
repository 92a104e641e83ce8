"""`info`: what lora_hf has here to work with, to be pasted into a report of a bug."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packaging.requirements import Requirement

from lora_hf.cli.terminal import print_json
from lora_hf.core.errors import how_to_install
from lora_hf.core.provenance import cpuinfo, git_state, machine, version, versions
from lora_hf.lora.architectures import ARCHITECTURES

if TYPE_CHECKING:
    from lora_hf.cli.commands.info import Environment


def add(verbs: Any) -> None:
    """Describes the verb."""
    parser = verbs.add_parser("info", help="versions, hardware and what is missing, for a report of a bug")
    parser.add_argument("--json", action="store_true", help="end with one JSON object on standard output")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Looks, and tells."""
    from lora_hf.cli.commands.info import look_around

    found = look_around()
    if options.json:
        print_json(found.to_dict())
        return
    for title, lines in _told(found).items():
        print(title)
        for name, value in lines.items():
            print(f"  {name:18}{value}")


def _told(found: Environment) -> dict[str, dict[str, str]]:
    installed = {name: version for name, version in found.optional.items() if version is not None}
    told = {
        "versions": {**found.versions, **_commit(found.code)},
        "optional packages": installed or {"none": ""},
        "hardware": _hardware(found.machine),
        "chosen here": _chosen(found.chosen, found.problem),
        "places": _places_lines(found.places),
    }
    if found.missing:
        told["missing"] = {
            extra: f"{', '.join(packages)}: {how_to_install(extra)}" for extra, packages in found.missing.items()
        }
    return told


def _commit(code: dict[str, Any]) -> dict[str, str]:
    return {"commit": code["commit"][:12] + (", changed since" if code["changed"] else "")} if code else {}


def _hardware(machine: dict[str, Any]) -> dict[str, str]:
    cores = f"{machine['cores']}, {machine['usable_cores']} for this process"
    told = {
        "system": machine["system"],
        "processor": machine["processor"] or "unknown",
        "cores": cores + (f", {machine['threads']} threads" if "threads" in machine else ""),
        "memory": _gigabytes(machine["memory"]),
        "instructions": " ".join(machine["units"]) or "unknown",
    }
    for number, gpu in enumerate(machine.get("gpus", ())):
        told[f"GPU {number}"] = f"{gpu['name']}, {_gigabytes(gpu['memory'])}, capability {gpu['compute_capability']}"
    if not machine.get("gpus"):
        told["GPU"] = "none that torch sees"
    return told


def _chosen(chosen: dict[str, Any], problem: str | None) -> dict[str, str]:
    told = {"torch": f"cannot be imported: {problem}"} if problem else {}
    if "auto_precision" in chosen:
        told["precision: auto"] = (
            f"{chosen['auto_precision']}: bf16 is {chosen['bf16_gain']:.1f} times as fast as fp32 here, "
            f"and taken from {chosen['bf16_from']:g} on"
        )
    told["LoRA layers"] = "fused forward and backward, in plain torch; rows of many adapters grouped"
    told["without padding"] = ", ".join(chosen["padding_free"])
    if chosen["padded"]:
        told["with padding"] = ", ".join(chosen["padded"])
    units = ", ".join(chosen["int8_units"])
    told["quantised: int8"] = f"yes, by {units}" if units else "yes, without instructions for it"
    told["quantised: nf4"] = "yes" if chosen["nf4"] else f"no: {how_to_install('quantised')}"
    told["METEOR, CIDEr"] = "Java is there" if chosen["java"] else "no Java: see docs/generation_metrics.md"
    return told


def _places_lines(places: dict[str, Any]) -> dict[str, str]:
    data = places["data"]
    there = "" if places["data_is_there"] else ", which is not a folder"
    told = {
        "data": f"LORA_HF_DATA_DIR={data}{there}" if data else "the hub, or task.data_dir; LORA_HF_DATA_DIR is not set",
        "models": f"{places['cache']}, then the hub",
    }
    if places["offline"]:
        told["offline"] = f"{', '.join(places['offline'])}: the hub is not asked"
    if places["other_endpoint"]:
        told["endpoint"] = "HF_ENDPOINT names another than the hub"
    if places["proxy"]:
        told["proxy"] = "set"
    return told


def _gigabytes(size: int | None) -> str:
    return f"{size / 1e9:.1f} GB" if size else "unknown"


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
    from lora_hf.lora.precision import FASTER, bf16_gain, resolve_precision

    return {"auto_precision": resolve_precision("auto"), "bf16_gain": bf16_gain(), "bf16_from": FASTER}


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
