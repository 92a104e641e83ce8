"""Runs a suite: several child processes at a time, one record of all finished runs."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from lora_hf.core.child_process import ChildProcesses, package_command, package_environment
from lora_hf.core.errors import ConfigError, DataError
from lora_hf.core.provenance import provenance
from lora_hf.core.records import RECORD_FILE, SuiteRecord
from lora_hf.data.tasks.registry import get_task
from lora_hf.experiments.suite.plan import (
    PlannedRun,
    SuiteOptions,
    is_finished,
    plan_suite,
    shared_config,
    write_config,
)
from lora_hf.experiments.suite.results import base_bytes, compare_all, run_result
from lora_hf.models.model_ids import public_name
from lora_hf.training.checkpoints import checkpoints_in
from lora_hf.training.run_dir import CHECKPOINTS_FOLDER, weights_folder

logger = logging.getLogger(__name__)

SUITE_FILE = "suite.json"
MESSAGES_FILE = "messages.txt"  # output of a run's processes, in its folder
TAIL = 6  # lines of output in the message of a failed run
POLL = 0.2  # seconds between two checks of the processes


@dataclass
class _Job:
    """A run that trains in one process; for generation, another process then scores its texts."""

    run: PlannedRun
    process: subprocess.Popen[bytes]
    remaining: list[list[str]]  # commands to start after this process
    started: float = field(default_factory=time.monotonic)


def run_suite(options: SuiteOptions, jobs: int = 1) -> tuple[SuiteRecord, Path]:
    """Starts every unfinished run and updates the record whenever one ends.

    A failed run does not stop the others. An interruption ends all processes; a later call with the same options
    keeps the finished runs and resumes the others from their checkpoints.

    Args:
        jobs: how many processes run at the same time.

    Returns:
        The record, with the failed runs in `failures`, and the `suite.json` that holds it.

    Raises:
        ConfigError, DataError, ModelError, HubError: the suite cannot start; raised before the first run.
        Interrupted: SIGINT or SIGTERM, after all processes have ended.
    """
    if jobs < 1:
        raise ConfigError(f"jobs: expected a whole number >= 1, found {jobs}")
    runs = plan_suite(options)
    finished = {run.name for run in runs if is_finished(run)}
    _check_base_and_data(runs)
    runs = list(map(_resolve_precision, runs))
    record = SuiteRecord(
        base={"name": public_name(runs[0].config.model.name)},
        configurations={},
        planned=len(runs),
        jobs=jobs,
        started=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **provenance(),
    )
    for run in runs:
        record.configurations.setdefault(run.configuration, {}).setdefault(run.task, shared_config(run.config))
    file = options.output / SUITE_FILE
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{options.output}: cannot create the output folder: {error.strerror}") from error
    if finished:
        logger.info("%d of %d runs are already finished", len(finished), len(runs))
    _run_all(runs, finished, jobs, record, file)
    return record, file


def _run_all(runs: Sequence[PlannedRun], finished: set[str], max_jobs: int, record: SuiteRecord, file: Path) -> None:
    waiting = [run for run in runs if run.name not in finished]
    total, suite_started = len(waiting), time.monotonic()
    jobs: list[_Job] = []
    _update(record, runs, finished, file)
    with ChildProcesses() as children:
        while waiting or jobs:
            for run in [run for run in waiting if run.needs in record.failures]:
                waiting.remove(run)
                record.failures[run.name] = f"the run it starts from failed: {run.needs}"
            while len(jobs) < max_jobs and (run := _next_ready(waiting, finished)):
                waiting.remove(run)
                (run.folder / MESSAGES_FILE).unlink(missing_ok=True)
                first, *remaining = _commands(run)
                jobs.append(_Job(run, _start(children, run, first, max_jobs), remaining))
            time.sleep(POLL)
            for job in [job for job in jobs if job.process.poll() is not None]:
                succeeded = job.process.returncode == 0
                if succeeded and job.remaining:
                    job.process = _start(children, job.run, job.remaining.pop(0), max_jobs)
                    continue
                jobs.remove(job)
                if succeeded and is_finished(job.run):
                    finished.add(job.run.name)
                    shutil.rmtree(job.run.folder / CHECKPOINTS_FOLDER, ignore_errors=True)
                else:
                    record.failures[job.run.name] = _failure(job)
                _update(record, runs, finished, file)
                done = total - len(waiting) - len(jobs)
                # The time left assumes that the other runs take as long on average.
                minutes_left = (time.monotonic() - suite_started) / max(done, 1) * (total - done) / 60
                _log_progress(job, record, f"{done}/{total}", minutes_left)
    _update(record, runs, finished, file)


def _next_ready(waiting: Sequence[PlannedRun], finished: set[str]) -> PlannedRun | None:
    """The next run whose required run is finished."""
    return next((run for run in waiting if run.needs is None or run.needs in finished), None)


def _commands(run: PlannedRun) -> list[list[str]]:
    """The missing steps: training and, for generation, scoring the texts."""
    commands = []
    if not (run.folder / RECORD_FILE).is_file():
        resume = ["--resume", "auto"] if checkpoints_in(run.folder / CHECKPOINTS_FOLDER) else []
        commands.append(["train", "--config", str(write_config(run)), *resume, "--json"])
    if run.writes_texts:
        weights = run.folder / weights_folder(run.config.train.method)
        data = ["--data-dir", run.config.task.data_dir] if run.config.task.data_dir else []
        commands.append(["eval", "--adapter", str(weights), "--split", "test", *data, "--json"])
    return commands


def _start(children: ChildProcesses, run: PlannedRun, words: list[str], jobs: int) -> subprocess.Popen[bytes]:
    """Starts a process that gets an equal share of the cores, within OMP_NUM_THREADS if that is set."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = os.environ.get("OMP_NUM_THREADS", "")
    threads = min(max(1, cores // jobs), int(limit) if limit.isdecimal() else cores)
    environment = package_environment() | {"OMP_NUM_THREADS": str(threads)}
    with (run.folder / MESSAGES_FILE).open("ab") as messages:
        output: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": messages, "stderr": subprocess.STDOUT}
        return children.start(package_command(*words), **output, env=environment)


def _failure(job: _Job) -> str:
    text = (job.run.folder / MESSAGES_FILE).read_text(encoding="utf-8", errors="replace")
    lines = [line for line in text.splitlines() if line.strip()][-TAIL:]
    code = job.process.returncode
    reason = f"killed by signal {-code} (9 usually means out of memory)" if code < 0 else f"exit code {code}"
    # A user error is a complete message in its last line; a bug ends with the error below its traceback.
    return "\n".join([reason, *([line for line in lines if line.startswith("error: ")] or lines)])


def _log_progress(job: _Job, record: SuiteRecord, count: str, minutes_left: float) -> None:
    results = {result["folder"]: f"{result['metric']} {result['value']:.4f}" for result in record.runs}
    outcome = results.get(job.run.name) or f"failed: {record.failures[job.run.name]}"
    taken = (time.monotonic() - job.started) / 60
    logger.info("[%s] %s: %s, %.1f min; about %.1f min left", count, job.run.name, outcome, taken, minutes_left)


def _update(record: SuiteRecord, runs: Sequence[PlannedRun], finished: set[str], file: Path) -> None:
    """Reads every finished run from its files, so that the record always agrees with them, and writes the record."""
    done = [run for run in runs if run.name in finished]
    record.runs = [run_result(run) for run in done]
    record.rows = {result["task"]: result["rows"] for result in reversed(record.runs)}
    record.base["bytes"] = base_bytes(runs[0].config.model)
    record.published = compare_all(done, record.runs)
    record.write(file)


def _resolve_precision(run: PlannedRun) -> PlannedRun:
    """Resolves `auto` once: each process would measure it on a busy machine, and they might disagree."""
    from lora_hf.lora.precision import resolve_precision

    model = replace(run.config.model, precision=resolve_precision(run.config.model.precision))
    return replace(run, config=replace(run.config, model=model))


def _check_base_and_data(runs: Sequence[PlannedRun]) -> None:
    from lora_hf.models.load import load_tokenizer

    by_task = {run.task: run for run in runs}
    problems = []
    for name, run in by_task.items():
        task = get_task(name)
        try:
            task.load(run.config.task.data_dir, (*task.splits, "test") if run.writes_texts else task.splits)
        except DataError as error:
            problems.append(f"\n  {error}")
    if problems:
        title = f"the data of {len(problems)} of {len(by_task)} tasks cannot be used:"
        raise DataError("".join([title, *problems]))
    load_tokenizer(runs[0].config.model)
