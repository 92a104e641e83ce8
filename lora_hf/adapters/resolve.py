"""Finds trained weights by folder or hub id, and reads what they were trained for. Needs no torch."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from lora_hf.adapters.format import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    AdapterMetadata,
    are_named,
    base_of,
    read_adapter_config,
    suggest_adapter,
)
from lora_hf.adapters.infer_task import UNRECORDED, infer_task, plain_text
from lora_hf.core.config.loader import load_config
from lora_hf.core.config.schema import GenerateConfig, ModelConfig, RunConfig
from lora_hf.core.errors import AdapterError, HubError
from lora_hf.core.hub_access import explain_hub_error, hub_is_reachable, hub_unreachable
from lora_hf.core.records import COMBINE_FILE, MERGE_FILE, RECORD_FILE, RUN_CONFIG_FILE, CombineRecord, MergeRecord
from lora_hf.data.tasks.base import Task
from lora_hf.data.tasks.custom import task_section
from lora_hf.data.tasks.registry import get_task, task_names, task_of
from lora_hf.models.model_ids import is_hub_id, is_path

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SavedModel:
    """Trained weights on disk: an adapter and the base it needs, or a full model (`is_full_model`), which needs none.

    `model` is the base of the adapter, or the full model itself. `data_dir` is where its run has found the rows.
    """

    folder: Path
    is_full_model: bool
    task: Task
    model: ModelConfig
    seed: int = 0
    max_length: int = 512
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    data_dir: str | None = None

    @property
    def run_folder(self) -> Path | None:
        """The folder of the run that produced these weights, if they still lie in it."""
        derived = any((self.folder / name).is_file() for name in (MERGE_FILE, COMBINE_FILE))
        parent = self.folder.resolve().parent
        return parent if (parent / RECORD_FILE).is_file() and not derived else None


def find_saved_model(folder: str | Path, revision: str | None = None, model: str | None = None) -> SavedModel:
    """Resolves an adapter or a full model to its task, its base and the settings of its run.

    A PEFT adapter records no task. It comes from a config.yaml in its folder, or else from `infer_task`.

    Args:
        folder: `outputs/<run>/adapter` or `outputs/<run>/model`; a copy of an adapter folder; a merged model or a
            combined adapter; or the hub id of an adapter, `user/name`.
        revision: a branch, tag or commit of the hub repository.
        model: where the base is now, a folder or a hub id; by default where the adapter says.

    Raises:
        AdapterError: the folder is none of these, is damaged, or does not tell its base and task; or the folder of
            its base is missing.
        DataError: the record of a merge or combination is damaged.
        HubError: as `fetch_adapter`.
        ModelError: as `infer_task`.
    """
    folder = fetch_adapter(folder, revision)
    run = run_config(folder)
    if not (folder / CONFIG_FILE).is_file() and (folder / "config.json").is_file():
        if run is None:
            raise AdapterError(
                f"{folder}: a full model outside its run folder: expected ../{RUN_CONFIG_FILE}, which names its task"
            )
        if model is not None:
            raise AdapterError(f"model={model}: {folder} is a full model, which needs no base; leave it out")
        precision = run.model.precision if (folder / MERGE_FILE).is_file() else "auto"
        full = ModelConfig(name=str(folder), precision=precision)
        unrecorded = run.task.name == UNRECORDED and run.task.kind is None
        task = plain_text() if unrecorded else task_of(run.task)
        return SavedModel(folder, True, task, full, 0, run.task.max_length, run.generate, run.task.data_dir)
    config, metadata = read_adapter_config(folder)
    named = base_of(config, metadata)
    base = model or named
    if is_path(base) and not Path(base).is_dir():
        raise AdapterError(
            f"{folder}: its base {base}: no such folder. Give its new location with model=NAME_OR_FOLDER, or in "
            f"base_model_name_or_path of {CONFIG_FILE}"
        )
    # A config.yaml in its own folder describes an adapter of PEFT; one in the folder above may be another run's.
    described = run is not None and not metadata.task and (folder / RUN_CONFIG_FILE).is_file()
    task = task_of(run.task) if base and described and run else _task_of(config, metadata, base, run, folder)
    if run is None or (run.model.name not in (base, named, metadata.base) and not described):
        return SavedModel(folder, False, task, ModelConfig(name=base))
    # Only the run records another tokenizer than the base's, or a random base and its seed.
    moved = run.model if run.model.name == base else replace(run.model, name=base, revision=None)
    settings = run.train.seed, run.task.max_length, run.generate, run.task.data_dir
    return SavedModel(folder, False, task, moved, *settings)


def _task_of(
    config: Mapping[str, Any], metadata: AdapterMetadata, base: str, run: RunConfig | None, folder: Path
) -> Task:
    """The task that the adapter names: a built-in one, or the custom task that the config of its run describes."""
    name = metadata.task
    if base and not name and (task := infer_task(config, metadata, folder, ModelConfig(name=base))):
        return task
    if not base or not name:
        missing = " and ".join(word for word, value in (("base", base), ("task", name)) if not value)
        raise AdapterError(
            f"{folder / WEIGHTS_FILE}: does not say which {missing} it was trained for, and its task_type "
            f"{config.get('task_type')!r} does not imply one. Save it with lora_hf.save_adapter and the name of its "
            'task, such as task="sst2", or load it in Python with lora_hf.load_adapter(model, folder)'
        )
    if run is not None and run.task.kind is not None and run.task.name == name:
        task = task_of(run.task)
    elif name in task_names():
        task = get_task(name)
    else:
        raise AdapterError(
            f"{folder} was trained for {name!r}, which is not a built-in task. A custom task is described by the "
            f"{RUN_CONFIG_FILE} of its run: copy that file into this folder"
        )
    if metadata.problem_type and task.problem_type not in (None, metadata.problem_type):
        raise AdapterError(
            f"{folder} was trained for {metadata.problem_type}; task {task.name} is {task.problem_type}. Restore "
            f"task.kind in the {RUN_CONFIG_FILE} of its run"
        )
    unnamed = not are_named(metadata.labels) and len(metadata.labels) == len(task.label_names or ())
    if task.label_names and task.label_names != metadata.labels and not unnamed:
        raise AdapterError(
            f"{folder} was trained for the labels {', '.join(metadata.labels)}; task {task.name} has "
            f"{', '.join(task.label_names)}"
        )
    return task


def run_sections(saved: SavedModel) -> dict[str, Any]:
    """The sections of a run's config that inference needs. A merge or combination stores them in its record."""
    return {
        "model": asdict(saved.model),
        "task": task_section(saved.task) | {"max_length": saved.max_length},
        "train": {"seed": saved.seed},
        "generate": asdict(saved.generate),
    }


