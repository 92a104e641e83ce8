"""What is measured: the sides by name, and one side's work in the form that goes through a pipe."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lora_hf.core.errors import ConfigError, did_you_mean

OURS = "lora"
PEAK = "peak"  # the machine's matrix multiplications; takes its turn as the sides do
PEERS = {"peft-default": "peft", "peft-best": "peft", "loralib": "loralib"}  # and the package that each needs
OTHERS = (*PEERS, "full", "head", "frozen", "without-dropout")
GROUPS = {"peft": ("peft-default", "peft-best")}


@dataclass(frozen=True)
class Work:
    """What a process is told first: its side, a `RunConfig.to_dict()`, the encoded rows, and how often they come."""

    side: str
    config: dict[str, Any]
    rows: list[dict[str, Any]]  # of one round: input_ids, attention_mask, labels, ...
    rounds: int  # the warm-up's included
    peak_seconds: float  # for each shape that `peak` multiplies in a round

    def to_line(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_line(cls, line: str) -> Work:
        return cls(**json.loads(line))


def sides_of(against: Sequence[str], model_kind: str) -> tuple[str, ...]:
    """Every side to run, ours first, `peft` standing for both of its settings.

    Raises:
        ConfigError: an unknown name, a side that the task cannot have, or a peer that is not installed.
    """
    known = (*GROUPS, *OTHERS)
    unknown = [name for name in against if name not in known]
    if unknown:
        found = ", ".join(repr(name) + did_you_mean(name, known) for name in unknown)
        raise ConfigError(f"--against: expected some of {', '.join(known)}, found {found}")
    sides = tuple(dict.fromkeys((OURS, *(side for name in against for side in GROUPS.get(name, (name,))))))
    if "head" in sides and model_kind != "sequence-classification":
        raise ConfigError("--against head: a language model has no head to train alone; leave it out")
    for side in sides:
        package = PEERS.get(side)
        if package and importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"--against {side}: {package} is not installed; run pip install {package}, or leave it out"
            )
    return sides
