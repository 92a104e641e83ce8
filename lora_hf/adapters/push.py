"""Uploads an adapter to the hub in one commit: its two files, the config of its run and a model card."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from lora_hf.adapters.format import CONFIG_FILE, WEIGHTS_FILE, base_of, read_adapter, read_adapter_config, write_adapter
from lora_hf.adapters.model_card import Facts, model_card
from lora_hf.adapters.resolve import run_config
from lora_hf.core.config.schema import RunConfig
from lora_hf.core.errors import HubError
from lora_hf.core.hub_access import explain_hub_error, hub_is_reachable, hub_unreachable
from lora_hf.core.records import RECORD_FILE, RUN_CONFIG_FILE, RunRecord, ScoreRecord
from lora_hf.models.model_ids import base_name, is_local

CARD_FILE = "README.md"
PATH_SETTINGS = {("task", "data_dir"), ("train", "start_from"), ("output", "dir")}  # always paths, never names


@dataclass(frozen=True)
class Push:
    """An upload: the size of each file in bytes, and the model card. `url` is empty for a dry run."""

    repo_id: str
    files: dict[str, int]
    card: str
    url: str = ""


def push_adapter(
    folder: str | Path, repo_id: str, private: bool = False, dry_run: bool = False, model: str | None = None
) -> Push:
    """Uploads the adapter in `folder` to the hub repository `repo_id`, and creates the repository if needed.

    The upload is one commit, so the repository gets all files or none. The record and the config of the run come from
    the folder above the adapter; without them the card says what is unknown. Paths of this machine are not uploaded.

    Args:
        private: create a private repository; fails if the repository exists and is public.
        dry_run: upload nothing and do not use the network.
        model: the base to name, such as its hub id; by default what the adapter names.

    Raises:
        HubError: an invalid repository id, no token, or the hub is out of reach, refuses or drops the connection.
        AdapterError: `folder` is not a readable adapter.
        ConfigError, DataError: the config or the record of the run is damaged.
    """
    _check_repo_id(repo_id)
    facts, contents = _read(Path(folder), model)
    card = model_card(repo_id, facts)
    contents[CARD_FILE] = card.encode()
    if facts.run is not None:
        contents[RUN_CONFIG_FILE] = yaml.safe_dump(facts.run.to_dict(), sort_keys=False).encode()
    push = Push(repo_id, {name: len(content) for name, content in contents.items()}, card)
    return push if dry_run else replace(push, url=_upload(repo_id, contents, private))


def _check_repo_id(repo_id: str) -> None:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo_id)
        valid = repo_id.count("/") == 1
    except HFValidationError:
        valid = False
    if not valid:
        raise HubError(
            f"{repo_id!r} is not a repository id: expected USER/NAME, each of at most 96 letters, digits, '-', '_' and "
            "'.', such as someone/sst2-lora"
        )


def _read(folder: Path, model: str | None) -> tuple[Facts, dict[str, bytes]]:
    """The facts for the model card, and the two files of the adapter without local paths."""
    config, metadata = read_adapter_config(folder)
    base = model or base_of(config, metadata)
    names = {base, base_of(config, metadata), metadata.base}
    facts = Facts({**config, "base_model_name_or_path": base}, metadata)
    run, run_folder = run_config(folder), folder.resolve().parent
    if run is not None and run.model.name in names:
        facts = replace(facts, run=_without_paths(replace(run, model=replace(run.model, name=base))))
    record = RunRecord.load(run_folder / RECORD_FILE) if (run_folder / RECORD_FILE).is_file() else None
    if record is not None and record.task == metadata.task and record.model in names:  # else it is another run's
        scores = [ScoreRecord.load(file) for file in sorted(run_folder.glob("scores-*.json"))]
        facts = replace(facts, record=record, scores=[score for score in scores if score.adapted])
    tokenizer = metadata.tokenizer.get("name", "")
    if len(names) == 1 and not is_local(base) and not is_local(tokenizer):
        return facts, _adapter_files(folder)
    public = base_name(base) if is_local(base) else base
    if is_local(tokenizer):
        metadata = replace(metadata, tokenizer={**metadata.tokenizer, "name": base_name(tokenizer)})
    with tempfile.TemporaryDirectory() as tmp:
        config = {**config, "base_model_name_or_path": public}
        write_adapter(Path(tmp), config, read_adapter(folder).tensors, replace(metadata, base=public))
        return facts, _adapter_files(Path(tmp))


def _adapter_files(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in (CONFIG_FILE, WEIGHTS_FILE)}


def _without_paths(run: RunConfig) -> RunConfig:
    """The config with every path shortened to its base name."""

    def shorten(section: str, key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {name: shorten(section, name, inner) for name, inner in value.items()}
        is_path = isinstance(value, str) and ((section, key) in PATH_SETTINGS or is_local(value))
        return base_name(value) if is_path else value

    return RunConfig.from_dict({section: shorten(section, "", values) for section, values in run.to_dict().items()})


def _upload(repo_id: str, contents: Mapping[str, bytes], private: bool) -> str:
    """Creates the repository and the commit; returns the URL of the repository."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]: its HTTP client's class

    if get_token() is None:
        raise HubError(
            "no token for the hub: log in with `hf auth login`, or set HF_TOKEN to a token that may write (see "
            f"{constants.ENDPOINT}/settings/tokens)"
        )
    if not hub_is_reachable():
        raise HubError(f"{repo_id}: {hub_unreachable()}; nothing was sent. A dry run needs no network")
    api = HfApi()
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in contents.items()
    ]
    try:
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        if private and not api.model_info(repo_id).private:
            raise HubError(
                f"{repo_id} exists and is public: private=True does not hide it. Make it private in its settings, or "
                "choose another name"
            )
        if RUN_CONFIG_FILE not in contents and api.file_exists(repo_id, RUN_CONFIG_FILE):
            operations.append(CommitOperationDelete(RUN_CONFIG_FILE))  # it belongs to the previous adapter
        api.create_commit(repo_id, operations, commit_message="Upload a LoRA adapter")
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        reason = explain_hub_error(error, upload=True)
        raise HubError(f"{repo_id}: {reason}. The commit is complete or missing, never partial") from error
    return f"{constants.ENDPOINT}/{repo_id}"
