"""All runs with two processes of `tests/training/test_distributed.py`, in one start of torchrun.

`torchrun --nproc-per-node 2 -m tests.support.distributed_runs FOLDER` writes one folder per run, and what each process
observes to `seen-<rank>.json`.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from datasets import Dataset
from packaging.version import Version
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from lora_hf.core.config.schema import RunConfig
from lora_hf.core.errors import ConfigError, Interrupted, TrainingError, UserError
from lora_hf.data.sampling import last_batch_share
from lora_hf.data.tasks.registry import get_task
from lora_hf.lora.kernels import fused
from lora_hf.training import trainer
from lora_hf.training.distributed import all_reduce_max, destroy_processes, init_processes, rank, run_on_rank
from lora_hf.training.run import train
from lora_hf.training.trainer import AdapterTrainer
from tests.support.kills import small_config, small_rows

# Numbers of rows that the batches do not divide evenly, neither in one process nor in two.
TRAIN, DEVELOPMENT = 54, 37
NONE_LEFT = 36  # training rows, with which the second process has none in the last batch
FEW = (32, 6)  # two steps, for bf16, which many CPUs emulate
WITH_FSDP = Version(accelerate.__version__) >= Version("1.15")  # older versions lack parts of FSDP2
SGD = {"optim": "sgd", "logging_steps": 1}  # Adam normalizes gradients, so that rounding near zero changes a step


def classify(folder: Path, name: str, processes: int = 1, **train: Any) -> RunConfig:
    """Classification with gradient checkpointing and accumulation, 16 rows per step for any number of processes."""
    sections = small_config(folder).to_dict()
    sections["lora"] |= {"lora_dropout": 0.0}
    sections["train"] |= {
        "epochs": 2,
        "batch_size": 8 // processes,
        "eval_batch_size": 16 // processes,
        "gradient_accumulation": 2,
        "lr": 0.1,
        "hf": {**SGD, "gradient_checkpointing": True},
        **train,
    }
    sections["output"]["name"] = name
    return RunConfig.from_dict(sections)


def by_length(folder: Path, name: str, processes: int = 1) -> RunConfig:
    """One epoch with rows grouped by length."""
    return classify(folder, name, processes, epochs=1, hf={**SGD, "train_sampling_strategy": "group_by_length"})


def generate(folder: Path, name: str, processes: int = 1, precision: str = "fp32") -> RunConfig:
    """A language model on rows grouped by prompt, where a batch computes each prompt once."""
    sections = classify(folder, name, processes, group_by_prompt=True, label_smoothing=0.1, hf=SGD).to_dict()
    sections["model"] |= {"name": "tiny-gpt2", "precision": precision}
    sections["task"] |= {"name": "rule-restaurants", "max_length": 256}
    sections["train"] |= {"epochs": 1}
    return RunConfig.from_dict(sections)


def rows_of(task: str, train_rows: int = TRAIN, development: int = DEVELOPMENT) -> dict[str, Dataset]:
    """The first rows of a bundled task."""
    counts = {"train": train_rows, "validation": development}
    rows = get_task(task).load(None, get_task(task).splits)
    return {split: part.select(range(counts[split])) for split, part in rows.items()}


def stop_at(step: int, stopped_rank: int) -> TrainerCallback:
    """Sends a SIGTERM to one process within a step."""

    class Stopper(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == step - 1 and rank() == stopped_rank:
                signal.raise_signal(signal.SIGTERM)

    return Stopper()


def error_of(function: Callable[[], Any], kind: type[BaseException]) -> str:
    """The message of the error that the function raises."""
    try:
        function()
    except kind as error:
        return str(error)
    return "nothing"


def main(folder: Path) -> dict[str, Any]:
    """Runs everything, and returns what this process observes."""
    init_processes()
    seen: dict[str, Any] = {"largest": all_reduce_max(rank() + 5), "from_one": run_on_rank(lambda: [rank()], chosen=1)}

    def refused() -> None:
        raise ConfigError(f"process {rank()} refuses")

    seen["refused"] = error_of(lambda: run_on_rank(refused), UserError)
    classifier = train(classify(folder, "classify", 2), rows=rows_of("rule-sentiment"))
    seen["classify"] = {"metrics": classifier.record.metrics, "folder": str(classifier.folder)}
    seen["again"] = error_of(lambda: train(classify(folder, "classify", 2), rows=rows_of("rule-sentiment")), UserError)
    train(by_length(folder, "by_length", 2), rows=rows_of("rule-sentiment", NONE_LEFT))
    trainer.last_batch_share = lambda rows, batch_size, *_: (batch_size, 1.0)
    train(by_length(folder, "filled_up", 2), rows=rows_of("rule-sentiment", NONE_LEFT))
    trainer.last_batch_share = last_batch_share
    train(generate(folder, "generate", 2), rows=rows_of("rule-restaurants"))
    train(generate(folder, "generate_bf16", 2, "bf16"), rows=rows_of("rule-restaurants", *FEW))

    # With dropout: a run that is stopped and resumed equals an uninterrupted one.
    original, masks = fused.dropout_mask, []

    def record_mask(*arguments: Any) -> torch.Tensor:
        masks.append(original(*arguments))
        return masks[-1]

    fused.dropout_mask = record_mask
    train(small_config(folder / "whole", batch_size=4), rows=small_rows())
    fused.dropout_mask = original
    seen["mask"] = masks[0][0].tolist()
    stopped = small_config(folder / "stopped", batch_size=4)
    seen["stopped"] = error_of(lambda: train(stopped, rows=small_rows(), callbacks=[stop_at(5, 1)]), Interrupted)
    train(stopped, resume="auto", rows=small_rows())

    compute_loss, calls = AdapterTrainer.compute_loss, 0

    def nan_on_rank_1(self: AdapterTrainer, *arguments: Any, **named: Any) -> Any:
        nonlocal calls
        loss = compute_loss(self, *arguments, **named)
        calls += 1
        return loss * float("nan") if rank() == 1 and calls == 4 else loss

    AdapterTrainer.compute_loss = nan_on_rank_1
    config = small_config(folder / "nan", batch_size=4)
    seen["no number"] = error_of(lambda: train(config, rows=small_rows()), TrainingError)
    AdapterTrainer.compute_loss = compute_loss

    if WITH_FSDP:
        seen |= fsdp(folder)
    return seen


def fsdp(folder: Path) -> dict[str, Any]:
    """Runs with a sharded base."""
    seen: dict[str, Any] = {}
    enable_fsdp_on_cpu()

    class CountSharded(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            parameters = list(kwargs["model"].parameters())
            seen["sharded"] = [isinstance(each, DTensor) for each in parameters if not each.requires_grad]
            seen["not whole"] = [isinstance(each, DTensor) for each in parameters if each.requires_grad]

    train(by_length(folder, "fsdp", 2), rows=rows_of("rule-sentiment", NONE_LEFT), callbacks=[CountSharded()])
    seen["refused full"] = error_of(
        lambda: train(classify(folder, "full", 2, method="full"), rows=rows_of("rule-sentiment")), ConfigError
    )
    return seen


def enable_fsdp_on_cpu() -> None:
    """Accelerate enables FSDP on accelerators only, although torch supports it on CPUs."""
    original = Accelerator.__init__

    def init(self: Accelerator, *arguments: Any, **named: Any) -> None:
        original(self, *arguments, **named)
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        self.state.distributed_type = DistributedType.FSDP
        self.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
        )

    Accelerator.__init__ = init


if __name__ == "__main__":
    root = Path(sys.argv[1])
    seen = main(root)
    (root / f"seen-{rank()}.json").write_text(json.dumps(seen), encoding="utf-8")
    destroy_processes()
