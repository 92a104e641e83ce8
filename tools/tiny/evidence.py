"""Samples of what the bundled bases predict: `python -m tools.tiny.evidence [--json] [--output FILE]`.

The losses come from the records in the folders of the bases. The predictions are computed anew.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer, GPT2LMHeadModel

from tools.tiny.pretrain import BASES

MASKED_SENTENCES = (
    "She was the most beautiful <mask> in the world.",
    "He did <mask> know what to say.",
    "The President of the United <mask> signed the law.",
    "The food was very <mask>, and we enjoyed it.",
    "Once upon a <mask> there lived an old king.",
    "He opened the <mask> and went into the room.",
    "I am so <mask> that you could come.",
    "It is one of the <mask> films of the year.",
)
PROMPTS = (
    "Once upon a time",
    "The President of the United",
    "She opened the door and",
    "Scientists have found that",
    '"I do not know," said',
)
FIELDS = ("parameters", "corpus_tokens", "trained_tokens", "minutes", "held_out_loss", "held_out_perplexity")


def fills(folder: Path, count: int = 5) -> list[dict[str, Any]]:
    """The most probable words for each masked sentence, with their probabilities."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForMaskedLM.from_pretrained(folder)
    rows = []
    for sentence in MASKED_SENTENCES:
        batch = tokenizer(sentence, return_tensors="pt")
        with torch.no_grad():
            logits = model(**batch).logits[batch["input_ids"] == tokenizer.mask_token_id][0]
        best = logits.softmax(dim=-1).topk(count)
        words = tokenizer.convert_ids_to_tokens(best.indices.tolist())
        probabilities = [round(value, 3) for value in best.values.tolist()]
        rows.append({"sentence": sentence, "fills": dict(zip(words, probabilities, strict=True))})
    return rows


def continuations(folder: Path, new_tokens: int = 40, seed: int = 0) -> list[dict[str, str]]:
    """Continues each prompt as the start of a document, greedily and by sampling (top-p 0.9, temperature 0.8)."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = GPT2LMHeadModel.from_pretrained(folder)
    rows = []
    for prompt in PROMPTS:
        batch = tokenizer(tokenizer.bos_token + prompt, return_tensors="pt")
        torch.manual_seed(seed)
        decodings = {"greedy": {"do_sample": False}, "sampled": {"do_sample": True, "top_p": 0.9, "temperature": 0.8}}
        row = {"prompt": prompt}
        for name, options in decodings.items():
            ids = model.generate(**batch, max_new_tokens=new_tokens, pad_token_id=0, **options)  # pyright: ignore[reportAttributeAccessIssue]
            row[name] = tokenizer.decode(ids[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        rows.append(row)
    return rows


def evidence() -> dict[str, Any]:
    """The main numbers of the record of each base, and its predictions."""
    result: dict[str, Any] = {}
    for name, show in (("tiny-roberta", fills), ("tiny-gpt2", continuations)):
        record = json.loads((BASES / name / "pretraining.json").read_text())
        weights = (BASES / name / "model.safetensors").stat().st_size
        result[name] = {field: record[field] for field in FIELDS} | {
            "bytes": weights,
            show.__name__: show(BASES / name),
        }
    return result


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.tiny.evidence", description="Shows what the bundled bases predict."
    )
    parser.add_argument("--json", action="store_true", help="print JSON on one line instead of indented")
    parser.add_argument("--output", type=Path, help="also write the JSON to this file")
    options = parser.parse_args(arguments)
    result = evidence()
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n")
    sys.stdout.write(json.dumps(result, indent=None if options.json else 2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
