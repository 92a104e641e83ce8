"""Token classification: a tag for each word of a text, such as the entities or the parts of speech in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_hf.core.config.schema import TaskConfig
from lora_hf.core.labels import IGNORE_INDEX
from lora_hf.data.metrics.tokens import score_tags, spans_of
from lora_hf.data.tasks.base import TRUNCATED, ModelKind, Task
from lora_hf.data.tasks.row_checks import check_columns, nfc
from lora_hf.data.tasks.sources import Source
from lora_hf.data.tasks.token_files import ENDS, STARTS, TAGS, read_tagged_rows, read_untagged_rows, text_column
from lora_hf.data.tasks.user_texts import encode_texts
from lora_hf.data.tasks.windows import WINDOW, WindowedTask, window_numbers, windows_of_rows
from lora_hf.data.tasks.words import OUTSIDE, Words, repair_bio, split_words

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

METRICS = ("f1", "accuracy")
# Columns of a window: the words whose tags it reads, and where their first tokens are.
WORDS, POSITIONS = "words", "positions"
_PREFIXES = ("B-", "I-", "E-", "S-", "L-", "U-")


@dataclass(frozen=True)
class TaggedWords:
    """What a model says about a text: the logits `(words, tags)` of its words; NaN for a word without a token."""

    words: Words
    logits: np.ndarray


@dataclass(frozen=True, kw_only=True)
class TokenClassification(WindowedTask):
    """A tag for each word, which its first token predicts; the other tokens have no label.

    With the metric `f1` the tags mark spans, as B-PER and I-PER do, and the answers are spans. With `accuracy` each
    word is an answer.
    """

    model_kind: ModelKind = "token-classification"
    column: str = ""  # of the user's files

    @property
    def marks_spans(self) -> bool:
        return self.best_metric == "f1"

    def head_config(self) -> dict[str, Any]:
        names = self.label_names
        return {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}

    def read_inputs(self, path: Path) -> dict[str, list]:
        return read_untagged_rows(path, self.column)

    def encode(self, rows: Mapping[str, list], tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict[str, list]:
        """Returns the model inputs of each window of each row, and which words it reads.

        A row of more than `max_length` tokens becomes several windows. Each word is read in the window in which it has
        the most context, so that it counts once; nothing is truncated.
        """
        self.check_offsets(tokenizer)
        capacity = max_length - tokenizer.num_special_tokens_to_add()
        tokens: Any = encode_texts(
            tokenizer,
            # A tokenizer of bytes would take a word without a space in front for the end of another.
            [[f" {word}" for word in words] for words in self._words(rows)],
            is_split_into_words=True,
            truncation=True,
            max_length=max_length,
            stride=self.fit_stride(max_length, capacity, "the special tokens"),
            return_overflowing_tokens=True,
        )
        encoded: dict[str, list] = {name: tokens[name] for name in tokenizer.model_input_names if name in tokens}
        owners = tokens["overflow_to_sample_mapping"]
        encoded[WINDOW] = window_numbers(owners)
        encoded[TRUNCATED] = [False] * len(owners)
        word_ids = [encoding.word_ids for encoding in tokens.encodings]
        firsts = [
            first
            for windows in windows_of_rows(encoded[WINDOW])
            for first in _with_most_context([word_ids[index] for index in windows])
        ]
        encoded[WORDS] = [list(first) for first in firsts]
        encoded[POSITIONS] = [list(first.values()) for first in firsts]
        if TAGS in rows:
            encoded["labels"] = [
                _labels(len(ids), first, rows[TAGS][owner])
                for ids, first, owner in zip(encoded["input_ids"], firsts, owners, strict=True)
            ]
        return encoded

    def _words(self, rows: Mapping[str, Any] | Dataset) -> list[Words]:
        columns: Any = rows if isinstance(rows, Mapping) else rows[:]
        texts = columns[self.text_columns[0]]
        if STARTS not in columns:
            return [split_words(text) for text in texts]
        return [Words(*each) for each in zip(texts, columns[STARTS], columns[ENDS], strict=True)]

    def row_outputs(
        self, outputs: Any, entries: Mapping[str, Any] | Dataset, rows: Mapping[str, Any] | Dataset
    ) -> list[TaggedWords]:
        """Returns the words of each row with the logits of their first tokens."""
        import numpy as np

        positions, words = entries[POSITIONS][:], entries[WORDS][:]
        chosen = [np.asarray(output)[at] for output, at in zip(outputs, positions, strict=True)]
        self.check_finite(chosen, "logits")
        found = []
        for of_row, windows in zip(self._words(rows), windows_of_rows(entries[WINDOW][:]), strict=True):
            logits = np.full((len(of_row), self.num_labels), np.nan, dtype=np.float32)
            for index in windows:
                logits[words[index]] = chosen[index]
            found.append(TaggedWords(of_row, logits))
        return found

    def predicted_tags(self, output: TaggedWords) -> list[str]:
        """Returns the tag of each word, with B- at the start of every span. A word without a token is outside."""
        return [tag for tag, _ in self._tags_and_scores(output)]

    def _tags_and_scores(self, output: TaggedWords) -> list[tuple[str, float]]:
        import numpy as np
        from scipy.special import softmax

        names, outside = self.label_names, OUTSIDE if OUTSIDE in self.label_names else self.label_names[0]
        known: Any = ~np.isnan(output.logits).any(axis=1)
        logits = np.where(known[:, None], output.logits, 0)
        probabilities = softmax(logits, axis=1)
        best = probabilities.argmax(axis=1) if len(probabilities) else []
        tags = [names[index] if sure else outside for index, sure in zip(best, known, strict=True)]
        scores = [float(row.max()) if sure else 0.0 for row, sure in zip(probabilities, known, strict=True)]
        return list(zip(repair_bio(tags) if self.marks_spans else tags, scores, strict=True))

    def score_rows(self, outputs: Sequence[TaggedWords], rows: Dataset) -> dict[str, float]:
        """Returns precision, recall and F1 of the spans as `seqeval` computes them, and the accuracy of the tags."""
        check_columns(rows.column_names, (TAGS,), self.name)
        references = [[self.label_names[tag] for tag in tags] for tags in rows[TAGS]]
        return score_tags([self.predicted_tags(output) for output in outputs], references, self.marks_spans)

    def format_answer(self, output: TaggedWords) -> dict[str, Any]:
        """Returns `spans`: start and end in the text, type, text, and the mean probability of the tags."""
        tagged, words = self._tags_and_scores(output), output.words
        tags = [tag for tag, _ in tagged]
        whole = spans_of(tags) if self.marks_spans else [(tag, index, index) for index, tag in enumerate(tags)]
        spans = []
        for kind, first, last in whole:
            start, end = words.starts[first], words.ends[last]
            score = sum(score for _, score in tagged[first : last + 1]) / (last + 1 - first)
            spans.append(
                {"start": start, "end": end, "type": kind, "text": words.text[start:end], "score": round(score, 4)}
            )
        return {"spans": spans}

    def prediction_lines(self, outputs: Sequence[TaggedWords], rows: Dataset) -> Iterator[dict[str, Any]]:
        """Yields the row number, words, tags and predicted tags of each row."""
        for index, (tags, output) in enumerate(zip(rows[TAGS], outputs, strict=True)):
            yield {
                "row": index,
                "words": list(output.words),
                "tags": [self.label_names[tag] for tag in tags],
                "predictions": self.predicted_tags(output),
            }

    def weaknesses(self, outputs: Sequence[TaggedWords]) -> list[str]:
        import numpy as np

        found = {tag for output in outputs for tag in self.predicted_tags(output)}
        problems = [f"the model predicts {min(found)!r} for every word"] if len(found) == 1 else []
        lost = sum(int(np.isnan(output.logits).any(axis=1).sum()) for output in outputs)
        if lost:
            problems.append(f"the tokenizer has no token for {lost} words, so the model predicts no tag for them")
        return problems


def _first_tokens(word_ids: Sequence[int | None]) -> dict[int, int]:
    """Returns the position of the first token of each word in a window."""
    positions: dict[int, int] = {}
    for position, word in enumerate(word_ids):
        if word is not None:
            positions.setdefault(word, position)
    return positions


def _with_most_context(windows: Sequence[Sequence[int | None]]) -> list[dict[int, int]]:
    """Returns for each window of a row the words that have more context there than in the others.

    Args:
        windows: the word of each token, None for special tokens.

    Returns:
        The positions of their first tokens, by word.
    """
    firsts = [_first_tokens(word_ids) for word_ids in windows]
    edges = [_text_edges(word_ids) for word_ids in windows]
    whole = {word for positions, (first, _) in zip(firsts, edges, strict=True)
             for word, position in positions.items() if position != first}  # fmt: skip
    best: dict[int, tuple[int, int]] = {}
    for number, (positions, (first, last)) in enumerate(zip(firsts, edges, strict=True)):
        for word, position in positions.items():
            is_rest = position == first and word in whole  # of a word that begins in another window
            context = -1 if is_rest else min(position - first, last - position)
            if word not in best or context > best[word][0]:
                best[word] = (context, number)
    return [
        {word: position for word, position in positions.items() if best[word][1] == number}
        for number, positions in enumerate(firsts)
    ]


def _text_edges(word_ids: Sequence[int | None]) -> tuple[int, int]:
    """Returns the positions of the first and last token of the text."""
    text = [position for position, word in enumerate(word_ids) if word is not None] or [0]
    return text[0], text[-1]


def _labels(length: int, first_tokens: dict[int, int], tags: Sequence[int]) -> list[int]:
    labels = [IGNORE_INDEX] * length
    for word, position in first_tokens.items():
        labels[position] = tags[word]
    return labels


def tag_names(config: TaskConfig) -> tuple[str, ...]:
    """Returns the tags of a config; from types of spans alone, O and the two tags of each."""
    names = config.label_names or ()
    if (config.metric or METRICS[0]) != "f1" or OUTSIDE in names or any(name.startswith(_PREFIXES) for name in names):
        return names
    return (OUTSIDE, *(f"{prefix}-{name}" for name in names for prefix in "BI"))


def tokens_task(config: TaskConfig, source: Source) -> Task:
    """Returns the task of a checked config."""
    column = (config.text_columns or ("",))[0]
    return TokenClassification(
        name=config.name,
        source=source,
        text_columns=(text_column(column),),
        column=column,
        label_names=tag_names(config),
        best_metric=config.metric or METRICS[0],
        stride=config.stride,
    )


def check_tokens_config(config: TaskConfig) -> list[str]:
    """Returns what is wrong with the tags of a config."""
    names = tag_names(config)
    wrong = len(names) < 2 or len(set(map(nfc, names))) < len(names)
    if (config.metric or METRICS[0]) == "f1":
        others = [name for name in names if name != OUTSIDE and not name.startswith(_PREFIXES)]
        wrong = wrong or bool(others) or OUTSIDE not in names
    expected = (
        "the types of spans, such as [PER, LOC], or all tags, such as [O, B-PER, I-PER]; with task.metric: accuracy "
        "any two or more different tags, such as [NOUN, VERB]"
    )
    found = ", ".join(config.label_names or ()) or "none"
    return [f"task.label_names: expected {expected}; found {found}"] if wrong else []


def read_tokens(config: TaskConfig, path: Path) -> Dataset:
    """Returns the rows of a file of a split."""
    column, label = (config.text_columns or ("",))[0], config.label_column or ""
    return read_tagged_rows(path, column, label, tag_names(config))
