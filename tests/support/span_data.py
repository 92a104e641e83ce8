"""Rows made by rule for the kinds of task that mark spans, and small encoder-decoders with a tokenizer of words."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
import transformers

from lora_hf.adapters.resolve import find_saved_model
from lora_hf.inference.classify import Predictor
from tests.support import fork_server
from tests.support.small_models import small_config
from tests.support.word_tokenizer import word_tokenizer

PEOPLE = ("Anna Meier", "Tom Brandt", "Li Wei", "Maria da Silva", "Ivan Petrov", "Aiko Tanaka", "John Smith", "Eva Ek")
PLACES = ("Paris", "New York", "Lake Como", "Hanoi", "Rio de Janeiro", "Oslo", "Cape Town", "Lima")
COMPANIES = ("Acme Corp", "Globex", "Blue Ocean Ltd", "Initech", "Umbrella Group", "Stark Industries")
SENTENCES = (
    "{PER} moved to {LOC} in {YEAR} .",
    "In {LOC} , {PER} met the board of {ORG} .",
    "{ORG} opened an office in {LOC} .",
    "The shares of {ORG} fell after {PER} left .",
    "Yesterday it rained in {LOC} and nobody came .",
    "{PER} and {PER} work for {ORG} .",
)
TAG_NAMES = ["PER", "LOC", "ORG"]


def sentence(choice: random.Random) -> tuple[list[str], list[str]]:
    """The tokens of a sentence and their BIO tags."""
    values = {"{PER}": PEOPLE, "{LOC}": PLACES, "{ORG}": COMPANIES}
    tokens: list[str] = []
    tags: list[str] = []
    for word in choice.choice(SENTENCES).split():
        words = choice.choice(values[word]).split() if word in values else [word]
        words = [str(choice.randint(1950, 2020))] if word == "{YEAR}" else words
        kind = word.strip("{}")
        tokens += words
        tags += [f"{'I' if place else 'B'}-{kind}" for place in range(len(words))] if word in values else ["O"]
    return tokens, tags


def write_conll(path: Path, rows: int, seed: int) -> Path:
    """Writes sentences as a CoNLL-2003 file: token, part of speech, chunk and tag."""
    choice = random.Random(seed)
    lines = ["-DOCSTART- -X- -X- O", ""]
    for _ in range(rows):
        lines += [f"{token} NN B-NP {tag}" for token, tag in zip(*sentence(choice), strict=True)] + [""]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def question(choice: random.Random, sentences: int = 3, answered: bool = True) -> dict[str, Any]:
    """A row of question, context and answers."""
    person, place = choice.choice(PEOPLE), choice.choice(PLACES)
    parts = [f"The office of {choice.choice(COMPANIES)} is closed." for _ in range(sentences)]
    parts.insert(choice.randrange(len(parts) + 1), f"{person} lives in {place}." if answered else "Nobody is at home.")
    context = " ".join(parts)
    answers = (
        {"text": [place], "answer_start": [context.index(place)]} if answered else {"text": [], "answer_start": []}
    )
    return {"question": f"Where does {person} live?", "context": context, "answers": answers}


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Writes JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows), encoding="utf-8")
    return path


def write_copies(path: Path, rows: int, seed: int) -> Path:
    """Writes sources of words of `word_tokenizer`, and their first words as targets."""
    choice = random.Random(seed)
    sources = [[f"w{choice.randrange(96)}" for _ in range(choice.randint(3, 8))] for _ in range(rows)]
    return write_lines(path, [{"source": " ".join(each), "target": " ".join(each[:2])} for each in sources])


def save_encoder_decoder(folder: Path, kind: str) -> Path:
    """A small random T5, BART and so on without dropout, with a tokenizer of words."""
    torch.manual_seed(0)
    config = small_config(kind)
    config.dropout = 0.0
    if kind == "t5":
        config.dropout_rate = 0.0
    model = transformers.AutoModelForSeq2SeqLM.from_config(config)
    model.generation_config.update(num_beams=2, max_length=7, min_length=3)
    model.save_pretrained(folder)
    word_tokenizer(ends=True, pad_token="<pad>").save_pretrained(folder)
    return folder


def start_logits_here_and_there(adapter: Path, folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """What the reader of this adapter computes for a question, in this process and in a new one."""
    fork_server.run(_save_start_logits, adapter, folder / "there.pt")
    return _start_logits(adapter), torch.load(folder / "there.pt")


def _start_logits(adapter: Path) -> torch.Tensor:
    predictor = Predictor.load(find_saved_model(adapter), "fp32")
    batch: Any = predictor.tokenizer("Where?", "Li Wei lives in Oslo.", return_tensors="pt")
    with torch.no_grad():
        return predictor.model(**batch).start_logits


def _save_start_logits(adapter: Path, file: Path) -> None:
    torch.save(_start_logits(adapter), file)
