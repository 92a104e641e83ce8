"""All tasks by name."""

from __future__ import annotations

from dataclasses import replace

from lora_hf.core.config.schema import TaskConfig
from lora_hf.core.errors import ConfigError, did_you_mean
from lora_hf.data.tasks.base import Task
from lora_hf.data.tasks.custom import KINDS, custom_task
from lora_hf.data.tasks.glue import GLUE, RULE_SENTIMENT
from lora_hf.data.tasks.label_names import infer_label_names
from lora_hf.data.tasks.nlg import NLG, RULE_RESTAURANTS
from lora_hf.data.tasks.row_selection import TrainingRows

_TASKS: dict[str, Task] = {task.name: task for task in (*GLUE, *NLG, RULE_SENTIMENT, RULE_RESTAURANTS)}
_TASKS_AND_ALIASES: dict[str, Task] = _TASKS | {f"glue/{task.name}": task for task in GLUE}


def get_task(name: str) -> Task:
    """Returns the task called `name`; GLUE's tasks have the alias `glue/<name>`.

    Raises:
        ConfigError: unknown task, with the nearest name and all names.
    """
    if name not in _TASKS_AND_ALIASES:
        raise ConfigError(
            f"task.name: unknown task {name!r}{did_you_mean(name.lower(), _TASKS_AND_ALIASES)}; known: "
            f"{', '.join(_TASKS)}; for a custom task also set task.kind"
        )
    return _TASKS_AND_ALIASES[name]


def task_of(config: TaskConfig) -> Task:
    """Returns the task of a config's `task` section: a built-in one by name, or with `kind` a custom one.

    Raises:
        ConfigError: as `get_task`; also an incomplete custom task, or one with the name of a built-in task.
        DataError: the classes are to be inferred, and there are no training rows to infer them from.
    """
    if config.kind is None:
        general = TaskConfig(
            config.name, config.data_dir, config.max_length, train_rows=config.train_rows, split_seed=config.split_seed
        )
        if config != general:
            raise ConfigError(
                "task.text_columns, label_column, label_names, metric and the like describe a custom task; also set "
                f"task.kind ({', '.join(KINDS)}), or leave them out"
            )
        task = get_task(config.name)
        if config.train_rows is None:
            return task
        return replace(task, source=TrainingRows(task.source, config.train_rows, config.split_seed, task.train_split))
    if config.name in _TASKS_AND_ALIASES:
        raise ConfigError(f"task.kind={config.kind}: {config.name} is a built-in task; give yours another task.name")
    return custom_task(infer_label_names(config))


def task_names() -> tuple[str, ...]:
    """Returns the names of all built-in tasks, GLUE's first, the bundled ones last."""
    return tuple(_TASKS)
