"""Where a result comes from: package versions, git commit, hardware, memory and time.

Nothing here names the machine or its user.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

PACKAGES = ("lora-hf", "torch", "transformers", "datasets", "evaluate", "accelerate", "safetensors", "tokenizers")
CPUINFO = Path("/proc/cpuinfo")


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that a result depends on."""
    return {"python": platform.python_version(), **{name: version(name) or "not installed" for name in PACKAGES}}


def version(package: str) -> str | None:
    """Returns the installed version of a package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_state() -> dict[str, Any]:
    """Returns `commit` and `changed` (uncommitted changes of the package); empty outside a git checkout of it.

    A virtual environment often lies in the checkout of another project, whose commit says nothing about the package.
    """

    def git(*arguments: str) -> str:
        result = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10
        )
        return result.stdout.strip() if result.returncode == 0 else ""

    try:
        commit = git("ls-files", "--", Path(__file__).name) and git("rev-parse", "HEAD")
        return {"commit": commit, "changed": bool(git("status", "--porcelain", "--", ".."))} if commit else {}
    except (OSError, subprocess.TimeoutExpired):
        return {}


def machine() -> dict[str, Any]:
    """Returns system, processor, number of cores and bytes of memory."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": cpuinfo("model name") or platform.processor(),
        "cores": os.cpu_count(),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None,
    }


def provenance() -> dict[str, Any]:
    """Returns what a record says about its origin: `versions`, `git` and `machine`."""
    return {"versions": versions(), "git": git_state(), "machine": machine()}


class Moment(NamedTuple):
    """The time of day, and in seconds the monotonic clock and the CPU time of this process."""

    date: datetime
    clock: float
    cpu: float

    @classmethod
    def now(cls) -> Moment:
        return cls(datetime.now(timezone.utc), time.monotonic(), time.process_time())


def peak_rss() -> int:
    """Returns the peak memory of this process in bytes; 0 on Windows."""
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def folder_size(folder: Path) -> int:
    """Returns the bytes of all files below a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def cpuinfo(field: str) -> str:
    """Returns a field of the first core in /proc/cpuinfo, such as `model name` or `flags`; empty without one."""
    try:
        lines = CPUINFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.split(":")[0].strip() == field), "")
