"""Every task by its name."""

from __future__ import annotations

from dataclasses import replace

from lora_hf.core.config.schema import TaskConfig
from lora_hf.core.errors import ConfigError, did_you_mean
from lora_hf.data.tasks.base import Task
from lora_hf.data.tasks.custom import custom_task
from lora_hf.data.tasks.glue import GLUE, RULE_SENTIMENT
from lora_hf.data.tasks.nlg import NLG, RULE_RESTAURANTS

_TASKS: dict[str, Task] = {task.name: task for task in (*GLUE, *NLG, RULE_SENTIMENT, RULE_RESTAURANTS)}
_ALIASES: dict[str, Task] = {f"glue/{task.name}": task for task in GLUE}


def get_task(name: str) -> Task:
    """Returns the task called `name`; GLUE's also answer to `glue/<name>`.

    Raises:
        ConfigError: no such task; the message gives the nearest names and the whole list.
    """
    known = _TASKS | _ALIASES
    if name not in known:
        nearest = did_you_mean(name.lower(), known)
        raise ConfigError(
            f"task.name: unknown task {name!r}{nearest}; known: {', '.join(task_names())}; for data of your own set "
            "task.kind as well"
        )
    return known[name]


def task_of(config: TaskConfig) -> Task:
    """Returns the task of a config's `task` section: one of ours by its name, or with `kind` a person's own.

    Raises:
        ConfigError: as `get_task`; a description of own data that is not whole, or under the name of a task of ours.
    """
    if config.kind is None:
        if replace(config, data_dir=None, max_length=TaskConfig.max_length) != TaskConfig(config.name):
            raise ConfigError(
                "task.text_columns, label_column, label_names and metric describe data of your own; set task.kind as "
                "well (classification, regression or generation), or leave them out"
            )
        return get_task(config.name)
    if config.name in _TASKS | _ALIASES:
        raise ConfigError(
            f"task.kind={config.kind}: {config.name} is a task of lora_hf; give your own data another task.name"
        )
    return custom_task(config)


def task_names() -> tuple[str, ...]:
    """Returns the names of all tasks, GLUE's first, the embedded ones last."""
    return tuple(_TASKS)
