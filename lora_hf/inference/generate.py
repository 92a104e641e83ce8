"""Texts from a trained run: greedy, beam search or sampling, in batches, in the order of the prompts."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from lora_hf.adapters.resolve import SavedModel
from lora_hf.adapters.save_load import load_saved_model
from lora_hf.core.config.schema import GenerateConfig
from lora_hf.core.errors import ConfigError
from lora_hf.core.provenance import git_state, machine, versions
from lora_hf.core.records import ScoreRecord
from lora_hf.data.metrics.nlg import NlgMetric
from lora_hf.data.tasks.generation import Example, TextGeneration
from lora_hf.lora.inject import merge
from lora_hf.lora.precision import flush_denormals
from lora_hf.models.load import dequantise

logger = logging.getLogger(__name__)

Scores = dict[str, float | None]
Progress = Any  # a callable that wraps an iterable and takes its length as `total`, such as tqdm


@dataclass(frozen=True)
class GeneratedText:
    """A text and its score: the log-probability of its tokens and its end, over their number ** length_penalty."""

    text: str
    score: float


@dataclass
class Generator:
    """A model ready to write, with the task it was trained for."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    task: TextGeneration
    max_length: int

    @classmethod
    def load(cls, saved: SavedModel, adapted: bool = True) -> Generator:
        """Loads the adapter merged into its base, or the whole model; the bare base where `adapted` is False.

        In fp32 whatever the run computed in: a beam search turns on small differences, and in bf16 a row's would depend
        on what else is in its batch.

        Raises:
            AdapterError, ModelError, HubError: as `load_saved_model`.
        """
        model, tokenizer = load_saved_model(saved, "fp32", adapted)
        # A prompt ends where its text begins: shorter ones of a batch are padded in front.
        tokenizer.padding_side = "left"
        # In fp32 nothing is won by a packed base, and merging into it would round the adapter away.
        merge(dequantise(model))
        positions = getattr(model.config, "max_position_embeddings", saved.max_length)
        return cls(model, tokenizer, saved.task, positions)  # type: ignore[arg-type]

    def generate(self, contexts: Sequence[str], decoding: GenerateConfig) -> Iterator[GeneratedText]:
        """A text for each context, in order, as its batch is done; a text does not depend on its batch.

        Raises:
            DataError: at once, where a context leaves no room for `max_new_tokens` in the model's positions.
        """
        prompts = self.task.prompts(contexts, self.tokenizer, self.max_length - decoding.max_new_tokens)
        torch.manual_seed(decoding.seed)
        starts = range(0, len(prompts), decoding.batch_size)
        return (text for at in starts for text in self.generate_batch(prompts[at : at + decoding.batch_size], decoding))

    @torch.inference_mode()
    def generate_batch(
        self,
        prompts: Sequence[list[int]],
        decoding: GenerateConfig,
        stopping: Sequence[StoppingCriteria] = (),
    ) -> Iterator[GeneratedText]:
        """A text for each encoded prompt, all in one batch; `stopping` are asked after each token, beside the end."""
        batch = self.tokenizer.pad({"input_ids": list(prompts)}, return_tensors="pt").to(self.model.device)
        width = batch["input_ids"].shape[1]
        with flush_denormals():
            made: Any = self.model.generate(  # type: ignore[operator]
                **batch,
                generation_config=self._settings(decoding),
                logits_processor=LogitsProcessorList(_processors(decoding, width)),
                stopping_criteria=StoppingCriteriaList(stopping),
            )
        tokens = made.sequences[:, width:]
        lengths = self._lengths(tokens)
        if decoding.num_beams > 1:
            scores = made.sequences_scores
        else:
            steps = self.model.compute_transition_scores(made.sequences, made.scores, normalize_logits=True)  # type: ignore[operator]
            inside = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
            scores = steps.where(inside, 0.0).sum(1) / lengths**decoding.length_penalty
        texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        for text, score in zip(texts, scores.tolist(), strict=True):
            # One text a line, whatever the model wrote.
            yield GeneratedText(" ".join(text.split()), round(score, 4))

    def _lengths(self, tokens: torch.Tensor) -> torch.Tensor:
        """`(rows,)`: the tokens of each text up to and with its end."""
        end: Any = self.tokenizer.eos_token_id
        ended = tokens.eq(end).cumsum(1)
        return ((ended == 0).sum(1) + 1).clamp(max=tokens.shape[1])

    def _settings(self, decoding: GenerateConfig) -> GenerationConfig:
        values = asdict(decoding)
        for name in ("seed", "batch_size", "no_repeat_ngram_size"):
            del values[name]
        if not decoding.do_sample:
            for name in ("temperature", "top_p", "top_k"):
                del values[name]
        if decoding.num_beams == 1:
            del values["length_penalty"]
        return GenerationConfig(
            **values,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
            return_dict_in_generate=True,
            output_scores=True,
        )


