"""The Modelfile: chat templates that are recognised by what they write, and the words that end an answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from lora_hf.adapters.export.ollama import find_chat_template
from lora_hf.adapters.export.targets import export_adapter
from lora_hf.core.errors import AdapterError
from lora_hf.models.load import BUNDLED_FOLDER
from tests.support.export_checks import save_base, save_random_adapter
from tests.support.random_adapters import save_random

pytest.importorskip("gguf")

# The templates in the tokenizers of these models, shortened to what they do for texts.
JINJA = {
    "chatml": (
        "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n"
        "{% endif %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "llama3": (
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
        "{{ m['content'] }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
    "gemma": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
        "{{ m['content'] }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    ),
    "mistral": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
        "{% else %} {{ m['content'] }}</s>{% endif %}{% endfor %}"
    ),
}


def tokenizer_with(template: str | None) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED_FOLDER / "tiny-gpt2")
    tokenizer.bos_token = "<s>"
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("name", JINJA)
def test_a_template_is_recognised_by_what_it_writes(name: str) -> None:
    found = find_chat_template(tokenizer_with(JINJA[name]))
    assert found is not None
    assert found.name == name
    assert found.default_system == ("Be kind." if name == "chatml" else "")


@pytest.mark.parametrize("template", [None, "{% for m in messages %}{{ m['content'] }}!{% endfor %}"])
def test_an_unknown_template_is_not_taken_for_another(template: str | None) -> None:
    assert find_chat_template(tokenizer_with(template)) is None


def test_the_template_in_the_language_of_ollama() -> None:
    found = find_chat_template(tokenizer_with(JINJA["llama3"]))
    assert found is not None
    assert found.go_template() == (
        '{{- range .Messages }}{{ if eq .Role "system" }}<|start_header_id|>system<|end_header_id|>\n\n{{ .Content }}'
        '<|eot_id|>{{ else if eq .Role "user" }}<|start_header_id|>user<|end_header_id|>\n\n{{ .Content }}<|eot_id|>'
        '{{ else if eq .Role "assistant" }}<|start_header_id|>assistant<|end_header_id|>\n\n{{ .Content }}<|eot_id|>'
        "{{ end }}{{ end }}<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def exported(folder: Path, template: str | None, **options: Any) -> tuple[str, str]:
    """The Modelfile, and what the record says."""
    base = save_base("llama", folder / "base")
    tokenizer_with(template).save_pretrained(base)
    save_random_adapter(base, folder / "adapter")
    record = export_adapter(folder / "adapter", "ollama", folder / "out", **options)
    return (folder / "out" / "Modelfile").read_text(), "\n".join(record.notes)


def test_a_chat_model(tmp_path: Path) -> None:
    text, notes = exported(tmp_path, JINJA["chatml"])
    lines = text.splitlines()
    assert lines[:2] == ["FROM ./base.gguf", "ADAPTER ./adapter.gguf"]
    assert 'SYSTEM """Be kind."""' in lines
    assert 'PARAMETER stop "<|im_end|>"' in lines
    assert "TEMPLATE is chatml" in notes
    assert "base.gguf" in notes


def test_a_base_of_ollama_and_no_known_template(tmp_path: Path) -> None:
    text, notes = exported(tmp_path, None, ollama_base="llama3.2")
    assert text.startswith("FROM llama3.2\n")
    assert "TEMPLATE" not in text
    assert "no TEMPLATE" in notes
    assert "base.gguf" not in notes


def test_an_adapter_of_a_task_gets_the_bare_prompt(tmp_path: Path) -> None:
    save_random(tmp_path / "adapter", "rule-restaurants")
    record = export_adapter(tmp_path / "adapter", "ollama", tmp_path / "out")
    assert 'TEMPLATE """{{ .Prompt }}"""' in (tmp_path / "out" / "Modelfile").read_text()
    assert any("bare prompt" in note and "rule-restaurants" in note for note in record.notes)


def test_an_encoder_is_refused(tmp_path: Path) -> None:
    save_random(tmp_path / "adapter", "rule-sentiment")
    with pytest.raises(AdapterError, match=r"a roberta, which Ollama does not generate with.*to=merged"):
        export_adapter(tmp_path / "adapter", "ollama", tmp_path / "out")
