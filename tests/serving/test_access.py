"""Who may ask: hosts, the token and repeated headers. The application behind is a stand-in."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient

from lora_hf.serving.limits import Limits
from lora_hf.serving.metrics import Metrics
from lora_hf.serving.middleware import AccessMiddleware, is_allowed_host

TOKEN = "a-token-of-this-test"


async def application(scope: Any, receive: Any, send: Any) -> None:
    await PlainTextResponse(scope["path"])(scope, receive, send)


def client_of(address: str = "127.0.0.1", **options: Any) -> TestClient:
    options = {"token": None, "limits": Limits(), "metrics": Metrics(), **options}
    return TestClient(AccessMiddleware(application, **options), client=(address, 1), base_url="http://localhost:8000")


def code(response: Any) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


@pytest.mark.parametrize("token", [None, TOKEN])
@pytest.mark.parametrize("path", ["/v1/adapters", "/"])
def test_other_names_of_the_server_are_refused(path: str, token: str | None) -> None:
    """A page of another site may let its own name point to this server and then read its answers."""
    client = client_of(token=token, hosts=frozenset({"localhost"}), page="/")
    assert code(client.get(path, headers={"host": "evil.example:8000"})) == (400, "unknown_host")
    authorized = {"authorization": f"Bearer {token}"} if token else {}
    assert client.get(path, headers=authorized).text == path


@pytest.mark.parametrize(
    ("host", "hosts", "allowed"),
    [
        ("localhost", {"localhost"}, True),
        ("LOCALHOST:8000", {"localhost"}, True),
        ("[::1]:8000", {"::1"}, True),
        ("lora.example", {"localhost", "lora.example"}, True),
        ("localhost.evil.example", {"localhost"}, False),
        ("evil.example@localhost", {"localhost"}, False),
        ("localhost:80:evil", {"localhost"}, False),
        ("localhost/evil", {"localhost"}, False),
        ("192.0.2.7:8000", {"localhost"}, False),
        ("192.0.2.7:8000", {"localhost", "0.0.0.0"}, True),
        ("[2001:db8::7]", {"localhost", "::"}, True),
        ("evil.example", {"localhost", "0.0.0.0"}, False),
    ],
)
def test_hosts(host: str, hosts: set[str], allowed: bool) -> None:
    assert is_allowed_host(host, frozenset(hosts)) is allowed


@pytest.mark.parametrize("name", ["content-type", "authorization", "host", "Content-Length", "origin"])
def test_a_repeated_header_is_refused(name: str) -> None:
    repeated = client_of().get("/v1/adapters", headers=[(name, "1"), (name, "2")])
    assert code(repeated) == (400, "bad_request")
    assert name.lower() in repeated.json()["error"]["message"]
    assert client_of().get("/v1/adapters", headers=[("x-any", "1"), ("x-any", "2")]).status_code == 200


def test_only_the_page_needs_no_token() -> None:
    client = client_of(token=TOKEN, page="/")
    assert client.get("/").text == "/"
    for method, path in (("POST", "/"), ("GET", "/v1/adapters"), ("OPTIONS", "/v1/adapters")):
        assert code(client.request(method, path)) == (401, "unauthorized")
