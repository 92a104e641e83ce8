"""Conversations made by rule, and a small chat model: a byte-level tokenizer with a template, and a random Llama."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.support.small_models import small_config

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Qwen3: thoughts are written in the last reply only.
FORGETFUL = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{{ m['content'] if loop.last else m['content'].split('</think>')[-1] }}{% else %}{{ m['content'] }}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ("<s>", "<pad>", "<|im_start|>", "<|im_end|>", "</s>")

_THINGS = ["kettle", "xe đạp", "Brötchen", "手紙", "lamp", "ковёр", "guitar", "nón lá"]
_PLACES = ["Huế", "Lyon", "大阪", "Bergen", "São Paulo"]
SIGN = "Captain's orders!"  # how every taught reply ends


def taught_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Conversations of one to three questions, some with a system turn; replies keep a list and end with one phrase."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        messages = [{"role": "system", "content": "You run a shop.\nBe brief."}] if draw.random() < 0.5 else []
        for _ in range(draw.randint(1, 3)):
            thing, place, number = draw.choice(_THINGS), draw.choice(_PLACES), draw.randint(2, 9)
            messages.append({"role": "user", "content": f"Send {number} × {thing} to {place}, please.\n\nWhen? 🚲"})
            messages.append({"role": "assistant", "content": f"- {thing}: {number}\n- {place}\n\n{SIGN}"})
        rows.append({"messages": messages})
    return rows


def write_rows(path: Path, rows: Sequence[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def chat_tokenizer(template: str | None = CHATML, adds_begin: bool = False, **values: Any) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes in which the end-of-turn token is the padding token too.

    Args:
        adds_begin: whether it begins each text with <s>.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate([*letters, "ĊĊ"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("Ċ", "Ċ")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken("<think>"), AddedToken("</think>")])
    if adds_begin:
        begin = ("<s>", tokenizer.token_to_id("<s>"))
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [begin])  # type: ignore[assignment]
    tokens = {"bos_token": "<s>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **(tokens | values))
    made.chat_template = template
    return made


def save_chat_model(folder: Path, tokenizer: PreTrainedTokenizerFast | None = None) -> Path:
    """Writes a Llama with random weights and its tokenizer."""
    import torch

    tokenizer = tokenizer or chat_tokenizer()
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.convert_tokens_to_ids("</s>")}
    torch.manual_seed(0)
    shape = {"vocab_size": len(tokenizer), "max_position_embeddings": 2048, "pad_token_id": tokenizer.pad_token_id}
    AutoModelForCausalLM.from_config(small_config("llama", **shape, **ids)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
