"""`info`: versions, hardware and settings, for a bug report; with `--model`, what a config would adapt of a model.

The output contains no token, no address, and no name of the machine or its user.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import shutil
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from lora_hf.cli.terminal import add_json, print_json
from lora_hf.core.errors import how_to_install
from lora_hf.core.provenance import cpuinfo, git_state, machine, version, versions
from lora_hf.lora.architectures import ARCHITECTURES

HELP = "show versions, hardware and missing packages, or the modules of a model that LoRA targets select"
DISTRIBUTION = "lora-hf"
DEVELOPER_EXTRAS = ("dev", "docs", "test")  # no user misses these
PEERS = ("loralib", "peft")
# CPU instructions that speed up matrix products, by their names in Linux.
CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
INT8_FLAGS = ("avx512_vnni", "amx_int8")
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
PROXIES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", metavar="NAME", help="show which modules of this base the targets select; loads no weights")
    add("--targets", default="all", metavar="TARGET,...", help="with --model: lora.targets; default: all")
    add("--r", type=int, default=8, metavar="N", help="with --model: the rank; default: 8")
    add_json(parser)


def run(options: argparse.Namespace) -> None:
    if options.model:
        from lora_hf.cli.model_table import describe_model, format_model

        model = describe_model(options.model, tuple(options.targets.split(",")), options.r)
        print_json(model) if options.json else print(format_model(model))
        return
    info = collect()
    if options.json:
        print_json(info)
        return
    for title, lines in _sections(info).items():
        if shown := {name: value for name, value in lines.items() if value}:
            print("\n".join([title, *(f"  {name:18}{value}" for name, value in shown.items())]))


def collect() -> dict[str, Any]:
    """Collects everything, in the seconds that importing torch takes and without using the network.

    Returns:
        `versions` of required packages, `optional` ones by name (None: not installed), and those `missing` by extra;
        `code`, `machine` (memory in bytes), `chosen` and `places`. If torch cannot be imported, `problem` says why, and
        what only torch knows is left out.
    """
    optional, missing = _extras()
    flags = cpuinfo("flags").split()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    hardware: dict[str, Any] = machine() | {
        "usable_cores": cores,
        "units": [each for each in CPU_FLAGS if each in flags],
    }
    chosen: dict[str, Any] = {
        "padding_free": [kind for kind, entry in ARCHITECTURES.items() if not entry.padded_because],
        "padded": [kind for kind, entry in ARCHITECTURES.items() if entry.padded_because],
        "nf4": optional.get("bitsandbytes") is not None,
        "int8_units": [flag for flag in INT8_FLAGS if flag in flags],
        "no_java_metrics": _why_no_java_metrics(optional),
    }
    problem = None
    try:
        _add_what_torch_knows(hardware, chosen)
    except Exception as error:  # noqa: BLE001 - a torch that cannot be imported is something to report
        problem = f"{type(error).__name__}: {_hide_home(str(error))}"
    data = os.environ.get("LORA_HF_DATA_DIR") or None
    cache = os.environ.get("HF_HUB_CACHE") or os.environ.get("HF_HOME") or "~/.cache/huggingface"
    return {
        "versions": versions(),
        "optional": optional,
        "code": git_state(),
        "machine": hardware,
        "chosen": chosen,
        "places": {
            "data": data and _hide_home(data),
            "data_is_there": bool(data) and Path(data).expanduser().is_dir(),
            "cache": _hide_home(cache),
            "offline": [name for name in OFFLINE if os.environ.get(name)],
            "other_endpoint": bool(os.environ.get("HF_ENDPOINT")),
            "proxy": any(os.environ.get(name) for name in PROXIES),
        },
        "missing": missing,
        "problem": problem,
    }


def _extras() -> tuple[dict[str, str | None], dict[str, list[str]]]:
    """The version of each optional package, and for each extra the packages that are missing or too old."""
    optional = {name: version(name) for name in PEERS}
    missing: dict[str, list[str]] = {}
    if version(DISTRIBUTION) is None:  # a clone whose scripts run without an installation
        return optional, {}
    requirements = [Requirement(line) for line in importlib.metadata.requires(DISTRIBUTION) or ()]
    extras = importlib.metadata.metadata(DISTRIBUTION).get_all("Provides-Extra") or ()
    for extra in (each for each in extras if each not in DEVELOPER_EXTRAS):
        for requirement in requirements:
            marker, name = requirement.marker, requirement.name
            if marker is None or not marker.evaluate({"extra": extra}) or marker.evaluate({"extra": ""}):
                continue
            if name == DISTRIBUTION:  # another extra, which is listed by itself
                continue
            installed = optional[name] = version(name)
            if installed is None or not requirement.specifier.contains(installed, prereleases=True):
                missing.setdefault(extra, []).append(f"{name}{requirement.specifier}")
    return dict(sorted(optional.items())), missing


def _why_no_java_metrics(optional: dict[str, str | None]) -> str | None:
    """Why METEOR and CIDEr cannot be computed; None if they can."""
    if shutil.which("java") is None:
        return "no, Java is missing: see docs/generation_metrics.md"
    return None if optional.get("pycocoevalcap") else f"no: {how_to_install('nlg')}"


def _add_what_torch_knows(hardware: dict[str, Any], chosen: dict[str, Any]) -> None:
    import torch

    from lora_hf.lora.precision import FASTER, bf16_gain, resolve_precision

    gpus = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    hardware["threads"], hardware["cuda"] = torch.get_num_threads(), torch.version.cuda
    hardware["gpus"] = [
        {"name": gpu.name, "memory": gpu.total_memory, "compute_capability": f"{gpu.major}.{gpu.minor}"} for gpu in gpus
    ]
    chosen |= {"auto_precision": resolve_precision("auto"), "bf16_gain": bf16_gain(), "bf16_from": FASTER}


def _hide_home(text: str) -> str:
    home = str(Path.home())
    return text.replace(home, "~") if len(home) > 1 else text


def _sections(info: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The lines to print, by section and name; empty ones are left out."""
    code, hardware, chosen, places = info["code"], info["machine"], info["chosen"], info["places"]
    cores = f"{hardware['cores']}, {hardware['usable_cores']} of them usable by this process"
    gpus = {
        f"GPU {number}": f"{gpu['name']}, {_gigabytes(gpu['memory'])}, capability {gpu['compute_capability']}"
        for number, gpu in enumerate(hardware.get("gpus", ()))
    }
    units = ", ".join(chosen["int8_units"])
    data = "task.data_dir, otherwise the hub; LORA_HF_DATA_DIR is not set"
    if places["data"]:
        data = f"LORA_HF_DATA_DIR={places['data']}" + ("" if places["data_is_there"] else ": no such folder")
    return {
        "versions": {
            **info["versions"],
            "commit": code and code["commit"][:12] + (", with local changes" if code["changed"] else ""),
        },
        "optional packages": {name: installed for name, installed in info["optional"].items() if installed},
        "hardware": {
            "system": hardware["system"],
            "processor": hardware["processor"] or "unknown",
            "cores": cores + (f", {hardware['threads']} threads" if "threads" in hardware else ""),
            "memory": _gigabytes(hardware["memory"]),
            "instructions": " ".join(hardware["units"]) or "unknown",
            **(gpus or {"GPU": "none visible to torch"}),
        },
        "settings on this machine": {
            "torch": info["problem"] and f"cannot be imported: {info['problem']}",
            "precision: auto": "auto_precision" in chosen
            and f"{chosen['auto_precision']}: bf16 runs {chosen['bf16_gain']:.1f} times as fast as fp32, and is used "
            f"from {chosen['bf16_from']:g} times on",
            "without padding": ", ".join(chosen["padding_free"]),
            "with padding": ", ".join(chosen["padded"]),
            "quantized: int8": f"yes, with {units}" if units else "yes, but without CPU instructions for it",
            "quantized: nf4": "yes" if chosen["nf4"] else f"no: {how_to_install('quantised')}",
            "METEOR, CIDEr": chosen["no_java_metrics"] or "yes",
        },
        "data and models": {
            "data": data,
            "models": f"{places['cache']}, then the hub",
            "offline": places["offline"] and f"{', '.join(places['offline'])}: the hub is not used",
            "endpoint": places["other_endpoint"] and "HF_ENDPOINT replaces the hub",
            "proxy": places["proxy"] and "set",
        },
        "missing": {
            extra: f"{', '.join(packages)}: {how_to_install(extra)}" for extra, packages in info["missing"].items()
        },
    }


def _gigabytes(size: int | None) -> str:
    return f"{size / 1e9:.1f} GB" if size else "unknown"
