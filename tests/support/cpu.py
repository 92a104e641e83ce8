"""The capabilities of this CPU."""

from __future__ import annotations

import torch

from lora_hf.core.provenance import cpuinfo

BF16_UNITS = {"avx512_bf16", "amx_bf16", "bf16"}  # their names in Linux, on x86 and Arm


def has_bf16_units() -> bool:
    """Whether the CPU multiplies bf16 itself. Otherwise torch emulates it, which is tens of times slower."""
    return bool(BF16_UNITS & {*cpuinfo("flags").split(), *cpuinfo("Features").split()})


def renew_thread_pool() -> None:
    """To call first in a forked process, while it has one thread.

    torch replaces the thread pool that a fork breaks when it is next asked for one. If two threads ask at once, as when
    transformers loads weights, one of them may find none: "Invalid thread pool!".
    """
    torch.set_num_threads(torch.get_num_threads())
