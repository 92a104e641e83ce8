"""What the CPU of this machine can do."""

from __future__ import annotations

from lora_hf.core.provenance import cpuinfo

BF16_UNITS = {"avx512_bf16", "amx_bf16", "bf16"}  # as Linux names them on x86 and Arm


def has_bf16_units() -> bool:
    """Whether bf16 products are computed by the CPU; elsewhere torch emulates them, tens of times slower."""
    return bool(BF16_UNITS & {*cpuinfo("flags").split(), *cpuinfo("Features").split()})
