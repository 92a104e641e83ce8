"""What no test covers of the model types and classes, with the reason: docs/models.md shows it."""

from __future__ import annotations

from typing import NamedTuple


class LeftOut(NamedTuple):
    """Adapters of all classes of some model types that one library writes and the other refuses."""

    model_types: tuple[str, ...]
    writer: str  # PEFT or lora_hf
    setting: str  # of tests/support/peft_settings.py
    error: str  # a regular expression that the message of the refusal matches
    reason: str


# tests/parity/test_peft_classes.py fails if one of these works.
LEFT_OUT = (
    LeftOut(
        model_types=("mixtral", "qwen3_moe"),
        writer="PEFT",
        setting="all-linear",
        error=r"target_parameters=.* not supported",
        reason="PEFT also adapts the tensors of the experts and the router (`target_parameters`), which lora_hf cannot "
        "do. It refuses the file and names that field. Name the projections instead.",
    ),
)


def left_out(kind: str, setting: str) -> LeftOut | None:
    return next((each for each in LEFT_OUT if kind in each.model_types and setting == each.setting), None)
