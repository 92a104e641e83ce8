"""The capabilities of this CPU."""

from __future__ import annotations

from lora_hf.core.provenance import cpuinfo

BF16_UNITS = {"avx512_bf16", "amx_bf16", "bf16"}  # their names in Linux, on x86 and Arm


def has_bf16_units() -> bool:
    """Whether the CPU multiplies bf16 itself. Otherwise torch emulates it, which is tens of times slower."""
    return bool(BF16_UNITS & {*cpuinfo("flags").split(), *cpuinfo("Features").split()})
