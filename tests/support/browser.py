"""A real browser for tests: headless Chromium through its ChromeDriver, in the words of W3C WebDriver."""

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
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the key of an element in every answer, says the standard
WAIT = 30.0


def missing() -> str:
    """What is not installed; an empty string where a browser can be had."""
    return ", ".join(name for name in ("chromium", "chromedriver") if shutil.which(name) is None)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class Browser:
    def __init__(self, client: httpx.Client) -> None:
        self.client = client
        options = {"binary": shutil.which("chromium"), "args": ARGUMENTS}
        wanted = {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}}
        self.session = f"/session/{self._ask('POST', '/session', wanted)['sessionId']}"

    def open(self, url: str) -> None:
        self._of_session("POST", "/url", {"url": url})

    def click(self, css: str) -> None:
        self._of_session("POST", f"/element/{self.find(css)}/click", {})

    def type(self, css: str, text: str) -> None:
        self._of_session("POST", f"/element/{self.find(css)}/value", {"text": text})

    def text(self, css: str) -> str:
        return str(self.run("return document.querySelector(arguments[0])?.innerText ?? ''", css))

    def value(self, css: str) -> str:
        return str(self.run("return document.querySelector(arguments[0])?.value ?? ''", css))

    def run(self, script: str, *arguments: Any) -> Any:
        return self._of_session("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def find(self, css: str) -> str:
        until = time.monotonic() + WAIT
        while True:
            found = self._of_session("POST", "/elements", {"using": "css selector", "value": css})
            for each in found:
                if self._of_session("GET", f"/element/{each[ELEMENT]}/displayed"):
                    return each[ELEMENT]
            assert time.monotonic() < until, f"no {css} on the page: {self.text('body')[:500]}"
            time.sleep(0.1)

    def until(self, script: str, *arguments: Any) -> Any:
        """What a script returns as soon as that is neither empty nor false."""
        end = time.monotonic() + WAIT
        while not (found := self.run(script, *arguments)):
            assert time.monotonic() < end, f"never: {script}; the page says {self.text('body')[:500]}"
            time.sleep(0.1)
        return found

    def picture(self, file: Path) -> None:
        file.write_bytes(base64.b64decode(self._of_session("GET", "/screenshot")))

    def _of_session(self, method: str, path: str, body: Any = None) -> Any:
        return self._ask(method, self.session + path, body)

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
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
            found = Browser(client)
            try:
                yield found
            finally:
                client.delete(found.session)
    finally:
        driver.kill()
        driver.wait()
