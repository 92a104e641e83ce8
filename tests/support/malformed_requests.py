"""Malformed requests, which schemathesis generates from a server's own description, and the server's answers.

`python -m tests.support.malformed_requests --output FILE` writes the record. The server is `scripts/serve.py` in its
own process, with random adapters on the bundled bases; clients may load adapters over HTTP. A request passes if it
gets a 4xx in the documented form, or if it is not malformed after all and gets an answer.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import requests
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import seed as seeded
from schemathesis import GenerationMode

from lora_hf.core.provenance import git_state, machine, version, versions
from tests.support.random_adapters import PROMPTS, TEXTS, save_random
from tests.support.server_process import serving
from tests.support.waiting import LIMIT

TOKEN = "a-token-of-this-record"
AUTHORIZED = {"authorization": f"Bearer {TOKEN}"}
TASKS = {"one": "rule-sentiment", "two": "rule-sentiment", "writer": "rule-restaurants"}
CLASSIFY, GENERATE, EMBED = "/v1/classify", "/v1/generate", "/v1/embeddings"
# Codes of malformed requests; other codes refuse well-formed ones, such as a request for an unknown adapter.
MALFORMED = (
    "bad_request",
    "invalid_request",
    "malformed_json",
    "method_not_allowed",
    "too_large",
    "unsupported_media_type",
)
UNAVAILABLE = ((503, "queue_full"), (503, "loading"), (503, "closing"), (504, "deadline_passed"))
MAX_NAME_LENGTH = 64  # of an adapter, by the description
EXAMPLES = 600  # duplicates among them are sent once


def cases(schema: Any, examples: int, seed: int) -> Iterator[tuple[str, list[Any]]]:
    """For each operation, the requests that schemathesis generates against its description, without duplicates.

    First come those that break one rule each: bounds, types, fields, methods and content types. For operations with a
    body, `examples` random ones follow, some of which are not JSON.
    """
    for result in schema.get_all_operations():
        operation = result.ok()
        config = schema.config.generation_for(operation=operation)
        coverage = schema.iter_coverage_cases(
            operation, generation_modes=[GenerationMode.NEGATIVE], generation_config=config
        )
        drawn = _random_cases(operation, examples, seed) if operation.body else []
        # A case's hash is that of its bytes on the wire.
        unique = dict.fromkeys(map(_with_served_adapter, [*coverage, *drawn]))
        yield f"{operation.method.upper()} {operation.path}", list(unique)


def _with_served_adapter(case: Any) -> Any:
    """Names an adapter that is served; otherwise an unknown name would hide all other defects."""
    body = case.body
    if isinstance(body, dict) and isinstance(body.get("adapter"), str) and 0 < len(body["adapter"]) <= MAX_NAME_LENGTH:
        body["adapter"] = "writer" if case.path == GENERATE else "one"
    if isinstance(body, dict) and isinstance(body.get("model"), str) and body["model"]:
        body["model"] = "one" if case.path == EMBED else "writer"
    return case


def _random_cases(operation: Any, examples: int, seed: int) -> list[Any]:
    drawn = []

    @seeded(seed)
    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(operation.as_strategy(generation_mode=GenerationMode.NEGATIVE))
    def draw(case: Any) -> None:
        drawn.append(case)

    draw()
    return drawn


def outcome(status: int, content: bytes) -> tuple[str, str]:
    """How a request ended, and the error's code.

    `accepted`: answered; `malformed` or `refused`: 4xx; `unavailable`: 5xx with a documented code; `failed`: any other
    5xx, or an error in another form.
    """
    if status < 400:
        return "accepted", ""
    try:
        answer = json.loads(content)
        error = answer["error"]
        code, message = error["code"], error["message"]
    except (ValueError, KeyError, TypeError):
        return "failed", ""
    documented = answer.keys() == {"error"} and error.keys() == {"message", "type", "param", "code"}
    if not (documented and isinstance(code, str) and isinstance(message, str) and message):
        return "failed", str(code)
    if status >= 500:
        return ("unavailable" if (status, code) in UNAVAILABLE else "failed"), code
    return ("malformed" if code in MALFORMED else "refused"), code


def right_answers(client: httpx.Client) -> list[Any]:
    """The answers to well-formed requests, and the list of adapters."""
    classified = [(CLASSIFY, {"adapter": name, "inputs": list(TEXTS)}) for name in ("one", "two")]
    generated = [(GENERATE, {"adapter": "writer", "prompt": prompt, "max_new_tokens": 20}) for prompt in PROMPTS]
    responses = [client.post(path, json=body) for path, body in [*classified, *generated]]
    responses += [client.get(path) for path in ("/v1/adapters", "/readyz")]
    return [(response.status_code, response.json()) for response in responses]


def malformed_requests(folder: Path, examples: int, seed: int = 0) -> dict[str, Any]:
    """Sends all of them one by one, with the same well-formed requests before and after, and returns the record."""
    allowed = folder / "allowed"
    words: list[str | Path] = ["--precision", "fp32", "--allow-loading", allowed, "--deadline", str(LIMIT)]
    for number, (name, task) in enumerate(TASKS.items()):
        words += ["--adapter", f"{name}={save_random(allowed / name, task, number)}"]
    operations: dict[str, Counter[str]] = {}
    answers, failures = Counter(), []
    with serving(*words, LORA_HF_TOKEN=TOKEN) as (process, address, lines):
        with httpx.Client(base_url=address, headers=AUTHORIZED, timeout=LIMIT) as client, requests.Session() as session:
            before = right_answers(client)
            start = time.monotonic()
            schema = schemathesis.openapi.from_url(f"{address}/openapi.json", headers=AUTHORIZED)
            for operation, requests_of_operation in cases(schema, examples, seed):
                counts = operations.setdefault(operation, Counter())
                for case in requests_of_operation:
                    response = case.call(session=session, headers=AUTHORIZED, timeout=LIMIT)
                    verdict, code = outcome(response.status_code, response.content)
                    if code == "deadline_passed" and isinstance(case.body, dict) and case.body.get("deadline"):
                        verdict = "refused"  # its own deadline may be far too short
                    counts.update(("requests", verdict))
                    answers[f"{response.status_code} {code}".strip()] += 1
                    if verdict in ("failed", "unavailable"):
                        failures.append(_described(response))
            seconds = time.monotonic() - start
            after = right_answers(client)
        alive = process.poll() is None
    totals = sum(operations.values(), Counter())
    return {
        "kind": "malformed requests",
        "totals": dict(totals),
        "operations": {name: dict(counts) for name, counts in operations.items()},
        "answers": dict(sorted(answers.items())),
        "failures": failures,
        "tracebacks": sum("Traceback" in line for line in lines),
        "afterwards": {
            "questions": len(before),
            "well_answered_before": sum(status == 200 for status, _ in before),
            "same": sum(one == other for one, other in zip(before, after, strict=True)),
            "alive": alive,
        },
        "seconds": seconds,
        "examples": examples,
        "seed": seed,
        "versions": versions() | {name: version(name) for name in ("fastapi", "schemathesis", "hypothesis")},
        "git": git_state(),
        "machine": machine(),
    }


def _described(response: Any) -> dict[str, Any]:
    """A request and its response, short but complete enough to send the request again."""
    sent = response.request
    body = sent.body.decode("utf-8", "replace") if isinstance(sent.body, bytes) else sent.body
    return {
        "request": f"{sent.method} {sent.path_url}"[:500],
        "body": body and body[:2000],
        "status": response.status_code,
        "answer": response.content.decode("utf-8", "replace")[:500],
    }


def passed(record: dict[str, Any]) -> bool:
    """Whether nothing failed and the server answered the same before and after."""
    afterwards = record["afterwards"]
    same = afterwards["questions"] == afterwards["well_answered_before"] == afterwards["same"]
    return not record["failures"] and not record["tracebacks"] and same and afterwards["alive"]


def main(arguments: list[str] | None = None) -> int:
    """Writes the record; returns 1 if a request failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=EXAMPLES, help="random requests per operation with a body")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        record = malformed_requests(Path(folder), options.examples, options.seed)
    options.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    totals = record["totals"]
    print(f"{totals['malformed']} of {totals['requests']} were malformed; {len(record['failures'])} failed")
    return int(not passed(record))


if __name__ == "__main__":
    sys.exit(main())
