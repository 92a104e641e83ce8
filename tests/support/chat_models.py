"""A small random chat model on disk, and random adapters for any base."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer

from lora_hf.adapters.save_load import save_adapter
from lora_hf.core.config.schema import LoraConfig, ModelConfig
from lora_hf.data.tasks.registry import get_task
from lora_hf.lora.inject import inject
from lora_hf.models.load import BUNDLED_FOLDER, load_base
from tests.support.small_models import randomize_lora_b, small_model

TEMPLATE = (
    "{% for message in messages %}{% if message.role not in ('system', 'user', 'assistant') or not message.content %}"
    "{{ raise_exception('unknown role') }}{% endif %}<{{ message.role }}>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def save_chat_model(folder: Path) -> Path:
    """A Llama with random weights, the tokenizer of tiny-gpt2 and a chat template."""
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED_FOLDER / "tiny-gpt2")
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    end = tokenizer.eos_token_id
    model = small_model(
        "llama",
        vocab_size=len(tokenizer),
        max_position_embeddings=256,
        initializer_range=0.2,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )
    model.save_pretrained(folder)
    return folder


def save_random_on(base: Path, folder: Path, task: str, seed: int, std: float = 0.5) -> Path:
    """A random adapter for `task` on the model in the folder `base`."""
    spec = get_task(task)
    model = inject(load_base(ModelConfig(name=str(base), precision="fp32"), spec), LoraConfig(r=4, targets=("q", "v")))
    randomize_lora_b(model, seed, std)
    return save_adapter(model, folder, task=task)
