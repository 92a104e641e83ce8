"""The bodies of requests and responses, with one server's limits: what OpenAPI shows."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import (
    Base64Bytes,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    Tag,
    create_model,
)

from lora_hf.serving.limits import Limits

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)


class Problem(BaseModel):
    """Why the request failed, in OpenAI's form: `code` is for programs, `message` for people."""

    message: str = Field(examples=["no adapter 'sst3' (did you mean 'sst2'?); served: rte, sst2"])
    type: str = Field(examples=["invalid_request_error"])
    param: str | None = Field(description="the field of the request with the error")
    code: str = Field(examples=["unknown_adapter"])


class Failure(BaseModel):
    """The body of every error."""

    error: Problem


class ClassifyAnswer(BaseModel):
    """One answer per input: `label` (or `labels`, if a text may have several) and `probabilities`, a `score` for
    regression, or what else the task answers."""

    adapter: str = Field(examples=["sst2"])
    version: str = Field(description="a hash of the adapter's files", examples=["1058a1ae93b4"])
    answers: list[dict[str, Any]] = Field(
        examples=[[{"label": "positive", "probabilities": {"negative": 0.0312, "positive": 0.9688}}]]
    )
    truncated: list[int] = Field(
        description="the indices of the inputs that are longer than the adapter reads; their ends were ignored",
        examples=[[]],
    )


class GenerateAnswer(BaseModel):
    """A text, and the sum of its tokens' log-probabilities divided by their number ** length_penalty."""

    adapter: str = Field(examples=["e2e"])
    version: str | None = Field(description="a hash of the adapter's files; null for the bare base")
    text: str = Field(examples=["The Vaults is a pub."])
    score: float = Field(examples=[-0.4213])


class Adapter(BaseModel):
    """A served adapter, as last loaded."""

    name: str = Field(examples=["sst2"])
    version: str = Field(examples=["1058a1ae93b4"])
    base: str = Field(examples=["roberta-base"])
    task: str = Field(examples=["sst2"])
    kind: str = Field(examples=["sequence-classification"])
    labels: list[str] = Field(examples=[["negative", "positive"]])
    reads: list[str] = Field(description="the texts in one input", examples=[["sentence"]])
    chat: bool = Field(description="whether it can answer chat completions")
    embeds: bool = Field(description="whether it can answer embeddings")


class Adapters(BaseModel):
    """All served adapters, sorted by name."""

    adapters: list[Adapter]


class Load(BaseModel):
    """The adapter to load."""

    model_config = STRICT
    folder: StrictStr = Field(
        min_length=1, max_length=1000, description="relative to the server's adapter folder", examples=["sst2/adapter"]
    )


class Upload(BaseModel):
    """A file of texts for an adapter."""

    model_config = STRICT
    adapter: StrictStr = Field(min_length=1, max_length=64, examples=["sst2"])
    name: StrictStr = Field(
        min_length=1, max_length=255, description="its suffix tells the format", examples=["rows.csv"]
    )
    content: Base64Bytes = Field(description="its bytes in base64", examples=["c2VudGVuY2UKYSB3YXJtIGZpbG0K"])


class Rows(BaseModel):
    """The texts of each row."""

    rows: list[list[str]] = Field(examples=[[["a warm film"]]])


def bodies(limits: Limits) -> tuple[Any, Any]:
    """Returns the pydantic models for the bodies of /v1/classify and /v1/generate."""
    name = Annotated[StrictStr, Field(min_length=1, max_length=64, description="as listed by /v1/adapters")]
    text = Annotated[StrictStr, Field(min_length=1, max_length=limits.max_characters)]
    pair = Annotated[list[text], Field(min_length=2, max_length=2)]  # type: ignore[valid-type]
    # By its type, so that the errors are those of a text or of a pair, and not of both.
    either = Annotated[
        Annotated[text, Tag("text")] | Annotated[pair, Tag("pair")],  # type: ignore[valid-type]
        Discriminator(lambda value: "pair" if isinstance(value, list | tuple) else "text"),
    ]
    inputs = Field(min_length=1, max_length=limits.max_inputs, description="texts, or pairs if the task reads two")
    seconds = Field(None, gt=0, le=limits.deadline, description="how long to wait, in seconds")
    stream = Field(False, description="send server-sent events: `text` for each piece, then `done` or `error`")
    classify: dict[str, Any] = {"adapter": "sst2", "inputs": ["a warm, funny film"]}
    generate: dict[str, Any] = {"adapter": "e2e", "prompt": "name[The Vaults], eatType[pub]", "num_beams": 4}
    fields: dict[str, Any] = {
        "adapter": (name, ...),
        "prompt": (text, ...),
        "num_beams": _optional(int, ge=1, le=limits.max_beams),
        "length_penalty": _optional(float, ge=-10, le=10),
        "no_repeat_ngram_size": _optional(int, ge=0, le=100),
        "max_new_tokens": _optional(int, ge=1, le=limits.max_new_tokens),
        "temperature": _optional(float, ge=0.01, le=100),
        "top_p": _optional(float, gt=0, le=1),
        "top_k": _optional(int, ge=0, le=1_000_000),
        "seed": _optional(int, ge=0, lt=2**63),
        "stream": (StrictBool, stream),
        "deadline": (float | None, seconds),
    }
    return (
        create_model(
            "ClassifyBody",
            __config__=strict_config(classify),
            adapter=(name, ...),
            inputs=(Annotated[list[either], inputs], ...),  # type: ignore[valid-type]
            deadline=(float | None, seconds),
        ),
        create_model("GenerateBody", __config__=strict_config(generate), **fields),
    )


def strict_config(example: dict[str, Any]) -> ConfigDict:
    return STRICT | ConfigDict(json_schema_extra={"examples": [example]})


def _optional(kind: type, **bounds: float) -> tuple[Any, Any]:
    """A number; if the request omits it, the adapter's run decides."""
    return (StrictInt if kind is int else float) | None, Field(None, **bounds)  # type: ignore[arg-type, operator]