class NoRepeatedNGram(LogitsProcessor):
    """Bans n-grams that the text already has, as the LoRA paper's decoder does.

    transformers' own ban counts the prompt and the padding too: `customer rating : 5 out of 5` in the prompt would
    forbid the text to say `5 out of 5`.
    """

    def __init__(self, size: int, width: int) -> None:
        self.ban, self.width = NoRepeatNGramLogitsProcessor(size), width

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        return self.ban(input_ids[:, self.width :], scores)  # type: ignore[arg-type]


def _processors(decoding: GenerateConfig, width: int) -> list[LogitsProcessor]:
    size = decoding.no_repeat_ngram_size
    return [NoRepeatedNGram(size, width)] if size else []


def score_texts(task: TextGeneration, examples: Sequence[Example], texts: Sequence[str]) -> dict[str, Scores]:
    """The task's official scores over all examples, and over each of its subsets; None where a scorer cannot run.

    The reasons for a None are logged.
    """
    parts: dict[str, list[int]] = {"all": list(range(len(examples)))}
    for subset in task.subsets:
        parts[subset] = [index for index, example in enumerate(examples) if example.subset == subset]
    scores = {}
    for part, chosen in parts.items():
        if chosen:
            metric = NlgMetric(task.metric)
            references = [list(examples[index].references) for index in chosen]
            scores[part] = metric.compute(predictions=[texts[index] for index in chosen], references=references) or {}
    for name, reason in metric.reasons.items():
        logger.warning("%s: %s", name, reason)
    return scores


def evaluate_texts(
    generator: Generator, saved: SavedModel, rows: Mapping[str, Dataset], adapted: bool, progress: Progress
) -> tuple[list[Path], dict[str, dict[str, Scores]]]:
    """Writes and scores a text for each input of each split, with the decoding of the run.

    In a run folder `predictions-<split>.txt` and `.jsonl` keep the texts, `outputs-<split>.jsonl` each with its input
    and references, and `scores-<split>.json` the `ScoreRecord`; those of the bare base say so in their names.

    Returns:
        The records written, and the scores by split and subset.
    """
    run = saved.run_folder
    records: list[Path] = []
    scores: dict[str, dict[str, Scores]] = {}
    for split, part in rows.items():
        examples = generator.task.groups(part)
        contexts = [example.context for example in examples]
        started = time.perf_counter()
        texts = progress(generator.generate(contexts, saved.generate), total=len(examples))
        name = f"{split}{'' if adapted else '-without-adapter'}"
        made = write_texts(run / f"predictions-{name}.txt", contexts, texts) if run else list(texts)
        written = time.perf_counter()
        scores[split] = score_texts(generator.task, examples, [text.text for text in made])
        if run:
            _write_outputs(run / f"outputs-{name}.jsonl", generator.task.name, examples, made)
            record = ScoreRecord(
                task=generator.task.name,
                model=saved.model.name,
                adapted=adapted,
                split=split,
                inputs=len(examples),
                decoding=asdict(saved.generate),
                metrics=scores[split],
                precision=str(generator.model.dtype).removeprefix("torch."),
                timings={"generate": written - started, "score": time.perf_counter() - written},
                versions=versions(),
                git=git_state(),
                machine=machine(),
            )
            records.append(record.write(run / f"scores-{name}.json"))
    return records, scores


def _write_outputs(path: Path, task: str, examples: Sequence[Example], made: Sequence[GeneratedText]) -> None:
    """One JSON object an input: what was asked, what people wrote, and what the model wrote."""
    aside = path.with_name(f"{path.name}.part")
    with aside.open("w", encoding="utf-8") as file:
        for example, text in zip(examples, made, strict=True):
            references = list(example.references)
            line = {"task": task, "input": example.context, "references": references, "output": text.text}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    aside.replace(path)


def write_texts(path: Path, prompts: Sequence[str], texts: Iterator[GeneratedText]) -> list[GeneratedText]:
    """Writes each text as it is made, and gives all of them back.

    `path` gets a text a line in the order of the prompts, the `.jsonl` of the same name prompt, text and score. Until
    the last is made both are called `.part`: an interruption leaves there what it had, and older files as they were.

    Raises:
        ConfigError: the folder cannot be written.
    """
    plain, full = path.with_suffix(".txt") if path.suffix == ".jsonl" else path, path.with_suffix(".jsonl")
    asides = [file.with_name(f"{file.name}.part") for file in (plain, full)]
    made = []
    try:
        with asides[0].open("w", encoding="utf-8") as lines, asides[1].open("w", encoding="utf-8") as rows:
            for prompt, generated in zip(prompts, texts, strict=True):
                lines.write(f"{generated.text}\n")
                rows.write(json.dumps({"prompt": prompt, **asdict(generated)}, ensure_ascii=False) + "\n")
                lines.flush()
                rows.flush()
                made.append(generated)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from error
    for aside, file in zip(asides, (plain, full), strict=True):
        aside.replace(file)
    return made
