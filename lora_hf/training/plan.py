"""Shows what a run will do and cost, without running it: rows, modules, memory, time and files."""

from __future__ import annotations

import tempfile
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from lora_hf.core.config.schema import RunConfig
from lora_hf.core.provenance import Moment
from lora_hf.core.records import RECORD_FILE, RUN_CONFIG_FILE
from lora_hf.data.overview import DataOverview
from lora_hf.data.tasks.registry import task_of
from lora_hf.training.callbacks import ProgressLines
from lora_hf.training.estimate import Estimate
from lora_hf.training.run import find_run, prepare_model, prepare_run
from lora_hf.training.run_dir import CHECKPOINTS_FOLDER, CURVES, LOG_FILE, weights_folder


@dataclass
class RunPlan:
    """A planned run: its folder and files, its data, and the adapted modules by role (`modules`)."""

    folder: Path
    data: DataOverview
    modules: dict[str, list[str]]
    parameters: dict[str, int]
    steps: int
    estimate: Estimate
    files: list[str]


def plan_run(config: RunConfig) -> RunPlan:
    """Reads the data, loads and adapts the model, and trains for a few steps in a temporary folder.

    Raises:
        UserError, TrainingError: as `train`.
    """
    started = Moment.now()
    config, folder, _ = find_run(config)
    task = task_of(config.task)
    rows = task.load(config.task.data_dir, task.splits)
    model, sites = prepare_model(config, task)
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary) / folder.name
        # Nothing is evaluated, which patience would need, and the steps are no run for a tracker.
        train = replace(config.train, patience=None, hf=config.train.hf | {"report_to": "none"})
        inside = replace(config, train=train, output=replace(config.output, dir=temporary, name=folder.name))

        def begin() -> None:
            scratch.mkdir()
            (scratch / RUN_CONFIG_FILE).touch()

        run = prepare_run(inside, scratch, rows, model, sites, started, begin, callbacks=())
        run.estimator.stop = True
        run.trainer.remove_callback(ProgressLines)
        arguments = run.trainer.args
        arguments.eval_strategy, arguments.save_strategy = IntervalStrategy.NO, SaveStrategy.NO
        arguments.load_best_model_at_end = False
        run.trainer.train()
    estimate = run.estimator.estimate
    assert estimate is not None, "a training has at least one step"
    weights = weights_folder(config.train.method)
    files = [RUN_CONFIG_FILE, f"{weights}/", RECORD_FILE, LOG_FILE, f"{CHECKPOINTS_FOLDER}/"]
    files += [f"predictions-{split}.jsonl" for split in task.evaluation_splits if task.verb == "predict"]
    if config.output.plots:
        pictures = ("confusion", "reliability") if task.label_names else ()
        files += [CURVES, *(f"{name}-{split}.png" for split in task.evaluation_splits for name in pictures)]
    roles = Counter(site.role for site in sites)
    modules = {role: [site.path for site in sites if site.role == role] for role in roles}
    return RunPlan(folder, run.data, modules, run.record.parameters, run.trainer.state.max_steps, estimate, files)
