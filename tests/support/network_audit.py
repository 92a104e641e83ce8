"""Runs every verb in one process under an audit hook: `python -m tests.support.network_audit FOLDER`.

The data and the base are local, and nothing tells the Hugging Face libraries to stay offline. The hook refuses every
connection and name lookup beyond this machine and records it in `FOLDER/audit.json`, with the addresses listened on.
"""

from __future__ import annotations

import ipaddress
import json
import logging
import os
import re
import shutil
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import Any

import httpx
import pyarrow
from pyarrow import parquet

from lora_hf.cli.main import main
from lora_hf.core.hub_access import hub_is_reachable
from tests.support.waiting import LIMIT

BASE = Path(__file__).parents[2] / "lora_hf" / "models" / "bases" / "tiny-roberta"
INPUT = "name[The Mill], eatType[pub]"
NETWORKED = ("push", "hub")  # these use the network, which shows that the hook works


class NetworkAudit:
    """Records the hosts that this process contacts, and the addresses that it listens on."""

    def __init__(self) -> None:
        self.contacted: list[str] = []
        self.listened: list[str] = []
        sys.addaudithook(self._audit)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "socket.getaddrinfo" or event.startswith("socket.gethostby"):
            self._check(arguments[0])
        elif event in ("socket.connect", "socket.sendto", "socket.sendmsg", "socket.bind"):
            if arguments[0].family not in (socket.AF_INET, socket.AF_INET6) or arguments[1] is None:
                return
            if event == "socket.bind":
                self.listened.append(arguments[1][0])
            else:
                self._check(arguments[1][0])

    def _check(self, host: Any) -> None:
        name = host.decode() if isinstance(host, bytes) else host
        if name is None or name == "localhost" or _is_loopback(name):
            return
        self.contacted.append(name)
        raise OSError(f"{name} is not this machine")

    def take(self) -> dict[str, list[str]]:
        """Returns what was recorded since the last call."""
        recorded = {"contacted": self.contacted, "listened": self.listened}
        self.contacted, self.listened = [], []
        return recorded


def _is_loopback(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


class QueryAndStop(logging.Handler):
    """Queries the server of this process once it says that it is ready, then stops it with SIGTERM."""

    def __init__(self) -> None:
        super().__init__()
        self.answers: list[Any] = []

    def emit(self, record: logging.LogRecord) -> None:
        if ready := re.match(r"ready: .*(http://\S+)", record.getMessage()):
            threading.Thread(target=self._query, args=(ready[1],), daemon=True).start()

    def _query(self, address: str) -> None:
        headers = {"authorization": f"Bearer {os.environ['LORA_HF_TOKEN']}"}
        with httpx.Client(base_url=address, headers=headers, timeout=LIMIT, trust_env=False) as client:
            another = {"authorization": "Bearer another"}
            self.answers.append(client.get("/v1/adapters", headers=another).status_code)
            self.answers.append(client.post("/v1/classify", json={"adapter": "a", "inputs": ["a film"]}).json())
        os.kill(os.getpid(), signal.SIGTERM)


def write_rows(folder: Path) -> None:
    """A small SST-2 as parquet files."""
    for split, count in (("train", 32), ("validation", 12)):
        rows = {
            "sentence": [f"a {'good' if number % 2 else 'bad'} film, number {number}" for number in range(count)],
            "label": [number % 2 for number in range(count)],
        }
        (folder / "glue" / "sst2").mkdir(parents=True, exist_ok=True)
        parquet.write_table(pyarrow.table(rows), folder / "glue" / "sst2" / f"{split}.parquet")


def verbs(folder: Path) -> dict[str, list[str]]:
    """The arguments of each verb, in the order of their dependencies."""
    data, run, writer = folder / "data", folder / "runs" / "run", folder / "writer"
    adapter = run / "adapter"
    train = [f"model.name={folder / 'base'}", f"task.data_dir={data}", "train.max_steps=2", "model.precision=fp32"]
    train += [
        f"output.dir={run.parent}",
        "output.plots=false",
        "output.name=run",
        "task.max_length=32",
        "train.batch_size=8",
    ]
    texts = ["--predictions", str(folder / "texts.txt"), "--references", str(folder / "references.txt")]
    return {
        "train": ["--config", "glue_sst2.yaml", *train],
        "eval": ["--adapter", str(adapter), "--data-dir", str(data)],
        "predict": ["--adapter", str(adapter), "--text", "a good film"],
        "generate": ["--adapter", str(writer), "--prompt", INPUT, "--max-new-tokens", "4"],
        "score": ["--task", "e2e_nlg", *texts],
        "merge": ["--adapter", str(adapter), "--output", str(folder / "merged")],
        "export": ["--adapter", str(writer), "--to", "ollama", "--output", str(folder / "exported")],
        "combine": ["--adapter", f"{adapter}=0.5", "--adapter", f"{adapter}=0.5", "--output", str(folder / "one")],
        "compare": [str(run.parent), "--output", str(folder / "report"), "--data-dir", str(data)],
        "push --dry-run": ["--adapter", str(adapter), "--repo-id", "someone/a-lora", "--dry-run"],
        "serve": ["--adapter", f"a={adapter}", "--precision", "fp32", "--port", "0"],
        "push": ["--adapter", str(adapter), "--repo-id", "someone/a-lora"],
    }


def run_all(folder: Path) -> dict[str, Any]:
    """For each verb its exit code, the hosts it contacted and the addresses it listened on."""
    from tests.support.random_adapters import save_random

    shutil.copytree(BASE, folder / "base")
    write_rows(folder / "data")
    save_random(folder / "writer", "rule-restaurants")
    (folder / "texts.txt").write_text("The Mill is a pub.\n", encoding="utf-8")
    (folder / "references.txt").write_text("The Mill is a pub.\n", encoding="utf-8")
    audit, queries, results = NetworkAudit(), QueryAndStop(), {}
    logging.getLogger("lora_hf").addHandler(queries)
    for name, words in verbs(folder).items():
        code = main([name.split()[0], *words])
        results[name] = {"code": code, "answers": queries.answers if name == "serve" else [], **audit.take()}
    hub_is_reachable.cache_clear()
    hub_is_reachable()
    results["hub"] = audit.take()
    return results


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    (folder / "audit.json").write_text(json.dumps(run_all(folder), indent=1), encoding="utf-8")
