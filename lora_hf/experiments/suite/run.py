"""Runs a suite: each run in a process of its own, some at a time, and one record of all that is finished."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from lora_hf.core.child_process import package_environment
from lora_hf.core.errors import ConfigError, DataError
from lora_hf.core.provenance import git_state, machine, versions
from lora_hf.core.records import RECORD_FILE, SuiteRecord
from lora_hf.data.tasks.registry import get_task
from lora_hf.experiments.suite.plan import (
    PlannedRun,
    SuiteOptions,
    can_resume,
    configuration_of,
    is_finished,
    plan_suite,
    shown_base,
    write_config,
)
from lora_hf.experiments.suite.results import base_bytes, compare_all, result_of

logger = logging.getLogger(__name__)

SUITE_FILE = "suite.json"
SAID_FILE = "messages.txt"  # of a run: what its processes said
VERB = "import sys; from lora_hf.cli.main import main; sys.exit(main())"
TAIL = 6  # lines of it that tell why a run failed
PAUSE = 0.2  # seconds between two looks at the processes
PATIENCE = 10  # seconds that a stopped process gets to end


@dataclass
class _Started:
    """Runs whose processes are at work: the current one, and the words of those to come."""

    runs: list[PlannedRun]
    process: subprocess.Popen[bytes]
    rest: list[list[str]] = field(default_factory=list)
    since: float = field(default_factory=time.monotonic)


def run_suite(options: SuiteOptions, jobs: int = 1, joint: int = 1) -> tuple[SuiteRecord, Path]:
    """Makes every run that is not finished yet, and the record after each.

    Args:
        jobs: processes at a time.
        joint: LoRA runs that one process trains together, on one copy of the base (`lora_hf.training.joint`).

    A run that fails does not stop the others. An interruption stops the processes at work: finished runs stay, and a
    later call with the same options goes on from the checkpoints.

    Returns:
        The record, also written as `suite.json`, with the failed runs in `failures`; and its file.

    Raises:
        ConfigError, DataError, ModelError, HubError: a mistake of the whole suite, told before the first run.
    """
    if jobs < 1 or joint < 1:
        raise ConfigError(f"--jobs {jobs} --joint {joint}: expected at least 1 of each")
    runs = plan_suite(options)
    done = {run.name for run in runs if is_finished(run)}
    _check_base_and_data(runs)
    runs = _with_one_precision(runs)
    first = runs[0].config
    record = SuiteRecord(
        base={"name": shown_base(first.model.name)},
        configurations={},
        planned=len(runs),
        jobs=jobs,
        started=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        versions=versions(),
        git=git_state(),
        machine=machine(),
    )
    for run in runs:
        record.configurations.setdefault(run.configuration, {}).setdefault(run.task, configuration_of(run.config))
    file = options.output / SUITE_FILE
    _make(options.output)
    if done:
        logger.info("%d of %d runs are finished already", len(done), len(runs))
    _renew(record, runs, done, file)
    _run_all(runs, done, jobs, joint, record, file)
    return record, file


def _run_all(
    runs: Sequence[PlannedRun], done: set[str], jobs: int, joint: int, record: SuiteRecord, file: Path
) -> None:
    """Keeps `jobs` runs at work until none is left, and renews the record as they end."""
    waiting = [run for run in runs if run.name not in done]
    total, began, at_work = len(waiting), time.monotonic(), []
    with _stops_when_told():
        try:
            while waiting or at_work:
                for run in [run for run in waiting if run.needs in record.failures]:
                    waiting.remove(run)
                    record.failures[run.name] = f"the run it starts from failed: {run.needs}"
                while len(at_work) < jobs and (ready := _next_ready(waiting, done, joint)):
                    waiting = [run for run in waiting if run not in ready]
                    at_work.append(_start(ready, jobs))
                time.sleep(PAUSE)
                for started in [each for each in at_work if each.process.poll() is not None]:
                    at_work.remove(started)
                    if started.process.returncode == 0 and started.rest:
                        at_work.append(_go_on(started, jobs))
                        continue
                    for run in started.runs:
                        # One that trained together with one that failed may have finished.
                        if is_finished(run) and (len(started.runs) > 1 or started.process.returncode == 0):
                            done.add(run.name)
                            shutil.rmtree(run.folder / "checkpoints", ignore_errors=True)  # its best is kept
                        else:
                            record.failures[run.name] = _why(started)
                    _renew(record, runs, done, file)
                    left = len(waiting) + sum(len(each.runs) for each in at_work)
                    for run in started.runs:
                        _tell(run, started.since, record, total - left, total, time.monotonic() - began)
        finally:
            _stop(at_work)
    _renew(record, runs, done, file)


def _next_ready(waiting: Sequence[PlannedRun], done: set[str], joint: int) -> list[PlannedRun]:
    """The next run that need not wait for another, and up to `joint` of those that can train together with it."""
    ready = [run for run in waiting if run.needs is None or run.needs in done]
    if not ready or joint == 1 or ready[0].config.train.method != "lora":
        return ready[:1]
    alike = [run for run in ready if run.config.train.method == "lora" and run.config.model == ready[0].config.model]
    return alike[:joint]


def _start(runs: list[PlannedRun], jobs: int) -> _Started:
    """Starts what is missing of runs: their training, and for generation the scoring of their texts."""
    steps = []
    missing = [run for run in runs if not (run.folder / RECORD_FILE).is_file()]
    if missing:
        resume = ["--resume", "auto"] if any(can_resume(run) for run in missing) else []
        configs = [word for run in missing for word in ("--config", str(write_config(run)))]
        steps.append(["train", *configs, *resume, "--json"])
    for run in runs:
        if run.writes_texts:
            weights = run.folder / ("model" if run.config.train.method == "full" else "adapter")
            data = ["--data-dir", run.config.task.data_dir] if run.config.task.data_dir else []
            steps.append(["eval", "--adapter", str(weights), "--split", "test", *data, "--json"])
    said = runs[0].folder / SAID_FILE
    said.unlink(missing_ok=True)
    return _Started(runs, _process(said, steps[0], jobs), steps[1:])


def _go_on(started: _Started, jobs: int) -> _Started:
    said = started.runs[0].folder / SAID_FILE
    return replace(started, process=_process(said, started.rest[0], jobs), rest=started.rest[1:])


def _process(said: Path, words: list[str], jobs: int) -> subprocess.Popen[bytes]:
    """A process with its share of the cores, out of reach of the terminal's Ctrl-C: the suite stops it itself."""
    threads = max(1, _cores() // jobs)
    limit = os.environ.get("OMP_NUM_THREADS", "")
    threads = min(threads, int(limit)) if limit.isdecimal() else threads
    environment = package_environment() | {"OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-c", VERB, *words]
    with said.open("ab") as out:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environment, start_new_session=True
        )


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _stop(at_work: Sequence[_Started]) -> None:
    for started in at_work:
        started.process.send_signal(signal.SIGINT)
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until and any(started.process.poll() is None for started in at_work):
        time.sleep(PAUSE)
    for started in at_work:
        started.process.kill()  # does nothing to one that has ended
        started.process.wait()


