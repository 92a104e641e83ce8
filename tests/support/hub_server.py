"""A small stand-in of the hub on loopback: repositories, large files, commits, downloads with ETag and Range.

It answers as https://huggingface.co does where `huggingface_hub` looks, and breaks connections where a test says so.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

REPO = Path(__file__).parents[2]
TOKEN, USER = "hf_aTokenThatMayWrite", "someone"
WEIGHTS = "adapter_model.safetensors"


@dataclass
class Repository:
    """`commits` are (sha, files by path), the last is `main`; the hub makes the first."""

    private: bool = False
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.commits.append((etag(b"the first"), {".gitattributes": b"*.safetensors filter=lfs"}))

    @property
    def files(self) -> dict[str, bytes]:
        """What people put into `main`."""
        return {path: content for path, content in self.commits[-1][1].items() if path != ".gitattributes"}

    def commit(self, changes: dict[str, bytes | None]) -> str:
        files = {**self.commits[-1][1], **changes}
        files = {path: content for path, content in files.items() if content is not None}
        sha = etag(f"{len(self.commits)}{sorted(files.items())}".encode())
        self.commits.append((sha, files))
        return sha


class Hub:
    """The server; `breaks` says for a request how many bytes of its answer are sent before the connection is cut."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.breaks: Callable[[str], int | None] = lambda request: None
        handler = type("BoundHandler", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home: Path, token: str | None = TOKEN) -> dict[str, str]:
        """Of a process that takes this for the hub, with its own cache in `home`."""
        kept = {name: value for name, value in os.environ.items() if not name.endswith("_OFFLINE")}
        kept |= {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        return kept | ({"HF_TOKEN": token} if token else {})

    def ask(
        self, home: Path, *words: str | Path, code: int = 0, token: str | None = TOKEN, offline: bool = False
    ) -> subprocess.CompletedProcess[str]:
        """Runs a script, such as `push --adapter ...`, or with `-c` Python, against this hub."""
        start = "-c" if words[0] == "-c" else str(REPO / "scripts" / f"{words[0]}.py")
        environment = self.environment(home, token) | ({"HF_HUB_OFFLINE": "1"} if offline else {})
        done = subprocess.run(
            [sys.executable, start, *map(str, words[1:])],
            capture_output=True, text=True, timeout=120, env=environment, cwd=REPO,
        )  # fmt: skip
        assert done.returncode == code, done.stderr
        if code == 2:
            assert done.stderr.count("error:") == 1
            assert "Traceback" not in done.stderr
        assert TOKEN not in done.stdout + done.stderr
        return done


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None: ...

    def do_GET(self) -> None:
        body = self._body()
        path = urlsplit(self.path).path
        request = f"{self.command} {path}"
        self.hub.requests.append(request)
        status, headers, content = self._route(request, body)
        headers = {"Content-Length": str(len(content)), **headers}
        cut = self.hub.breaks(request)
        if cut != 0:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[:cut] if cut is not None else content)
        if cut is not None:
            self.wfile.flush()
            self.close_connection = True

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815 - what http.server calls them

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _route(self, request: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        sent = self.headers.get("Authorization")
        known = sent == f"Bearer {TOKEN}"
        if sent and not known and not request.startswith("PUT"):
            return refused(401, message="Invalid credentials in Authorization header")
        if request == "HEAD /":
            return plain({})
        if request == "GET /api/whoami-v2":
            return plain({"type": "user", "name": USER})
        if request == "POST /api/repos/create":
            return self._create(json.loads(body), known)
        if request == "POST /api/validate-yaml":
            return self._validate(json.loads(body)["content"])
        if found := re.fullmatch(r"PUT /large/(\w+)", request):
            assert hashlib.sha256(body).hexdigest() == found[1]
            self.hub.large[found[1]] = body
            return plain({})
        found = re.fullmatch(
            r"(\w+) (?:/api/models)?/([^/]+/[^/]+?)(?:\.git)?(?:/(info|preupload|commit|revision|tree|resolve)/(.*))?",
            request,
        )
        repository = self.hub.repositories.get(found[2]) if found else None
        if found is None or repository is None or (repository.private and not known):
            return refused(404, "RepoNotFound", "Repository not found")
        method, name, verb, rest = found.groups()
        if method in ("POST", "PUT") and not (known and name.startswith(f"{USER}/")):
            return refused(403, message="Forbidden: you must have write access")
        if verb == "preupload":
            files = [
                {
                    "path": file["path"],
                    "shouldIgnore": False,
                    "uploadMode": "lfs" if file["path"] == WEIGHTS else "regular",
                }
                for file in json.loads(body)["files"]
            ]
            return plain({"files": files})
        if verb == "info":
            objects = [
                {**entry, "actions": {"upload": {"href": f"{self.hub.endpoint}/large/{entry['oid']}"}}}
                for entry in json.loads(body)["objects"]
            ]
            return plain({"objects": objects, "transfer": "basic"})
        if verb == "commit":
            return self._commit(name, repository, body)
        return self._read(name, repository, verb or "revision", rest or "main")

    def _create(self, asked: dict[str, Any], known: bool) -> tuple[int, dict[str, str], bytes]:
        if not known:
            return refused(401, message="Invalid username or password.")
        if asked["organization"] != USER:
            return refused(403, message=f"You don't have the rights to create a model under {asked['organization']}")
        name = f"{USER}/{asked['name']}"
        if name in self.hub.repositories:
            return (
                409,
                {},
                json.dumps({"error": "You already created it", "url": f"{self.hub.endpoint}/{name}"}).encode(),
            )
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.hub.repositories[name] = Repository(private)
        return plain({"url": f"{self.hub.endpoint}/{name}"})

    def _validate(self, card: str) -> tuple[int, dict[str, str], bytes]:
        data = yaml.safe_load(card.split("---\n")[1])
        errors = [] if isinstance(data, dict) and "library_name" in data else [{"message": "no metadata"}]
        bases = data.get("base_model")
        if bases is not None and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", bases):
            errors.append({"message": '"base_model" with value that is not a valid id'})
        status, headers, _ = plain({})
        return (400 if errors else status), headers, json.dumps({"errors": errors, "warnings": []}).encode()

    def _commit(self, name: str, repository: Repository, body: bytes) -> tuple[int, dict[str, str], bytes]:
        if self.hub.breaks(f"{self.command} {self.path}") is not None:
            return plain({})  # cut off before it is done
        changes: dict[str, bytes | None] = {}
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                changes[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                changes[value["path"]] = self.hub.large[value["oid"]]
            elif line["key"] == "deletedFile":
                changes[value["path"]] = None
        sha = repository.commit(changes)
        return plain({"commitUrl": f"{self.hub.endpoint}/{name}/commit/{sha}", "commitOid": sha})

    def _read(self, name: str, repository: Repository, verb: str, rest: str) -> tuple[int, dict[str, str], bytes]:
        revision, _, file = rest.partition("/")
        commits = dict(repository.commits)
        sha = repository.commits[-1][0] if revision == "main" else revision
        if sha not in commits:
            return refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = commits[sha]
        if verb == "revision":
            siblings = [{"rfilename": path} for path in files]
            return plain({"id": name, "modelId": name, "sha": sha, "private": repository.private, "siblings": siblings})
        if verb == "tree":
            entries = [
                {"type": "file", "path": path, "size": len(content), "oid": etag(content)}
                for path, content in files.items()
            ]
            return plain(entries)
        if file not in files:
            return refused(404, "EntryNotFound", "Entry not found")
        content = files[file]
        headers = {"ETag": f'"{etag(content)}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if wanted is None:
            return 200, headers, content
        start = int(wanted[1])
        headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        return 206, headers, content[start:]


def etag(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:40]


def plain(value: Any) -> tuple[int, dict[str, str], bytes]:
    return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()


def refused(status: int, code: str = "", message: str = "") -> tuple[int, dict[str, str], bytes]:
    headers = {"Content-Type": "application/json", "X-Error-Message": message}
    return status, headers | ({"X-Error-Code": code} if code else {}), json.dumps({"error": message}).encode()
