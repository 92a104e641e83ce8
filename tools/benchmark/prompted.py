"""Scores of a chat model that was not fine-tuned, prompted with examples: the baseline of a fine-tuned one.

    python -m tools.benchmark.prompted --model DIR --data-dir DIR --output docs/results/e2e/smollm2-prompted.json

Each input of the test split follows an instruction and the same few training rows, as turns of the model's own chat
template. Decoding is greedy, in fp32, and ends with the model's turn.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_hf.core.config.schema import GenerateConfig, TaskConfig
from lora_hf.core.provenance import provenance
from lora_hf.core.records import ScoreRecord
from lora_hf.data.tasks.generation import Example, TextGeneration
from lora_hf.data.tasks.registry import get_task, task_of
from lora_hf.inference.generate import Generator, score_subsets

TASKS = ("e2e_nlg", "rule-restaurants")
INSTRUCTION = (
    "You describe restaurants. The user lists attributes, and you answer with one or two sentences that say all of "
    "them and nothing else."
)
EXAMPLES = 3
DECODING = GenerateConfig(max_new_tokens=96, batch_size=16)


def messages(shots: Sequence[Example], context: str) -> list[dict[str, str]]:
    """The conversation that the model continues."""
    turns = [{"role": "system", "content": INSTRUCTION}]
    for shot in shots:
        turns += [
            {"role": "user", "content": shot.context},
            {"role": "assistant", "content": shot.references[0]},
        ]
    return [*turns, {"role": "user", "content": context}]


def draw_examples(task: TextGeneration, data_dir: str | None, count: int, seed: int = 0) -> list[Example]:
    """Random training inputs; each has the first of its references."""
    groups = task.groups(task.load(data_dir, ["train"])["train"])
    return random.Random(seed).sample(groups, count)


def load_generator(folder: str) -> Generator:
    """The model alone in fp32, which continues conversations."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat: Any = task_of(TaskConfig(name="prompted", kind="chat"))
    return Generator(model, tokenizer, chat, model.config.max_position_embeddings)


def generate(
    generator: Generator, task: TextGeneration, shots: Sequence[Example], contexts: Sequence[str]
) -> list[str]:
    """A text for each context."""
    chat: Any = generator.task
    conversations = [chat.conversation(messages(shots, context)) for context in contexts]
    answers = tqdm(generator.generate(conversations, DECODING), total=len(contexts))
    return [task.clean(answer.text) for answer in answers]


def score_prompted(
    task_name: str, folder: str, data_dir: str | None, limit: int | None = None
) -> tuple[ScoreRecord, list[str]]:
    """The scores of the test split, or of its first `limit` inputs, and the texts."""
    task = get_task(task_name)
    assert isinstance(task, TextGeneration)
    shots = draw_examples(task, data_dir, EXAMPLES)
    inputs = task.groups(task.load(data_dir, ["test"])["test"])[:limit]
    generator = load_generator(folder)
    start = time.perf_counter()
    texts = generate(generator, task, shots, [each.context for each in inputs])
    generated = time.perf_counter()
    scores = score_subsets(task, inputs, texts)
    record = ScoreRecord(
        task=task_name,
        model=Path(folder).name,
        adapted=False,
        split="test",
        inputs=len(inputs),
        decoding=asdict(DECODING) | {"prompt": messages(shots, "")[:-1]},
        metrics=scores,
        precision="float32",
        timings={"generate": generated - start, "score": time.perf_counter() - generated},
        **provenance(),
    )
    return record, texts


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.benchmark.prompted", description=(__doc__ or "").splitlines()[0]
    )
    for option in ("--model", "--data-dir", "--output"):
        parser.add_argument(option, required=True)
    parser.add_argument("--task", default="e2e_nlg", choices=TASKS)
    parser.add_argument("--limit", type=int, help="score the first inputs only")
    options = parser.parse_args()
    record, texts = score_prompted(options.task, options.model, options.data_dir, options.limit)
    record.write(Path(options.output))
    for text in texts[:3]:
        print(text)
    print(record.metrics["all"])


if __name__ == "__main__":
    main()
