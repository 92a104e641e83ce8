"""Generates texts with trained weights, by greedy search, beam search or sampling, and scores them."""

from __future__ import annotations

import copy
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
)

from lora_hf.adapters.resolve import SavedModel
from lora_hf.adapters.save_load import load_saved_model
from lora_hf.core.atomic_io import atomic_path
from lora_hf.core.config.schema import GenerateConfig
from lora_hf.core.errors import ConfigError
from lora_hf.core.provenance import provenance
from lora_hf.core.records import ScoreRecord
from lora_hf.data.metrics.nlg import NlgMetric
from lora_hf.data.tasks.generation import Example, TextGeneration, one_line
from lora_hf.data.tasks.user_texts import honored_tokens, warn_honored_tokens
from lora_hf.inference.logits import FiniteLogits, NoRepeatedNGram
from lora_hf.inference.text_files import text_files
from lora_hf.lora.inject import merge as add_to_base
from lora_hf.lora.precision import flush_denormals
from lora_hf.models.align import check_tokens, position_limit
from lora_hf.models.load import dequantise

logger = logging.getLogger(__name__)

Scores = dict[str, float | None]
Progress = Any  # a callable that wraps an iterable and takes its length as `total`, such as tqdm


@dataclass(frozen=True)
class GeneratedText:
    """A text and its score: the log-probability of its tokens, end included, over `number ** length_penalty`."""

    text: str
    score: float


