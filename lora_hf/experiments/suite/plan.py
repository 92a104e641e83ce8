"""Plans a suite: one config for every combination of task, configuration and seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from lora_hf.core.config.loader import load_config
from lora_hf.core.config.schema import RunConfig
from lora_hf.core.errors import ConfigError, did_you_mean
from lora_hf.core.records import RECORD_FILE, RUN_CONFIG_FILE, RunRecord
from lora_hf.data.tasks.registry import get_task
from lora_hf.experiments.suite.published import FROM_MNLI, published_recipe
from lora_hf.models.model_ids import public_name
from lora_hf.training.run_dir import config_differences

RECIPE = "recipe"  # name of the configuration that uses the published recipe of each task
FIXED = ("model.name", "task.name", "task.data_dir", "train.seed", "train.start_from")  # keys that the suite sets
SCORES_FILE = "scores-test.json"  # scores of the texts generated for the test split


@dataclass(frozen=True)
class PlannedRun:
    """One run of a suite; `needs` is the name of the MNLI run it starts from."""

    configuration: str
    config: RunConfig
    needs: str | None = None

    @property
    def task(self) -> str:
        return self.config.task.name

    @property
    def name(self) -> str:
        return str(self.config.output.name)

    @property
    def folder(self) -> Path:
        return Path(self.config.output.dir) / self.name

    @property
    def writes_texts(self) -> bool:
        """Whether the run is followed by generating and scoring texts."""
        return get_task(self.task).verb == "generate"


@dataclass(frozen=True)
class SuiteOptions:
    """Options of a suite.

    `overrides` are `key=value`, for all runs or those of `TASK:`, `CONFIGURATION:` or `TASK:CONFIGURATION:`, and
    `TASK:seeds=0,1`.
    """

    tasks: tuple[str, ...]
    output: Path
    model: str | None = None  # default: the one in the configs, or in the published recipes
    data_dir: str | None = None
    seeds: tuple[int, ...] = (0,)
    configs: tuple[str, ...] = ()
    from_mnli: bool = False
    overrides: tuple[str, ...] = ()


def plan_suite(options: SuiteOptions) -> list[PlannedRun]:
    """All runs in starting order: the first seed of everything comes first, so early tables have all rows.

    Raises:
        ConfigError: an unknown task, an invalid config, several bases, or two configurations with the same name.
    """
    tasks = list(dict.fromkeys(get_task(name).name for name in options.tasks))
    files = {Path(file).stem: file for file in options.configs} or {RECIPE: None}
    overrides, seeds = _parse_overrides(options, tasks, list(files))
    if len(files) < len(options.configs):
        raise ConfigError(f"configs: expected different file names, found {', '.join(options.configs)}")
    if options.from_mnli:
        if "mnli" not in tasks:
            raise ConfigError("from_mnli: runs start from runs of mnli; add mnli to the tasks")
        tasks.sort(key=lambda task: task != "mnli")
    configs: dict[tuple[str, str], RunConfig] = {}
    for name, file in files.items():
        for task in tasks:
            config = load_config(file or _recipe_file(task, options.model), overrides[task, name])
            configs[task, name] = replace(
                config,
                model=replace(config.model, name=options.model or config.model.name),
                task=replace(config.task, name=task, data_dir=options.data_dir or config.task.data_dir),
            )
    bases = sorted({config.model.name for config in configs.values()})
    if len(bases) > 1:
        raise ConfigError(f"a suite has one base model, found {', '.join(bases)}; choose one of them")
    return [
        _planned_run(configs[task, name], name, seeds[task][index], options, seeds)
        for index in range(max(map(len, seeds.values())))
        for task in tasks
        if index < len(seeds[task])
        for name in files
    ]


def _parse_overrides(
    options: SuiteOptions, tasks: Sequence[str], configurations: Sequence[str]
) -> tuple[dict[tuple[str, str], list[str]], dict[str, tuple[int, ...]]]:
    """The overrides of each task and configuration, in which the narrower ones win, and the seeds of each task."""
    found: list[tuple[str | None, str | None, str]] = []
    seeds = dict.fromkeys(tasks, options.seeds)
    for override in options.overrides:
        path, _, value = override.partition("=")
        *scope, key = path.split(":")
        task = scope.pop(0) if scope and scope[0] in tasks else None
        name = scope.pop(0) if scope and scope[0] in configurations else None
        if scope:
            raise ConfigError(
                f"{override!r}: {scope[0]!r} is not one of the tasks or configurations"
                f"{did_you_mean(scope[0], (*tasks, *configurations))}; expected [TASK:][CONFIGURATION:]key=value"
            )
        if key in FIXED or (key.startswith("output.") and key != "output.plots"):
            raise ConfigError(f"{override!r}: the suite sets {key} itself; use the options of the suite")
        if key == "seeds" and (task or name):
            if name or not task:
                raise ConfigError(
                    f"{override!r}: expected TASK:seeds=0,1, as all configurations of a task share its seeds"
                )
            seeds[task] = parse_seeds(value, override)
        else:
            found.append((task, name, f"{key}={value}"))
    found.sort(key=lambda each: each[:2].count(None), reverse=True)
    chosen = {
        (task, name): [text for of_task, of_name, text in found if of_task in (None, task) and of_name in (None, name)]
        for task in tasks
        for name in configurations
    }
    return chosen, seeds


def parse_seeds(text: str, source: str) -> tuple[int, ...]:
    """The seeds in a text such as `0,1,2`.

    Raises:
        ConfigError: not whole numbers, or a duplicate; the message starts with `source`.
    """
    words = text.split(",")
    if not all(word.isdecimal() for word in words) or len(set(map(int, words))) < len(words):
        raise ConfigError(f"{source}: expected different whole numbers, such as 0,1,2, found {text!r}")
    return tuple(map(int, words))


def _recipe_file(task: str, model: str | None) -> Path:
    """The published recipe for the base model, or for the model the paper uses."""
    default = "gpt2-medium" if get_task(task).model_kind == "causal-lm" else "roberta-base"
    recipe = published_recipe(task, model or default) or published_recipe(task, default)
    if recipe is None:
        raise ConfigError(f"task {task}: configs/ has no published recipe for it; pass a config file")
    return recipe


def _planned_run(
    config: RunConfig, configuration: str, seed: int, options: SuiteOptions, seeds: Mapping[str, Sequence[int]]
) -> PlannedRun:
    task = config.task.name
    train, needs = replace(config.train, seed=seed), None
    if options.from_mnli and task in FROM_MNLI and train.method == "lora":
        # Start from the MNLI run with the same seed, or with the first seed if MNLI has fewer seeds.
        needs = _run_name("mnli", configuration, seed if seed in seeds["mnli"] else seeds["mnli"][0])
        train = replace(train, start_from=str(options.output / needs / "adapter"))
    name = _run_name(task, configuration, seed)
    output = replace(config.output, dir=str(options.output), name=name, overwrite=False)
    return PlannedRun(configuration, replace(config, train=train, output=output), needs)


def _run_name(task: str, configuration: str, seed: int) -> str:
    return f"{task}-{configuration}-seed{seed}"


def is_finished(run: PlannedRun) -> bool:
    """Whether the run's folder has its record, and the scores of its texts, made with the same config.

    Raises:
        ConfigError: the folder holds a run with another config.
        DataError: the record is damaged.
    """
    record, config = run.folder / RECORD_FILE, run.folder / RUN_CONFIG_FILE
    if record.is_file():
        found = RunRecord.load(record).config
    elif config.is_file():
        found = load_config(config).to_dict()
    else:
        return False
    # The folder may have been moved, or written in another way.
    expected = {section: keys for section, keys in run.config.to_dict().items() if section != "output"}
    if different := config_differences(found, expected):
        raise ConfigError(
            f"{run.folder}: contains a run with another config: {'; '.join(different[:4])}. Choose another output "
            "folder, or remove this one"
        )
    return record.is_file() and (not run.writes_texts or (run.folder / SCORES_FILE).is_file())


def shared_config(config: RunConfig) -> dict[str, Any]:
    """The part of the config that all runs of a task and configuration share."""
    values = config.to_dict()
    del values["output"], values["train"]["seed"], values["train"]["start_from"], values["task"]["data_dir"]
    values["model"]["name"] = public_name(config.model.name)
    return values


def write_config(run: PlannedRun) -> Path:
    """Creates the run's folder with its config.

    Raises:
        ConfigError: the folder cannot be written.
    """
    file = run.folder / RUN_CONFIG_FILE
    try:
        run.folder.mkdir(parents=True, exist_ok=True)
        file.write_text(yaml.safe_dump(run.config.to_dict(), sort_keys=False), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{run.folder}: cannot write to the run folder: {error.strerror}") from error
    return file
