"""Sends an adapter to the hub: its two files, the config of its run and a model card, in one commit."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from lora_hf.adapters.format import CONFIG_FILE, WEIGHTS_FILE, read_adapter, read_adapter_config, write_adapter
from lora_hf.adapters.model_card import Facts, model_card
from lora_hf.adapters.resolve import http_status, run_config
from lora_hf.core.config.schema import RunConfig
from lora_hf.core.errors import HubError
from lora_hf.core.hub_access import hub_is_reachable
from lora_hf.core.records import RECORD_FILE, RUN_CONFIG_FILE, RunRecord, ScoreRecord
from lora_hf.models.model_ids import base_name, is_local

CARD_FILE = "README.md"
PATHS = {("task", "data_dir"), ("train", "start_from"), ("output", "dir")}  # settings that are always paths


@dataclass(frozen=True)
class Push:
    """What goes to the hub: the size of each file in bytes, and the card. `url` is empty until it is there."""

    repo_id: str
    files: dict[str, int]
    card: str
    url: str = ""


def push_adapter(folder: str | Path, repo_id: str, private: bool = False, dry_run: bool = False) -> Push:
    """Sends the adapter in `folder` to the hub's repository `repo_id`, which is made where it does not exist.

    Everything goes in one commit: the repository holds all of it or nothing. What is said of the run comes from the
    folder above the adapter; without one the card says what is not known. No path of this machine is sent.

    Args:
        private: the repository is private; one that exists and is public is refused.
        dry_run: nothing is sent, and the network is not touched.

    Raises:
        HubError: not a repository id, no token, or the hub is out of reach, broke off or refused.
        AdapterError: `folder` is no readable adapter.
        ConfigError, DataError: its run's config or record is damaged.
    """
    _check_repo_id(repo_id)
    facts, contents = _adapter(Path(folder))
    card = model_card(repo_id, facts)
    contents[CARD_FILE] = card.encode()
    if facts.run is not None:
        contents[RUN_CONFIG_FILE] = yaml.safe_dump(facts.run.to_dict(), sort_keys=False).encode()
    push = Push(repo_id, {name: len(content) for name, content in contents.items()}, card)
    return push if dry_run else replace(push, url=_send(repo_id, contents, private))


def _check_repo_id(repo_id: str) -> None:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo_id)
        good = repo_id.count("/") == 1
    except HFValidationError:
        good = False
    if not good:
        raise HubError(
            f"{repo_id!r} is not the id of a repository: expected USER/NAME, each of at most 96 letters, digits, '-', "
            "'_' and '.', such as someone/sst2-lora"
        )


def _adapter(folder: Path) -> tuple[Facts, dict[str, bytes]]:
    """What is known of the adapter, and its two files as they are sent."""
    config, metadata = read_adapter_config(folder)
    facts = Facts(config, metadata)
    run, above = run_config(folder), folder.resolve().parent
    if run is not None and run.model.name == facts.base:
        facts = replace(facts, run=_without_paths(run))
    record = RunRecord.load(above / RECORD_FILE) if (above / RECORD_FILE).is_file() else None
    if record is not None and (record.task, record.model) == (metadata.task, facts.base):  # else it is of another run
        scores = [ScoreRecord.load(file) for file in sorted(above.glob("scores-*.json"))]
        facts = replace(facts, record=record, scores=[each for each in scores if each.adapted])
    if not is_local(facts.base):
        return facts, {name: (folder / name).read_bytes() for name in (CONFIG_FILE, WEIGHTS_FILE)}
    public = base_name(facts.base)
    with tempfile.TemporaryDirectory() as aside:
        write_adapter(
            Path(aside),
            {**config, "base_model_name_or_path": public},
            read_adapter(folder).tensors,
            replace(metadata, base=public),
        )
        return facts, {name: (Path(aside) / name).read_bytes() for name in (CONFIG_FILE, WEIGHTS_FILE)}


def _without_paths(run: RunConfig) -> RunConfig:
    """The config with the base name of every path in it."""

    def public(section: str, key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {name: public(section, name, inner) for name, inner in value.items()}
        named = isinstance(value, str) and ((section, key) in PATHS or is_local(value))
        return base_name(value) if named else value

    sections = run.to_dict().items()
    return RunConfig.from_dict(
        {section: {key: public(section, key, value) for key, value in values.items()} for section, values in sections}
    )


def _send(repo_id: str, contents: Mapping[str, bytes], private: bool) -> str:
    """Makes the repository and the one commit; the address of the repository."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]: its client's own

    if get_token() is None:
        raise HubError(
            "no token for the hub: log in with `hf auth login`, or set HF_TOKEN to a token that may write (see "
            f"{constants.ENDPOINT}/settings/tokens)"
        )
    if not hub_is_reachable():
        raise HubError(
            f"{repo_id}: the hub ({constants.ENDPOINT}) is out of reach or switched off (HF_HUB_OFFLINE); nothing was "
            "sent. --dry-run shows what would be"
        )
    api = HfApi()
    changes: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in contents.items()
    ]
    try:
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        if private and not api.model_info(repo_id).private:
            raise HubError(
                f"{repo_id} exists and is public: --private would not hide it. Make it private in its settings, or "
                "choose another name"
            )
        if RUN_CONFIG_FILE not in contents and api.file_exists(repo_id, RUN_CONFIG_FILE):
            changes.append(CommitOperationDelete(RUN_CONFIG_FILE))  # it describes the adapter that was there before
        api.create_commit(repo_id, changes, commit_message="Upload a LoRA adapter")
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        raise HubError(f"{repo_id}: {_failure(error)}. What is pushed is there as a whole or not at all") from error
    return f"{constants.ENDPOINT}/{repo_id}"


def _failure(error: Exception) -> str:
    status = http_status(error)
    if status == 401:
        return "the hub refused the token (401); log in with `hf auth login`, or set HF_TOKEN to one that may write"
    if status in (403, 404):
        return (
            f"this token may not write there ({status}); choose a repository of your own, or log in as its owner with "
            "`hf auth login`, or set HF_TOKEN to a token that may write"
        )
    if status is not None:
        return f"the hub answered with status {status}: {getattr(error, 'server_message', None) or 'no reason given'}"
    if isinstance(error, ValueError):  # the hub's word on the card
        return str(error).strip()
    return f"the connection to the hub broke ({type(error).__name__}); run it again"
