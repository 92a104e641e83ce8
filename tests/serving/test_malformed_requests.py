"""A server process under some of the malformed requests of `tests/support/malformed_requests.py`."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest

from tests.support.malformed_requests import malformed_requests, outcome, passed

pytestmark = pytest.mark.full
FORM = {"type": "invalid_request_error", "param": None}


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return malformed_requests(tmp_path_factory.mktemp("malformed"), examples=20)


def test_no_malformed_request_breaks_the_server(record: dict[str, Any]) -> None:
    assert record["failures"] == []
    assert passed(record)
    assert record["totals"]["malformed"] > 150
    assert record["operations"]["GET /readyz"]["malformed"] == 7, "one per wrong method"


def test_every_request_is_counted_once(record: dict[str, Any]) -> None:
    assert sum(record["answers"].values()) == record["totals"]["requests"]
    assert sum(record["totals"].values()) == 2 * record["totals"]["requests"], "one outcome each"
    assert sum(map(Counter, record["operations"].values()), Counter()) == record["totals"]
    codes = {answer.partition(" ")[2] for answer in record["answers"]}
    assert {"malformed_json", "unsupported_media_type", "method_not_allowed", "invalid_request", "too_large"} <= codes


@pytest.mark.parametrize(
    ("status", "answer", "verdict"),
    [
        (200, {"answers": []}, "accepted"),
        (422, {"error": {**FORM, "code": "invalid_request", "message": "inputs: Field required"}}, "malformed"),
        (404, {"error": {**FORM, "code": "unknown_adapter", "message": "no adapter"}}, "refused"),
        (503, {"error": {**FORM, "code": "queue_full", "message": "try again"}}, "unavailable"),
        (503, {"error": {**FORM, "code": "internal", "message": "broken"}}, "failed"),
        (500, {"error": {**FORM, "code": "internal", "message": "broken"}}, "failed"),
        (422, {"error": {**FORM, "code": "invalid_request", "message": ""}}, "failed"),
        (422, {"error": {**FORM, "code": "invalid_request", "message": "m", "more": 1}}, "failed"),
        (422, {"detail": "inputs: Field required"}, "failed"),
        (422, ["error"], "failed"),
        (422, {"error": "invalid_request"}, "failed"),
    ],
)
def test_a_response_is_judged_by_its_status_and_form(status: int, answer: Any, verdict: str) -> None:
    assert outcome(status, json.dumps(answer).encode())[0] == verdict


def test_an_error_that_is_not_json_is_a_failure() -> None:
    assert outcome(400, b"Invalid HTTP request received.") == ("failed", "")


@pytest.mark.parametrize(
    "change",
    [
        {"failures": [{"status": 500}]},
        {"tracebacks": 1},
        {"afterwards": {"questions": 7, "well_answered_before": 7, "same": 6, "alive": True}},
        {"afterwards": {"questions": 7, "well_answered_before": 6, "same": 7, "alive": True}},
        {"afterwards": {"questions": 7, "well_answered_before": 7, "same": 7, "alive": False}},
    ],
)
def test_any_failure_makes_the_record_bad(change: dict[str, Any], record: dict[str, Any]) -> None:
    assert not passed(record | change)
