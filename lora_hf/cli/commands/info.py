"""`info`: what lora_hf has here to work with, to be pasted into a report of a bug."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from lora_hf.cli.terminal import print_json
from lora_hf.core.errors import how_to_install

if TYPE_CHECKING:
    from lora_hf.cli.environment import Environment


def add(verbs: Any) -> None:
    """Describes the verb."""
    parser = verbs.add_parser("info", help="versions, hardware and what is missing, for a report of a bug")
    parser.add_argument("--json", action="store_true", help="end with one JSON object on standard output")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Looks, and tells."""
    from lora_hf.cli.environment import look_around

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
        "places": _places(found.places),
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
    told["METEOR, CIDEr"] = "Java is there" if chosen["java"] else "no Java: see docs/scores.md"
    return told


def _places(places: dict[str, Any]) -> dict[str, str]:
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
