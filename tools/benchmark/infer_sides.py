"""The sides of the inference comparison. Each is a function that classifies rows of many adapters on one base."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lora_hf.inference.classify import batched_logits
from lora_hf.lora.inject import adapter_names, inject, lora_layers, merge, set_adapter
from lora_hf.lora.unpadding import enable_unpadding
from tools.benchmark.job import Job
from tools.benchmark.peers import peft_config
from tools.benchmark.train_sides import Setup

STD = 0.02  # of every B, because a library could skip the product where B = 0
SWITCHES = 1000  # of the active adapter, to time one


@dataclass(frozen=True)
class Rows:
    """The model inputs of a round, and the adapter of each row."""

    inputs: list[dict[str, list[int]]]
    adapters: list[str]


Predict = Callable[[], None]  # classifies all rows once
ExtraMeasurements = Callable[[], dict[str, Any]]  # of a side, after the last round


def build(job: Job) -> tuple[Predict, ExtraMeasurements]:
    """Prepares the side of the job."""
    setup = Setup.from_job(job, Path())
    inputs = [{key: value for key, value in row.items() if key != "adapter"} for row in job.rows]
    return SIDES[job.side](setup, Rows(inputs, [row["adapter"] for row in job.rows]))


def _model(setup: Setup, rows: Rows) -> Any:
    """Our base with the adapters of all rows."""
    model = setup.base()
    for name in dict.fromkeys(rows.adapters):
        inject(model, setup.config.lora, name)
    generator = torch.Generator().manual_seed(0)
    for layer in lora_layers(model).values():
        for weights in layer.adapters.values():
            weights.lora_B.data.normal_(0, STD, generator=generator)
    if torch.cuda.is_available():
        model.to(torch.device("cuda"))  # type: ignore[call-arg]
    enable_unpadding(model)
    return model.eval()


def _mixed(setup: Setup, rows: Rows) -> Any:
    """Rows of all adapters in the same batches."""
    model, size = _model(setup, rows), setup.config.train.eval_batch_size

    def predict() -> None:
        batched_logits(model, setup.tokenizer, rows.inputs, size, iter, rows.adapters)

    def time_switches() -> dict[str, Any]:
        names = adapter_names(model)
        start = time.perf_counter()
        for number in range(SWITCHES):
            set_adapter(model, names[number % len(names)])
        return {"switch_seconds": (time.perf_counter() - start) / SWITCHES}

    return predict, time_switches


def _apart(setup: Setup, rows: Rows) -> Any:
    """Each batch holds rows of one adapter, as without mixed batches."""
    model, size = _model(setup, rows), setup.config.train.eval_batch_size

    def predict() -> None:
        for name in dict.fromkeys(rows.adapters):
            set_adapter(model, name)
            own = [row for row, other in zip(rows.inputs, rows.adapters, strict=True) if other == name]
            batched_logits(model, setup.tokenizer, own, size, iter)

    return predict, dict


def _merged(setup: Setup, rows: Rows) -> Any:
    """All rows through one merged model, as if there were only one task: the upper bound."""
    model, size = merge(_model(setup, rows)), setup.config.train.eval_batch_size
    return lambda: batched_logits(model, setup.tokenizer, rows.inputs, size, iter), dict


def _peft(precision: Any, by_length: bool) -> Any:
    def prepare(setup: Setup, rows: Rows) -> Any:
        """PEFT's `adapter_names`. It does not support heads like RoBERTa's, so all adapters share one head."""
        import peft

        model: Any = setup.plain_base(precision)
        settings = peft_config(setup.config.lora, model, heads=False)
        names = list(dict.fromkeys(rows.adapters))
        model = peft.get_peft_model(model, settings, adapter_name=names[0])
        for name in names[1:]:
            model.add_adapter(name, settings)
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.data.normal_(0, STD)
        model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()

        def predict() -> None:
            with torch.inference_mode():
                for batch_rows in _batches(rows, setup.config.train.eval_batch_size, by_length):
                    batch = setup.tokenizer.pad([rows.inputs[row] for row in batch_rows], return_tensors="pt")
                    model(**batch.to(model.device), adapter_names=[rows.adapters[row] for row in batch_rows])

        return predict, dict

    return prepare


def _batches(rows: Rows, size: int, by_length: bool) -> Iterator[list[int]]:
    order = list(range(len(rows.inputs)))
    if by_length:
        order.sort(key=lambda row: -len(rows.inputs[row]["input_ids"]))
    return (order[start : start + size] for start in range(0, len(order), size))


SIDES: dict[str, Callable[[Setup, Rows], Any]] = {
    "mixed": _mixed,
    "apart": _apart,
    "merged": _merged,
    "peft-names": _peft("fp32", by_length=False),
    "peft-names-bf16": _peft("bf16", by_length=True),
}