@dataclass
class Generator:
    """A model ready for generation, and the task it was trained for. `max_length` is in tokens, prompt included."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    task: TextGeneration
    max_length: int

    @classmethod
    def load(
        cls,
        saved: SavedModel,
        adapted: bool = True,
        precision: str | None = None,
        exact: bool = False,
        merge: bool = False,
    ) -> Generator:
        """Loads an adapter and its base, or a full model; with `adapted=False` the base alone.

        Args:
            precision: of the base, as in a config; default: that of the run. A quantized base stays quantized.
            exact: run in fp32, and dequantize a quantized base. Otherwise the text of a row may depend on the other
                rows of its batch, as sums round differently.
            merge: add the adapter to the weights of the base: faster, but another copy of each of them.

        Raises:
            AdapterError, ModelError, HubError: as `load_saved_model`.
            AdapterError: the adapter cannot be merged.
        """
        model, tokenizer = load_saved_model(saved, "fp32" if exact else precision or saved.model.precision, adapted)
        if exact:
            dequantise(model)
        if merge:
            add_to_base(model)
        return cls(model, tokenizer, saved.task, text_limit(model, saved.max_length))  # type: ignore[arg-type]

    def generate(self, contexts: Sequence[str], decoding: GenerateConfig) -> Iterator[GeneratedText]:
        """Yields a text for each context, in order, batch by batch.

        Raises:
            DataError: a context leaves no space for `max_new_tokens`. It is raised before anything is generated.
        """
        decoding = resolve_decoding(decoding, self.model)
        prompts = self._encode(contexts, decoding)
        warn_honored_tokens(self.task.name, contexts, honored_tokens(self.tokenizer))
        torch.manual_seed(decoding.seed)
        size = decoding.batch_size
        batches = (prompts[start : start + size] for start in range(0, len(prompts), size))
        return (text for batch in batches for text in self.generate_batch(batch, decoding))

    def reply(self, context: str, decoding: GenerateConfig, on_text: Callable[[str], None]) -> GeneratedText:
        """Generates the text for one context, and calls `on_text` with each new piece of it.

        Raises:
            DataError: as `generate`.
        """
        decoding = resolve_decoding(decoding, self.model)
        prompts = self._encode([context], decoding)
        (text,) = self.generate_batch(prompts, decoding, streamer=_Streamer(self.tokenizer, on_text))
        return text

    def _encode(self, contexts: Sequence[str], decoding: GenerateConfig) -> list[list[int]]:
        limit = prompt_limit(self.model, self.max_length, decoding)
        prompts = self.task.prompts(contexts, self.tokenizer, limit)
        check_tokens(self.task, prompts, self.tokenizer, self.model)
        return prompts

    def generate_batch(
        self, prompts: Sequence[list[int]], decoding: GenerateConfig, streamer: TextStreamer | None = None
    ) -> list[GeneratedText]:
        """Returns a text for each encoded prompt, generated in one batch.

        Args:
            streamer: gets each token of a single prompt once it is generated, without beam search.

        Raises:
            TrainingError: logits are not finite.
        """
        ends, first = self.task.end_tokens(self.tokenizer), self.task.first_token(self.tokenizer)
        outputs = self.generate_tokens(prompts, decoding, ends, first, [FiniteLogits()], streamer=streamer)
        texts = self.tokenizer.batch_decode([tokens for tokens, _ in outputs], skip_special_tokens=True)
        scored = zip(texts, outputs, strict=True)
        return [GeneratedText(self.task.clean(text), round(score, 4)) for text, (_, score) in scored]

    @torch.inference_mode()
    def generate_tokens(
        self,
        prompts: Sequence[list[int]],
        decoding: GenerateConfig,
        end_tokens: Sequence[int],
        first_token: int | None,
        processors: Sequence[LogitsProcessor] = (),
        stopping: Sequence[StoppingCriteria] = (),
        streamer: TextStreamer | None = None,
    ) -> list[tuple[list[int], float]]:
        """Returns the new tokens of each encoded prompt, end token included, and the score of its text.

        Args:
            end_tokens: tokens that end a text besides those of the tokenizer and the model.
            first_token: the token with which an encoder-decoder begins each text; None: as its base says.
            stopping: criteria to stop at, in addition to the end tokens and `max_new_tokens`.
        """
        encodes = self.model.config.is_encoder_decoder
        # Padded in front where the text continues at the end of the prompt.
        side = "right" if encodes else "left"
        padded = self.tokenizer.pad({"input_ids": list(prompts)}, padding_side=side, return_tensors="pt")
        batch = padded.to(self.model.device)
        width = 1 if encodes else batch["input_ids"].shape[1]  # a decoder of its own starts with one token
        size = decoding.no_repeat_ngram_size
        own = [NoRepeatedNGram(size, width)] if size else []
        ends = [*base_end_tokens(self.model, self.tokenizer), *end_tokens]
        config = self._generation_config(decoding, ends, first_token)
        with flush_denormals(), _base_settings_aside(self.model):
            output: Any = self.model.generate(  # type: ignore[operator]
                **batch,
                generation_config=config,
                logits_processor=LogitsProcessorList([*processors, *own]),
                stopping_criteria=StoppingCriteriaList(stopping),
                streamer=streamer,
            )
        tokens = output.sequences[:, width:]
        lengths = self._lengths(tokens, ends)
        if decoding.num_beams > 1:
            scores = output.sequences_scores
        else:
            steps = self.model.compute_transition_scores(output.sequences, output.scores, normalize_logits=True)  # type: ignore[operator]
            inside = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
            scores = steps.where(inside, 0.0).sum(1) / lengths**decoding.length_penalty
        rows = zip(tokens.tolist(), lengths.tolist(), scores.tolist(), strict=True)
        return [(row[:length], score) for row, length, score in rows]

    def _lengths(self, tokens: torch.Tensor, ends: Sequence[int]) -> torch.Tensor:
        """The number of tokens of each row `(batch,)`, end token included; padding follows stopped ones."""
        ended = torch.isin(tokens, torch.tensor(ends, device=tokens.device)).cumsum(1)
        pad: Any = self.tokenizer.pad_token_id
        padding = tokens.ne(pad).flip(1).cumsum(1).flip(1) == 0
        before = ((ended == 0) & ~padding).sum(1)
        return (before + ended[:, -1].clamp(max=1)).clamp(min=1)

    def _generation_config(
        self, decoding: GenerateConfig, ends: Sequence[int], first_token: int | None
    ) -> GenerationConfig:
        unused = {"seed", "batch_size", "no_repeat_ngram_size", "from_base"}
        unused |= set() if decoding.do_sample else {"temperature", "top_p", "top_k"}
        unused |= {"length_penalty"} if decoding.num_beams == 1 else set()
        values = {name: value for name, value in asdict(decoding).items() if name not in unused} | {
            "eos_token_id": list(ends),
            "pad_token_id": self.tokenizer.pad_token_id,
            "return_dict_in_generate": True,
            "output_scores": True,
        }
        if not self.model.config.is_encoder_decoder:
            return GenerationConfig(**values)
        # What has no setting here stays the base's own, such as the shortest length and forced tokens.
        own: Any = copy.deepcopy(self.model.generation_config)
        others: dict[str, Any] = {
            "max_length": None,
            "no_repeat_ngram_size": None,
            "num_return_sequences": 1,  # a prompt has one text
            **dict.fromkeys(unused & vars(own).keys()),
        }
        forced = {} if first_token is None else {"forced_bos_token_id": first_token}
        own.update(**(others | values | forced))
        return own


@contextmanager
def _base_settings_aside(model: PreTrainedModel) -> Iterator[None]:
    """Hides the generation_config of a decoder's base, from which transformers fills what a call leaves open.

    It may hold a repetition penalty or a shortest length, which no setting, record or server knows.
    """
    own = model.generation_config
    if not model.config.is_encoder_decoder:
        model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def text_limit(model: PreTrainedModel, run_length: int) -> int:
    """The most tokens of a text: the positions of a decoder, or what the encoder read in the run."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", run_length)
    return min(run_length, positions) if model.config.is_encoder_decoder else positions


