"""What a folder of trained weights says about itself, told without loading torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lora_hf.adapters.format import CONFIG_FILE, WEIGHTS_FILE, inspect_adapter
from lora_hf.adapters.pulling import local_adapter
from lora_hf.core.config.schema import GenerateConfig, ModelConfig, RunConfig, load_config
from lora_hf.core.errors import AdapterError
from lora_hf.core.records import COMBINE_FILE, MERGE_FILE, RECORD_FILE, RUN_CONFIG_FILE, CombineRecord, MergeRecord
from lora_hf.data.tasks.base import Task
from lora_hf.data.tasks.custom import described
from lora_hf.data.tasks.registry import get_task, task_names, task_of


@dataclass(frozen=True)
class Saved:
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


def find_saved(folder: str | Path, revision: str | None = None) -> Saved:
    """What lies in `outputs/<run>/adapter`, `outputs/<run>/model`, in an adapter folder that was copied elsewhere, or
    in a merged model or combined adapter, wherever it is.

    `folder` may also be the hub id of an adapter, `user/name`, and `revision` a branch, tag or commit of it.

    Raises:
        AdapterError: none of them, damaged, or without a word on base and task.
        DataError: the record of a merge or a combination is damaged.
        HubError: as `local_adapter`.
    """
    folder = local_adapter(folder, revision)
    run = run_config(folder)
    if not (folder / CONFIG_FILE).is_file() and (folder / "config.json").is_file():
        if run is None:
            raise AdapterError(
                f"{folder}: a whole model outside its run folder: expected ../{RUN_CONFIG_FILE}, which names its task"
            )
        merged = (folder / MERGE_FILE).is_file()
        whole = ModelConfig(name=str(folder), precision=run.model.precision if merged else "auto")
        return Saved(folder, True, task_of(run.task), whole, 0, run.task.max_length, run.generate)
    config, about = inspect_adapter(folder)
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
        return Saved(folder, False, task, ModelConfig(name=base))
    # The run says what the adapter does not: a tokenizer from elsewhere, a random base and its seed.
    return Saved(folder, False, task, run.model, run.train.seed, run.task.max_length, run.generate)


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


def config_of(saved: Saved) -> dict[str, Any]:
    """The sections of a run's config that say how `saved` answers; what is made from it keeps them in its record."""
    return {
        "model": asdict(saved.model),
        "task": described(saved.task) | {"max_length": saved.max_length},
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
