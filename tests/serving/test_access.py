"""Who may ask: hosts, repeated headers, and the playground's log-in. The application behind is a stand-in."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.responses import PlainTextResponse, Response
from starlette.testclient import TestClient

from lora_hf.serving.limits import Limits
from lora_hf.serving.metrics import Metrics
from lora_hf.serving.middleware import AccessMiddleware, LoginLimit, is_allowed_host

PAGE, TOKEN = "/playground", "a-token-of-this-test"


async def application(scope: Any, receive: Any, send: Any) -> None:
    """As gradio: 400 to a wrong password, and a cookie that pages of other sites could use to a right one."""
    response: Response = PlainTextResponse(scope["path"])
    if scope["path"].rstrip("/") == f"{PAGE}/login":
        right = TOKEN.encode() in (await receive())["body"]
        response = Response(status_code=200 if right else 400)
        response.set_cookie("one", "1", httponly=True, samesite="none", secure=True)
        response.set_cookie("two", "2", samesite="lax")
    await response(scope, receive, send)


def client_of(address: str = "127.0.0.1", **options: Any) -> TestClient:
    options = {"token": None, "limits": Limits(max_logins=3), "metrics": Metrics(), **options}
    return TestClient(AccessMiddleware(application, **options), client=(address, 1), base_url="http://localhost:8000")


def code(response: Any) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


@pytest.mark.parametrize("token", [None, TOKEN])
@pytest.mark.parametrize("path", ["/v1/adapters", PAGE, f"{PAGE}/config"])
def test_other_names_of_the_server_are_refused(path: str, token: str | None) -> None:
    """A page of another site may let its own name point to this server and then read its answers."""
    client = client_of(token=token, hosts=frozenset({"localhost"}), playground=PAGE)
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


@pytest.mark.parametrize("token", [None, TOKEN])
def test_pages_of_other_sites_cannot_use_the_playground(token: str | None) -> None:
    client = client_of(token=token, playground=PAGE)
    for origin in ("https://evil.example", "null", "http://localhost:3000", "http://localhost"):
        for method in ("GET", "POST", "OPTIONS"):
            assert code(client.request(method, f"{PAGE}/queue", headers={"origin": origin})) == (403, "foreign_origin")
    for headers in (
        {},
        {"origin": "http://localhost:8000"},
        {"origin": "https://lora.example", "host": "lora.example"},
    ):
        assert client.get(f"{PAGE}/queue", headers=headers).status_code == 200


def test_the_cookie_of_the_playground_stays_on_its_page() -> None:
    found = client_of(token=TOKEN, playground=PAGE).post(f"{PAGE}/login", content=TOKEN).headers.get_list("set-cookie")
    assert [each.count("SameSite=strict") for each in found] == [1, 1]
    assert not any(word in each.lower() for each in found for word in ("samesite=none", "samesite=lax"))
    assert ["Secure" in each for each in found] == [True, False]


def test_failed_logins_are_limited() -> None:
    client = client_of(token=TOKEN, playground=PAGE)
    for path in ("login", "login/", "login"):
        client.post(f"{PAGE}/{path}", content="wrong")
    refused = client.post(f"{PAGE}/login", content=TOKEN)
    assert code(refused) == (429, "too_many_logins"), "else the limit would only slow the answers down"
    assert refused.headers["retry-after"] == "60"
    assert client.get(PAGE).status_code == 200, "the page itself stays"
    client = client_of(token=TOKEN, playground=PAGE)
    for _ in range(5):
        for password in ("wrong", "wrong", TOKEN):
            status = client.post(f"{PAGE}/login", content=password).status_code
        assert status == 200, "a log-in that succeeds clears the failed ones before it"


def test_logins_are_limited_per_client_and_in_total(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    logins = LoginLimit(2)
    assert [logins.admit("a"), logins.admit("a"), logins.admit("a"), logins.admit("b")] == [True, True, False, True]
    assert sum(logins.admit(str(number)) for number in range(100)) == 17
    now = 61.0
    assert logins.admit("a")
