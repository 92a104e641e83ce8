"""`serve` in its own process, which gets SIGTERM while it answers, and its errors."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lora_hf.adapters.format import WEIGHTS_FILE
from lora_hf.cli.main import main
from tests.support.random_adapters import PROMPTS, save_random
from tests.support.server_process import SCRIPT, serving
from tests.support.waiting import LIMIT, wait_until

TOKEN = "a-token-of-this-test"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {name: save_random(root / name, task) for name, task in (("a", "rule-sentiment"), ("w", "rule-restaurants"))}


@pytest.mark.full
def test_a_request_in_flight_is_answered_after_sigterm(folders: dict[str, Path]) -> None:
    adapters = ["--adapter", f"a={folders['a']}", "--adapter", f"w={folders['w']}"]
    with serving(*adapters, "--precision", "fp32", LORA_HF_TOKEN=TOKEN) as (process, address, lines):
        with httpx.Client(base_url=address, headers={"authorization": f"Bearer {TOKEN}"}, timeout=LIMIT) as client:
            assert httpx.get(f"{address}/v1/adapters").status_code == 401
            answer = client.post("/v1/classify", json={"adapter": "a", "inputs": ["a warm, funny film"]}).json()
            assert answer["answers"][0]["label"] in ("negative", "positive")
            body: dict[str, Any] = {"adapter": "w", "prompt": PROMPTS[1], "max_new_tokens": 60, "stream": True}
            # At this temperature the end token is unlikely to be sampled soon.
            body |= {"temperature": 50.0, "seed": 1}
            with client.stream("POST", "/v1/generate", json=body) as stream:
                chunks = stream.iter_text()
                first = next(chunks)
                process.send_signal(signal.SIGTERM)
                whole = first + "".join(chunks)
        assert process.wait(LIMIT) == 0
        assert "event: text" in first
        assert "event: done" not in first, "the request must be in flight at the signal"
        assert "event: done" in whole
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{address}/healthz")
        log = "".join(lines)
        assert "POST /v1/classify 200" in log
        assert TOKEN not in log
        assert "funny" not in log


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--adapter", "nowhere"], "--adapter nowhere: expected NAME=DIR, such as sst2=nowhere"),
        (["--adapter", "a=1", "--adapter", "a=2"], "--adapter a=2: 'a' is the name of another adapter"),
        (["--adapter", "a=nowhere/at/all"], "nowhere/at/all: "),
        (["--adapter", "a=x", "--allow-loading", "."], "needs a token"),
        (["--adapter", "a=x", "--token-file", "nowhere"], "cannot be read"),
        (["--adapter", "a=x", "--port", "70000"], "--port: expected 0 to 65535, found 70000"),
        (["--adapter", "a=x", "--max-batch", "0"], "--max-batch: expected a number above 0"),
        (["--adapter", "a=someone/x", "--host", "127.0.0.1:1"], "--host 127.0.0.1:1: other machines"),
        (["--adapter", "a=x", "--max-connections", "0"], "--max-connections: expected a number above 0"),
    ],
)
def test_errors_are_reported_before_serving(
    words: list[str], message: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LORA_HF_TOKEN", raising=False)
    assert main([*words, "--port", "0"] if "--port" not in words else words, verb="serve") == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("host", "token", "message"),
    [
        ("0.0.0.0", None, "--host 0.0.0.0: other machines could use the server without a token"),
        ("0.0.0.0", "", "LORA_HF_TOKEN: expected one word"),
        ("0.0.0.0", " \t\n", "LORA_HF_TOKEN: expected one word"),
        ("::", None, "without a token"),
        ("192.0.2.1", None, "without a token"),
        ("lora.example", None, "without a token"),
        ("127.0.0.1", "  ", "LORA_HF_TOKEN: expected one word"),
        ("192.0.2.1", TOKEN, "--host 192.0.2.1 --port 0: cannot listen"),
        ("127.0.0.1", "", "LORA_HF_TOKEN: expected one word"),
        ("127.0.0.1", "secret", "a=nowhere"),
        ("0.0.0.0", "secret", "expected at least 16 characters, found 6"),
        ("::1", None, "a=nowhere"),
        ("127.0.0.2", None, "a=nowhere"),
        ("localhost", None, "a=nowhere"),
    ],
)
def test_other_machines_need_a_token(
    host: str, token: str | None, message: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LORA_HF_TOKEN", raising=False)
    if token is not None:
        monkeypatch.setenv("LORA_HF_TOKEN", token)
    adapter = "someone/x" if "cannot listen" in message else "nowhere/at/all"
    assert main(["--adapter", f"a={adapter}", "--host", host, "--port", "0"], verb="serve") == 2
    assert message.removeprefix("a=") in capsys.readouterr().err


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8").split()]


def is_running(pid: int) -> bool:
    """Whether a process exists that is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.full
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the model process in /proc")
def test_neither_process_outlives_the_other(folders: dict[str, Path]) -> None:
    with serving("--adapter", f"a={folders['a']}", "--precision", "fp32") as (process, address, _):
        (models,) = children(process.pid)
        process.kill()
        process.wait(LIMIT)
        wait_until(lambda: not is_running(models))
    with serving("--adapter", f"a={folders['a']}", "--precision", "fp32") as (process, address, lines):
        assert httpx.get(f"{address}/readyz").status_code == 200
        os.kill(children(process.pid)[0], signal.SIGKILL)
        assert process.wait(LIMIT) == 2
        wait_until(lambda: "the model process has ended (signal 9)" in "".join(lines))


@pytest.mark.full
def test_an_adapter_that_cannot_be_loaded_ends_the_server(folders: dict[str, Path], tmp_path: Path) -> None:
    damaged = save_random(tmp_path / "damaged")
    with safe_open(damaged / WEIGHTS_FILE, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(damaged / WEIGHTS_FILE)
    missing, _ = tensors.popitem()
    save_file(tensors, damaged / WEIGHTS_FILE, metadata=metadata)
    words = [sys.executable, str(SCRIPT), "--port", "0", "--adapter", f"a={folders['a']}", "--adapter", f"d={damaged}"]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=LIMIT, check=False)
    assert ended.returncode == 2
    assert "error: " in ended.stderr
    assert missing in ended.stderr
    assert "Traceback" not in ended.stderr
