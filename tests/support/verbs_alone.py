"""Every verb in one process that notes whom it would reach: `python -m tests.support.verbs_alone FOLDER`.

Nothing tells the Hugging Face libraries to stay offline, and the data and the base are local. A connection or a look-up
of a name beyond this machine is refused and written to `FOLDER/noted.json`, with the addresses that were listened on.
"""

from __future__ import annotations

import ipaddress
import json
import os
import shutil
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pyarrow
from pyarrow import parquet

from lora_hf.cli.main import main
from lora_hf.core.hub_access import hub_is_reachable

BASE = Path(__file__).parents[2] / "lora_hf" / "models" / "bases" / "tiny-roberta"
INPUT = "name[The Mill], eatType[pub]"
ASKED_BY_PURPOSE = ("push", "hub")  # what is to reach out: they show that the notes are taken


class Notes:
    """Whom this process asks for, and where it listens."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.listened: list[str] = []
        sys.addaudithook(self._note)

    def _note(self, event: str, arguments: tuple[Any, ...]) -> None:
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
        self.asked.append(name)
        raise OSError(f"{name} is beyond this machine")

    def take(self) -> dict[str, list[str]]:
        """What came since the last time."""
        taken = {"asked": self.asked, "listened": self.listened}
        self.asked, self.listened = [], []
        return taken


def _is_loopback(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def ask_and_end(address: str, answers: list[Any]) -> None:
    """Asks the server of this process once it is ready, and ends it by SIGTERM."""
    with httpx.Client(
        base_url=address, headers={"authorization": f"Bearer {os.environ['LORA_HF_TOKEN']}"}, trust_env=False
    ) as client:
        until = time.monotonic() + 60
        while time.monotonic() < until:
            try:
                if client.get("/readyz").status_code == 200:
                    answers.append(client.get("/v1/adapters", headers={"authorization": "Bearer another"}).status_code)
                    answers.append(client.post("/v1/classify", json={"adapter": "a", "inputs": ["a film"]}).json())
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.05)
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
    """The words of each verb, in the order in which they need each other."""
    data, run, writer = folder / "data", folder / "runs" / "run", folder / "writer"
    adapter = run / "adapter"
    train = [f"model.name={folder / 'base'}", f"task.data_dir={data}", "train.max_steps=2", "model.precision=fp32"]
    train += [f"output.dir={run.parent}", "output.name=run", "task.max_length=32", "train.batch_size=8"]
    texts = ["--predictions", str(folder / "texts.txt"), "--references", str(folder / "references.txt")]
    return {
        "train": ["--config", "glue_sst2.yaml", *train],
        "eval": ["--adapter", str(adapter), "--data-dir", str(data)],
        "predict": ["--adapter", str(adapter), "--text", "a good film"],
        "generate": ["--adapter", str(writer), "--prompt", INPUT, "--max-new-tokens", "4"],
        "score": ["--task", "e2e_nlg", *texts],
        "merge": ["--adapter", str(adapter), "--output", str(folder / "merged")],
        "combine": ["--adapter", f"{adapter}=0.5", "--adapter", f"{adapter}=0.5", "--output", str(folder / "one")],
        "compare": [str(run.parent), "--output", str(folder / "report"), "--data-dir", str(data)],
        "push --dry-run": ["--adapter", str(adapter), "--repo-id", "someone/a-lora", "--dry-run"],
        "serve": ["--adapter", f"a={adapter}", "--precision", "fp32"],
        "push": ["--adapter", str(adapter), "--repo-id", "someone/a-lora"],
    }


def run_all(folder: Path) -> dict[str, Any]:
    """Of each verb its exit code, what it asked for, and where it listened."""
    from tests.support.served_adapters import save_random

    shutil.copytree(BASE, folder / "base")
    write_rows(folder / "data")
    save_random(folder / "writer", "rule-restaurants")
    (folder / "texts.txt").write_text("The Mill is a pub.\n", encoding="utf-8")
    (folder / "references.txt").write_text("The Mill is a pub.\n", encoding="utf-8")
    notes, found = Notes(), {}
    for name, words in verbs(folder).items():
        answers: list[Any] = []
        if name == "serve":
            port = free_port()
            words = [*words, "--port", str(port)]
            notes.take()
            threading.Thread(target=ask_and_end, args=(f"http://127.0.0.1:{port}", answers), daemon=True).start()
        code = main([name.split()[0], *words])
        found[name] = {"code": code, "answers": answers, **notes.take()}
    hub_is_reachable.cache_clear()
    hub_is_reachable()
    found["hub"] = notes.take()
    return found


if __name__ == "__main__":
    place = Path(sys.argv[1])
    (place / "noted.json").write_text(json.dumps(run_all(place), indent=1), encoding="utf-8")
