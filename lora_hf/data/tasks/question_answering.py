"""Extractive question answering: the span of a context that answers a question."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_hf.core.config.schema import TaskConfig
from lora_hf.core.errors import DataError
from lora_hf.data.metrics.question_answering import score_answers
from lora_hf.data.tasks.base import TRUNCATED, ModelKind, Task
from lora_hf.data.tasks.kind import check_no_classes
from lora_hf.data.tasks.question_files import ANSWERS, STARTS, read_inputs
from lora_hf.data.tasks.row_checks import check_columns
from lora_hf.data.tasks.sources import Source
from lora_hf.data.tasks.user_texts import encode_texts
from lora_hf.data.tasks.windows import WINDOW, WindowedTask, window_numbers, windows_of_rows

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

METRICS = ("f1", "exact_match")
# As in the examples of BERT and transformers: how many of the best starts and ends are combined, and how many tokens an
# answer may have.
N_BEST, LONGEST_ANSWER = 20, 30
LEAST_CONTEXT = 8  # tokens of context in each window
# Columns of a window: where in the context each token begins and ends, -1 for other tokens.
TOKEN_STARTS, TOKEN_ENDS = "token_starts", "token_ends"


@dataclass(frozen=True)
class Answer:
    """A span of the context, or no answer: then the text is empty and has no place."""

    text: str
    start: int | None
    end: int | None
    score: float


@dataclass(frozen=True, kw_only=True)
class QuestionAnswering(WindowedTask):
    """The span of a context that answers a question.

    With `null_score_threshold`, as in SQuAD 2.0, there may be no answer: if the score of the first token exceeds that
    of the best span by more than this.
    """

    model_kind: ModelKind = "question-answering"
    null_score_threshold: float | None = None

    @property
    def num_labels(self) -> int:
        """A logit for the start and one for the end."""
        return 2

    def head_config(self) -> dict[str, Any]:
        return {"num_labels": 2}

    def read_inputs(self, path: Path) -> dict[str, list]:
        return read_inputs(path, self.text_columns)

    def check(self, rows: Dataset, split: str, origin: str) -> None:
        super().check(rows, split, origin)
        without = [index for index, answers in enumerate(rows[ANSWERS]) if not answers]
        if without and self.null_score_threshold is None and not split.startswith("test"):
            raise DataError(
                f"{origin}: {len(without)} of {len(rows)} questions have no answer, the first is row {without[0]} "
                "(counting from 0); set task.null_score_threshold: 0.0 to train on them, or leave these rows out"
            )

    def encode(self, rows: Mapping[str, list], tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict[str, list]:
        """Returns the model inputs of each window of each row, and `start_positions` and `end_positions`.

        Windows without the whole answer have the position of the first token, as questions without one.

        Raises:
            DataError: a question leaves no space for its context.
        """
        self.check_offsets(tokenizer)
        questions, contexts = ([text.strip() for text in rows[self.text_columns[0]]], rows[self.text_columns[1]])
        strides = self._strides(questions, tokenizer, max_length)
        found: list[tuple[int, dict[str, Any]]] = []
        for stride in dict.fromkeys(strides):  # nearly always one: long questions have a smaller one
            chosen = [row for row, other in enumerate(strides) if other == stride]
            windows = _windows([questions[row] for row in chosen], [contexts[row] for row in chosen], tokenizer,
                               max_length, stride)  # fmt: skip
            found += [(chosen[index], window) for index, window in windows]
        found.sort(key=itemgetter(0))
        if ANSWERS in rows:
            texts, starts = rows[ANSWERS], rows[STARTS]
            for row, window in found:
                window["start_positions"], window["end_positions"] = _target(window, texts[row], starts[row])
        owners, entries = [row for row, _ in found], [window for _, window in found]
        encoded = {name: [window[name] for window in entries] for name in entries[0]} if entries else {}
        return {**encoded, WINDOW: window_numbers(owners), TRUNCATED: [False] * len(owners)}

    def _strides(self, questions: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[int]:
        """The stride of each row; it depends on the row alone, so that its answer does not depend on other rows."""
        special = tokenizer.num_special_tokens_to_add(pair=True)
        encoded: Any = encode_texts(tokenizer, list(questions), add_special_tokens=False, verbose=False)
        strides = []
        for question, tokens in zip(questions, encoded["input_ids"], strict=True):
            capacity, what = max_length - special - len(tokens), f"the {len(tokens)} tokens of the question"
            strides.append(self.fit_stride(max_length, capacity, f"{what} {question!r:.80}", LEAST_CONTEXT))
        return strides

    def row_outputs(
        self, outputs: Any, entries: Mapping[str, Any] | Dataset, rows: Mapping[str, Any] | Dataset
    ) -> list[Answer]:
        """Returns the best answer of each row over its windows, from start and end logits `(windows, seq, 2)`."""
        import numpy as np

        ids, starts, ends = (entries[name][:] for name in ("input_ids", TOKEN_STARTS, TOKEN_ENDS))
        logits = [np.asarray(output)[: len(tokens)] for output, tokens in zip(outputs, ids, strict=True)]
        self.check_finite(logits, "logits")
        contexts = rows[self.text_columns[1]][:]
        answers = []
        for context, windows in zip(contexts, windows_of_rows(entries[WINDOW][:]), strict=True):
            candidates = [
                candidate for index in windows for candidate in _candidates(logits[index], starts[index], ends[index])
            ]
            no_answer = min(float(logits[index][0].sum()) for index in windows)
            answers.append(self._choose(context, candidates, no_answer))
        return answers

    def _choose(self, context: str, candidates: list[tuple[float, int, int]], no_answer: float) -> Answer:
        import numpy as np
        from scipy.special import softmax

        candidates = sorted(candidates, reverse=True)[:N_BEST]
        scores = [score for score, _, _ in candidates]
        threshold = self.null_score_threshold
        values = np.array([*scores, no_answer] if threshold is not None or not scores else scores)
        probabilities = softmax(values)
        if not candidates or (threshold is not None and no_answer - scores[0] > threshold):
            return Answer("", None, None, float(probabilities[-1]))
        _, start, end = candidates[0]
        text = context[start:end].strip()  # the tokens of some tokenizers include the space before them
        start += context[start:end].find(text)
        return Answer(text, start, start + len(text), float(probabilities[0]))

    def score_rows(self, outputs: Sequence[Answer], rows: Dataset) -> dict[str, float]:
        """Returns exact match and F1, as the official script of SQuAD 1.1, or with a threshold that of 2.0."""
        check_columns(rows.column_names, (ANSWERS,), self.name)
        references = rows[ANSWERS][:]
        if self.null_score_threshold is None and [] in references:
            raise DataError(
                f"{self.name}: row {references.index([])} (counting from 0) has no answer to score with; expected one "
                "in each row, or task.null_score_threshold for questions without an answer"
            )
        return score_answers([answer.text for answer in outputs], references, self.null_score_threshold is not None)

    def format_answer(self, output: Answer) -> dict[str, Any]:
        """Returns the answer, its offsets in the context, and its probability among the best spans.

        Without an answer the text is empty and the offsets are null.
        """
        return {"answer": output.text, "start": output.start, "end": output.end, "score": round(output.score, 4)}

    def prediction_lines(self, outputs: Sequence[Answer], rows: Dataset) -> Iterator[dict[str, Any]]:
        """Yields the row number, the right answers and the model's for each row."""
        for index, (references, output) in enumerate(zip(rows[ANSWERS], outputs, strict=True)):
            yield {"row": index, "answers": list(references), **self.format_answer(output)}

    def weaknesses(self, outputs: Sequence[Answer]) -> list[str]:
        if any(answer.text for answer in outputs):
            return []
        return ["the model answers no question; train longer, or set a greater task.null_score_threshold"]


