"""A conversation as tokens, through a chat template, with the tokens that an assistant turn is trained on.

Where a turn lies is found by comparing texts: the conversation before it, with the generation prompt, and the
conversation up to it. The template needs no `{% generation %}` marks; they are used where the comparison fails. A
template that writes earlier turns differently once later ones follow, as Qwen3's does with thoughts, gives one row for
each text that a reply of the model is an end of.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_hf.core.errors import ConfigError, DataError, ModelError
from lora_hf.core.labels import IGNORE_INDEX
from lora_hf.data.tasks.user_texts import encode_texts, special_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
Span = tuple[int, int]  # of characters

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + END + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
PRESETS = {"chatml": CHATML}
MARKS = re.compile(r"{%-?\s*generation\s*-?%}")


def read_template(setting: str) -> str:
    """Returns the template that a value of `task.chat_template` means: a preset, a file, or a template itself.

    Raises:
        ConfigError: neither a preset nor a readable file.
    """
    if setting in PRESETS or "{" in setting:
        return setting
    try:
        return Path(setting).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise ConfigError(
            f"task.chat_template: expected {', '.join(PRESETS)} or a file with a Jinja template, found "
            f"{setting!r:.100} ({reason})"
        ) from error


@dataclass(frozen=True)
class Chat:
    """A conversation, and the indices of the assistant turns that are trained."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    trained: tuple[int, ...] = ()

    def before(self, turn: int) -> Chat:
        return Chat(self.messages[:turn], self.tools)


@dataclass
class _Text:
    """A rendered conversation, and where its trained turns lie."""

    text: str
    spans: list[Span] = field(default_factory=list)


