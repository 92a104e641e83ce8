"""Merges an adapter into its base, writes a plain Hugging Face folder, and checks that its outputs are the same."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lora_hf.adapters.resolve import SavedModel, run_sections
from lora_hf.adapters.save_load import load_saved_model, plain_model
from lora_hf.core.atomic_io import atomic_folder
from lora_hf.core.config.schema import ModelConfig
from lora_hf.core.errors import AdapterError
from lora_hf.core.provenance import folder_size, provenance
from lora_hf.core.records import MERGE_FILE, MergeRecord
from lora_hf.data.tasks.base import Task
from lora_hf.data.tasks.sources import Bundled
from lora_hf.lora.heads import task_type
from lora_hf.models.align import output_logits, reads_end_token
from lora_hf.models.load import DTYPES, dequantise, load_base

logger = logging.getLogger(__name__)

Dtype = Literal["fp32", "bf16", "fp16"]

# The drift of a logit that needs no comment, relative to the largest one (or to 1, if that is larger). In fp32 the same
# sums are computed in another order. bf16 rounds each weight by up to 2^-9 of itself and fp16 by 2^-12, and a model
# accumulates these errors.
TOLERANCES: dict[Dtype, float] = {"fp32": 1e-5, "bf16": 3e-2, "fp16": 4e-3}
# A deep model drifts further by the rounding of its own weights. A merge that does not multiply that is still right.
ROUNDING_FACTOR = 4

ADVICE: dict[Dtype, str] = {
    "fp32": "The adapter is too large for its base: train it with a lower learning rate or lora_alpha",
    "bf16": "Merge in fp32",
    "fp16": "Merge in fp32, or in bf16 if weights are beyond the range of fp16",
}

PROBE_ROWS, PROBE_LENGTH, PROBE_SEED = 8, 32, 0  # rows of each kind, tokens of a random row


def merge_adapter(saved: SavedModel, output: Path, dtype: Dtype = "fp32", overwrite: bool = False) -> MergeRecord:
    """Writes the merged model to `output`: weights, config, tokenizer and the record of the merge.

    The base is loaded in fp32 (a quantized base in its packed form, then unpacked), the adapter is added in fp32, and
    the sum is rounded once to `dtype`. A probe then runs through the adapter on its base and through the written
    folder, both in fp32, so any difference comes from merging. The probe consists of random token ids from a fixed seed
    and, for bundled tasks, of rows of the task.

    Raises:
        AdapterError: `saved` is a full model; the adapter does not fit its base; or the logits of the probe drift more
            than `TOLERANCES` allows, and more than rounding the base explains. Nothing is written.
        ConfigError: `output` exists (see `check_output_folder`) or cannot be written.
        ModelError, HubError: the base cannot be loaded.
    """
    if saved.is_full_model:
        raise AdapterError(f"{saved.folder}: a full model; there is no adapter to merge")
    with atomic_folder(output, MERGE_FILE, overwrite) as folder:
        started = time.perf_counter()
        # Dropout is a setting of the training run; the merged model keeps the one of its base.
        saved = replace(saved, model=replace(saved.model, dropout=None))
        model, tokenizer = load_saved_model(saved, "fp32")
        random_rows, task_rows = draw_probe(model, tokenizer), bundled_rows(saved.task, tokenizer, saved.max_length)
        before = logits(model, [*random_rows, *task_rows])
        merged = plain_model(dequantise(model)).to(DTYPES[dtype])  # type: ignore[arg-type]
        merged.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        written = time.perf_counter()
        reloaded = load_base(ModelConfig(name=str(folder), precision="fp32"), saved.task).eval()
        after = logits(reloaded.to(model.device), [*random_rows, *task_rows])  # type: ignore[arg-type]
        drift = _drift(before, after, dtype)
        del merged, reloaded
        _check_drift(drift, lambda: _rounding(saved, dtype, [*random_rows, *task_rows]), dtype, output)
        record = MergeRecord(
            task=saved.task.name,
            base=saved.model.name,
            adapter=str(saved.folder),
            dtype=dtype,
            config=run_sections(replace(saved, model=replace(saved.model, precision=dtype, quantised=None))),
            drift=drift,
            probe={"drawn": len(random_rows), "real": len(task_rows), "seed": PROBE_SEED},
            files={"model": folder_size(folder)},
            timings={"merge": written - started, "probe": time.perf_counter() - written},
            **provenance(),
        )
        record.write(folder / MERGE_FILE)
    return record


def _rounding(saved: SavedModel, dtype: Dtype, probe: Sequence[torch.Tensor]) -> float:
    """The relative drift of the bare base when its weights are rounded to `dtype`."""
    base, _ = load_saved_model(saved, "fp32", adapted=False)
    exact = logits(base, probe)
    rounded = logits(dequantise(base).to(DTYPES[dtype]).float(), probe)  # type: ignore[arg-type]
    return _drift(exact, rounded, dtype)["relative"]


def draw_probe(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[torch.Tensor]:
    """`PROBE_ROWS` random rows of token ids `(1, PROBE_LENGTH)`, shorter if the model is.

    They have no special tokens, except that rows for a model that answers at the end token end with it.
    """
    special, vocabulary = set(tokenizer.all_special_ids), model.config.get_text_config().vocab_size
    ids = torch.tensor([token for token in range(vocabulary) if token not in special])
    length = min(PROBE_LENGTH, tokenizer.model_max_length)
    generator = torch.Generator().manual_seed(PROBE_SEED)
    rows = ids[torch.randint(len(ids), (PROBE_ROWS, 1, length), generator=generator)]
    if reads_end_token(model):
        rows[..., -1] = model.config.eos_token_id
    return list(rows)


def bundled_rows(task: Task, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[torch.Tensor]:
    """The token ids `(1, tokens)` of the first rows of a bundled task; empty for other tasks."""
    if not isinstance(task.source, Bundled):
        return []
    split = task.evaluation_splits[0]
    rows = task.load(None, [split])[split][:PROBE_ROWS]
    return [torch.tensor([ids]) for ids in task.encode(rows, tokenizer, max_length)["input_ids"][:PROBE_ROWS]]


@torch.inference_mode()
def logits(model: PreTrainedModel, probe: Sequence[torch.Tensor]) -> torch.Tensor:
    """The logits of all rows, flattened into one fp32 tensor on the CPU. A decoder after an encoder reads them too."""
    decodes = task_type(model) == "SEQ_2_SEQ_LM"
    rows = []
    for ids in (row.to(model.device) for row in probe):
        output = model(input_ids=ids, decoder_input_ids=ids) if decodes else model(input_ids=ids)
        rows.append(output_logits(output).float().flatten().cpu())
    return torch.cat(rows)


def _drift(before: torch.Tensor, after: torch.Tensor, dtype: Dtype) -> dict[str, float]:
    moved, largest = float((after - before).abs().max()), float(before.abs().max())
    return {
        "max_abs": moved,
        "largest_logit": largest,
        "relative": moved / max(1.0, largest),
        "tolerance": TOLERANCES[dtype],
    }


def _check_drift(drift: dict[str, float], rounding: Callable[[], float], dtype: Dtype, output: Path) -> None:
    """Checks the drift: above the tolerance, it warns if rounding the base explains it, and raises an error otherwise.

    Args:
        rounding: computes the drift of the base alone when rounded to `dtype`.
    """
    relative, tolerance = drift["relative"], drift["tolerance"]
    if relative <= tolerance:
        return
    drift["rounding"] = 0.0 if dtype == "fp32" else rounding()
    if relative <= ROUNDING_FACTOR * drift["rounding"]:
        logger.warning(
            "merging in %s moves a logit of the probe by %.3g of the largest; rounding the base alone moves one by "
            "%.3g. %s for the exact outputs",
            dtype,
            relative,
            drift["rounding"],
            ADVICE["bf16"],
        )
        return
    # Also for NaN, which a weight beyond the range of fp16 produces.
    raise AdapterError(
        f"output {output}: not written: merging in {dtype} changed the outputs by more than the tolerance: a logit "
        f"moved by {drift['max_abs']:.3g}, the largest is {drift['largest_logit']:.3g}; expected a relative drift of "
        f"at most {max(tolerance, ROUNDING_FACTOR * drift['rounding']):.3g}, found {relative:.3g}. {ADVICE[dtype]}"
    )
