"""Malformed requests, made by schemathesis from a server's own description, and what the server answers.

`python -m tests.support.malformed --output FILE` writes the record. The server is `scripts/serve.py` in a process of its own,
with adapters of random weights on the embedded bases; one that may be loaded over HTTP lies beside them. A request is
well met where it ends in 4xx and the documented form, or where it was not malformed after all and is answered.
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
from tests.support.served import serving
from tests.support.served_adapters import PROMPTS, TEXTS, save_random

TOKEN = "a-token-of-this-record"
AUTHORIZED = {"authorization": f"Bearer {TOKEN}"}
TASKS = {"one": "rule-sentiment", "two": "rule-sentiment", "writer": "rule-restaurants"}
CLASSIFY, GENERATE = "/v1/classify", "/v1/generate"
# Codes of a request that is broken itself; others are refused for what they ask, such as an adapter that is not there.
BROKEN = (
    "bad_request",
    "invalid_request",
    "malformed_json",
    "method_not_allowed",
    "too_large",
    "unsupported_media_type",
)
UNAVAILABLE = ((503, "queue_full"), (503, "loading"), (503, "closing"), (504, "deadline_passed"))
LONGEST = 64  # letters of an adapter's name, by the description
EXAMPLES = 600  # of which some are drawn twice, and sent once


def cases(schema: Any, examples: int, seed: int) -> Iterator[tuple[str, list[Any]]]:
    """By operation what schemathesis makes against its description, each request once.

    First every rule broken by itself: bounds, types, fields, methods and content types; then, where there is a body,
    `examples` drawn at random, among them such as are no JSON.
    """
    for found in schema.get_all_operations():
        operation = found.ok()
        config = schema.config.generation_for(operation=operation)
        made = schema.iter_coverage_cases(
            operation, generation_modes=[GenerationMode.NEGATIVE], generation_config=config
        )
        drawn = _drawn(operation, examples, seed) if operation.body else []
        # A case is hashed by what goes over the wire.
        yield f"{operation.method.upper()} {operation.path}", list(dict.fromkeys(map(_of_a_served, [*made, *drawn])))


def _of_a_served(case: Any) -> Any:
    """The case, which asks for an adapter that is served: else what is no mistake would end at its name."""
    body = case.body
    if isinstance(body, dict) and isinstance(body.get("adapter"), str) and 0 < len(body["adapter"]) <= LONGEST:
        body["adapter"] = "writer" if case.path == GENERATE else "one"
    return case


def _drawn(operation: Any, examples: int, seed: int) -> list[Any]:
    found = []

    @seeded(seed)
    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(operation.as_strategy(generation_mode=GenerationMode.NEGATIVE))
    def draw(case: Any) -> None:
        found.append(case)

    draw()
    return found


def outcome(status: int, content: bytes) -> tuple[str, str]:
    """What became of a request: `malformed`, `refused`, `accepted`, `unavailable` or `failed`; and the error's code.

    `unavailable` is a server that says why it cannot answer now; another 5xx, or an error of another form, `failed`.
    """
    if status < 400:
        return "accepted", ""
    try:
        answer = json.loads(content)
        error = answer["error"]
        code, message = error["code"], error["message"]
    except (ValueError, KeyError, TypeError):
        return "failed", ""
    documented = answer.keys() == {"error"} and error.keys() == {"code", "message"}
    if not (documented and isinstance(code, str) and isinstance(message, str) and message):
        return "failed", str(code)
    if status >= 500:
        return ("unavailable" if (status, code) in UNAVAILABLE else "failed"), code
    return ("malformed" if code in BROKEN else "refused"), code


def right_answers(client: httpx.Client) -> list[Any]:
    """What the server says to questions that are well asked, and what it serves."""
    classified = [(CLASSIFY, {"adapter": name, "inputs": list(TEXTS)}) for name in ("one", "two")]
    written = [(GENERATE, {"adapter": "writer", "prompt": prompt, "max_new_tokens": 20}) for prompt in PROMPTS]
    found = [client.post(path, json=body) for path, body in [*classified, *written]]
    found += [client.get(path) for path in ("/v1/adapters", "/readyz")]
    return [(each.status_code, each.json()) for each in found]


def malformed_requests(folder: Path, examples: int, seed: int = 0) -> dict[str, Any]:
    """Sends them all, one after the other, and asks the same questions before and after; the record of it."""
    allowed = folder / "allowed"
    words: list[str | Path] = ["--precision", "fp32", "--allow-loading", allowed]
    for number, (name, task) in enumerate(TASKS.items()):
        words += ["--adapter", f"{name}={save_random(allowed / name, task, number)}"]
    operations: dict[str, Counter[str]] = {}
    answers, failures = Counter(), []
    with serving(*words, LORA_HF_TOKEN=TOKEN) as (process, address, lines):
        with httpx.Client(base_url=address, headers=AUTHORIZED, timeout=60) as client, requests.Session() as session:
            before = right_answers(client)
            began = time.monotonic()
            schema = schemathesis.openapi.from_url(f"{address}/openapi.json", headers=AUTHORIZED)
            for operation, made in cases(schema, examples, seed):
                counts = operations.setdefault(operation, Counter())
                for case in made:
                    response = case.call(session=session, headers=AUTHORIZED, timeout=60)
                    verdict, code = outcome(response.status_code, response.content)
                    counts.update(("requests", verdict))
                    answers[f"{response.status_code} {code}".strip()] += 1
                    if verdict in ("failed", "unavailable"):
                        failures.append(_described(response))
            seconds = time.monotonic() - began
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
    """A request and its answer in a few words, to send it again by hand."""
    sent = response.request
    body = sent.body.decode("utf-8", "replace") if isinstance(sent.body, bytes) else sent.body
    return {
        "request": f"{sent.method} {sent.path_url}"[:500],
        "body": body and body[:2000],
        "status": response.status_code,
        "answer": response.content.decode("utf-8", "replace")[:500],
    }


def well(record: dict[str, Any]) -> bool:
    """Whether nothing failed, and the server answered afterwards as before."""
    afterwards = record["afterwards"]
    same = afterwards["questions"] == afterwards["well_answered_before"] == afterwards["same"]
    return not record["failures"] and not record["tracebacks"] and same and afterwards["alive"]


def main(arguments: list[str] | None = None) -> int:
    """Sends them and writes the record; fails where the server did."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=EXAMPLES, help="drawn at random for each operation with a body")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        record = malformed_requests(Path(folder), options.examples, options.seed)
    options.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    totals = record["totals"]
    print(f"{totals['malformed']} of {totals['requests']} were malformed; {len(record['failures'])} failed")
    return int(not well(record))


if __name__ == "__main__":
    sys.exit(main())
