"""A real browser for tests: headless Chromium, driven through ChromeDriver by W3C WebDriver."""

from __future__ import annotations

import base64
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.support.waiting import LIMIT, wait_until

ARGUMENTS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1280,1000", "--disable-dev-shm-usage"]
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the key of an element in responses, set by the standard


def missing() -> str:
    """The programs that are not installed; empty if the browser can start."""
    return ", ".join(name for name in ("chromium", "chromedriver") if shutil.which(name) is None)


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
        def displayed() -> str | None:
            for element in self._session_request("POST", "/elements", {"using": "css selector", "value": css}):
                if self._session_request("GET", f"/element/{element[ELEMENT]}/displayed"):
                    return element[ELEMENT]
            return None

        return str(wait_until(displayed))

    def until(self, script: str, *arguments: Any) -> Any:
        """Repeats a script until it returns a true value."""
        return wait_until(lambda: self.run(script, *arguments))

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
    command = [str(shutil.which("chromedriver")), "--port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as driver:
        try:
            assert driver.stdout is not None
            started = next(line for line in driver.stdout if "started successfully on port" in line)
            port = re.findall(r"\d+", started)[-1]
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=LIMIT, trust_env=False) as client:
                page = Browser(client)
                try:
                    yield page
                finally:
                    client.delete(page.session)
        finally:
            driver.kill()
