"""The sides of the inference comparison: rows of many adapters on one base, each side a function that answers them."""

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
from tools.benchmark.peers import peft_config
from tools.benchmark.sides import Setup
from tools.benchmark.work import Work

STD = 0.02  # of every B: at B = 0 a library could leave the product out
FLIPS = 1000  # of the active adapter, timed


@dataclass(frozen=True)
class Rows:
    """The rows of a round as model inputs, and the adapter of each."""

    inputs: list[dict[str, list[int]]]
    adapters: list[str]


Answer = Callable[[], None]


def build(work: Work) -> tuple[Answer, Callable[[], dict[str, Any]]]:
    """What answers all rows once, and what the side tells at its end."""
    setup = Setup.of(work, Path())
    inputs = [{key: value for key, value in row.items() if key != "adapter"} for row in work.rows]
    rows = Rows(inputs, [row["adapter"] for row in work.rows])
    return ANSWERING[work.side](setup, rows)


def _ours(setup: Setup, rows: Rows) -> Any:
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
    model, size = _ours(setup, rows), setup.config.train.eval_batch_size

    def answer() -> None:
        batched_logits(model, setup.tokenizer, rows.inputs, size, iter, rows.adapters)

    def flips() -> dict[str, Any]:
        names = adapter_names(model)
        begin = time.perf_counter()
        for number in range(FLIPS):
            set_adapter(model, names[number % len(names)])
        return {"switch_seconds": (time.perf_counter() - begin) / FLIPS}

    return answer, flips


def _apart(setup: Setup, rows: Rows) -> Any:
    """A batch holds rows of one adapter: what can be done without mixing."""
    model, size = _ours(setup, rows), setup.config.train.eval_batch_size

    def answer() -> None:
        for name in dict.fromkeys(rows.adapters):
            set_adapter(model, name)
            own = [row for row, other in zip(rows.inputs, rows.adapters, strict=True) if other == name]
            batched_logits(model, setup.tokenizer, own, size, iter)

    return answer, dict


def _merged(setup: Setup, rows: Rows) -> Any:
    """All rows through one merged model, as if there were a single task: the bound."""
    model, size = merge(_ours(setup, rows)), setup.config.train.eval_batch_size
    return lambda: batched_logits(model, setup.tokenizer, rows.inputs, size, iter), dict


def _peft(precision: Any, by_length: bool) -> Any:
    def prepare(setup: Setup, rows: Rows) -> Any:
        """PEFT's `adapter_names`, which takes no head of RoBERTa's: the adapters without, on one head for all."""
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

        def answer() -> None:
            with torch.inference_mode():
                for chosen in _batches(rows, setup.config.train.eval_batch_size, by_length):
                    batch = setup.tokenizer.pad([rows.inputs[row] for row in chosen], return_tensors="pt")
                    model(**batch.to(model.device), adapter_names=[rows.adapters[row] for row in chosen])

        return answer, dict

    return prepare


def _batches(rows: Rows, size: int, by_length: bool) -> Iterator[list[int]]:
    order = list(range(len(rows.inputs)))
    if by_length:
        order.sort(key=lambda row: -len(rows.inputs[row]["input_ids"]))
    return (order[start : start + size] for start in range(0, len(order), size))


ANSWERING: dict[str, Callable[[Setup, Rows], Any]] = {
    "mixed": _mixed,
    "apart": _apart,
    "merged": _merged,
    "peft-names": _peft("fp32", by_length=False),
    "peft-names-bf16": _peft("bf16", by_length=True),
}
