"""The bodies of OpenAI's API, as far as this server takes part in it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, StrictBool, StrictInt, StrictStr, create_model

from lora_hf.serving.limits import Limits
from lora_hf.serving.schema import STRICT, strict_config

NO_EFFECT = "accepted, without effect"


class Model(BaseModel):
    """An adapter, or a base without any."""

    id: str = Field(examples=["e2e"])
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "lora_hf"
    parent: str | None = Field(description="the base of an adapter; null for a base", examples=["gpt2"])


class Models(BaseModel):
    """All models that `model` may name."""

    object: Literal["list"] = "list"
    data: list[Model]


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int = 0
    total_tokens: int


class Completion(BaseModel):
    """The generated texts; `system_fingerprint` is the version of the adapter."""

    id: str
    object: Literal["text_completion", "chat.completion"]
    created: int
    model: str
    system_fingerprint: str | None
    choices: list[dict[str, Any]]
    usage: Usage


class Embeddings(BaseModel):
    """A vector of length 1 for each input: the mean of the hidden states of its tokens."""

    object: Literal["list"] = "list"
    model: str
    data: list[dict[str, Any]]
    usage: Usage


class TextPart(BaseModel):
    model_config = STRICT
    type: Literal["text"]
    text: StrictStr


class Message(BaseModel):
    """A message of a chat. The chat template of the base decides which roles and which order it takes."""

    model_config = STRICT
    role: Literal["system", "developer", "user", "assistant"]
    content: StrictStr | list[TextPart]
    name: StrictStr | None = Field(None, description=NO_EFFECT)

    def for_template(self) -> dict[str, str]:
        role = "system" if self.role == "developer" else self.role
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": role, "content": text}


class StreamOptions(BaseModel):
    model_config = STRICT
    include_usage: StrictBool = False
    include_obfuscation: StrictBool = Field(False, description=NO_EFFECT)


class TextFormat(BaseModel):
    model_config = STRICT
    type: Literal["text"]


def openai_bodies(limits: Limits) -> tuple[Any, Any, Any]:
    """The pydantic models for the bodies of chat completions, completions and embeddings."""
    string: Any = StrictStr  # a type checker takes these for values
    integer: Any = StrictInt
    boolean: Any = StrictBool
    text: Any = Annotated[StrictStr, Field(max_length=limits.max_characters)]
    tokens: Any = Annotated[list[StrictInt], Field(min_length=1, max_length=limits.max_characters)]
    texts: Any = Annotated[list[text], Field(min_length=1, max_length=limits.max_choices)]
    inputs: Any = Annotated[list[text], Field(min_length=1, max_length=limits.max_inputs)]
    most = Field(None, ge=1, le=limits.max_new_tokens, description="default: that of the adapter's run")
    longest = Field(None, ge=1, le=limits.max_new_tokens, description="default: as many as this server allows")
    name: Any = Annotated[StrictStr, Field(min_length=1, description="an adapter or a base, as listed by /v1/models")]
    user: Any = (string | None, Field(None, description=NO_EFFECT))
    stops: Any = Annotated[list[Annotated[StrictStr, Field(min_length=1)]], Field(max_length=16)]
    nothing: Any = Annotated[float, Field(ge=0, le=0)]
    zero: Any = (nothing | None, Field(None, description="only 0"))
    no_bias: Any = Annotated[dict[str, float], Field(max_length=0)]
    greedy = "below 0.01: the most probable text; default: as in the adapter's run, which for most is 0"
    sampling: dict[str, Any] = {
        "temperature": (float | None, Field(None, ge=0, le=2, description=greedy)),
        "top_p": (float | None, Field(None, gt=0, le=1)),
        "top_k": (integer | None, Field(None, ge=0, le=1_000_000)),
        "seed": (integer | None, Field(None, description="of sampling; default: another one for each request")),
        "n": (integer | None, Field(None, ge=1, le=limits.max_choices)),
        "stop": (string | stops | None, Field(None, description="strings that end the text")),
        "stream": (boolean | None, Field(None, description="send server-sent events")),
        "stream_options": (StreamOptions | None, None),
        "frequency_penalty": zero,
        "presence_penalty": zero,
        "logit_bias": (no_bias | None, Field(None, description="only empty")),
        "user": user,
    }
    chat: dict[str, Any] = {
        "model": "assistant", "messages": [{"role": "user", "content": "Which pub is near the river?"}]
    }  # fmt: skip
    completion: dict[str, Any] = {"model": "e2e", "prompt": "name[The Vaults], eatType[pub]", "temperature": 0}
    embedding: dict[str, Any] = {"model": "sst2", "input": ["a warm, funny film"]}
    return (
        create_model(
            "ChatCompletionBody",
            __config__=strict_config(chat),
            model=(name, ...),
            messages=(Annotated[list[Message], Field(min_length=1, max_length=1000)], ...),
            max_tokens=(StrictInt | None, longest),
            max_completion_tokens=(StrictInt | None, longest),
            logprobs=(StrictBool | None, None),
            top_logprobs=(StrictInt | None, Field(None, ge=0, le=20)),
            response_format=(TextFormat | None, None),
            metadata=(dict[str, Any] | None, Field(None, description=NO_EFFECT)),
            store=(StrictBool | None, Field(None, description=NO_EFFECT)),
            **sampling,
        ),
        create_model(
            "CompletionBody",
            __config__=strict_config(completion),
            model=(name, ...),
            prompt=(text | tokens | texts, ...),
            max_tokens=(StrictInt | None, most),
            logprobs=(StrictInt | None, Field(None, ge=0, le=20)),
            echo=(Literal[False] | None, Field(None, description="only false")),
            best_of=(Literal[1] | None, Field(None, description="only 1")),
            **sampling,
        ),
        create_model(
            "EmbeddingBody",
            __config__=strict_config(embedding),
            model=(name, ...),
            input=(text | inputs, ...),
            encoding_format=(Literal["float", "base64"], "float"),
            user=user,
        ),
    )
