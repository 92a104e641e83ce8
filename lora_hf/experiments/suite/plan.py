"""What a suite runs: every task in every configuration with every seed, each a config of its own."""

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
from lora_hf.experiments.suite.published import FROM_MNLI, MEDIUM, ROBERTA, published_recipe
from lora_hf.models.model_ids import base_name
from lora_hf.training.run_dir import config_differences

RECIPE = "recipe"  # the name of the one configuration of a suite that takes each task's published recipe
FIXED = ("model.name", "task.name", "task.data_dir", "train.seed", "train.start_from")  # the suite's own to set
SCORES_FILE = "scores-test.json"  # of a generation run, whose texts are written for the test split


@dataclass(frozen=True)
class PlannedRun:
    """One run of a suite; `needs` names the MNLI run that it starts from."""

    task: str
    configuration: str
    config: RunConfig
    needs: str | None = None

    @property
    def name(self) -> str:
        """Of the run's folder."""
        return _name(self.task, self.configuration, self.config.train.seed)

    @property
    def folder(self) -> Path:
        """Where its files go."""
        return Path(self.config.output.dir) / self.name

    @property
    def writes_texts(self) -> bool:
        """Whether the trained model's texts are scored afterwards."""
        return get_task(self.task).model_kind == "causal-lm"


@dataclass(frozen=True)
class SuiteOptions:
    """What a person asks of a suite; `overrides` are `key=value`, `TASK:key=value` and `TASK:seeds=0,1`."""

    tasks: tuple[str, ...]
    output: Path
    model: str | None = None  # without: that of the configurations, or of the published recipes
    data_dir: str | None = None
    seeds: tuple[int, ...] = (0,)
    configs: tuple[str, ...] = ()
    from_mnli: bool = False
    overrides: tuple[str, ...] = ()


def plan_suite(options: SuiteOptions) -> list[PlannedRun]:
    """Every run in the order to start them: first the first seed of everything, so that an early table has each row.

    Raises:
        ConfigError: an unknown task, a config that does not fit, two bases, two configurations of one name.
    """
    tasks = tuple(dict.fromkeys(get_task(name).name for name in options.tasks))
    shared, own, seeds = _sort_overrides(options, tasks)
    files = {Path(file).stem: file for file in options.configs} or {RECIPE: None}
    if len(files) < len(options.configs):
        raise ConfigError(f"--config: two files have one name, which names a column: {', '.join(options.configs)}")
    if options.from_mnli and "mnli" not in tasks:
        raise ConfigError("--from-mnli: needs the runs of mnli; add mnli to --tasks")
    configs: dict[tuple[str, str], RunConfig] = {}
    for name, file in files.items():
        for task in tasks:
            config = load_config(file or _recipe_of(task, options.model), [*shared, *own[task]])
            configs[task, name] = replace(
                config,
                model=replace(config.model, name=options.model or config.model.name),
                task=replace(config.task, name=task, data_dir=options.data_dir or config.task.data_dir),
            )
    _check_one_base(configs)
    runs = []
    for turn in range(max(len(each) for each in seeds.values())):
        for task in sorted(tasks, key=lambda each: each != "mnli") if options.from_mnli else tasks:
            if turn < len(seeds[task]):
                runs += [_planned(configs[task, name], name, seeds[task][turn], options, seeds) for name in files]
    return runs


def is_finished(run: PlannedRun) -> bool:
    """Whether the run's folder holds its record (and its texts' scores), made with this very config.

    Raises:
        ConfigError: the folder holds a run of another config.
        DataError: the record is damaged.
    """
    if (run.folder / RECORD_FILE).is_file():
        _check_same(run, RunRecord.load(run.folder / RECORD_FILE).config)
        return not run.writes_texts or (run.folder / SCORES_FILE).is_file()
    if (run.folder / RUN_CONFIG_FILE).is_file():
        _check_same(run, load_config(run.folder / RUN_CONFIG_FILE).to_dict())
    return False


def can_resume(run: PlannedRun) -> bool:
    """Whether an unfinished run left a checkpoint to go on from."""
    return not (run.folder / RECORD_FILE).exists() and any((run.folder / "checkpoints").glob("checkpoint-*"))