class ChatEncoder:
    """Turns conversations into the tokens of one tokenizer and template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str | None, name: str) -> None:
        """
        Args:
            template: as from `read_template`; None: the tokenizer's own.
            name: of the task, for errors.

        Raises:
            ModelError: there is no template.
        """
        self.tokenizer = tokenizer
        self.template = _resolve(template, tokenizer, name)
        self._own = template is None  # so that tools may choose another one of the tokenizer's
        self.special, self.begin = special_tokens(tokenizer), _added_begin(tokenizer)
        self.pattern = re.compile("|".join(map(re.escape, sorted(self.special, key=len, reverse=True))) or "(?!)")

    def encode(self, chat: Chat) -> list[tuple[list[int], list[int]]]:
        """Returns the tokens and labels of the texts that the trained turns need, most often one.

        Raises:
            DataError: the template cannot render the conversation, leaves a part of it out, or hides where a turn is.
        """
        marked, markers = self._mark(chat)
        try:
            texts = self._texts(marked)
        except _HiddenTurnError as error:
            return [self._encode_by_marks(chat, marked is not chat, error)]
        self._check_complete(marked, texts)
        return [self._with_begin(*self._encode_text(each, markers)) for each in texts]

    def prompt(self, chat: Chat) -> list[int]:
        """Returns the tokens that a reply to the conversation follows.

        Raises:
            DataError: the template cannot render the conversation.
        """
        marked, markers = self._mark(chat)
        text = self._render(marked.messages, marked.tools, add_generation_prompt=True)
        return self._with_begin(*self._encode_text(_Text(text), markers))[0]

    def end_tokens(self) -> list[int]:
        """Returns the special token that the template ends an assistant turn with; empty if there is none."""
        reply = "END-OF-THE-REPLY"
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": reply}]
        try:
            end = self._render(turns, None).rpartition(reply)[2]
        except DataError:  # a template for other conversations, such as those with a system turn only
            return []
        added = set(self.special.values()) | set(self.tokenizer.added_tokens_decoder)
        return list(itertools.islice((token for token in self._tokens(end)[0] if token in added), 1))

    def special_in(self, chat: Chat) -> list[str]:
        """Returns the special tokens that the texts of the conversation spell out."""
        return sorted({match for text in _texts_in(chat.messages) for match in self.pattern.findall(text)})

    # Rendering

    def _render(self, messages: Sequence[Message], tools: Any, add_generation_prompt: bool = False) -> str:
        from jinja2 import TemplateError, TemplateSyntaxError

        template = None if self._own else self.template
        options: Any = {"tools": tools, "chat_template": template, "add_generation_prompt": add_generation_prompt}
        try:
            return self.tokenizer.apply_chat_template(list(messages), tokenize=False, **options)  # pyright: ignore[reportReturnType]
        except TemplateSyntaxError as error:
            raise DataError(
                f"the chat template cannot render any conversation: line {error.lineno} of it: "
                f"{str(error.message).rstrip('.')}. Correct it, or set task.chat_template to a file with another one"
            ) from error
        except (TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
            roles = ", ".join(str(message["role"]) for message in messages[:6]) + (", ..." if len(messages) > 6 else "")
            raise DataError(
                f"the chat template cannot render a conversation with the turns {roles or 'none'}: {error}. Change the "
                "conversation, or set task.chat_template to a file with a template that can"
            ) from error

    def _texts(self, chat: Chat) -> list[_Text]:
        """The texts to train on. A turn whose text ends another one's lies in that one."""
        texts: list[_Text] = []
        for turn in reversed(chat.trained):
            until = self._render(chat.messages[: turn + 1], chat.tools)
            start = self._start(chat, turn, until)
            for other in texts:
                end = self._common_end(until, other.text)
                if end == len(until) or self._is_closing(chat.messages[turn], until, start, end, other.text):
                    other.spans.append((start, end))
                    break
            else:
                texts.append(_Text(until, [(start, len(until))]))
        for each in texts:
            each.spans.sort()
        return texts[::-1]

    def _common_end(self, text: str, other: str) -> int:
        """Where the texts begin to differ: before a special token, not inside it."""
        if other.startswith(text):
            return len(text)
        pairs = enumerate(zip(text, other, strict=False))
        end = next((index for index, (one, two) in pairs if one != two), min(len(text), len(other)))
        inside = (match.start() for match in self.pattern.finditer(text) if match.start() < end < match.end())
        return next(inside, end)

    @staticmethod
    def _is_closing(message: Message, until: str, start: int, end: int, other: str) -> bool:
        """Whether `until[end:]` closes every conversation, as Phi-3's <|endoftext|>, and the reply lies before it."""
        content = str(message.get("content") or "").strip()
        return (
            bool(content) and other.endswith(until[end:]) and content in until[start:end] and content not in until[end:]
        )

    def _start(self, chat: Chat, turn: int, until: str) -> int:
        """Where the reply begins: after the generation prompt, or where it differs from that."""
        before = chat.messages[:turn]
        if not before:
            raise _HiddenTurnError(f"turn {turn} is the assistant's, and nothing comes before it")
        try:
            prompt = self._render(before, chat.tools, add_generation_prompt=True)
            if until.startswith(prompt):
                return len(prompt)
            context = self._render(before, chat.tools)
        except DataError as error:
            raise _HiddenTurnError(str(error)) from error
        start = self._common_end(until, prompt)
        if start < len(context):
            raise _HiddenTurnError(f"the template writes the turns before turn {turn} differently once it follows")
        return start

    def _check_complete(self, chat: Chat, texts: Sequence[_Text]) -> None:
        """Raises a DataError for turns, tools or calls that the template leaves out: the model would learn nothing."""
        spans = [span for each in texts for span in each.spans]
        if all(start == end for start, end in spans) and any(
            chat.messages[turn].get("content") for turn in chat.trained
        ):
            raise DataError(
                "the chat template does not write the assistant's turns. Set task.chat_template to chatml, or to a "
                "file with a template that does"
            )
        text = "\n".join(each.text for each in texts)
        names = {f"the tool {name!r}": name for name in map(_tool_name, chat.tools or ()) if name}
        for index, message in enumerate(chat.messages[: chat.trained[-1] + 1] if chat.trained else ()):
            calls = message.get("tool_calls") or ()
            names |= {f"the call of {name!r} in turn {index}": name for name in map(_tool_name, calls) if name}
        for what, name in names.items():
            if name not in text:
                raise DataError(
                    f"the chat template does not write {what}. Set task.chat_template to a file with a template that "
                    "writes tools and tool_calls, or write them into the content"
                )

    # Tokens

    def _mark(self, chat: Chat) -> tuple[Chat, str]:
        """The conversation with two characters around each special token in its texts, and these characters.

        So the template's own tokens are told from those that a user spells out, which stay text.
        """
        texts = "".join(_texts_in([chat.messages, chat.tools]))
        if not self.pattern.search(texts):
            return chat, ""
        free = (chr(code) for code in range(0xE000, 0xF8FF) if chr(code) not in texts)
        opening, closing = itertools.islice(free, 2)

        def mark(value: Any) -> Any:
            if isinstance(value, str):
                return self.pattern.sub(lambda match: f"{opening}{match[0]}{closing}", value)
            if isinstance(value, Mapping):
                return {key: mark(inner) for key, inner in value.items()}
            return [mark(inner) for inner in value] if isinstance(value, list) else value

        return Chat(mark(chat.messages), mark(chat.tools), chat.trained), opening + closing

    def _encode_text(self, rendered: _Text, markers: str) -> tuple[list[int], list[int]]:
        ids: list[int] = []
        labels: list[int] = []
        for start, piece, as_text in _pieces(rendered.text, markers):
            for tokens, trained in self._encode_piece(start, piece, as_text, rendered.spans):
                ids += tokens
                labels += trained
        return ids, labels

    def _encode_piece(
        self, start: int, piece: str, as_text: bool, spans: Sequence[Span]
    ) -> Iterator[tuple[list[int], list[int]]]:
        """The tokens and labels of a piece of a text; of its parts, where a token would reach across a turn's edge."""
        tokens, offsets = self._tokens(piece, as_text, first=start == 0)
        if as_text and piece != self.tokenizer.unk_token and self.special[piece] in tokens:
            raise DataError(
                f"a message holds the special token {piece!r}, which the tokenizer cannot read as text; change the text"
            )
        edges = sorted({edge - start for span in spans for edge in span if 0 < edge - start < len(piece)})
        across = offsets is None or any(a < edge < b for edge in edges for a, b in offsets)
        if edges and across:
            for a, b in itertools.pairwise([0, *edges, len(piece)]):
                yield from self._encode_piece(start + a, piece[a:b], as_text, spans)
            return
        places = [(0, len(piece))] * len(tokens) if offsets is None else offsets
        inside = [any(first <= start + a and start + b <= last for first, last in spans) for a, b in places]
        yield tokens, [token if yes else IGNORE_INDEX for token, yes in zip(tokens, inside, strict=True)]

    def _tokens(self, text: str, as_text: bool = False, first: bool = True) -> tuple[list[int], list[Span] | None]:
        """The tokens of a text and, from a fast tokenizer, their characters.

        A piece that is not the first is encoded after a line break, because SentencePiece begins a text with a space.
        """
        options: dict[str, Any] = {"add_special_tokens": False, "split_special_tokens": as_text, "verbose": False}
        fast = bool(self.tokenizer.is_fast)
        lead = "" if first else "\n"
        encoded = self.tokenizer(lead + text, return_offsets_mapping=fast, **options)
        tokens: list[int] = list(encoded["input_ids"])  # pyright: ignore[reportArgumentType]
        if first:
            return tokens, encoded["offset_mapping"] if fast else None  # pyright: ignore[reportReturnType]
        prefix: list[int] = list(self.tokenizer(lead, **options)["input_ids"])  # pyright: ignore[reportArgumentType]
        if tokens[: len(prefix)] != prefix:  # the line break has merged with the text
            return self._tokens(text, as_text)
        if not fast:
            return tokens[len(prefix) :], None
        offsets: Any = encoded["offset_mapping"]
        return tokens[len(prefix) :], [(a - 1, b - 1) for a, b in offsets[len(prefix) :]]

    def _with_begin(self, ids: list[int], labels: list[int]) -> tuple[list[int], list[int]]:
        """With the token that begins a text, where the tokenizer adds one and the template writes none."""
        if self.begin is None or ids[:1] == [self.begin]:
            return ids, labels
        return [self.begin, *ids], [IGNORE_INDEX, *labels]

    def _encode_by_marks(self, chat: Chat, holds_special: bool, reason: Exception) -> tuple[list[int], list[int]]:
        """The tokens and labels by the template's `{% generation %}` marks."""
        if not MARKS.search(self.template):
            raise DataError(
                f"cannot find the assistant turns: {reason}. Begin the conversation with a user turn, or set "
                "task.chat_template to a file with {% generation %} and {% endgeneration %} around them"
            ) from reason
        if holds_special:
            raise DataError(
                f"a message holds the special token {self.special_in(chat)[0]!r}, which cannot be read as text where "
                "the template's {% generation %} marks are needed; change the text"
            ) from reason
        encoded: Any = self.tokenizer.apply_chat_template(
            chat.messages, tools=chat.tools, chat_template=self.template, return_dict=True,  # type: ignore[arg-type]
            return_assistant_tokens_mask=True,
        )  # fmt: skip
        ids, mask = list(encoded["input_ids"]), list(encoded["assistant_masks"])
        runs = [(value, len(list(run))) for value, run in itertools.groupby(mask)]
        turns = [index for index, message in enumerate(chat.messages) if message["role"] == "assistant"]
        marked = sum(value for value, _ in runs)
        if marked == len(turns):
            left = iter(turns)
            mask = [on for value, length in runs for on in [value and next(left) in chat.trained] * length]
        elif tuple(turns) != chat.trained:
            raise DataError(
                f"the template marks {marked} assistant turns, expected {len(turns)}; set task.chat_template to a file "
                "with {% generation %} and {% endgeneration %} around each"
            ) from reason
        return self._with_begin(ids, [token if on else IGNORE_INDEX for token, on in zip(ids, mask, strict=True)])


