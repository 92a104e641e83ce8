"""The names of the sides, and the job that a worker process gets."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lora_hf.core.errors import ConfigError, did_you_mean

OURS = "lora"
PEAK = "peak"  # multiplies matrices only, to measure the peak of the machine
PRODUCTS = "products"  # multiplies with the frozen weights only, as often as a step does
PEERS = {"peft-default": "peft", "peft-best": "peft", "loralib": "loralib"}  # side: the package it needs
OTHERS = (*PEERS, "full", "head", "frozen", "without-dropout", PRODUCTS)
GROUPS = {"peft": ("peft-default", "peft-best")}
INFER_SIDES = ("mixed", "apart", "merged", "peft-names", "peft-names-bf16")

# The `model` section of each storage format of the frozen base. A quantized base computes in fp32, like the plain one,
# or in bf16, like QLoRA.
FORMATS: dict[str, dict[str, str]] = {
    "fp32": {"precision": "fp32"},
    "bf16": {"precision": "bf16"},
    "int8": {"precision": "fp32", "quantised": "int8"},
    "int8-bf16": {"precision": "bf16", "quantised": "int8"},
    "nf4": {"precision": "fp32", "quantised": "nf4"},
    "nf4-bf16": {"precision": "bf16", "quantised": "nf4"},
}


@dataclass(frozen=True)
class Job:
    """What a worker process does. It travels through a pipe as one line of JSON."""

    side: str
    config: dict[str, Any]  # RunConfig.to_dict()
    rows: list[dict[str, Any]]  # of one round: input_ids, attention_mask, labels, ...
    rounds: int  # including the warm-up
    peak_seconds: float = 0.0  # for each shape that the side `peak` multiplies in a round
    fastest: str = "fp32"  # the precision that this machine multiplies fastest

    def to_line(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_line(cls, line: str) -> Job:
        return cls(**json.loads(line))


def train_sides(against: Sequence[str], model_kind: str) -> tuple[str, ...]:
    """All training sides to run: ours first, with `peft` expanded to both of its settings.

    Raises:
        ConfigError: an unknown side, a side that the task does not have, or a library that is not installed.
    """
    known = (*GROUPS, *OTHERS)
    unknown = [name for name in against if name not in known]
    if unknown:
        found = ", ".join(repr(name) + did_you_mean(name, known) for name in unknown)
        raise ConfigError(f"--against: expected some of {', '.join(known)}, found {found}")
    sides = tuple(dict.fromkeys((OURS, *(side for name in against for side in GROUPS.get(name, (name,))))))
    if "head" in sides and model_kind != "sequence-classification":
        raise ConfigError("--against head: a language model has no head to train alone; leave this side out")
    for side in sides:
        if side in PEERS:
            require_package(PEERS[side], f"--against {side}", ", or leave this side out")
    return sides


def require_package(package: str, needed_by: str, alternative: str = "") -> None:
    if importlib.util.find_spec(package) is None:
        raise ConfigError(f"{needed_by}: {package} is not installed; run pip install {package}{alternative}")