@contextmanager
def _stops_when_told() -> Iterator[None]:
    """SIGTERM ends the suite as Ctrl-C does; its processes would go on without it otherwise."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not in the main thread, which alone gets signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _why(started: _Started) -> str:
    text = (started.runs[0].folder / SAID_FILE).read_text(encoding="utf-8", errors="replace")
    lines = [line for line in text.splitlines() if line.strip()][-TAIL:]
    code = started.process.returncode
    said = f"killed by signal {-code}, which for 9 mostly means that memory ran out" if code < 0 else f"exit {code}"
    # The last line of a mistake is the whole message; of a bug it is the error below its traceback.
    mistakes = [line for line in lines if line.startswith("error: ")]
    return "\n".join([said, *(mistakes or lines)])


def _tell(run: PlannedRun, since: float, record: SuiteRecord, done: int, total: int, seconds: float) -> None:
    """Progress over the whole; the time left supposes that the rest takes as long a run as those before."""
    made = next((each for each in record.runs if each["folder"] == run.name), None)
    said = f"{made['metric']} {made['value']:.4f}" if made else f"failed: {record.failures[run.name]}"
    took = (time.monotonic() - since) / 60
    left = seconds / max(done, 1) * (total - done) / 60
    logger.info("[%d/%d] %s: %s, %.1f min; about %.1f min left", done, total, run.name, said, took, left)


def _renew(record: SuiteRecord, runs: Sequence[PlannedRun], done: set[str], file: Path) -> None:
    """Reads every finished run again: a record renewed from files cannot drift from them."""
    finished = [run for run in runs if run.name in done]
    record.runs = [result_of(run) for run in finished]
    record.rows = {}
    for made in record.runs:
        record.rows.setdefault(made["task"], made["rows"])
    record.base["bytes"] = base_bytes(runs[0].config.model)
    record.published = compare_all(finished, record.runs)
    record.write(file)


def _make(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output {output}: cannot be made: {error.strerror}") from error


def _with_one_precision(runs: Sequence[PlannedRun]) -> list[PlannedRun]:
    """`auto` settled once: beside another process each would probe a busy machine, and might settle otherwise."""
    from lora_hf.lora.precision import resolve_precision

    return [
        replace(run, config=replace(run.config, model=replace(run.config.model, precision=precision)))
        for run in runs
        for precision in [resolve_precision(run.config.model.precision)]
    ]


def _check_base_and_data(runs: Sequence[PlannedRun]) -> None:
    """What no run could do without, told before the first: data of each task, and the base."""
    from lora_hf.models.load import load_tokenizer

    splits = {run.task: run for run in runs}
    problems = []
    for task, run in splits.items():
        needed = (*get_task(task).splits, *(("test",) if run.writes_texts else ()))
        try:
            get_task(task).load(run.config.task.data_dir, needed)
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("\n  ".join([f"the data of {len(problems)} of {len(splits)} tasks cannot be used:", *problems]))
    load_tokenizer(runs[0].config.model)
