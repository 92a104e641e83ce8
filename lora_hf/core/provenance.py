"""Where a result comes from: versions, git commit, machine, memory. Nothing here names the machine or its user."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    pass

PACKAGES = ("lora-hf", "torch", "transformers", "datasets", "evaluate", "accelerate", "safetensors", "tokenizers")
CPUINFO = Path("/proc/cpuinfo")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on."""
    return {"python": platform.python_version(), **{name: version(name) or "not installed" for name in PACKAGES}}


def version(package: str) -> str | None:
    """The installed version of a package; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_state() -> dict[str, Any]:
    """Commit of the code and whether it was changed since; empty where this is no git checkout."""
    here = Path(__file__).parents[1]  # all of lora_hf

    def ask(*words: str) -> str:
        answer = subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, timeout=10)
        return answer.stdout.strip() if answer.returncode == 0 else ""

    try:
        commit = ask("rev-parse", "HEAD")
        return {"commit": commit, "changed": bool(ask("status", "--porcelain", "--", "."))} if commit else {}
    except (OSError, subprocess.TimeoutExpired):
        return {}


def machine() -> dict[str, Any]:
    """Processor, cores and memory; nothing that names the machine or its user."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": cpuinfo("model name") or platform.processor(),
        "cores": os.cpu_count(),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None,
    }


def peak_rss() -> int:
    """The most memory this process has held so far, in bytes; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def folder_size(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def cpuinfo(field: str) -> str:
    """What Linux says of the first core, such as its `model name` or its `flags`; empty where it does not say."""
    try:
        lines = CPUINFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.split(":")[0].strip() == field), "")
