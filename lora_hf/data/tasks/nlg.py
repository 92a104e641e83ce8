"""Data-to-text tasks: E2E, DART and WebNLG in the form of the LoRA paper, and `rule-restaurants`, which needs no data.

Source of the linearizations: microsoft/LoRA, examples/NLG/src/format_converting_{e2e,dart,webnlg}.py; E2E's renamed
slots and spaced values are those of the text files that the first of them reads.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from lora_hf.core.errors import DataError, did_you_mean
from lora_hf.data.synthetic import rule_restaurants
from lora_hf.data.tasks.generation import Example, TextGeneration, shown
from lora_hf.data.tasks.raw_formats import CommaSeparated, DartJson, WebNlgXml, dart_rows, web_nlg_rows
from lora_hf.data.tasks.sources import Bundled, LocalOrHub


@dataclass(frozen=True, kw_only=True)
class SlotsToText(TextGeneration):
    """E2E (Novikova et al. 2017, arXiv 1706.09254): `name[The Vaults], eatType[pub]` with one reference per row."""

    text_columns: tuple[str, ...] = ("meaning_representation", "human_reference")

    def context(self, prompt: str) -> str:
        """Returns `name : The Vaults | Type : pub` for `name[The Vaults], eatType[pub]`."""
        try:
            return _linearize_slots(prompt)
        except ValueError as error:
            raise DataError(f"{self.name}: {error}") from error

    def _example(self, *values: Any) -> Example:
        meaning, reference = values
        # The paper's files hold tokenized references, one per line; here they stay untokenized, on one line.
        reference = " ".join(reference.split())
        return Example(_linearize_slots(meaning), (reference,) if reference else ())


@dataclass(frozen=True, kw_only=True)
class TriplesToText(TextGeneration):
    """Sets of (subject, relation, object), linearized as `subject : relation : object | subject : ...`."""

    reads_text: ClassVar[bool] = False
    lower_case_relations: bool = False

    def context(self, prompt: str) -> str:
        """Returns the context for `subject : relation : object | subject : relation : object`."""
        triples, position = [], 0
        for part in prompt.strip("\n").split(" | "):
            fields = [field.strip() for field in part.split(" : ", 2)]
            if len(fields) < 3 or not all(fields):
                raise DataError(
                    f"{self.name}: {shown(prompt)} does not parse at position {position} (counting from 0): expected "
                    f"'subject : relation : object', and ' | ' before the next, found {part!r}"
                )
            triples.append(fields)
            position += len(part) + len(" | ")
        return self._linearize(triples)

    def _linearize(self, triples: Sequence[Sequence[str]]) -> str:
        lower = self.lower_case_relations
        return " | ".join(
            f"{subject} : {relation.lower() if lower else relation} : {value}" for subject, relation, value in triples
        )


@dataclass(frozen=True, kw_only=True)
class Dart(TriplesToText):
    """DART (Nan et al. 2021, arXiv 2007.02871): relations in lower case; every annotation is a reference."""

    text_columns: tuple[str, ...] = ("tripleset", "annotations")
    lower_case_relations: bool = True

    def _example(self, *values: Any) -> Example:
        triples, annotations = values
        if not _is_list(triples) or not triples or not all(_is_triple(triple) for triple in triples):
            raise ValueError(f"expected 'tripleset' as lists of subject, relation and object, found {shown(triples)}")
        if not _is_list(annotations) or not all(isinstance(each, Mapping) and "text" in each for each in annotations):
            raise ValueError(f"expected 'annotations' with a 'text' each, found {shown(annotations)}")
        texts = [annotation["text"] for annotation in annotations]
        return Example(self._linearize(triples), _usable(texts))


@dataclass(frozen=True, kw_only=True)
class WebNlg(TriplesToText):
    """The WebNLG challenge 2017 (Gardent et al. 2017): the references are the texts that were judged good."""

    text_columns: tuple[str, ...] = ("category", "modified_triple_set", "lex_comment", "lex_text")
    subsets: tuple[str, ...] = ("seen", "unseen")
    seen_categories: tuple[str, ...]

    def _example(self, *values: Any) -> Example:
        category, lines, comments, texts = values
        triples = [line.split(" | ") if isinstance(line, str) else line for line in lines or ()]
        if not triples or not all(_is_triple(triple) for triple in triples):
            raise ValueError(f"expected 'modified_triple_set' of 'subject | relation | object', found {shown(lines)}")
        if not _is_list(comments) or not _is_list(texts) or len(comments) != len(texts):
            raise ValueError("expected as many entries of 'lex_comment' as of 'lex_text'")
        good = [text for text, comment in zip(texts, comments, strict=True) if comment == "good"]
        subset = "seen" if category in self.seen_categories else "unseen"
        return Example(self._linearize(triples), _usable(good), subset)


# E2E's slots and their names in the paper's files.
_SLOT_NAMES = {
    "name": "name",
    "eatType": "Type",
    "food": "food",
    "priceRange": "price",
    "customer rating": "customer rating",
    "area": "area",
    "familyFriendly": "family friendly",
    "near": "near",
}
_SLOT = re.compile(r"\s*([^\[\],]*[^\[\],\s])\s*\[([^\[\]]*)\]\s*")


def _linearize_slots(meaning: str) -> str:
    """Returns a meaning representation in the paper's form; a ValueError says where it does not parse."""
    parts, position = [], 0
    while True:
        match = _SLOT.match(meaning, position)
        if match is None:
            raise _parse_error(meaning, position, "slot[value], such as name[The Vaults]")
        slot, value = match[1], match[2].strip()
        if slot not in _SLOT_NAMES:
            expected = f"one of {', '.join(_SLOT_NAMES)}{did_you_mean(slot, _SLOT_NAMES)}"
            raise _parse_error(meaning, match.start(1), expected)
        if not value:
            raise _parse_error(meaning, match.start(2), f"a value of {slot}")
        parts.append(f"{_SLOT_NAMES[slot]} : {_spaced(value)}")
        position = match.end()
        if position == len(meaning):
            return " | ".join(parts)
        if meaning[position] != ",":
            raise _parse_error(meaning, position, "a comma before the next slot, or the end")
        position += 1


