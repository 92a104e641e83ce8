"""A small fake of the Hugging Face hub on loopback: repositories, large files, commits, downloads with ETag and Range.

For the requests of `huggingface_hub` it answers like https://huggingface.co. Tests can make it break connections.
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

from tests.support.waiting import LIMIT

REPO = Path(__file__).parents[2]
TOKEN, USER = "hf_aTokenThatMayWrite", "someone"
WEIGHTS = "adapter_model.safetensors"
Response = tuple[int, dict[str, str], bytes]  # status, headers, content


@dataclass
class Repository:
    """`commits` are pairs of sha and files by path. The hub makes the first, and the last is `main`."""

    private: bool = False
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.commits.append((etag(b"the first"), {".gitattributes": b"*.safetensors filter=lfs"}))

    @property
    def files(self) -> dict[str, bytes]:
        """The files that users have committed to `main`."""
        return {path: content for path, content in self.commits[-1][1].items() if path != ".gitattributes"}

    def commit(self, changes: dict[str, bytes | None]) -> str:
        files = {**self.commits[-1][1], **changes}
        files = {path: content for path, content in files.items() if content is not None}
        sha = etag(f"{len(self.commits)}{sorted(files.items())}".encode())
        self.commits.append((sha, files))
        return sha


class Hub:
    """The server. For a request, `breaks` gives the number of bytes to send before cutting the connection, or None."""

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
        """The environment of a process that uses this hub, with its cache in `home`."""
        values = {name: value for name, value in os.environ.items() if not name.endswith("_OFFLINE")}
        values |= {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        return values | ({"HF_TOKEN": token} if token else {})

    def ask(
        self, home: Path, *words: str | Path, code: int = 0, token: str | None = TOKEN, offline: bool = False
    ) -> subprocess.CompletedProcess[str]:
        """Runs a script such as `push --adapter ...`, or Python code with `-c`, against this hub."""
        start = "-c" if words[0] == "-c" else str(REPO / "scripts" / f"{words[0]}.py")
        environment = self.environment(home, token) | ({"HF_HUB_OFFLINE": "1"} if offline else {})
        done = subprocess.run(
            [sys.executable, start, *map(str, words[1:])],
            capture_output=True, text=True, timeout=LIMIT, env=environment, cwd=REPO,
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

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815 - the names of http.server

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _route(self, request: str, body: bytes) -> Response:
        sent = self.headers.get("Authorization")
        authorized = sent == f"Bearer {TOKEN}"
        if sent and not authorized and not request.startswith("PUT"):
            return error(401, message="Invalid credentials in Authorization header")
        if request == "HEAD /":
            return ok({})
        if request == "GET /api/whoami-v2":
            return ok({"type": "user", "name": USER})
        if request == "POST /api/repos/create":
            return self._create(json.loads(body), authorized)
        if request == "POST /api/validate-yaml":
            return self._validate(json.loads(body)["content"])
        if found := re.fullmatch(r"PUT /large/(\w+)", request):
            assert hashlib.sha256(body).hexdigest() == found[1]
            self.hub.large[found[1]] = body
            return ok({})
        found = re.fullmatch(
            r"(\w+) (?:/api/models)?/([^/]+/[^/]+?)(?:\.git)?(?:/(info|preupload|commit|revision|tree|resolve)/(.*))?",
            request,
        )
        repository = self.hub.repositories.get(found[2]) if found else None
        if found is None or repository is None or (repository.private and not authorized):
            return error(404, "RepoNotFound", "Repository not found")
        method, name, verb, rest = found.groups()
        if method in ("POST", "PUT") and not (authorized and name.startswith(f"{USER}/")):
            return error(403, message="Forbidden: you must have write access")
        if verb == "preupload":
            files = [
                {
                    "path": file["path"],
                    "shouldIgnore": False,
                    "uploadMode": "lfs" if file["path"] == WEIGHTS else "regular",
                }
                for file in json.loads(body)["files"]
            ]
            return ok({"files": files})
        if verb == "info":
            objects = [
                {**entry, "actions": {"upload": {"href": f"{self.hub.endpoint}/large/{entry['oid']}"}}}
                for entry in json.loads(body)["objects"]
            ]
            return ok({"objects": objects, "transfer": "basic"})
        if verb == "commit":
            return self._commit(name, repository, body)
        return self._read(name, repository, verb or "revision", rest or "main")

    def _create(self, options: dict[str, Any], authorized: bool) -> Response:
        if not authorized:
            return error(401, message="Invalid username or password.")
        if options["organization"] != USER:
            return error(403, message=f"You don't have the rights to create a model under {options['organization']}")
        name = f"{USER}/{options['name']}"
        if name in self.hub.repositories:
            message = {"error": "You already created it", "url": f"{self.hub.endpoint}/{name}"}
            return 409, {}, json.dumps(message).encode()
        private = options.get("visibility") == "private" or bool(options.get("private"))
        self.hub.repositories[name] = Repository(private)
        return ok({"url": f"{self.hub.endpoint}/{name}"})

    def _validate(self, card: str) -> Response:
        data = yaml.safe_load(card.split("---\n")[1])
        errors = [] if isinstance(data, dict) and "library_name" in data else [{"message": "no metadata"}]
        bases = data.get("base_model")
        if bases is not None and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", bases):
            errors.append({"message": '"base_model" with value that is not a valid id'})
        status, headers, _ = ok({})
        return (400 if errors else status), headers, json.dumps({"errors": errors, "warnings": []}).encode()

    def _commit(self, name: str, repository: Repository, body: bytes) -> Response:
        if self.hub.breaks(f"{self.command} {self.path}") is not None:
            return ok({})  # the connection breaks before the commit
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
        return ok({"commitUrl": f"{self.hub.endpoint}/{name}/commit/{sha}", "commitOid": sha})

    def _read(self, name: str, repository: Repository, verb: str, rest: str) -> Response:
        revision, _, file = rest.partition("/")
        commits = dict(repository.commits)
        sha = repository.commits[-1][0] if revision == "main" else revision
        if sha not in commits:
            return error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = commits[sha]
        if verb == "revision":
            siblings = [{"rfilename": path} for path in files]
            return ok({"id": name, "modelId": name, "sha": sha, "private": repository.private, "siblings": siblings})
        if verb == "tree":
            entries = [
                {"type": "file", "path": path, "size": len(content), "oid": etag(content)}
                for path, content in files.items()
            ]
            return ok(entries)
        if file not in files:
            return error(404, "EntryNotFound", "Entry not found")
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


def ok(value: Any) -> Response:
    return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()


def error(status: int, code: str = "", message: str = "") -> Response:
    headers = {"Content-Type": "application/json", "X-Error-Message": message}
    return status, headers | ({"X-Error-Code": code} if code else {}), json.dumps({"error": message}).encode()
