"""An adapter merged into its base and written as a plain Hugging Face folder, with proof that it answers the same."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lora_hf.adapters.resolve import SavedModel, config_of
from lora_hf.adapters.save_load import load_saved_model
from lora_hf.core.atomic_io import atomic_folder
from lora_hf.core.config.schema import ModelConfig
from lora_hf.core.errors import AdapterError
from lora_hf.core.provenance import folder_size, git_state, machine, versions
from lora_hf.core.records import MERGE_FILE, MergeRecord
from lora_hf.data.tasks.base import Task
from lora_hf.data.tasks.sources import Embedded
from lora_hf.lora.inject import adapter_heads, eject, merge
from lora_hf.models.load import DTYPES, dequantise, load_base

Dtype = Literal["fp32", "bf16", "fp16"]

# How far a logit may move, as a share of the largest one (of 1, where that is smaller). In fp32 the same sums come in
# another order; in bf16 each weight is rounded by up to 2^-9 of itself and in fp16 by 2^-12, and a model adds that up.
TOLERANCES: dict[Dtype, float] = {"fp32": 1e-5, "bf16": 3e-2, "fp16": 4e-3}

ADVICE: dict[Dtype, str] = {
    "fp32": "The adapter is too large for its base: train it with a lower learning rate or lora_alpha",
    "bf16": "Merge with --dtype fp32",
    "fp16": "Merge with --dtype fp32, or bf16 where it is weights beyond the range of fp16",
}

PROBE_ROWS, PROBE_LENGTH, PROBE_SEED = 8, 32, 0  # rows of each kind, tokens of a drawn one


def merge_adapter(saved: SavedModel, output: Path, dtype: Dtype = "fp32", overwrite: bool = False) -> MergeRecord:
    """Writes the model with its adapter merged to `output`: weights, config, tokenizer, and the record of the merge.

    The base is read in fp32 whatever the run computed in (a quantised one as it was packed, and unpacked for good), the
    adapter added in fp32, the sum rounded once to `dtype`. A
    probe (token ids drawn from a fixed seed and, where the task comes with the package, rows of it) goes through the
    adapter beside its base and through the written folder, read again; both compute in fp32, so that what they differ
    by is what merging did to the weights.

    Raises:
        AdapterError: `saved` is a whole model; the adapter does not fit its base; or the probe's logits moved by more
            than `TOLERANCES` allow. Nothing is written then.
        ConfigError: the output is in the way (see `folders.check_output`) or cannot be written.
        ModelError, HubError: the base cannot be loaded.
    """
    if saved.whole:
        raise AdapterError(f"{saved.folder}: a whole model; there is no adapter to merge")
    with atomic_folder(output, MERGE_FILE, overwrite) as folder:
        started = time.perf_counter()
        # The dropout of a run is its own; the merged model keeps that of its base.
        saved = replace(saved, model=replace(saved.model, dropout=None))
        model, tokenizer = load_saved_model(saved, "fp32")
        drawn, rows = draw_probe(model, tokenizer), real_rows(saved.task, tokenizer, saved.max_length)
        before = logits(model, [*drawn, *rows])
        merged = plain_model(dequantise(model)).to(DTYPES[dtype])  # type: ignore[arg-type]
        merged.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        written = time.perf_counter()
        again = load_base(ModelConfig(name=str(folder), precision="fp32"), saved.task).eval()
        after = logits(again.to(model.device), [*drawn, *rows])  # type: ignore[arg-type]
        drift = _drift(before, after, dtype, output)
        config = config_of(replace(saved, model=replace(saved.model, precision=dtype, quantised=None)))
        record = MergeRecord(
            task=saved.task.name,
            base=saved.model.name,
            adapter=str(saved.folder),
            dtype=dtype,
            config=config,
            drift=drift,
            probe={"drawn": len(drawn), "real": len(rows), "seed": PROBE_SEED},
            files={"model": folder_size(folder)},
            timings={"merge": written - started, "probe": time.perf_counter() - written},
            versions=versions(),
            git=git_state(),
            machine=machine(),
        )
        record.write(folder / MERGE_FILE)
    return record


def plain_model(model: PreTrainedModel) -> PreTrainedModel:
    """The model without LoRA layers: the active adapter merged into the base, its head in place of the base's own."""
    heads = {path: head.modules_to_save[head.active] for path, head in adapter_heads(model).items() if head.active}
    eject(merge(model))
    for path, head in heads.items():  # eject leaves the head of an adapter that has no LoRA layer
        model.set_submodule(path, head)
    return model


def draw_probe(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[torch.Tensor]:
    """`PROBE_ROWS` rows of token ids `(1, PROBE_LENGTH)`, none of them special; shorter where the model reads less."""
    special = set(tokenizer.all_special_ids)
    ids = torch.tensor([token for token in range(model.config.vocab_size) if token not in special])
    length = min(PROBE_LENGTH, tokenizer.model_max_length)
    generator = torch.Generator().manual_seed(PROBE_SEED)
    return list(ids[torch.randint(len(ids), (PROBE_ROWS, 1, length), generator=generator)])


def real_rows(task: Task, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[torch.Tensor]:
    """The token ids `(1, tokens)` of the first rows of a task that comes with the package; none of another task."""
    if not isinstance(task.source, Embedded):
        return []
    split = task.evaluation_splits[0]
    rows = task.load(None, [split])[split][:PROBE_ROWS]
    return [torch.tensor([ids]) for ids in task.encode(rows, tokenizer, max_length)["input_ids"][:PROBE_ROWS]]


@torch.inference_mode()
def logits(model: PreTrainedModel, probe: Sequence[torch.Tensor]) -> torch.Tensor:
    """All logits of the probe, one row after the other, in fp32 on the CPU."""
    rows = [model(input_ids=ids.to(model.device)).logits for ids in probe]
    return torch.cat([row.float().flatten().cpu() for row in rows])


def _drift(before: torch.Tensor, after: torch.Tensor, dtype: Dtype, output: Path) -> dict[str, float]:
    moved, largest = float((after - before).abs().max()), float(before.abs().max())
    relative, tolerance = moved / max(1.0, largest), TOLERANCES[dtype]
    if not relative <= tolerance:  # NaN, where a weight is beyond fp16, is no drift that could be told
        raise AdapterError(
            f"--output {output}: not written: merged in {dtype} the model answers otherwise than the adapter beside "
            f"its base: a logit moved by {moved:.3g}, the largest being {largest:.3g}; expected a relative drift of "
            f"at most {tolerance:g}, found {relative:.3g}. {ADVICE[dtype]}"
        )
    return {"max_abs": moved, "largest_logit": largest, "relative": relative, "tolerance": tolerance}