def prompt_limit(model: PreTrainedModel, text_limit: int, decoding: GenerateConfig) -> int:
    """The most tokens of a prompt. A decoder alone continues it, and needs positions for the new tokens."""
    return text_limit if model.config.is_encoder_decoder else text_limit - decoding.max_new_tokens


def resolve_decoding(decoding: GenerateConfig, model: PreTrainedModel) -> GenerateConfig:
    """For an encoder-decoder, the settings with those of `from_base` taken from the base's generation_config.

    Its decoder has positions of its own, or any number; a warning says if they are fewer than `max_new_tokens`.
    """
    if not model.config.is_encoder_decoder:
        return decoding
    names = decoding.with_base_settings().from_base if decoding.from_base is None else decoding.from_base
    own = model.generation_config
    values = {name: value for name in names or () if (value := getattr(own, name, None)) is not None}
    if "max_new_tokens" in (names or ()) and "max_new_tokens" not in values and (own.max_length or 0) > 1:
        values["max_new_tokens"] = own.max_length - 1  # it counts the token that the decoder starts with
    resolved = replace(decoding, **values, from_base=())
    positions = position_limit(model) or resolved.max_new_tokens
    if positions < resolved.max_new_tokens:
        logger.warning(
            "the model has %d positions, fewer than generate.max_new_tokens=%d; longer texts end there",
            positions, resolved.max_new_tokens,
        )  # fmt: skip
    return replace(resolved, max_new_tokens=min(resolved.max_new_tokens, positions))


class _Streamer(TextStreamer):
    """Passes each piece of a text on, as soon as it is sure."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)  # type: ignore[arg-type]
        self.on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.on_text(text)


def base_end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokenizer's end token and those of the base: chat models also end a turn with one of their own."""
    sources = (tokenizer, model.generation_config, model.config)
    found = [getattr(source, "eos_token_id", None) for source in sources]
    ids = [token for each in found for token in (each if isinstance(each, list) else [each])]
    return list(dict.fromkeys(token for token in ids if token is not None))


def score_subsets(task: TextGeneration, examples: Sequence[Example], texts: Sequence[str]) -> dict[str, Scores]:
    """The task's official scores over all examples, and over each of its subsets.

    The score of a scorer that cannot run is None; the reason is logged.
    """
    parts: dict[str, list[int]] = {"all": list(range(len(examples)))}
    for subset in task.subsets:
        parts[subset] = [index for index, example in enumerate(examples) if example.subset == subset]
    scores = {}
    for part, indices in parts.items():
        if indices:
            metric = NlgMetric(task.metric)
            references = [list(map(one_line, examples[index].references)) for index in indices]
            predictions = [one_line(texts[index]) for index in indices]  # as the scorers read their files
            scores[part] = metric.compute(predictions=predictions, references=references) or {}
    for name, reason in metric.reasons.items():
        logger.warning("%s: %s", name, reason)
    return scores


