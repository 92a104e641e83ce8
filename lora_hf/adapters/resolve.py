"""What a folder of trained weights says about itself, told without loading torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lora_hf.adapters.format import CONFIG_FILE, WEIGHTS_FILE, read_adapter_config, suggest_adapter
from lora_hf.core.config.loader import load_config
from lora_hf.core.config.schema import GenerateConfig, ModelConfig, RunConfig
from lora_hf.core.errors import AdapterError, HubError
from lora_hf.core.hub_access import hub_is_reachable
from lora_hf.core.records import COMBINE_FILE, MERGE_FILE, RECORD_FILE, RUN_CONFIG_FILE, CombineRecord, MergeRecord
from lora_hf.data.tasks.base import Task
from lora_hf.data.tasks.custom import task_section
from lora_hf.data.tasks.registry import get_task, task_names, task_of
from lora_hf.models.model_ids import is_hub_id


@dataclass(frozen=True)
class SavedModel:
    """An adapter with the base it needs, or (`whole`) a model of which every parameter was trained."""

    folder: Path
    whole: bool
    task: Task
    model: ModelConfig
    seed: int = 0
    max_length: int = 512
    generate: GenerateConfig = field(default_factory=GenerateConfig)

    @property
    def run(self) -> Path | None:
        """The folder of the run that these weights are the result of, where they lie in it."""
        made = any((self.folder / name).is_file() for name in (MERGE_FILE, COMBINE_FILE))
        run = self.folder.resolve().parent
        return run if (run / RECORD_FILE).is_file() and not made else None


def find_saved_model(folder: str | Path, revision: str | None = None) -> SavedModel:
    """What lies in `outputs/<run>/adapter`, `outputs/<run>/model`, in an adapter folder that was copied elsewhere, or
    in a merged model or combined adapter, wherever it is.

    `folder` may also be the hub id of an adapter, `user/name`, and `revision` a branch, tag or commit of it.

    Raises:
        AdapterError: none of them, damaged, or without a word on base and task.
        DataError: the record of a merge or a combination is damaged.
        HubError: as `fetch_adapter`.
    """
    folder = fetch_adapter(folder, revision)
    run = run_config(folder)
    if not (folder / CONFIG_FILE).is_file() and (folder / "config.json").is_file():
        if run is None:
            raise AdapterError(
                f"{folder}: a whole model outside its run folder: expected ../{RUN_CONFIG_FILE}, which names its task"
            )
        merged = (folder / MERGE_FILE).is_file()
        whole = ModelConfig(name=str(folder), precision=run.model.precision if merged else "auto")
        return SavedModel(folder, True, task_of(run.task), whole, 0, run.task.max_length, run.generate)
    config, about = read_adapter_config(folder)
    base = about.base or config.get("base_model_name_or_path")
    if not base or not about.task:
        missing = " and ".join(word for word, known in (("base", base), ("task", about.task)) if not known)
        raise AdapterError(
            f"{folder / WEIGHTS_FILE}: does not say which {missing} it was trained for; PEFT records no task. "
            'Save it with lora_hf.save_adapter(model, folder, task="sst2"), or whichever task it is for, or load it in '
            "Python with lora_hf.load_adapter(model, folder)"
        )
    task = _task_called(about.task, run, folder)
    if task.label_names and task.label_names != about.labels:
        raise AdapterError(
            f"{folder} was trained for the labels {', '.join(about.labels)}; task {task.name} has "
            f"{', '.join(task.label_names)}"
        )
    if run is None or run.model.name != base:
        return SavedModel(folder, False, task, ModelConfig(name=base))
    # The run says what the adapter does not: a tokenizer from elsewhere, a random base and its seed.
    return SavedModel(folder, False, task, run.model, run.train.seed, run.task.max_length, run.generate)


def _task_called(name: str, run: RunConfig | None, folder: Path) -> Task:
    """The task that an adapter names: one of ours, or the own data that the config of its run describes."""
    if run is not None and run.task.kind is not None and run.task.name == name:
        return task_of(run.task)
    if name not in task_names():
        raise AdapterError(
            f"{folder} was trained for {name!r}, which is no task of lora_hf; own data are described in the "
            f"{RUN_CONFIG_FILE} of the run: put that file into this folder"
        )
    return get_task(name)


def config_of(saved: SavedModel) -> dict[str, Any]:
    """The sections of a run's config that say how `saved` answers; what is made from it keeps them in its record."""
    return {
        "model": asdict(saved.model),
        "task": task_section(saved.task) | {"max_length": saved.max_length},
        "train": {"seed": saved.seed},
        "generate": asdict(saved.generate),
    }


def run_config(folder: Path) -> RunConfig | None:
    """The config of the run that the weights in `folder` come from, where that can be known.

    It stands in the record of a merge or a combination, above the weights in a run folder, beside them if pulled.

    Raises:
        ConfigError, DataError: it cannot be read.
    """
    if (folder / MERGE_FILE).is_file():
        return RunConfig.from_dict(MergeRecord.load(folder / MERGE_FILE).config, str(folder / MERGE_FILE))
    if (folder / COMBINE_FILE).is_file():
        return RunConfig.from_dict(CombineRecord.load(folder / COMBINE_FILE).config, str(folder / COMBINE_FILE))
    for place in (folder / RUN_CONFIG_FILE, folder.resolve().parent / RUN_CONFIG_FILE):
        if place.is_file():
            return load_config(place)
    return None


def fetch_adapter(place: str | Path, revision: str | None = None) -> Path:
    """The folder `rank`, or the folder in the local cache that holds the hub's adapter `user/name`.

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


def http_status(error: BaseException | None) -> int | None:
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

    near = suggest_adapter(Path(name))
    if not reachable:
        at = "" if revision is None else f" at revision {revision!r}"
        return (
            f"{name}: no such folder here{near}; as a hub id: the hub is out of reach or switched off "
            f"(HF_HUB_OFFLINE), and the local cache does not hold this adapter{at}. Give the path of an adapter "
            "folder, or set HF_ENDPOINT to a mirror"
        )
    status = http_status(error)
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
