"""Damaged adapters, configs and data, each with one change to a good one, and how lora_hf handles them.

`python -m tests.support.damaged_inputs --output FILE` writes the record. A case passes if it ends in one clear
message, or if the damage is harmless and the input is used as meant.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import torch
import yaml
from pyarrow import parquet
from safetensors.torch import load_file, save_file

from lora_hf.adapters.format import CONFIG_FILE, WEIGHTS_FILE
from lora_hf.adapters.resolve import find_saved_model
from lora_hf.adapters.save_load import load_adapter
from lora_hf.core.config.loader import load_config
from lora_hf.core.config.schema import ModelConfig
from lora_hf.core.errors import UserError
from lora_hf.core.provenance import git_state, machine, versions
from lora_hf.data.readers import read_texts
from lora_hf.data.tasks.registry import get_task
from lora_hf.lora.inject import eject
from lora_hf.models.load import load_base
from lora_hf.training.validation import _check_training_arguments
from tests.support.adapters_on_disk import TASK, run_folder

Case = tuple[str, Callable[[Path], Any]]  # a name, and a function that damages the good input in a folder

HOSTILE: tuple[Any, ...] = (
    None,
    -1,
    0,
    2**62,
    1e308,
    float("nan"),
    True,
    "",
    "../../../etc/passwd",
    "__import__('os').system('true')",
    "(a+)+$",
    [],
    {},
    [[]],
    {"a": {"b": []}},
)


def adapter_cases(good: Path) -> Iterator[Case]:
    """Every kind of damage to each tensor, field and file of a good adapter."""
    for key in sorted(load_file(good / WEIGHTS_FILE)):
        for name, change in TENSOR_DAMAGE.items():
            yield f"{key}: {name}", _on_tensors(key, change)
    config = json.loads((good / CONFIG_FILE).read_text(encoding="utf-8"))
    for key in config:
        yield f"{key}: missing", _on_config(lambda fields, key=key: fields.pop(key))
        for value in HOSTILE:
            yield f"{key}: {value!r:.40}", _on_config(lambda fields, key=key, value=value: fields.update({key: value}))
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        for part in (0, 1, 7, 8, 100, -1, -100):
            yield f"{name}: cut at {part}", lambda folder, name=name, part=part: _cut(folder / name, part)
        yield f"{name}: other bytes", lambda folder, name=name: (folder / name).write_bytes(b"\xff\xfe" * 500)
        yield f"{name}: gone", lambda folder, name=name: (folder / name).unlink()
    # The size in a header must not be trusted.
    yield "a header of 2**60 bytes", lambda folder: (folder / WEIGHTS_FILE).write_bytes((2**60).to_bytes(8, "little"))
    yield "JSON nested 100000 deep", lambda folder: (folder / CONFIG_FILE).write_text("[" * 100_000)


def config_cases() -> Iterator[Case]:
    """Each key of a good recipe with each hostile value, and texts that are not recipes."""
    sections = load_config("rule_sentiment.yaml").to_dict()
    for section, values in sections.items():
        for key in values:
            for value in HOSTILE:
                yield f"{section}.{key}: {value!r:.40}", _recipe(sections, section, key, value)
        yield f"{section}: a list", _text(yaml.safe_dump({**sections, section: [1]}))
    for text in (
        "",
        "42",
        "- a\n- b",
        "model: [",
        "model:\n\t name: x",
        "a: &a [*a]",
        "model: &m {name: *m}",
        "!!python/object/apply:os.system ['true']",
        "1: 2",
        "null: {}",
        "? [a]\n: b",
        "train: {1: 2}",
        "train: {lr: 2020-01-01}",
        "lora: {targets: [[q]]}",
        "train: {lr: !!binary aGVsbG8=}",
        "\x00",
        "train: {lr: .inf}",
        "lora: {r: 1" + "0" * 5000 + "}",
        "[" * 2000,
        "a: &a [x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b]\nlora: {targets: *c}",
    ):
        yield f"text {text[:30]!r}", _text(text)
    yield "bytes that are no UTF-8", lambda folder: (folder / "recipe.yaml").write_bytes(b"model: \xff")


def data_cases() -> Iterator[Case]:
    """A good split with wrong rows, columns, types and bytes; and damaged files of rows to predict."""
    good = {"sentence": ["a good film", "a bad film"], "label": [1, 0], "idx": [0, 1]}
    for column in ("sentence", "label"):
        yield f"no {column}", _rows({key: value for key, value in good.items() if key != column})
        yield f"{column} renamed", _rows({("x" + key if key == column else key): v for key, v in good.items()})
    for name, values in {
        "negative": [1, -1],
        "too great": [1, 2],
        "huge": [1, 2**62],
        "null": [1, None],
        "all null": [None, None],
        "floats": [1.0, 0.0],
        "NaN": [1.0, float("nan")],
        "texts": ["1", "0"],
        "lists": [[1], [0]],
        "true and false": [True, False],
        "objects": [{"a": 1}, {"a": 0}],
        "bytes": [b"1", b"0"],
    }.items():
        yield f"label {name}", _rows({**good, "label": values})
    for name, values in {
        "null": ["a", None],
        "all null": [None, None],
        "numbers": [1, 2],
        "lists": [["a"], ["b"]],
        "bytes": [b"a", b"\xff"],
        "empty": ["a", ""],
        "blank": ["a", " \n"],
        "10 MB": ["a", "word " * 2_000_000],
        "NUL": ["a", "\x00" * 10],
        "control characters": ["a", "\x1b[31m" * 10],
        "one long word": ["a", "w" * 1_000_000],
    }.items():
        yield f"sentence {name}", _rows({**good, "sentence": values})
    yield "no rows", _rows({key: value[:0] for key, value in good.items()})
    for part in (0, 4, 100, -1, -8):
        yield f"parquet cut at {part}", _both(_rows(good), lambda folder, part=part: _cut(_split(folder), part))
    yield "parquet of other bytes", lambda folder: _write(_split(folder), b"\xff" * 1000)
    yield "a folder for a file", lambda folder: _split(folder).mkdir(parents=True)
    yield "no folder", lambda folder: None
    for name, content in {
        "empty": b"",
        "not UTF-8": b'{"sentence": "\xff"}',
        "half a line": b'{"sentence": "a"',
        "a list": b'["a"]',
        "a number": b"7",
        "null": b"null",
        "no text": b'{"label": 1}',
        "near name": b'{"sentense": "a"}',
        "number for a text": b'{"sentence": 1}',
        "list for a text": b'{"sentence": ["a"]}',
        "blank": b'{"sentence": " "}',
        "second line broken": b'{"sentence": "a"}\n{',
        "blank line": b'{"sentence": "a"}\n\n{"sentence": "b"}',
        "nested 100000 deep": b"[" * 100_000,
        "surrogate": b'{"sentence": "\\ud800"}',
        "a number of 5000 digits": b'{"sentence": ' + b"9" * 5000 + b"}",
    }.items():
        yield f"jsonl {name}", lambda folder, content=content: _write(folder / "rows.jsonl", content)


TENSOR_DAMAGE: dict[str, Callable[[dict[str, torch.Tensor], str], Any]] = {
    "dropped": lambda tensors, key: tensors.pop(key),
    "renamed": lambda tensors, key: tensors.update({f"{key}x": tensors.pop(key)}),
    "reshaped": lambda tensors, key: tensors.update({key: tensors[key].reshape(-1, 1).clone()}),
    "shortened": lambda tensors, key: tensors.update({key: tensors[key][:-1].clone()}),
    "empty": lambda tensors, key: tensors.update({key: tensors[key][:0].clone()}),
    "NaN": lambda tensors, key: tensors[key].reshape(-1)[:1].fill_(float("nan")),
    "infinite": lambda tensors, key: tensors[key].reshape(-1)[-1:].fill_(float("inf")),
    "whole numbers": lambda tensors, key: tensors.update({key: tensors[key].to(torch.int32)}),
    "complex": lambda tensors, key: tensors.update({key: tensors[key].to(torch.complex64)}),
    "twice": lambda tensors, key: tensors.update({f"{key}.copy": tensors[key].clone()}),
}


def _on_tensors(key: str, change: Callable[[dict[str, torch.Tensor], str], Any]) -> Callable[[Path], Any]:
    def damage(folder: Path) -> None:
        from safetensors import safe_open

        with safe_open(folder / WEIGHTS_FILE, "pt") as file:
            header = file.metadata()
        tensors = load_file(folder / WEIGHTS_FILE)
        change(tensors, key)
        save_file(tensors, folder / WEIGHTS_FILE, metadata=header)

    return damage


def _on_config(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    def damage(folder: Path) -> None:
        fields = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        change(fields)
        (folder / CONFIG_FILE).write_text(json.dumps(fields), encoding="utf-8")

    return damage


def _recipe(sections: dict[str, Any], section: str, key: str, value: Any) -> Callable[[Path], Any]:
    changed = copy.deepcopy(sections)
    changed[section][key] = value
    return _text(yaml.safe_dump(changed))


def _text(text: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / "recipe.yaml").write_text(text, encoding="utf-8")


def _rows(columns: dict[str, list]) -> Callable[[Path], Any]:
    def write(folder: Path) -> None:
        _split(folder).parent.mkdir(parents=True)
        parquet.write_table(pyarrow.table(columns), _split(folder))

    return write


def _split(folder: Path) -> Path:
    return folder / "glue" / "sst2" / "train.parquet"


def _both(first: Callable[[Path], Any], second: Callable[[Path], Any]) -> Callable[[Path], Any]:
    return lambda folder: (first(folder), second(folder))


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def _cut(path: Path, part: int) -> None:
    path.write_bytes(path.read_bytes()[:part])


class Adapters:
    """Loads each damaged adapter onto its base."""

    kind = "adapters"

    def __init__(self, folder: Path) -> None:
        self.good = run_folder(folder / "good")
        self.base = load_base(ModelConfig(name="tiny-roberta", precision="fp32"), TASK)
        self.cases = list(adapter_cases(self.good))

    def prepare(self, folder: Path) -> None:
        for file in self.good.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())

    def use(self, folder: Path) -> Any:
        before = {name: id(module) for name, module in self.base.named_modules()}
        try:
            find_saved_model(folder)
            return load_adapter(self.base, folder)
        except UserError:
            assert before == {name: id(module) for name, module in self.base.named_modules()}, "the model was changed"
            raise
        finally:
            self.base = eject(self.base)


class Configs:
    """Reads each recipe."""

    kind = "configs"

    def __init__(self, folder: Path) -> None:
        self.cases = list(config_cases())

    def prepare(self, folder: Path) -> None:
        pass

    def use(self, folder: Path) -> Any:
        config = load_config(folder / "recipe.yaml")
        if config.train.hf:
            _check_training_arguments(config.train.hf)
        assert type(config).from_dict(config.to_dict()) == config
        get_task(config.task.name)
        return config


class Data:
    """Reads and encodes each split or file of rows."""

    kind = "data"

    def __init__(self, folder: Path) -> None:
        from lora_hf.models.load import load_tokenizer

        self.tokenizer = load_tokenizer(ModelConfig(name="tiny-roberta"))
        self.cases = list(data_cases())

    def prepare(self, folder: Path) -> None:
        pass

    def use(self, folder: Path) -> Any:
        task = get_task("sst2")
        rows: Any
        if (folder / "rows.jsonl").exists():
            rows = read_texts(folder / "rows.jsonl", task.text_columns)
        else:
            rows = task.load(str(folder), ["train"])["train"][:]
        encoded = task.encode(rows, self.tokenizer, 64)
        assert all(len(row) <= 64 for row in encoded["input_ids"])
        return encoded


KINDS = (Adapters, Configs, Data)


def outcomes(kind: type[Adapters | Configs | Data], folder: Path) -> list[dict[str, Any]]:
    """For each case its verdict: `refused` with a message, `used`, or `escaped` with an unexpected exception."""
    folder.mkdir(exist_ok=True)
    target, results = kind(folder), []
    for number, (name, damage) in enumerate(target.cases):
        case_folder = folder / f"{number}"
        case_folder.mkdir()
        target.prepare(case_folder)
        damage(case_folder)
        before = {path: path.stat().st_mtime_ns for path in case_folder.rglob("*")}
        peak, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
        try:
            target.use(case_folder)
            verdict, message = "used", ""
        except UserError as error:
            verdict, message = "refused", str(error)
        except Exception as error:  # noqa: BLE001
            verdict, message = "escaped", f"{type(error).__name__}: {error}"
        results.append(
            {
                "case": name,
                "verdict": verdict,
                "message": message.replace(str(case_folder), "FOLDER")[:500],
                "wrote": before != {path: path.stat().st_mtime_ns for path in case_folder.rglob("*")},
                "seconds": time.monotonic() - start,
                "memory": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024,
            }
        )
    return results


def main() -> None:
    """Writes the record of all cases, with counts by kind and verdict."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        cases = {kind.kind: outcomes(kind, Path(folder) / kind.kind) for kind in KINDS}
    counts = {kind: dict(Counter(case["verdict"] for case in found)) for kind, found in cases.items()}
    worst = {
        kind: {key: max(case[key] for case in found) for key in ("seconds", "memory")} for kind, found in cases.items()
    }
    record = {"counts": counts, "worst": worst, "cases": cases}
    record |= {"versions": versions(), "git": git_state(), "machine": machine()}
    options.output.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