def run_config(folder: Path) -> RunConfig | None:
    """The config of the run that produced the weights in `folder`, or None if it is unknown.

    It is in the record of a merge or combination, in the run folder above the weights, or next to copied weights.

    Raises:
        ConfigError, DataError: the config or the record cannot be read.
    """
    for name, record in ((MERGE_FILE, MergeRecord), (COMBINE_FILE, CombineRecord)):
        if (folder / name).is_file():
            return RunConfig.from_dict(record.load(folder / name).config, str(folder / name))
    run = folder.resolve().parent  # there a user edits the config, so it counts more than the copy in the folder
    for parent in (run, folder) if (run / RECORD_FILE).is_file() else (folder, run):
        if (parent / RUN_CONFIG_FILE).is_file():
            _warn_of_another_copy(parent / RUN_CONFIG_FILE, folder / RUN_CONFIG_FILE)
            return load_config(parent / RUN_CONFIG_FILE)
    return None


def _warn_of_another_copy(counts: Path, copy: Path) -> None:
    if copy.is_file() and copy.read_bytes() != counts.read_bytes():
        logger.warning("%s differs from %s, which takes precedence in a run folder", copy, counts)


def fetch_adapter(folder: str | Path, revision: str | None = None) -> Path:
    """Returns a local `folder` unchanged; downloads the adapter of a hub id `user/name` and returns its cache folder.

    Downloads only the two files of the adapter and the config of its run, each completely or not at all. If the hub is
    out of reach, the cached copy is used.

    Args:
        revision: a branch, tag or commit of the hub repository; its main branch by default.

    Raises:
        HubError: the hub is out of reach, refuses, or has no such repository, revision or file.
        AdapterError: a revision of a local folder.
    """
    name = str(folder)
    if not is_hub_id(name):
        if revision is not None:
            raise AdapterError(f"{name}: a local path has no revision {revision!r}; leave it out, or give USER/NAME")
        return Path(folder)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]: its HTTP client's class

    reachable = hub_is_reachable()
    files = [CONFIG_FILE, WEIGHTS_FILE, RUN_CONFIG_FILE]
    try:
        fetched = Path(snapshot_download(name, revision=revision, allow_patterns=files, local_files_only=not reachable))
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        if reachable:
            reason = explain_hub_error(error, revision)
        else:
            at = "" if revision is None else f" at revision {revision!r}"
            reason = (
                f"{hub_unreachable()}, and the local cache does not hold this adapter{at}. Give the path of an adapter "
                "folder, or set HF_ENDPOINT to a mirror"
            )
        raise HubError(f"{name}: no such folder here{suggest_adapter(Path(name))}; as a hub id: {reason}") from error
    missing = [file for file in (CONFIG_FILE, WEIGHTS_FILE) if not (fetched / file).is_file()]
    if missing:
        source = "the hub's repository" if reachable else "the hub is out of reach, and the copy in the local cache"
        raise HubError(
            f"{name}: {source} has no {' and no '.join(missing)}; expected a LoRA adapter in PEFT's format, as "
            "safetensors (.bin files are not read)"
        )
    return fetched
