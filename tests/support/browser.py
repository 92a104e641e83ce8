"""A real browser for tests: headless Chromium, driven through ChromeDriver by W3C WebDriver."""

from __future__ import annotations

import base64
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

ARGUMENTS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1280,1000", "--disable-dev-shm-usage"]
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the key of an element in responses, set by the standard
WAIT = 30.0


def missing() -> str:
    """The programs that are not installed; empty if the browser can start."""
    return ", ".join(name for name in ("chromium", "chromedriver") if shutil.which(name) is None)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Browser:
    def __init__(self, client: httpx.Client) -> None:
        self.client = client
        options = {"binary": shutil.which("chromium"), "args": ARGUMENTS}
        wanted = {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}}
        self.session = f"/session/{self._request('POST', '/session', wanted)['sessionId']}"

    def open(self, url: str) -> None:
        self._session_request("POST", "/url", {"url": url})

    def click(self, css: str) -> None:
        self._session_request("POST", f"/element/{self.find(css)}/click", {})

    def type(self, css: str, text: str) -> None:
        self._session_request("POST", f"/element/{self.find(css)}/value", {"text": text})

    def text(self, css: str) -> str:
        return str(self.run("return document.querySelector(arguments[0])?.innerText ?? ''", css))

    def value(self, css: str) -> str:
        return str(self.run("return document.querySelector(arguments[0])?.value ?? ''", css))

    def run(self, script: str, *arguments: Any) -> Any:
        return self._session_request("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def find(self, css: str) -> str:
        until = time.monotonic() + WAIT
        while True:
            for element in self._session_request("POST", "/elements", {"using": "css selector", "value": css}):
                if self._session_request("GET", f"/element/{element[ELEMENT]}/displayed"):
                    return element[ELEMENT]
            assert time.monotonic() < until, f"no {css} on the page: {self.text('body')[:500]}"
            time.sleep(0.1)

    def until(self, script: str, *arguments: Any) -> Any:
        """Repeats a script until it returns a true value."""
        end = time.monotonic() + WAIT
        while not (value := self.run(script, *arguments)):
            assert time.monotonic() < end, f"timed out: {script}; the page shows {self.text('body')[:500]}"
            time.sleep(0.1)
        return value

    def picture(self, file: Path) -> None:
        file.write_bytes(base64.b64decode(self._session_request("GET", "/screenshot")))

    def _session_request(self, method: str, path: str, body: Any = None) -> Any:
        return self._request(method, self.session + path, body)

    def _request(self, method: str, path: str, body: Any = None) -> Any:
        answer = self.client.request(method, path, json=body).json()["value"]
        assert not (isinstance(answer, dict) and "error" in answer), answer
        return answer


@contextmanager
def browser() -> Iterator[Browser]:
    port = free_port()
    command = [str(shutil.which("chromedriver")), f"--port={port}"]
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as client:
            end = time.monotonic() + WAIT
            while True:
                try:
                    if client.get("/status").json()["value"]["ready"]:
                        break
                except httpx.TransportError:
                    assert time.monotonic() < end, "chromedriver does not answer"
                time.sleep(0.05)
            page = Browser(client)
            try:
                yield page
            finally:
                client.delete(page.session)
    finally:
        driver.kill()
        driver.wait()
