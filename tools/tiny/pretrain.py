"""Pretrains the bundled bases on a CPU: `python -m tools.tiny.pretrain --model NAME --text-dir DIR --work-dir DIR`.

These choices make about 20 million tokens enough for a network of five million parameters:

- Word embeddings start as PPMI vectors of the corpus, and the output bias as log unigram probabilities. So no step is
  spent on learning word frequencies and common neighbors.
- Muon (https://kellerjordan.github.io/posts/muon/) trains the hidden matrices, and AdamW the rest.
- Only masked positions are scored (30 % of them, falling to 15 %, after Wettig et al., EACL 2023).
- `<s>` must predict all words of its block (bag-of-words prediction: Ma et al., "Drop your Decoder", SIGIR 2024).
  Masked language modeling alone does not train that position, but a classification head reads only that one.

The text, masks and length of a step depend only on the seed and the step, and the learning rate is constant until the
final decay. So a run that is stopped and resumed, or that gets another --tokens before its decay starts, equals an
uninterrupted one.

On a machine with other load, set OMP_WAIT_POLICY=PASSIVE. Otherwise waiting threads spin, and the scheduler cannot move
the late thread to their core (on 2 cores with one other job, 1,600 tokens per second become 5,800).
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import platform
import shutil
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import cross_entropy, log_softmax
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers import __version__ as transformers_version

from lora_hf.core.errors import UserError
from tools.tiny import corpus as text
from tools.tiny.corpus import BOS, EOS, MASK, Corpus
from tools.tiny.recipes import RECIPES, Recipe, make_model, make_tokenizer

log = logging.getLogger(__name__)

BASES = Path(__file__).parents[2] / "lora_hf" / "models" / "bases"


@dataclass
class Progress:
    """The part of a checkpoint that is not tensors."""

    step: int = 0
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)


class MaskedObjective:
    """Masked language modeling for RoBERTa, plus bag-of-words prediction at `<s>`."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    def blocks(self, corpus: Corpus, rows: int, length: int, step: int) -> torch.Tensor:
        """Token ids `(rows, length)`, including special tokens."""
        words = text.blocks(corpus, rows, length - 2, step)
        return torch.cat([torch.full((rows, 1), BOS), words, torch.full((rows, 1), EOS)], dim=1)

    def losses(self, model: PreTrainedModel, ids: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The masked loss and the `<s>` loss of a training step, in nats per token."""
        generator = torch.Generator().manual_seed(self.recipe.seed + step)
        return self.masked_losses(model, ids, self.recipe.mask_rate(step), generator)

    def held_out_loss(self, model: PreTrainedModel, ids: torch.Tensor, batch: int) -> torch.Tensor:
        """The masked loss with 15 % of the tokens chosen, the same ones every time."""
        return self.masked_losses(model, ids, 0.15, torch.Generator().manual_seed(batch))[0]

    def masked_losses(
        self, model: PreTrainedModel, ids: torch.Tensor, rate: float, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The masked loss on a share `rate` of the tokens, and the `<s>` loss."""
        draws = torch.rand(ids.shape, generator=generator)
        chosen = (draws < rate) & (ids > MASK)  # never special tokens
        # Of the chosen tokens, 80 % are masked, 10 % replaced and 10 % kept (Devlin et al. 2019, section 3.1).
        others = torch.randint(MASK + 1, self.recipe.vocab_size, ids.shape, generator=generator)
        inputs = torch.where(chosen & (draws < 0.9 * rate), others, ids)
        inputs = torch.where(chosen & (draws < 0.8 * rate), MASK, inputs)
        head = model.get_submodule("lm_head")
        hidden = model.base_model(inputs).last_hidden_state
        masked = cross_entropy(head(hidden[chosen]).float(), ids[chosen])
        words = log_softmax(head(hidden[:, 0]).float(), dim=-1)
        return masked, -words.gather(1, ids[:, 1:-1]).mean()


class CausalObjective:
    """Next-token prediction for GPT-2, on text and on repeated passages.

    Generating text from a table requires copying from the context (induction: Olsson et al. 2022), which plain text
    teaches late. So a share of the rows repeats its own start, with a random period. The last tokens are plain text
    again, because a network that has just seen repeats also generates them.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    def blocks(self, corpus: Corpus, rows: int, length: int, step: int) -> torch.Tensor:
        """Token ids `(rows, length + 1)`: `<|endoftext|>`, then text."""
        return torch.cat([torch.zeros(rows, 1, dtype=torch.long), text.blocks(corpus, rows, length, step)], dim=1)

    def losses(self, model: PreTrainedModel, ids: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss of a training step in nats per token, and zero in place of the `<s>` loss."""
        generator = torch.Generator().manual_seed(self.recipe.seed + step)
        rows, length = ids.shape
        period = torch.randint(4, length // 2, (rows, 1), generator=generator)
        share = self.recipe.repeat_share if step < self.recipe.decay_end else 0.0
        repeats = torch.rand(rows, 1, generator=generator) < share
        positions = torch.arange(length).expand(rows, length)
        ids = ids.gather(1, torch.where(repeats, positions % period, positions))
        return self.held_out_loss(model, ids, step), torch.zeros(())

    def held_out_loss(self, model: PreTrainedModel, ids: torch.Tensor, batch: int) -> torch.Tensor:
        """The loss on the unchanged text, in nats per token."""
        hidden = model.base_model(ids[:, :-1], use_cache=False).last_hidden_state
        logits = model.get_submodule("lm_head")(hidden).float()
        return cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def make_objective(recipe: Recipe) -> MaskedObjective | CausalObjective:
    return MaskedObjective(recipe) if recipe.kind == "masked" else CausalObjective(recipe)


def make_optimizers(model: PreTrainedModel, recipe: Recipe) -> dict[str, torch.optim.Optimizer]:
    """Muon for the hidden matrices, AdamW for embeddings, norms and biases."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    matrices = [p for p in model.parameters() if p.ndim == 2 and id(p) not in embeddings]
    vectors = [p for p in model.parameters() if p.ndim != 2 or id(p) in embeddings]
    return {
        "muon": torch.optim.Muon(matrices, lr=recipe.matrix_lr, weight_decay=0.01, momentum=0.95),
        "adamw": torch.optim.AdamW(vectors, lr=recipe.vector_lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True),
    }


def save_checkpoint(
    folder: Path, model: PreTrainedModel, optimizers: dict[str, torch.optim.Optimizer], progress: Progress
) -> None:
    """Writes a new folder and renames it, so that a run killed at any moment leaves a complete checkpoint."""
    tensors = {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    for name, optimizer in optimizers.items():
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"{name}.{index}.{key}": value for key, value in state.items()}
    new, old = folder.with_name("checkpoint.new"), folder.with_name("checkpoint.old")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    save_file(tensors, new / "state.safetensors")
    (new / "progress.json").write_text(json.dumps(asdict(progress)))
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.replace(old)
    new.replace(folder)


def load_checkpoint(folder: Path, model: PreTrainedModel, optimizers: dict[str, torch.optim.Optimizer]) -> Progress:
    """Loads a checkpoint and returns its progress; without one, returns a new progress."""
    if not folder.exists():
        folder = folder.with_name("checkpoint.old")  # killed between the two renames
    if not folder.exists():
        return Progress()
    tensors = load_file(folder / "state.safetensors")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"model.{name}"])
    for name, optimizer in optimizers.items():
        state: dict[int, dict[str, torch.Tensor]] = {}
        for key, tensor in tensors.items():
            if key.startswith(f"{name}."):
                _, index, state_name = key.split(".")
                state.setdefault(int(index), {})[state_name] = tensor
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return Progress(**json.loads((folder / "progress.json").read_text()))


def choose_attention(model: PreTrainedModel, length: int) -> None:
    """Uses eager attention for blocks of up to 128 tokens, where it is 10 to 25 % faster than SDPA in bf16 on a CPU."""
    model.config._attn_implementation = "eager" if length <= 128 else "sdpa"


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, recipe: Recipe, validation: Corpus, batches: int) -> float:
    """Mean loss on validation blocks in nats per predicted token: causal, or masked at 15 % with fixed masks."""
    objective = make_objective(recipe)
    length = min(128, recipe.positions) if recipe.kind == "masked" else recipe.positions
    choose_attention(model, length)
    losses = []
    for batch in range(batches):
        ids = objective.blocks(validation, max(1, recipe.batch_tokens // length), length, batch)
        losses.append(objective.held_out_loss(model, ids, batch).item())
    return sum(losses) / len(losses)


def train(
    recipe: Recipe,
    corpora: tuple[Corpus, Corpus],
    work_dir: Path,
    resume: bool = False,
    stop_step: int | None = None,
) -> tuple[PreTrainedModel, Progress]:
    """Trains to the end of the recipe, or to `stop_step`, which leaves a checkpoint to resume from."""
    training, validation = corpora
    checkpoint = work_dir / "checkpoint"
    model = make_model(recipe, training.stream)
    optimizers = make_optimizers(model, recipe)
    progress = load_checkpoint(checkpoint, model, optimizers) if resume else Progress()
    objective = make_objective(recipe)
    lengths, shares = zip(*recipe.lengths, strict=True)
    start, sums = time.perf_counter() - progress.seconds, np.zeros(2)
    end = min(recipe.steps, stop_step or recipe.steps)
    while progress.step < end:
        step = progress.step
        length = int(np.random.default_rng([recipe.seed, step]).choice(lengths, p=shares))
        ids = objective.blocks(training, recipe.batch_tokens // length, length, step)
        choose_attention(model, length)
        with torch.autocast("cpu", torch.bfloat16):
            loss, sentence_loss = objective.losses(model, ids, step)
        (loss + recipe.sentence_weight * sentence_loss).backward()
        for optimizer, rate in zip(optimizers.values(), (recipe.matrix_lr, recipe.vector_lr), strict=True):
            optimizer.param_groups[0]["lr"] = rate * recipe.learning_rate_scale(step)
            optimizer.step()
            optimizer.zero_grad()
        sums += (loss.item(), sentence_loss.item())
        progress.step += 1
        if progress.step % recipe.check_steps == 0 or progress.step == end:
            since = progress.step - (progress.history[-1]["step"] if progress.history else 0)
            row = {
                "step": progress.step,
                "tokens": progress.step * recipe.batch_tokens,
                "train_loss": round(float(sums[0]) / since, 4),
                "sentence_loss": round(float(sums[1]) / since, 4),
                "held_out_loss": round(held_out_loss(model, recipe, validation, batches=8), 4),
            }
            progress.history.append(row)
            progress.seconds = time.perf_counter() - start
            sums[:] = 0
            save_checkpoint(checkpoint, model, optimizers, progress)
            log.info("%s, %.1f minutes", row, progress.seconds / 60)
    return model, progress


def export(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, output: Path, record: dict[str, Any]) -> None:
    """Writes a Hugging Face folder with the record. Its fp16 weights load in fp32 by default."""
    output.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(output)
    tokenizer.save_pretrained(output)
    edits = {
        "config.json": {"dtype": "float32"},
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"},
    }
    for name, changes in edits.items():  # with the stored dtype, dtype="auto" would compute in fp16
        file = output / name
        file.write_text(json.dumps(json.loads(file.read_text()) | changes, indent=2, sort_keys=True) + "\n")
    (output / "pretraining.json").write_text(json.dumps(record, indent=2) + "\n")


def pretrain(name: str, recipe: Recipe, text_dir: Path, work_dir: Path, output: Path, resume: bool) -> dict[str, Any]:
    """Trains the tokenizer and the model, exports the folder, and returns the record."""
    work_dir.mkdir(parents=True, exist_ok=True)
    files = {split: text.text_files(text_dir, split) for split in ("train", "validation")}
    tokenizer = make_tokenizer(recipe, files["train"], work_dir)
    encode = text.encode_masked if recipe.kind == "masked" else text.encode_causal
    training, validation = (
        text.cached(work_dir / split, lambda split=split: encode(files[split], tokenizer.backend_tokenizer))
        for split in ("train", "validation")
    )
    model, progress = train(recipe, (training, validation), work_dir, resume)
    loss = held_out_loss(model, recipe, validation, batches=40)
    record: dict[str, Any] = {
        "model": name,
        "recipe": asdict(recipe),
        "text": {file.name: text.sha256(file) for split in files.values() for file in split},
        "corpus_tokens": len(training.stream),
        "trained_tokens": progress.step * recipe.batch_tokens,
        "minutes": round(progress.seconds / 60, 1),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "held_out_loss": round(loss, 4),
        "held_out_perplexity": round(math.exp(loss), 2),
        "history": progress.history,
        "machine": {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers_version,
        },
    }
    export(model, tokenizer, output, record)
    return record


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.tiny.pretrain", description="Pretrains a bundled base.")
    parser.add_argument("--model", choices=sorted(RECIPES), required=True)
    parser.add_argument(
        "--text-dir",
        type=Path,
        required=True,
        help="folder of train-*.parquet and validation.parquet",
    )
    parser.add_argument("--work-dir", type=Path, required=True, help="folder for the tokenized text and the checkpoint")
    parser.add_argument("--output", type=Path, help="folder of the exported base; default: that of the bundled base")
    parser.add_argument("--tokens", type=int, help="tokens to train on; default: those of the recipe")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint in the work folder")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(message)s")
    recipe = RECIPES[options.model]
    if options.tokens:
        recipe = replace(recipe, tokens=options.tokens)
    output = options.output or BASES / options.model
    try:
        record = pretrain(options.model, recipe, options.text_dir, options.work_dir, output, options.resume)
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write(json.dumps(record) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
