"""Groups runs that differ only in their seed into configurations, and finds what makes these not comparable."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lora_hf.core.config.loader import flatten
from lora_hf.core.records import describe_base, describe_method, describe_run
from lora_hf.experiments.compare.runs import FinishedRun

# Keys that change which rows, or which tokens of them, a run is scored on; perplexities have no labels to tell it.
CHOOSES_ROWS = ("validation", "split_seed", "train_on", "chat_template", "drop_unlearnable")
Aspects = dict[str, dict[str, Any]]  # machine, data and recipe, each as names and values


@dataclass(frozen=True)
class Configuration:
    """One row of the report.

    `key` is a letter, `A` for the best configuration. `differs` describes by aspect how it differs from most others.
    """

    key: str
    label: str
    runs: tuple[FinishedRun, ...]  # by seed
    aspects: Aspects
    differs: dict[str, str]

    @property
    def score(self) -> float:
        """The mean over the runs."""
        return sum(run.score for run in self.runs) / len(self.runs)

    @property
    def median_run(self) -> FinishedRun:
        """The run with the median score, or the lower of two: it represents the configuration row by row."""
        return sorted(self.runs, key=lambda run: run.score)[(len(self.runs) - 1) // 2]

    @property
    def same_data(self) -> bool:
        """Whether its score is comparable with most others."""
        return "data" not in self.differs

    @property
    def comparable(self) -> bool:
        """Whether its speed, time and memory are comparable too."""
        return not self.differs


def group_runs(runs: Sequence[FinishedRun]) -> list[Configuration]:
    """The configurations of the runs of one task, the best first."""
    groups: dict[str, tuple[Aspects, list[FinishedRun]]] = {}
    for run, aspects in zip(runs, _aspects(runs), strict=True):
        identity = json.dumps((_settings(run), aspects["machine"], aspects["data"]), sort_keys=True)
        groups.setdefault(identity, (aspects, []))[1].append(run)
    usual = {aspect: _most_common([aspects[aspect] for aspects, _ in groups.values()]) for aspect in ASPECTS}
    found = []
    for aspects, members in groups.values():
        differs = {aspect: _difference(aspects[aspect], usual[aspect]) for aspect in ASPECTS}
        differs = {aspect: text for aspect, text in differs.items() if text}
        members.sort(key=lambda run: run.record.seed)
        found.append(Configuration("", "", tuple(members), aspects, differs))
    found.sort(key=lambda each: each.score, reverse=runs[0].task.greater_is_better)
    return [
        replace(each, key=_letter(index), label=label)
        for index, (each, label) in enumerate(zip(found, _labels(found), strict=True))
    ]


def _settings(run: FinishedRun) -> dict[str, Any]:
    """The config without the seed, the location of files, and sections that have no effect."""
    sections = {name: dict(values) for name, values in run.record.config.items() if name != "output"}
    del sections["train"]["seed"], sections["task"]["data_dir"]
    sections["train"]["start_from"] = _start(run)
    if run.record.method != "lora":
        del sections["lora"]
    return sections


def _start(run: FinishedRun) -> str | None:
    """What the run started from: in a suite, each seed from the run of its own seed."""
    start = run.record.config["train"]["start_from"]
    return start and re.sub(r"-seed\d+(?=[/\\]adapter$)", "-seed*", start)


def _aspects(runs: Sequence[FinishedRun]) -> list[Aspects]:
    """The aspects of each run; a value that is not recorded is assumed to be the most common one."""
    found = [{aspect: describe(run) for aspect, describe in ASPECTS.items()} for run in runs]
    for aspect in ASPECTS:
        for name in found[0][aspect]:
            known = [each[aspect][name] for each in found if each[aspect][name] is not None]
            for each in found:
                if each[aspect][name] is None and known:
                    each[aspect][name] = _most_common(known)
    return found


def _machine(run: FinishedRun) -> dict[str, Any]:
    machine, memory = run.record.machine, run.record.machine.get("memory")
    return {
        "processor": machine.get("processor"),
        "cores": machine.get("cores"),
        "threads": machine.get("threads"),
        "memory, GB": round(memory / 1e9) if memory else None,  # the exact number varies between boots
        "GPU": "yes" if run.record.memory["cuda"] else "no",
    }


def _data(run: FinishedRun) -> dict[str, Any]:
    splits = run.task.evaluation_splits
    data: dict[str, Any] = {f"{split} rows": run.record.rows[split] for split in (run.task.train_split, *splits)}
    for split in splits:
        found = run.predictions.get(split)
        digest = hashlib.sha256(found.labels.tobytes()).hexdigest()[:12] if found else None
        data[f"fingerprint of the {split} labels"] = digest
    section = run.record.config["task"]
    return data | {f"task.{key}": "none" if section[key] is None else section[key] for key in CHOOSES_ROWS}


def _recipe(run: FinishedRun) -> dict[str, Any]:
    """What a comparison of methods keeps fixed. Learning rate, schedule and weight decay belong to a method."""
    task, model, train = (run.record.config[name] for name in ("task", "model", "train"))
    return {
        "length": f"{train['max_steps']} steps" if train["max_steps"] else f"{train['epochs']:g} epochs",
        "batch_size": train["batch_size"],
        "gradient_accumulation": train["gradient_accumulation"],
        "max_length": task["max_length"],
        "precision": model["precision"],
        "group_by_prompt": train["group_by_prompt"],
        "label_smoothing": train["label_smoothing"],
        "class_weights": train["class_weights"] or "none",
        "patience": train["patience"] or "none",
        "start_from": _start(run) or "nothing",
    }


ASPECTS: dict[str, Callable[[FinishedRun], dict[str, Any]]] = {"machine": _machine, "data": _data, "recipe": _recipe}


def _most_common(values: Sequence[Any]) -> Any:
    """Of equally common values, the first."""
    return max(values, key=values.count)


def _difference(values: dict[str, Any], usual: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}, not {usual[name]}" for name, value in values.items() if value != usual[name])


def _labels(configurations: Sequence[Configuration]) -> list[str]:
    """Short descriptions; equal ones are extended by the settings that differ. A base that all share is omitted."""
    records = [each.runs[0].record for each in configurations]
    one_base = len(set(map(describe_base, records))) == 1
    labels = [describe_method(record) if one_base else describe_run(record) for record in records]
    details = [
        flatten(_settings(each.runs[0])) | each.aspects["machine"] | each.aspects["data"] for each in configurations
    ]
    unique = []
    for label, detail in zip(labels, details, strict=True):
        others = [other for other, same in zip(details, labels, strict=True) if same == label]
        differing = (
            f"{name.rpartition('.')[2]}={value}"
            for name, value in detail.items()
            if any(other.get(name) != value for other in others)
        )
        unique.append(", ".join([label, *differing]))
    return unique


def _letter(index: int) -> str:
    """A to Z, then AA."""
    before, last = divmod(index, 26)
    return (_letter(before - 1) if before else "") + chr(ord("A") + last)