def evaluate_texts(
    generator: Generator, saved: SavedModel, splits: Mapping[str, Dataset], adapted: bool, progress: Progress
) -> tuple[list[Path], dict[str, dict[str, Scores]]]:
    """Generates and scores a text for each input of each split, with the decoding settings of the run.

    In a run folder it writes the texts to `predictions-<split>.txt` and `.jsonl`, each text with its input and
    references to `outputs-<split>.jsonl`, and the `ScoreRecord` to `scores-<split>.json`. For the base alone the names
    contain `without-adapter`.

    Returns:
        The paths of the records, and the scores by split and subset.
    """
    run_folder = saved.run_folder
    records: list[Path] = []
    scores: dict[str, dict[str, Scores]] = {}
    for split, rows in splits.items():
        examples = generator.task.groups(rows)
        contexts = [example.context for example in examples]
        started = time.perf_counter()
        stream = progress(generator.generate(contexts, saved.generate), total=len(examples))
        name = f"{split}{'' if adapted else '-without-adapter'}"
        shown = [generator.task.shown_context(context) for context in contexts]
        texts = write_texts(run_folder / f"predictions-{name}.txt", shown, stream) if run_folder else list(stream)
        generated = time.perf_counter()
        scores[split] = score_subsets(generator.task, examples, [text.text for text in texts])
        if run_folder:
            _write_outputs(run_folder / f"outputs-{name}.jsonl", generator.task, examples, texts)
            record = ScoreRecord(
                task=generator.task.name,
                model=saved.model.name,
                adapted=adapted,
                split=split,
                inputs=len(examples),
                decoding=asdict(resolve_decoding(saved.generate, generator.model)),
                metrics=scores[split],
                precision=str(generator.model.dtype).removeprefix("torch."),
                timings={"generate": generated - started, "score": time.perf_counter() - generated},
                **provenance(),
            )
            records.append(record.write(run_folder / f"scores-{name}.json"))
    return records, scores


def _write_outputs(
    path: Path, task: TextGeneration, examples: Sequence[Example], texts: Sequence[GeneratedText]
) -> None:
    """Writes one JSON object per input, with its references and the generated text."""
    with atomic_path(path) as tmp, tmp.open("w", encoding="utf-8") as file:
        for example, text in zip(examples, texts, strict=True):
            given, references = task.shown_context(example.context), list(example.references)
            line = {"task": task.name, "input": given, "references": references, "output": text.text}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def write_texts(path: Path, prompts: Sequence[Any], texts: Iterator[GeneratedText]) -> list[GeneratedText]:
    """Writes each text as soon as it is generated, and returns all of them.

    `path` gets one text per line, in the order of the prompts; the `.jsonl` file of the same name gets prompt, text and
    score, and keeps the line breaks of a text. Both files are named `.part` until the last text: an interruption keeps
    the texts so far there, and leaves older files unchanged.

    Raises:
        ConfigError: the folder cannot be written to.
    """
    files = text_files(path)
    partial_files = [file.with_name(f"{file.name}.part") for file in files]
    written = []
    try:
        with (
            partial_files[0].open("w", encoding="utf-8") as lines,
            partial_files[1].open("w", encoding="utf-8") as rows,
        ):
            for prompt, text in zip(prompts, texts, strict=True):
                lines.write(f"{one_line(text.text)}\n")
                rows.write(json.dumps({"prompt": prompt, **asdict(text)}, ensure_ascii=False) + "\n")
                lines.flush()
                rows.flush()
                written.append(text)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from error
    for partial, file in zip(partial_files, files, strict=True):
        partial.replace(file)
    return written