def _parse_error(meaning: str, position: int, expected: str) -> ValueError:
    found = repr(meaning[position : position + 20]) if meaning[position:].strip() else "the end"
    return ValueError(
        f"{shown(meaning)} does not parse at position {position} (counting from 0): expected {expected}, found {found}"
    )


def _spaced(value: str) -> str:
    """Returns the value with the spaces of the paper's tokenized files: `£20-25` becomes `£ 20 - 25`."""
    return re.sub(r"(?<=\d)-(?=\d)", " - ", re.sub(r"£(?=\d)", "£ ", value))


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _is_triple(value: Any) -> bool:
    return _is_list(value) and len(value) == 3 and all(isinstance(field, str) and field.strip() for field in value)


def _usable(texts: Sequence[str | None]) -> tuple[str, ...]:
    return tuple(text for text in texts if text and text.strip())  # DART's test split has an empty text


_CONVERTED = "refs/convert/parquet"  # the main branches hold loading scripts, which datasets 4 does not run


def _files(train: str, validation: str, test: str, *folders: str) -> dict[str, tuple[str, ...]]:
    """Returns the paths to try for each split: its file in each of the folders."""
    names = {"train": train, "validation": validation, "test": test}
    return {split: tuple(f"{folder}{name}" for folder in folders) for split, name in names.items()}


NLG = (
    SlotsToText(
        name="e2e_nlg",
        metric="e2e_nlg",
        source=LocalOrHub(
            folder="e2e_nlg",
            hub_id="tuetschek/e2e_nlg",
            hub_revision=_CONVERTED,
            raw_files=CommaSeparated(
                files=_files("trainset.csv", "devset.csv", "testset_w_refs.csv", "e2e-dataset/", "e2e_nlg/", ""),
                columns={"meaning_representation": "mr", "human_reference": "ref"},
            ),
        ),
    ),
    Dart(
        name="dart",
        metric="dart",
        source=LocalOrHub(
            folder="dart",
            hub_id="Yale-LILY/dart",
            hub_revision=_CONVERTED,
            adapt=dart_rows,
            raw_files=DartJson(
                _files(
                    *(f"dart-v1.1.1-full-{part}.json" for part in ("train", "dev", "test")),
                    "dart/", "dart/data/v1.1.1/", "",
                )
            ),
        ),
    ),
    WebNlg(
        name="web_nlg",
        metric="web_nlg",
        seen_categories=("Airport", "Astronaut", "Building", "City", "ComicsCharacter", "Food", "Monument",
                         "SportsTeam", "University", "WrittenWork"),
        source=LocalOrHub(
            folder="web_nlg",
            hub_id="webnlg-challenge/web_nlg",
            hub_revision=_CONVERTED,
            hub_folder="webnlg_challenge_2017",
            adapt=web_nlg_rows,
            raw_files=WebNlgXml(
                _files("train", "dev", "test/testdata_with_lex.xml", "webnlg_challenge_2017/", "web_nlg/")
            ),
        ),
    ),
)  # fmt: skip

RULE_RESTAURANTS = SlotsToText(name="rule-restaurants", metric="e2e_nlg", source=Bundled(rule_restaurants))