def configuration_of(config: RunConfig) -> dict[str, Any]:
    """What the runs of a task and configuration share."""
    values = config.to_dict()
    del values["output"], values["train"]["seed"], values["train"]["start_from"], values["task"]["data_dir"]
    values["model"]["name"] = shown_base(config.model.name)
    return values


def shown_base(name: str) -> str:
    """The base as a record names it: of a local folder only the last part."""
    return base_name(name) if Path(name).is_dir() else name


def _name(task: str, configuration: str, seed: int) -> str:
    return f"{task}-{configuration}-seed{seed}"


def _planned(
    config: RunConfig, name: str, seed: int, options: SuiteOptions, seeds: Mapping[str, Sequence[int]]
) -> PlannedRun:
    task = config.task.name
    train, needs = replace(config.train, seed=seed), None
    if options.from_mnli and task in FROM_MNLI and train.method == "lora":
        # The run of the same seed; of a task with more seeds than MNLI has, the others start from its first.
        needs = _name("mnli", name, seed if seed in seeds["mnli"] else seeds["mnli"][0])
        train = replace(train, start_from=str(options.output / needs / "adapter"))
    output = replace(config.output, dir=str(options.output), name=_name(task, name, seed), overwrite=False)
    return PlannedRun(task, name, replace(config, train=train, output=output), needs)


def _recipe_of(task: str, model: str | None) -> Path:
    """The published recipe for the base, or that for the paper's usual base where there is none."""
    usual = MEDIUM if get_task(task).model_kind == "causal-lm" else ROBERTA
    recipe = published_recipe(task, model or usual) or published_recipe(task, usual)
    if recipe is None:
        raise ConfigError(f"--tasks {task}: configs/ has no published recipe for it; give one with --config FILE")
    return recipe


def _sort_overrides(
    options: SuiteOptions, tasks: Sequence[str]
) -> tuple[list[str], dict[str, list[str]], dict[str, tuple[int, ...]]]:
    """The overrides of all tasks, those of each, and the seeds of each."""
    shared: list[str] = []
    own: dict[str, list[str]] = {task: [] for task in tasks}
    seeds = dict.fromkeys(tasks, options.seeds)
    for override in options.overrides:
        key, _, value = override.partition("=")
        task, colon, key = key.rpartition(":")
        if colon and task not in tasks:
            raise ConfigError(f"{override!r}: {task!r} is not among --tasks{did_you_mean(task, tasks)}")
        if key in FIXED or key.startswith("output."):
            raise ConfigError(f"{override!r}: the suite sets {key} itself; use its options, see --help")
        if colon and key == "seeds":
            seeds[task] = parse_seeds(value, override)
        elif colon:
            own[task].append(f"{key}={value}")
        else:
            shared.append(override)
    return shared, own, seeds


def parse_seeds(text: str, said: str) -> tuple[int, ...]:
    """The seeds of `0,1,2`.

    Raises:
        ConfigError: not whole numbers, or one of them twice; opens with `said`.
    """
    words = text.split(",")
    if not all(word.isdecimal() for word in words) or len(set(map(int, words))) < len(words):
        raise ConfigError(f"{said}: expected different whole numbers, such as 0,1,2, found {text!r}")
    return tuple(map(int, words))


def _check_one_base(configs: Mapping[tuple[str, str], RunConfig]) -> None:
    names = sorted({config.model.name for config in configs.values()})
    if len(names) > 1:
        raise ConfigError(f"a suite has one base, found {', '.join(names)}; choose one with --model NAME")


def _check_same(run: PlannedRun, found: Mapping[str, Any]) -> None:
    # The folder may be written otherwise, or have moved.
    wanted = {section: keys for section, keys in run.config.to_dict().items() if section != "output"}
    different = config_differences(found, wanted)
    if different:
        raise ConfigError(
            f"{run.folder}: holds a run of another config: {'; '.join(different[:4])}. Choose another --output, or "
            "remove that folder"
        )


def write_config(run: PlannedRun) -> Path:
    """Makes the run's folder with the config to start it with.

    Raises:
        ConfigError: the folder cannot be written.
    """
    file = run.folder / RUN_CONFIG_FILE
    try:
        run.folder.mkdir(parents=True, exist_ok=True)
        file.write_text(yaml.safe_dump(run.config.to_dict(), sort_keys=False), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--output {run.folder}: cannot be written: {error.strerror}") from error
    return file