class _HiddenTurnError(Exception):
    """Comparing texts does not tell where a turn begins."""


def _resolve(template: str | None, tokenizer: PreTrainedTokenizerBase, name: str) -> str:
    if template in PRESETS:
        end = "<|im_end|>" if "<|im_end|>" in tokenizer.get_vocab() else tokenizer.eos_token
        if end is None:
            raise ModelError(
                f"task.chat_template={template}: the tokenizer {tokenizer.name_or_path!r} has no eos_token"
            )
        return PRESETS[template].replace("END", repr(end))
    if template is not None:
        return template
    try:
        return tokenizer.get_chat_template()
    except ValueError as error:
        raise ModelError(
            f"{name}: the tokenizer {tokenizer.name_or_path!r} has no chat template. Set task.chat_template=chatml, or "
            "task.chat_template=FILE with a Jinja template; or choose a model that was made for chats"
        ) from error


def _added_begin(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token with which the tokenizer itself begins every text, or None."""
    begin = tokenizer.bos_token_id
    if begin is None or not tokenizer.num_special_tokens_to_add():
        return None
    ids: Any = encode_texts(tokenizer, "a")["input_ids"]
    return begin if ids[:1] == [begin] else None  # pyright: ignore[reportReturnType]


def _pieces(text: str, markers: str) -> Iterator[tuple[int, str, bool]]:
    """The start of each piece between the markers, the piece, and whether it is a user's, without empty pieces."""
    if not markers:
        yield 0, text, False
        return
    opening, closing = markers
    for match in re.finditer(f"{opening}([^{closing}]*){closing}|[^{opening}{closing}]+", text):
        is_text = match[1] is not None
        piece = match[1] if is_text else match[0]
        if piece:
            yield match.start() + is_text, piece, is_text


def _tool_name(tool: Mapping[str, Any]) -> str | None:
    function = tool.get("function")
    return (function if isinstance(function, Mapping) else tool).get("name")


def _texts_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _texts_in(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _texts_in(inner)
