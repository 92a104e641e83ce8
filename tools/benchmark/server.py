"""A server in processes of its own, for the benchmarks."""

from __future__ import annotations

import http.client
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_hf.core.child_process import package_environment
from lora_hf.core.errors import TrainingError

SERVE = "import sys; from lora_hf.cli.main import main; sys.exit(main(verb='serve'))"
TIMEOUT = 120.0  # seconds to start, and to answer the last requests


@dataclass
class Server:
    process: subprocess.Popen
    port: int
    token: str
    startup_seconds: float

    def request(self, method: str, path: str, body: Any = None) -> tuple[int, bytes]:
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)) as connection:
            headers = {"authorization": f"Bearer {self.token}", "content-type": "application/json"}
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            response = connection.getresponse()
            return response.status, response.read()

    def metrics(self) -> str:
        return self.request("GET", "/metrics")[1].decode()

    def memory_mib(self) -> float:
        """The memory of the process and its children, each shared page counted once."""
        return memory_mib(self.process.pid)


def memory_mib(pid: int) -> float:
    """The proportional set size of a process and its children."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8")
    size = int(next(line for line in rollup.splitlines() if line.startswith("Pss:")).split()[1]) / 1024
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8").split()
    return size + sum(memory_mib(int(child)) for child in children)


def memory_without_models() -> float:
    """The memory of the two processes of a server before they load anything: Python and its libraries, in MiB."""
    total = 0.0
    for module in ("lora_hf.serving.app", "lora_hf.serving.model_process"):
        code = f"import {module}, sys; print(flush=True); sys.stdin.read()"
        words = [sys.executable, "-c", code]
        with subprocess.Popen(words, stdin=-1, stdout=-1, env=package_environment()) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdout.readline()
            total += memory_mib(process.pid)
            process.stdin.close()
    return total


@contextmanager
def running_server(
    adapters: dict[str, Path], root: Path, precision: str, token: str, *options: str
) -> Iterator[Server]:
    """A server once it is ready; it may load adapters from below `root`."""
    words = [word for name, folder in adapters.items() for word in ("--adapter", f"{name}={folder}")]
    words += ["--port", "0", "--allow-loading", str(root), "--precision", precision, *options]
    environment = package_environment() | {"LORA_HF_TOKEN": token}
    start = time.perf_counter()
    log = root / f"server-{time.monotonic_ns()}.log"
    with log.open("w", encoding="utf-8") as errors:
        process = subprocess.Popen([sys.executable, "-c", SERVE, *words], stderr=errors, env=environment)
        try:
            while time.perf_counter() - start < TIMEOUT and process.poll() is None:
                output = log.read_text(encoding="utf-8")
                if address := re.search(r"ready: .*http://127\.0\.0\.1:(\d+)\D", output):
                    yield Server(process, int(address[1]), token, time.perf_counter() - start)
                    return
                time.sleep(0.02)
            raise TrainingError(f"benchmark serve: the server did not start: {log.read_text(encoding='utf-8')[-2000:]}")
        finally:
            process.kill()
            process.wait()
