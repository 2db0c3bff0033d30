"""Imitates the Hugging Face hub with two local servers: the hub, and the storage to which large files are sent.

It answers the requests that huggingface_hub sends to create a repository and to commit files. Every request is
recorded, and faults can be set for the requests of a path.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml

USER = "someone"
LARGE = (".safetensors", ".mp4", ".png")  # by LFS
REPO = r"/api/models/([^/]+/[^/]+)"


def in_hub_cache(cache: Path, name: str, folder: Path) -> None:
    """Stores a model in a folder for --cache_dir as the hub's client stores the model me/NAME."""
    stored, commit = cache / f"models--me--{name}", "0" * 40
    shutil.copytree(folder, stored / "snapshots" / commit)
    (stored / "refs").mkdir()
    (stored / "refs" / "main").write_text(commit)


@dataclass(frozen=True)
class Request:
    """One recorded request."""

    server: str  # hub or storage
    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Fault:
    """The answer to requests whose "METHOD path" matches: a status, or a function to call before the usual answer."""

    pattern: str
    answer: int | Callable[[], None]
    times: int


Answer = tuple[int, dict[str, Any]]


@dataclass
class StandIn:
    """Holds the state of both servers. ``token`` may read everything, and may write where ``writable`` says so."""

    token: str
    writable: Callable[[str], bool] = lambda repository: True
    requests: list[Request] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    commits: list[set[str]] = field(default_factory=list)  # the paths in each commit
    blobs: dict[str, bytes] = field(default_factory=dict)
    servers: dict[str, ThreadingHTTPServer] = field(default_factory=dict)

    def url(self, server: str = "hub") -> str:
        """Returns the address of one of the two servers."""
        host = {"hub": "127.0.0.1", "storage": "localhost"}[server]
        return f"http://{host}:{self.servers[server].server_address[1]}"

    def fail(self, pattern: str, answer: int | Callable[[], None], times: int = 1) -> None:
        """Makes the next requests fail that match the pattern."""
        self.faults.append(Fault(pattern, answer, times))

    def asked(self, pattern: str) -> int:
        """Returns how many requests matched."""
        return len([r for r in self.requests if re.search(pattern, f"{r.method} {r.path}")])

    def close(self, server: str) -> None:
        """Stops a server, which then refuses connections."""
        self.servers[server].shutdown()
        self.servers[server].server_close()

    def answer(self, request: Request) -> Answer:
        """Records a request and answers it."""
        self.requests.append(request)
        for fault in self.faults:
            if fault.times and re.search(fault.pattern, f"{request.method} {request.path}"):
                fault.times -= 1
                if isinstance(fault.answer, int):
                    return fault.answer, {"error": f"fault {fault.answer}; you sent {request.headers}"}
                fault.answer()
        return self._store(request) if request.server == "storage" else self._hub(request)

    def _store(self, request: Request) -> Answer:
        oid = request.path.rpartition("/")[2]
        if hashlib.sha256(request.body).hexdigest() != oid:
            return 400, {"error": "the content is not what its name says"}
        self.blobs[oid] = request.body
        return 200, {}

    def _hub(self, request: Request) -> Answer:
        if request.headers.get("authorization") != f"Bearer {self.token}":
            return 401, {"error": "Invalid credentials in Authorization header"}
        for pattern, method in ROUTES.items():
            match = re.fullmatch(pattern, f"{request.method} {request.path}")
            if match:
                return method(self, request.body, *match.groups())
        return 404, {"error": f"no such address: {request.method} {request.path}"}

    def _create(self, body: bytes) -> Answer:
        wanted = json.loads(body)
        repository = f"{wanted['organization'] or USER}/{wanted['name']}"
        if not self.writable(repository):
            return 403, {"error": f"You don't have the rights to create a model under the namespace of {repository}"}
        there = repository in self.repositories
        self.repositories.setdefault(repository, {})
        if wanted.get("visibility") == "private" and not there:
            self.private.add(repository)
        return 409 if there else 200, {"url": f"{self.url()}/{repository}"}

    def _info(self, _: bytes, repository: str) -> Answer:
        if repository not in self.repositories:
            return 404, {"error": "Repository not found"}
        files = [{"rfilename": path} for path in (".gitattributes", *self.repositories[repository])]
        return 200, {"id": repository, "sha": "0" * 40, "siblings": files}

    def _recipe(self, _: bytes, repository: str) -> Answer:
        return 200, json.loads(self.repositories[repository]["recipe.json"])

    def _check(self, _: bytes, repository: str) -> Answer:
        return (200, {}) if self.writable(repository) else (403, {"error": f"{repository}: you may not write"})

    def _validate(self, body: bytes) -> Answer:
        """Checks the front matter as the hub does: it must be YAML, and a model in it must have a valid name."""
        content = json.loads(body)["content"]
        data = yaml.safe_load(content.removeprefix("---\n").partition("\n---\n")[0])
        base = data.get("base_model", "some/model")
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", base):
            return 400, {"warnings": [], "errors": [{"message": f'"base_model" with value "{base}" is not valid.'}]}
        return 200, {"warnings": [], "errors": []}

    def _preupload(self, body: bytes, repository: str) -> Answer:
        paths = [file["path"] for file in json.loads(body)["files"]]
        there = self.repositories[repository]
        known = {path: oid_of(path, there[path]) if path in there else None for path in paths}
        modes = {path: "lfs" if path.endswith(LARGE) else "regular" for path in paths}
        files = [{"path": p, "uploadMode": modes[p], "shouldIgnore": False, "oid": known[p]} for p in paths]
        return 200, {"files": files}

    def _batch(self, body: bytes, _repository: str) -> Answer:
        def actions(oid: str) -> dict[str, Any]:
            return {} if oid in self.blobs else {"actions": {"upload": {"href": f"{self.url('storage')}/{oid}"}}}

        objects = [{"oid": o["oid"], "size": o["size"], **actions(o["oid"])} for o in json.loads(body)["objects"]]
        return 200, {"transfer": "basic", "objects": objects}

    def _commit(self, body: bytes, repository: str) -> Answer:
        files = {}
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.blobs[value["oid"]]
        self.repositories[repository] |= files
        self.commits.append(set(files))
        return 200, {"commitUrl": f"{self.url()}/{repository}/commit/{'0' * 40}", "commitOid": "0" * 40}