def _windows(
    questions: list[str], contexts: list[str], tokenizer: PreTrainedTokenizerBase, max_length: int, stride: int
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the row and the inputs of each window."""
    tokens: Any = encode_texts(
        tokenizer,
        questions,
        contexts,
        truncation="only_second",
        max_length=max_length,
        stride=stride,
        return_overflowing_tokens=True,
    )
    names = [name for name in tokenizer.model_input_names if name in tokens]
    for index, (owner, encoding) in enumerate(zip(tokens["overflow_to_sample_mapping"], tokens.encodings, strict=True)):
        places = [
            offsets if sequence == 1 else (-1, -1)
            for offsets, sequence in zip(encoding.offsets, encoding.sequence_ids, strict=True)
        ]
        window: dict[str, Any] = {name: tokens[name][index] for name in names}
        window[TOKEN_STARTS], window[TOKEN_ENDS] = map(list, zip(*places, strict=True))
        yield owner, window


def _target(window: Mapping[str, Any], texts: Sequence[str], starts: Sequence[int]) -> tuple[int, int]:
    """Returns the first and last token of the first answer, or twice the first token if the window lacks a part."""
    if not texts:
        return 0, 0
    start, end = starts[0], starts[0] + len(texts[0])
    context = [position for position, place in enumerate(window[TOKEN_STARTS]) if place >= 0]
    token_starts, token_ends = window[TOKEN_STARTS], window[TOKEN_ENDS]
    if not context or token_starts[context[0]] > start or token_ends[context[-1]] < end:
        return 0, 0
    first = max(position for position in context if token_starts[position] <= start)
    last = min(position for position in context if token_ends[position] >= end)
    return first, max(first, last)


def _candidates(logits: np.ndarray, starts: Sequence[int], ends: Sequence[int]) -> list[tuple[float, int, int]]:
    """Returns score, start and end in the context of the spans of a window that combine a good start and end."""
    import numpy as np

    place_starts, place_ends = np.asarray(starts), np.asarray(ends)
    # Tokens without characters, such as a space of its own in front, are no answer.
    readable = np.flatnonzero((place_starts >= 0) & (place_ends > place_starts))
    firsts, lasts = (readable[np.argsort(-logits[readable, side], kind="stable")[:N_BEST]] for side in (0, 1))
    return [
        (float(logits[first, 0] + logits[last, 1]), int(starts[first]), int(ends[last]))
        for first in firsts
        for last in lasts
        if first <= last < first + LONGEST_ANSWER
    ]


def question_answering_task(config: TaskConfig, source: Source) -> Task:
    """Returns the task of a checked config."""
    return QuestionAnswering(
        name=config.name,
        source=source,
        text_columns=config.text_columns or (),
        best_metric=config.metric or METRICS[0],
        null_score_threshold=config.null_score_threshold,
        stride=config.stride,
    )


def check_questions_config(config: TaskConfig) -> list[str]:
    """Returns what is wrong with the columns of a config."""
    problems = check_no_classes(config)
    if len(config.text_columns or ()) != 2:
        problems.append(
            "task.text_columns: expected the columns of the question and of the context, found "
            f"{', '.join(config.text_columns or ())}"
        )
    return problems
