"""An adapter for Ollama: the GGUF file, and a Modelfile with the base, the chat template and the stop words.

Ollama's templates are Go's. The chat template of the tokenizer, in Jinja, is compared with the known ones by what they
write for a conversation.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from lora_hf.adapters.export import gguf
from lora_hf.adapters.export.contents import Contents
from lora_hf.core.config.schema import ModelConfig
from lora_hf.core.errors import AdapterError
from lora_hf.models.load import load_tokenizer

MODEL_FILE = "Modelfile"
BASE_FILE = "base.gguf"
BARE_PROMPT = "{{ .Prompt }}"
MODEL_TYPES = tuple(kind for kind, known in gguf.ARCHITECTURES.items() if known.name != "bert")  # it generates texts
_SLOT = "{}"


@dataclass(frozen=True)
class ChatTemplate:
    """What a template writes for a message of each role, with `{}` for its text; `system` is empty if it has none.

    `default_system` is the message that it adds to a conversation without one, and `opening` begins an answer: by
    default what stands before its text.
    """

    name: str
    system: str
    user: str
    assistant: str
    stop: tuple[str, ...]
    default_system: str = ""
    opening: str | None = None

    def render(self, messages: list[dict[str, str]]) -> str:
        """The conversation up to where the answer begins."""
        return "".join(self._part(each["role"]).replace(_SLOT, each["content"]) for each in messages) + self.prompt

    @property
    def prompt(self) -> str:
        return self.assistant.split(_SLOT)[0] if self.opening is None else self.opening

    def _part(self, role: str) -> str:
        return {"system": self.system, "user": self.user, "assistant": self.assistant}[role]

    def go_template(self) -> str:
        """The template in Ollama's language."""
        roles = [role for role in ("system", "user", "assistant") if self._part(role)]
        branches = [f'if eq .Role "{role}" }}}}' + self._part(role).replace(_SLOT, "{{ .Content }}") for role in roles]
        return "{{- range .Messages }}{{ " + "{{ else ".join(branches) + "{{ end }}{{ end }}" + self.prompt


_LLAMA3 = "<|start_header_id|>{role}<|end_header_id|>\n\n{}<|eot_id|>"
_CHATML = "<|im_start|>{role}\n{}<|im_end|>\n"
_GEMMA = "<start_of_turn>{role}\n{}<end_of_turn>\n"
_PHI3 = "<|{role}|>\n{}<|end|>\n"
_ZEPHYR = "<|{role}|>\n{}</s>\n"


def _alike(name: str, text: str, stop: str, system: str = "system", assistant: str = "assistant") -> ChatTemplate:
    parts = [text.replace("{role}", role) if role else "" for role in (system, "user", assistant)]
    return ChatTemplate(name, *parts, stop=(stop,))


CHAT_TEMPLATES = (
    _alike("chatml", _CHATML, "<|im_end|>"),
    _alike("llama3", _LLAMA3, "<|eot_id|>"),
    _alike("gemma", _GEMMA, "<end_of_turn>", system="", assistant="model"),
    _alike("phi3", _PHI3, "<|end|>"),
    _alike("zephyr", _ZEPHYR, "</s>"),
    ChatTemplate("mistral", "", "[INST] {} [/INST]", " {}</s>", ("</s>",), opening=""),
    ChatTemplate("mistral-v0.3", "", "[INST] {}[/INST]", " {}</s>", ("</s>",), opening=""),
)

_TURNS = [
    {"role": "user", "content": "first question"},
    {"role": "assistant", "content": "first answer"},
    {"role": "user", "content": "second question"},
]
_SYSTEM = {"role": "system", "content": "some rules"}


def write(contents: Contents, folder: Path, base: str | None = None) -> list[str]:
    """Writes `adapter.gguf` and `Modelfile`, and returns how to use them.

    Args:
        base: what `FROM` names: a model of Ollama, or a file; by default `base.gguf` in the same folder.

    Raises:
        AdapterError: a base that generates no text, or as `gguf.write`.
    """
    if contents.config.model_type not in MODEL_TYPES:
        raise AdapterError(
            f"{contents.file.folder}: its base {contents.base} is a {contents.config.model_type}, which Ollama does "
            "not generate with; to=merged writes a plain model"
        )
    gguf.write(contents, folder)
    tokenizer, task = load_tokenizer(ModelConfig(name=contents.base)), contents.file.metadata.task
    template = None if task else find_chat_template(tokenizer)
    end = (str(tokenizer.eos_token),) if tokenizer.eos_token else ()
    stop = dict.fromkeys((template.stop if template else ()) + end)
    lines = [f"FROM {base or f'./{BASE_FILE}'}", f"ADAPTER ./{gguf.ADAPTER_FILE}"]
    if task:
        lines.append(f'TEMPLATE """{BARE_PROMPT}"""')
        about = f"TEMPLATE is the bare prompt: the task {task} has no turns"
    else:
        lines += _template_lines(template)
        about = _about_template(tokenizer, template)
    lines += [f'PARAMETER stop "{word}"' for word in stop]
    (folder / MODEL_FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")
    notes = [] if base else [f"convert_hf_to_gguf.py of llama.cpp writes the base: put it beside, as {BASE_FILE}"]
    return [*notes, about, f"ollama create NAME --file {MODEL_FILE}"]


def _template_lines(template: ChatTemplate | None) -> list[str]:
    if template is None:
        return []
    system = [f'SYSTEM """{template.default_system}"""'] if template.default_system else []
    return [f'TEMPLATE """{template.go_template()}"""', *system]


def find_chat_template(tokenizer: PreTrainedTokenizerBase) -> ChatTemplate | None:
    """The known template that writes the same as the tokenizer's, after the token that begins a text."""
    if not tokenizer.chat_template:
        return None
    for template in CHAT_TEMPLATES:
        rules = [_SYSTEM] if template.system else []
        if not _writes(tokenizer, rules + _TURNS, template.render(rules + _TURNS)):
            continue
        if _writes(tokenizer, _TURNS, template.render(_TURNS)):
            return template
        added = _default_system(tokenizer, template)
        return None if added is None else replace(template, default_system=added)
    return None


def _default_system(tokenizer: PreTrainedTokenizerBase, template: ChatTemplate) -> str | None:
    """The system message that a template adds by itself; None if it does something else."""
    before, after = template.system.split(_SLOT)
    text = _render(tokenizer, _TURNS)
    added, found, _ = text.partition(after + template.render(_TURNS))
    return added.removeprefix(before) if found and added.startswith(before) else None


def _writes(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], text: str) -> bool:
    # llama.cpp adds the token that begins a text by itself.
    return _render(tokenizer, messages) in (text, f"{tokenizer.bos_token}{text}")


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> str:
    """Empty where the template refuses the messages, such as a system message."""
    try:
        text: Any = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except TemplateError:
        return ""
    return text


def _about_template(tokenizer: PreTrainedTokenizerBase, template: ChatTemplate | None) -> str:
    if template is None:
        reason = "is none that is known here" if tokenizer.chat_template else "does not exist"
        return f"no TEMPLATE: the tokenizer's chat template {reason}, so Ollama takes that of the base"
    if not template.system:
        return f"TEMPLATE is {template.name}, which has no system message"
    return f"TEMPLATE is {template.name}"