ROUTES: dict[str, Callable[..., Answer]] = {
    "POST /api/repos/create": StandIn._create,
    f"GET {REPO}(?:/revision/main)?": StandIn._info,
    f"GET {REPO}/auth-check/write": StandIn._check,
    r"GET /([^/]+/[^/]+)/resolve/main/recipe\.json": StandIn._recipe,
    "POST /api/validate-yaml": StandIn._validate,
    f"POST {REPO}/preupload/main": StandIn._preupload,
    r"POST /([^/]+/[^/]+)\.git/info/lfs/objects/batch": StandIn._batch,
    f"POST {REPO}/commit/main": StandIn._commit,
}


def oid_of(path: str, content: bytes) -> str:
    """Returns the id of a file on the hub: git's hash of the file, or of its LFS pointer."""
    if path.endswith(LARGE):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


def handler_of(state: StandIn, server: str) -> type[BaseHTTPRequestHandler]:
    """Returns the class of handlers that pass the requests of one server to the stand-in."""

    class Handler(BaseHTTPRequestHandler):
        def handle_any(self) -> None:
            headers = {name.lower(): value for name, value in self.headers.items()}
            request = Request(server, self.command, self.path, headers, self._body(headers))
            status, content = state.answer(request)
            answer = json.dumps(content).encode()
            with suppress(ConnectionError):  # the client may have been killed
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

        def _body(self, headers: dict[str, str]) -> bytes:
            if headers.get("transfer-encoding") != "chunked":
                return self.rfile.read(int(headers.get("content-length", 0)))
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body

        do_GET = do_POST = do_PUT = do_HEAD = handle_any

        def log_message(self, *_: Any) -> None:
            """Prints nothing."""

    return Handler


@contextmanager
def stand_in(token: str) -> Iterator[StandIn]:
    """Runs both servers within the context."""
    state = StandIn(token)
    for name in ("hub", "storage"):
        state.servers[name] = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(state, name))
        threading.Thread(target=state.servers[name].serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield state
    finally:
        for name in state.servers:
            state.close(name)
