"""What the name of a base or an adapter refers to: a bundled base, a local folder, or a hub repository."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from lora_hf.core.config.schema import OutputConfig
from lora_hf.core.errors import ModelError, did_you_mean

BUNDLED = ("tiny-roberta", "tiny-gpt2")

# The common short names, and the ids that the hub has moved them to.
HUB_IDS = {
    "roberta-base": "FacebookAI/roberta-base",
    "roberta-large": "FacebookAI/roberta-large",
    "gpt2": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "deberta-v2-xxlarge": "microsoft/deberta-v2-xxlarge",
    "bert-base-uncased": "google-bert/bert-base-uncased",
    "distilbert-base-uncased": "distilbert/distilbert-base-uncased",
}


def check_model_exists(name: str) -> None:
    """Raises ModelError for a path without a folder, or for a misspelled bundled base.

    Any other name may be a hub id, also without a `/`: the hub's oldest models have none.
    """
    if name in BUNDLED or Path(name).is_dir():
        return
    if is_path(name):
        raise ModelError(f"{name}: no such folder; expected a Hugging Face model folder or a hub id")
    close = difflib.get_close_matches(name, BUNDLED, n=1, cutoff=0.7)
    if close and "/" not in name:
        raise ModelError(f"{name}: no such model or folder (did you mean {close[0]!r}?)")


def suggest_model(name: str) -> str:
    """Returns `` (did you mean 'roberta-base'?)`` for a name without `/` that is similar to a known one."""
    known = (*BUNDLED, *HUB_IDS)
    return "" if "/" in name or name in known else did_you_mean(name, known)


def is_path(name: str) -> bool:
    """Whether a name cannot be a hub id: `./x`, `~/x`, `outputs/x`, an absolute path, or more than one slash."""
    return name.startswith((".", "/", "~", f"{OutputConfig.dir}/")) or name.count("/") > 1 or "\\" in name


def is_local(name: str) -> bool:
    """Whether a name refers to a local folder. An existing folder takes precedence over the hub; no name is neither."""
    return is_path(name) or (name != "" and Path(name).is_dir())


def is_hub_id(name: str) -> bool:
    """Whether a name has the form `user/name`, and no local file or folder has that name or that of the user."""
    match = re.fullmatch(r"(\w[\w.-]*)/\w[\w.-]*", name, re.ASCII)
    return match is not None and not is_path(name) and not Path(name).exists() and not Path(match[1]).is_dir()


def base_name(path: str) -> str:
    """The last part of a path. Only this part may appear in files that leave the machine."""
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def public_name(name: str) -> str:
    """A base as records and clients name it: without the path of a local folder."""
    return base_name(name) if Path(name).is_dir() else name
