"""What a folder of trained weights says about itself, told without loading torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from lora_hf.adapter_file import CONFIG_FILE, inspect_adapter
from lora_hf.config import GenerateConfig, ModelConfig, RunConfig, load_config
from lora_hf.errors import AdapterError
from lora_hf.pulling import local_adapter
from lora_hf.records import RUN_CONFIG_FILE
from lora_hf.tasks.base import Task
from lora_hf.tasks.table import get_task


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


def find_saved(folder: str | Path, revision: str | None = None) -> Saved:
    """What lies in `outputs/<run>/adapter`, `outputs/<run>/model`, or in an adapter folder that was copied elsewhere.

    `folder` may also be the hub id of an adapter, `user/name`, and `revision` a branch, tag or commit of it.

    Raises:
        AdapterError: neither of them, damaged, or without a word on base and task.
        HubError: as `local_adapter`.
    """
    folder = local_adapter(folder, revision)
    run = run_config(folder)
    if not (folder / CONFIG_FILE).is_file() and (folder / "config.json").is_file():
        if run is None:
            raise AdapterError(
                f"{folder}: a whole model outside its run folder: expected ../{RUN_CONFIG_FILE}, which names its task"
            )
        whole = ModelConfig(name=str(folder))
        return Saved(folder, True, get_task(run.task.name), whole, 0, run.task.max_length, run.generate)
    config, about = inspect_adapter(folder)
    base = about.base or config.get("base_model_name_or_path")
    if not base or not about.task:
        raise AdapterError(
            f"{folder}: the file does not say which base and task it was trained for (PEFT does not record the task); "
            "load it in Python with lora_hf.load_adapter(model, folder)"
        )
    task = get_task(about.task)
    if task.label_names and task.label_names != about.labels:
        raise AdapterError(
            f"{folder} was trained for the labels {', '.join(about.labels)}; task {task.name} has "
            f"{', '.join(task.label_names)}"
        )
    if run is None or run.model.name != base:
        return Saved(folder, False, task, ModelConfig(name=base))
    # The run says what the adapter does not: a tokenizer from elsewhere, a random base and its seed.
    return Saved(folder, False, task, run.model, run.train.seed, run.task.max_length, run.generate)


def run_config(folder: Path) -> RunConfig | None:
    """The config of the run that the weights in `folder` come from: above them in a run folder, beside them if pulled.

    Raises:
        ConfigError: it cannot be read.
    """
    for place in (folder / RUN_CONFIG_FILE, folder.resolve().parent / RUN_CONFIG_FILE):
        if place.is_file():
            return load_config(place)
    return None
