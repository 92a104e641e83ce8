"""OpenAI's own client against a server with two adapters on a chat model, one on gpt2 and one on an encoder.

The model is a small random Llama, and in the long tests also six layers of smollm2 in a server process of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
import uvicorn

from lora_hf.adapters.resolve import find_saved_model
from lora_hf.adapters.save_load import load_saved_model
from lora_hf.inference.generate import Generator, base_end_tokens
from lora_hf.serving.app import ServerState
from lora_hf.serving.engine import Engine
from lora_hf.serving.limits import Limits
from tests import tolerances
from tests.support.chat_models import save_chat_model, save_random_on
from tests.support.engine_client import ThreadClient, app_of
from tests.support.random_adapters import PROMPTS, TEXTS, save_random
from tests.support.server_process import serving
from tests.support.waiting import LIMIT, wait_until

pytestmark = pytest.mark.minutes

TOKEN = "a-token-of-this-test"
CHAT: list[Any] = [
    {"role": "system", "content": "You are brief."},
    {"role": "user", "content": "Name a pub near the river."},
]
NEW = 12  # tokens


@dataclass
class Served:
    client: openai.OpenAI
    base: str
    folders: dict[str, Path]


def serve_in_thread(folders: dict[str, Path]) -> Iterator[str]:
    with Engine(Limits(deadline=LIMIT), exact=True) as engine:
        for name, folder in folders.items():
            engine.load(name, folder)
        app = app_of(ThreadClient(engine), ServerState(TOKEN, ready=True))
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        wait_until(lambda: server.started)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module", params=["tiny", pytest.param("smollm2", marks=pytest.mark.full)])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("adapters")
    tiny = request.param == "tiny"
    base = save_chat_model(root / "tiny-chat") if tiny else request.getfixturevalue("short_smollm2")
    std = 0.5 if tiny else 0.2
    folders = {name: save_random_on(base, root / name, "rule-restaurants", seed, std) for seed, name in enumerate("ab")}
    folders |= {"writer": save_random(root / "writer", "rule-restaurants"), "encoder": save_random(root / "encoder")}
    if tiny:
        addresses = serve_in_thread(folders)
        address = next(addresses)
    else:
        words = [word for name, folder in folders.items() for word in ("--adapter", f"{name}={folder}")]
        process = serving("--exact", "--deadline", str(LIMIT), *words, LORA_HF_TOKEN=TOKEN)
        _, address, _ = process.__enter__()
    with openai.OpenAI(base_url=f"{address}/v1", api_key=TOKEN, max_retries=0, timeout=LIMIT) as client:
        yield Served(client, base.name, folders)
    if tiny:
        next(addresses, None)
    else:
        process.__exit__(None, None, None)


@pytest.fixture(scope="module")
def offline(served: Served) -> dict[str, Any]:
    """The model in this process with each adapter, and alone."""
    loaded = {name: load_saved_model(find_saved_model(served.folders[name]), "fp32") for name in "ab"}
    loaded[served.base] = load_saved_model(find_saved_model(served.folders["a"]), "fp32", adapted=False)
    return loaded


def chat(served: Served, model: str, **options: Any) -> Any:
    return served.client.chat.completions.create(
        model=model, **{"messages": CHAT, "max_tokens": NEW, "temperature": 0, **options}
    )


@torch.no_grad()
def greedy(offline: dict[str, Any], name: str, messages: list[Any] = CHAT) -> tuple[list[int], torch.Tensor, str]:
    """The new tokens, their logits and the text."""
    model, tokenizer = offline[name]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    made = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=base_end_tokens(model, tokenizer),
        pad_token_id=tokenizer.pad_token_id,
    )
    tokens = made[0, len(prompt) :].tolist()
    logits = model(made).logits[0, len(prompt) - 1 : -1].float()
    return tokens, logits, tokenizer.decode(tokens, skip_special_tokens=True)


def test_models_are_the_adapters_and_their_bases(served: Served) -> None:
    models = {each.id: each for each in served.client.models.list()}
    assert models.keys() == {"a", "b", "writer", "encoder", served.base, "tiny-gpt2", "tiny-roberta"}
    assert models["a"].parent == served.base  # type: ignore[attr-defined]
    assert models[served.base].parent is None  # type: ignore[attr-defined]


def test_chat_equals_the_model_with_its_adapter(served: Served, offline: dict[str, Any]) -> None:
    texts = set()
    for name in ("a", "b", served.base):
        answer = chat(served, name)
        tokens, _, text = greedy(offline, name)
        choice = answer.choices[0]
        assert (choice.message.role, choice.message.content) == ("assistant", text)
        assert choice.finish_reason == ("length" if len(tokens) == NEW else "stop")
        assert answer.usage.completion_tokens == len(tokens)
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + len(tokens)
        assert (answer.model, answer.object) == (name, "chat.completion")
        texts.add(text)
    assert len(texts) == 3, "equal texts would prove nothing"


def test_a_streamed_chat_is_the_same_chat(served: Served) -> None:
    whole = chat(served, "a")
    chunks = list(chat(served, "a", stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage
    assert len(chunks) > 4


def test_mixed_streams_get_what_they_get_alone(served: Served) -> None:
    names = ["a", "b", served.base] * 3

    def ask(number: int) -> str:
        messages = [{"role": "user", "content": "A pub. " * (1 + number)}]
        chunks = served.client.chat.completions.create(
            model=names[number],
            messages=messages,  # type: ignore[arg-type]
            stream=True,
            max_tokens=4 + 3 * number,
            temperature=number % 2,
            seed=number,
        )
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    with ThreadPoolExecutor(len(names)) as threads:
        together = list(threads.map(ask, range(len(names))))
    assert together == [ask(number) for number in range(len(names))]


def test_completions_equal_generate(served: Served) -> None:
    for name in "ab":
        saved = find_saved_model(served.folders[name])
        generator = Generator.load(saved, exact=True)
        contexts = [generator.task.context(prompt) for prompt in PROMPTS]
        made = list(generator.generate(contexts, replace(saved.generate, max_new_tokens=NEW)))
        found = served.client.completions.create(model=name, prompt=list(PROMPTS), max_tokens=NEW, temperature=0)
        assert [choice.text for choice in found.choices] == [text.text for text in made]
        streamed = served.client.completions.create(
            model=name, prompt=PROMPTS[0], max_tokens=NEW, temperature=0, stream=True
        )
        assert "".join(chunk.choices[0].text for chunk in streamed) == made[0].text


def test_a_base_continues_the_text_itself_or_tokens(served: Served, offline: dict[str, Any]) -> None:
    model, tokenizer = offline[served.base]
    ids = tokenizer("A pub near")["input_ids"]
    made = model.generate(torch.tensor([ids]), max_new_tokens=5, do_sample=False, pad_token_id=0)[0, len(ids) :]
    for prompt in ("A pub near", ids):
        found = served.client.completions.create(model=served.base, prompt=prompt, max_tokens=5, temperature=0)
        assert found.choices[0].text == tokenizer.decode(made, skip_special_tokens=True)
        assert found.usage is not None
        assert found.usage.prompt_tokens == len(ids)


def test_stop_strings_end_the_text(served: Served, offline: dict[str, Any]) -> None:
    text = greedy(offline, "a")[2]
    stop = text[len(text) // 2 :][:3]
    wanted = text[: text.index(stop)]
    whole = chat(served, "a", stop=["never written", stop]).choices[0]
    assert (whole.message.content, whole.finish_reason) == (wanted, "stop")
    chunks = list(chat(served, "a", stop=stop, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == wanted


def test_log_probabilities_are_those_of_the_model(served: Served, offline: dict[str, Any]) -> None:
    tokens, logits, _ = greedy(offline, "b")
    wanted = logits.log_softmax(-1)
    content = chat(served, "b", logprobs=True, top_logprobs=3).choices[0].logprobs.content
    streamed = [
        token
        for chunk in chat(served, "b", logprobs=True, top_logprobs=3, stream=True)
        if chunk.choices[0].logprobs
        for token in chunk.choices[0].logprobs.content
    ]
    assert [each.token for each in streamed] == [each.token for each in content]
    assert len(content) >= len(tokens) - 1
    for position, each in enumerate(content):
        expected = wanted[position].topk(3).values.tolist()
        assert [top.logprob for top in each.top_logprobs] == pytest.approx(expected, abs=tolerances.MIXED_FP32 * 10)
        assert each.logprob == pytest.approx(float(wanted[position, tokens[position]]), abs=tolerances.MIXED_FP32 * 10)
    old = served.client.completions.create(model="b", prompt=PROMPTS[0], max_tokens=4, temperature=0, logprobs=2)
    recorded = old.choices[0].logprobs
    assert recorded is not None
    assert recorded.token_logprobs
    assert recorded.tokens
    assert recorded.top_logprobs
    assert len(recorded.tokens) == len(recorded.token_logprobs) == len(recorded.top_logprobs)


def test_choices_are_sampled_from_one_seed(served: Served) -> None:
    options: dict[str, Any] = {"n": 3, "temperature": 1.8, "top_p": 0.95, "seed": 5}
    first, second = (chat(served, "a", **options) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in second.choices]
    assert len(set(texts)) > 1
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    assert first.usage.prompt_tokens == chat(served, "a").usage.prompt_tokens
    streamed = ["", "", ""]
    for chunk in chat(served, "a", stream=True, **options):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts
    unseeded = {chat(served, "a", temperature=2).choices[0].message.content for _ in range(5)}
    assert len(unseeded) > 1, "without a seed each request draws its own"


@pytest.mark.parametrize("name", ["encoder", "tiny-roberta"])
def test_embeddings_are_the_mean_of_the_hidden_states(name: str, served: Served) -> None:
    model, tokenizer = load_saved_model(find_saved_model(served.folders["encoder"]), "fp32", name == "encoder")
    batch = tokenizer(list(TEXTS), padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model.base_model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    wanted = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1))
    for encoding in ({}, {"encoding_format": "float"}):
        found = served.client.embeddings.create(model=name, input=list(TEXTS), **encoding)  # type: ignore[arg-type]
        vectors = torch.tensor([each.embedding for each in found.data])
        assert torch.allclose(vectors, wanted, atol=tolerances.MIXED_FP32)
        assert found.usage.prompt_tokens == int(mask.sum())


@pytest.mark.parametrize(
    ("ask", "kind", "code", "message"),
    [
        (lambda s: chat(s, "c"), openai.NotFoundError, "model_not_found", "served: a, b"),
        (lambda s: chat(s, "a", temperature=3), openai.BadRequestError, "too_large", "temperature"),
        (lambda s: chat(s, "a", n=0), openai.BadRequestError, "invalid_request", "n: "),
        (lambda s: chat(s, "a", tools=[]), openai.BadRequestError, "invalid_request", "tools: Extra"),
        (lambda s: chat(s, "a", presence_penalty=1), openai.BadRequestError, "too_large", "presence_penalty"),
        (lambda s: chat(s, "a", messages=[]), openai.BadRequestError, "invalid_request", "messages"),
        (lambda s: chat(s, "writer"), openai.BadRequestError, "no_chat_template", "tiny-gpt2 has no chat template"),
        (lambda s: chat(s, "writer", stream=True), openai.BadRequestError, "no_chat_template", "tiny-gpt2"),
        (lambda s: chat(s, "encoder"), openai.BadRequestError, "wrong_kind", "use classify"),
        (lambda s: chat(s, "a", messages=[{"role": "user", "content": "pub " * 9000}]),
         openai.BadRequestError, "too_large", "messages"),
        (lambda s: s.client.embeddings.create(model="a", input="x"), openai.BadRequestError, "wrong_kind", "encoder"),
        (lambda s: s.client.embeddings.create(model="encoder", input=""), openai.BadRequestError, "bad_input", "empty"),
        (lambda s: s.client.completions.create(model="a", prompt="name[A], eatTipe[pub]"),
         openai.BadRequestError, "bad_input", "did you mean 'eatType'"),
        (lambda s: s.client.with_options(api_key="wrong").models.list(),
         openai.AuthenticationError, "unauthorized", "Bearer"),
    ],
)  # fmt: skip
def test_errors_are_those_of_openai(ask: Any, kind: Any, code: str, message: str, served: Served) -> None:
    with pytest.raises(kind) as raised:
        ask(served)
    assert message in str(raised.value)
    assert (raised.value.code, raised.value.type) == (code, "invalid_request_error")


def test_a_prompt_that_leaves_no_space_is_refused(served: Served, offline: dict[str, Any]) -> None:
    model, _ = offline[served.base]
    positions = model.config.max_position_embeddings
    with pytest.raises(openai.BadRequestError) as raised:
        served.client.completions.create(model=served.base, prompt=[5] * positions, max_tokens=1)
    assert raised.value.code == "context_length_exceeded"
    if positions < 1000:
        filled = served.client.completions.create(
            model=served.base, prompt=[5] * (positions - 1), max_tokens=1, temperature=0
        )
        assert filled.usage is not None
        assert filled.usage.completion_tokens == 1
