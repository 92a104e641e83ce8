"""`text-forms`: how far the texts of a base in bf16, int8 and nf4 are from those in fp32, with an adapter beside it."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lora_hf.adapters.resolve import SavedModel, find_saved_model
from lora_hf.core.config.schema import RunConfig
from lora_hf.core.errors import ConfigError
from lora_hf.inference.generate import Generator
from lora_hf.models.load import DTYPES
from tools.benchmark.rounds import environment
from tools.benchmark.serve_texts import PROMPTS, save_adapters

REFERENCE = "fp32"
PACKED = ("int8", "nf4")  # they compute in fp32 here; half precision comes on top


def benchmark_forms(config: RunConfig, forms: list[str], new_tokens: int = 64) -> dict[str, Any]:
    """Compares the forms of a base on the texts that it writes in fp32, with a random adapter beside it.

    Raises:
        ConfigError: an unknown form, or a number below one.
    """
    unknown = [form for form in forms if form not in (*DTYPES, *PACKED)]
    if unknown or new_tokens < 1:
        expected = ", ".join((*DTYPES, *PACKED))
        raise ConfigError(f"--forms {','.join(forms)} --new-tokens {new_tokens}: expected {expected}, and at least 1")
    with tempfile.TemporaryDirectory() as folder:
        saved = find_saved_model(next(iter(save_adapters(config, Path(folder)).values())))
        prompts, texts, wanted = _written(_load(saved, REFERENCE), new_tokens)
        sides = {form: _compare(_load(saved, form), prompts, texts, wanted) for form in forms}
    return {
        "work": {
            "model": Path(config.model.name).name,
            "texts": len(texts),
            "new_tokens": new_tokens,
            "lora": config.to_dict()["lora"],
        },
        "forms": sides,
        **environment(),
    }


def _load(saved: SavedModel, form: str) -> Generator:
    packed: Any = form if form in PACKED else None
    precision: Any = REFERENCE if packed else form
    return Generator.load(replace(saved, model=replace(saved.model, precision=precision, quantised=packed)))


def _prompts(generator: Generator) -> list[list[int]]:
    """The prompts as the base reads them: through its chat template, if it has one."""
    tokenizer: Any = generator.tokenizer
    if not getattr(tokenizer, "chat_template", None):
        return [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    return [tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) for chat in chats]


def _written(generator: Generator, new_tokens: int) -> tuple[list[list[int]], list[list[int]], list[torch.Tensor]]:
    """The prompts, the tokens that follow each in greedy search, and their log-probabilities."""
    prompts = _prompts(generator)
    texts = [_greedy(generator, prompt, new_tokens) for prompt in prompts]
    return prompts, texts, [_logprobs(generator, *pair) for pair in zip(prompts, texts, strict=True)]


@torch.inference_mode()
def _greedy(generator: Generator, prompt: list[int], new_tokens: int) -> list[int]:
    ids = torch.tensor([prompt])
    made = generator.model.generate(  # type: ignore[operator]
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False
    )
    return made[0, len(prompt) :].tolist()


@torch.inference_mode()
def _logprobs(generator: Generator, prompt: list[int], text: list[int]) -> torch.Tensor:
    """`(tokens, vocabulary)` before each token of the text."""
    logits = generator.model(torch.tensor([[*prompt, *text]])).logits[0, len(prompt) - 1 : -1]
    return logits.float().log_softmax(-1)


def _compare(
    generator: Generator, prompts: list[list[int]], texts: list[list[int]], wanted: list[torch.Tensor]
) -> dict[str, float]:
    differences, same, equal = [], [], 0
    for prompt, text, reference in zip(prompts, texts, wanted, strict=True):
        found, tokens = _logprobs(generator, prompt, text), torch.tensor(text)[:, None]
        differences.append((found.gather(1, tokens) - reference.gather(1, tokens)).abs())
        same.append(found.argmax(1) == reference.argmax(1))
        equal += _greedy(generator, prompt, len(text)) == text
    difference = torch.cat(differences)
    base = [
        each
        for path, each in (*generator.model.named_parameters(), *generator.model.named_buffers())
        if "lora_" not in path
    ]
    return {
        "base_mib": sum(each.numel() * each.element_size() for each in base) / 2**20,
        "mean_difference": float(difference.mean()),
        "largest_difference": float(difference.max()),
        "same_next_token": float(torch.cat(same).float().mean()),
        "equal_texts": equal / len(texts),
    }
