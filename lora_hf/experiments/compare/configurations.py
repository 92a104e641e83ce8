"""Runs that differ in their seed only are one configuration; and what keeps two of these from being comparable."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from lora_hf.core.records import describe_base, describe_method, describe_run
from lora_hf.experiments.compare.runs import FinishedRun

Aspects = dict[str, dict[str, Any]]  # machine, data and recipe, each as words and values


@dataclass(frozen=True)
class Configuration:
    """One row of a report.

    `key` is its letter, `A` for the best. `differs` says of machine, data and recipe what is not as in most others.
    """

    key: str
    label: str
    runs: tuple[FinishedRun, ...]  # by seed
    aspects: Aspects
    differs: dict[str, str]

    @property
    def score(self) -> float:
        """The mean of its runs."""
        return sum(run.score for run in self.runs) / len(self.runs)

    @property
    def middle(self) -> FinishedRun:
        """The run with the middle score, of an even number the lower one: what stands for the others row by row."""
        ordered = sorted(self.runs, key=lambda run: run.score)
        return ordered[(len(ordered) - 1) // 2]

    @property
    def same_data(self) -> bool:
        """Its quality may be compared with that of most others."""
        return "data" not in self.differs

    @property
    def comparable(self) -> bool:
        """Its speed, time and memory may be compared as well."""
        return not self.differs


def configurations(runs: Sequence[FinishedRun]) -> list[Configuration]:
    """The configurations among the runs of one task, the best first."""
    aspects = _aspects(runs)
    groups: dict[str, list[int]] = {}
    for index, run in enumerate(runs):
        same = (_settings(run), aspects[index]["machine"], aspects[index]["data"])
        groups.setdefault(json.dumps(same, sort_keys=True), []).append(index)
    usual = _usual([aspects[members[0]] for members in groups.values()])
    found = [
        Configuration(
            key="",
            label="",
            runs=tuple(sorted((runs[index] for index in members), key=lambda run: run.record.seed)),
            aspects=aspects[members[0]],
            differs=_differences(aspects[members[0]], usual),
        )
        for members in groups.values()
    ]
    found.sort(key=lambda each: each.score, reverse=runs[0].task.greater_is_better)
    labels = _labels(found)
    return [replace(each, key=_letter(place), label=labels[place]) for place, each in enumerate(found)]


def _settings(run: FinishedRun) -> dict[str, Any]:
    """The config without what does not make another configuration: the seed, and where files come from and go to."""
    sections = {name: dict(values) for name, values in run.record.config.items() if name != "output"}
    del sections["train"]["seed"], sections["task"]["data_dir"]
    if run.record.method != "lora":
        del sections["lora"]
    return sections


def _aspects(runs: Sequence[FinishedRun]) -> list[Aspects]:
    """Of each run; what one of them cannot tell is taken to be as in most others."""
    found = [{"machine": _machine(run), "data": _data(run), "recipe": _recipe(run)} for run in runs]
    for aspect in found[0]:
        for name in found[0][aspect]:
            known = Counter(each[aspect][name] for each in found if each[aspect][name] is not None)
            for each in found:
                if each[aspect][name] is None and known:
                    each[aspect][name] = known.most_common(1)[0][0]
    return found


def _machine(run: FinishedRun) -> dict[str, Any]:
    machine, memory = run.record.machine, run.record.machine.get("memory")
    return {
        "processor": machine.get("processor"),
        "cores": machine.get("cores"),
        "threads": machine.get("threads"),
        "memory, GB": round(memory / 1e9) if memory else None,  # to the byte it differs from boot to boot
        "GPU": "yes" if run.record.memory["cuda"] else "no",
        "runs in the same batches": run.record.together,
    }


def _data(run: FinishedRun) -> dict[str, Any]:
    rows = run.record.rows
    splits = (run.task.train_split, *run.task.evaluation_splits)
    found: dict[str, Any] = {f"{split} rows": rows[split] for split in splits}
    for split in run.task.evaluation_splits:
        answers = run.answers.get(split)
        digest = hashlib.sha256(answers.labels.tobytes()).hexdigest()[:12] if answers else None
        found[f"fingerprint of the {split} labels"] = digest
    return found


def _recipe(run: FinishedRun) -> dict[str, Any]:
    """What a comparison of methods holds fixed; a learning rate, its schedule and weight decay belong to a method."""
    task, model, train = (run.record.config[name] for name in ("task", "model", "train"))
    return {
        "length": f"{train['max_steps']} steps" if train["max_steps"] else f"{train['epochs']:g} epochs",
        "batch_size": train["batch_size"],
        "gradient_accumulation": train["gradient_accumulation"],
        "max_length": task["max_length"],
        "precision": model["precision"],
        "group_by_prompt": train["group_by_prompt"],
        "label_smoothing": train["label_smoothing"],
        "patience": train["patience"] or "none",
        "start_from": train["start_from"] or "nothing",
    }


def _usual(found: Sequence[Aspects]) -> Aspects:
    """Of each aspect the values that most have; where several are as frequent, those given first."""
    usual = {}
    for aspect in found[0]:
        (text, _), *_ = Counter(json.dumps(each[aspect]) for each in found).most_common(1)
        usual[aspect] = json.loads(text)
    return usual


def _differences(aspects: Aspects, usual: Aspects) -> dict[str, str]:
    return {
        aspect: ", ".join(f"{name} {value}, not {usual[aspect][name]}" for name, value in differing.items())
        for aspect, values in aspects.items()
        if (differing := {name: value for name, value in values.items() if value != usual[aspect][name]})
    }


def _labels(found: Sequence[Configuration]) -> list[str]:
    """In a few words, without the base where all have the same; configurations that read alike say how they differ."""
    one_base = len({describe_base(each.runs[0].record) for each in found}) == 1
    tell = describe_method if one_base else describe_run
    labels = [tell(each.runs[0].record) for each in found]
    details = [_flat({"settings": _settings(each.runs[0]), "aspects": each.aspects}) for each in found]
    told = []
    for label, detail in zip(labels, details, strict=True):
        alike = [other for other, same in zip(details, labels, strict=True) if same == label]
        told.append(", ".join([label, *_distinct(detail, alike)]))
    return told


def _distinct(detail: dict[str, Any], alike: Sequence[dict[str, Any]]) -> list[str]:
    """The values of `detail` that some of those that read alike do not have."""
    return [
        f"{name.rpartition('.')[2]}={value}"
        for name, value in detail.items()
        if any(other.get(name) != value for other in alike) and not name.startswith("aspects.recipe")
    ]


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _letter(place: int) -> str:
    """A to Z, then AA."""
    before, last = divmod(place, 26)
    return (_letter(before - 1) if before else "") + chr(ord("A") + last)
