"""An adapter by its place: a local folder as it is, a hub id through the hub's own cache."""

from __future__ import annotations

from pathlib import Path

from lora_hf.adapters.format import CONFIG_FILE, WEIGHTS_FILE, likely_meant
from lora_hf.core.errors import AdapterError, HubError
from lora_hf.core.hub_access import hub_is_reachable
from lora_hf.core.records import RUN_CONFIG_FILE
from lora_hf.models.model_ids import is_hub_id


def local_adapter(place: str | Path, revision: str | None = None) -> Path:
    """The folder `place`, or the folder in the local cache that holds the hub's adapter `user/name`.

    Only the adapter's two files and the config of its run are downloaded, each whole or not at all. Out of reach of the
    hub what the cache holds is used.

    Args:
        revision: a branch, tag or commit of the repository; its main branch where left out.

    Raises:
        HubError: the hub is out of reach, refuses, or has no such repository, revision or file.
        AdapterError: a revision of a local folder.
    """
    name = str(place)
    if not is_hub_id(name):
        if revision is not None:
            raise AdapterError(f"{name}: a local path has no revision {revision!r}; leave it out, or give USER/NAME")
        return Path(place)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]: its client's own

    reachable = hub_is_reachable()
    wanted = [CONFIG_FILE, WEIGHTS_FILE, RUN_CONFIG_FILE]
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=wanted, local_files_only=not reachable))
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        raise HubError(_failure(name, revision, reachable, error)) from error
    missing = [file for file in (CONFIG_FILE, WEIGHTS_FILE) if not (folder / file).is_file()]
    if missing:
        where = "the hub's repository" if reachable else "the hub is out of reach, and the copy in the local cache"
        raise HubError(
            f"{name}: {where} has no {' and no '.join(missing)}; expected a LoRA adapter in PEFT's format, as "
            "safetensors (.bin files are not read)"
        )
    return folder


def status_of(error: BaseException | None) -> int | None:
    """The HTTP status that an error of the hub's client comes from; None where no answer came."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is not None:
            return status
        error = error.__cause__
    return None


def _failure(name: str, revision: str | None, reachable: bool, error: Exception) -> str:
    from huggingface_hub import constants
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    near = likely_meant(Path(name))
    if not reachable:
        at = "" if revision is None else f" at revision {revision!r}"
        return (
            f"{name}: no such folder here{near}; as a hub id: the hub is out of reach or switched off "
            f"(HF_HUB_OFFLINE), and the local cache does not hold this adapter{at}. Give the path of an adapter "
            "folder, or set HF_ENDPOINT to a mirror"
        )
    status = status_of(error)
    if isinstance(error, RevisionNotFoundError):
        return f"{name}: the hub's repository has no branch, tag or commit {revision!r}"
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"{name}: no such folder here{near}, and no such repository on the hub ({constants.ENDPOINT}) that you may "
            "read. Check the name; for a private one log in with `hf auth login`, or set HF_TOKEN"
        )
    if status == 401:
        return f"{name}: the hub refused the token (401); log in again with `hf auth login`, or set HF_TOKEN"
    if status is not None:
        return f"{name}: the hub answered with status {status}; try again later"
    reason = type(error.__cause__ or error).__name__
    return (
        f"{name}: the connection to the hub ({constants.ENDPOINT}) broke ({reason}); nothing half-loaded is used: run "
        "it again"
    )
