"""A Hugging Face hub on this machine: the endpoints that huggingface_hub uses to read, make and fill repositories of models."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

READER, WRITER = "hf_reader", "hf_writer"
_LARGE = (".onnx", ".data", ".bin")
_REPOSITORY = r"(?P<name>[\w.-]+/[\w.-]+?)"


@dataclass
class Repository:
    """`commits`: files by path, by commit, the newest last. `gated`: files are only for WRITER."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    @property
    def head(self) -> str:
        return list(self.commits)[-1]

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[self.head]

    def commit(self, files: dict[str, bytes | None]) -> str:
        """Add a commit with these changes; None removes a file."""
        new = {**(self.files if self.commits else {}), **files}
        oid = hashlib.sha1(repr((len(self.commits), sorted(files))).encode()).hexdigest()
        self.commits[oid] = {path: content for path, content in new.items() if content is not None}
        return oid

    def find(self, revision: str) -> str | None:
        named = {"main": self.head, **self.tags, **{oid: oid for oid in self.commits}}
        return named.get(revision)


@dataclass
class FakeHub:
    """`url` is for HF_ENDPOINT. `requests`: "METHOD /path", in order. `broken`: an answer's status by a part of its path; `cut`: files of
    which half is sent; `claimed`: by path, a content that the hub says a file has."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    broken: dict[str, int] = field(default_factory=dict)
    cut: set[str] = field(default_factory=set)
    claimed: dict[str, bytes] = field(default_factory=dict)

    def downloads(self) -> list[str]:
        """Names of the files whose content was asked for since the last call; the log is emptied."""
        found = sorted({request.rsplit("/", 1)[1] for request in self.requests if request.startswith("GET") and "/resolve/" in request})
        self.requests.clear()
        return found


@contextmanager
def running_hub() -> Iterator[FakeHub]:
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def use_hub(monkeypatch: pytest.MonkeyPatch, hub: FakeHub, cache: Any, token: str | None = None) -> None:
    """Point the client in this process, which has read its settings at import, to `hub`, with an empty cache and without Xet."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)


def settings_of(hub: FakeHub, cache: Any, token: str | None = None) -> dict[str, str]:
    """The same for a process that is about to start, as variables of its environment."""
    found = {"HF_ENDPOINT": hub.url, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return found | ({"HF_TOKEN": token} if token else {})


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on stderr."""

    def do_GET(self) -> None:
        self._serve()

    def do_HEAD(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def do_PUT(self) -> None:
        self._serve()

    def _serve(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        for part, status in self.hub.broken.items():
            if part in path:
                return self._answer(status, {"error": "out of order"})
        for pattern, handle in _ROUTES:
            if found := re.fullmatch(pattern, path):
                return handle(self, body, **found.groupdict())
        return self._answer(404, {"error": f"no such endpoint: {path}"})

    def _answer(self, status: int, content: Any = None, headers: dict[str, str] | None = None, *, size: int | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data) if size is None else size), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _refuse(self, status: int, code: str, message: str) -> None:
        self._answer(status, {"error": message}, {"X-Error-Code": code, "X-Error-Message": message})

    @property
    def _token(self) -> str | None:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    def _found(self, name: str, revision: str = "main", *, content: bool = False) -> tuple[Repository, str] | None:
        """The repository and the commit, else None after an answer that says why not."""
        repository = self.hub.repositories.get(name)
        if self._token not in (None, READER, WRITER):
            return self._refuse(401, "", "Invalid credentials in Authorization header")
        if repository is None or (repository.private and self._token != WRITER):
            return self._refuse(404 if self._token else 401, "RepoNotFound", "Repository not found")
        if content and repository.gated and self._token != WRITER:
            return self._refuse(403 if self._token else 401, "GatedRepo", "Access to this model is restricted")
        commit = repository.find(revision)
        if commit is None:
            return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repository, commit

    def _writable(self) -> bool:
        if self._token != WRITER:
            self._refuse(401 if self._token is None else 403, "", "You don't have the rights to write")
        return self._token == WRITER

    def info(self, body: bytes, name: str, revision: str = "main") -> None:
        if found := self._found(name, revision):
            repository, commit = found
            files = [{"rfilename": path} for path in repository.commits[commit]]
            self._answer(200, {"id": name, "modelId": name, "sha": commit, "private": repository.private, "siblings": files, "tags": []})

    def _described(self, path: str, data: bytes) -> dict[str, Any]:
        data = self.hub.claimed.get(path, data)
        entry = {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()}
        if path.endswith(_LARGE):
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        return entry

    def paths_info(self, body: bytes, name: str, revision: str) -> None:
        if found := self._found(name, revision):
            files = found[0].commits[found[1]]
            wanted = parse_qs(body.decode())["paths"]
            self._answer(200, [self._described(path, files[path]) for path in wanted if path in files])

    def tree(self, body: bytes, name: str, revision: str) -> None:
        if found := self._found(name, revision):
            self._answer(200, [self._described(path, data) for path, data in found[0].commits[found[1]].items()])

    def resolve(self, body: bytes, name: str, revision: str, path: str) -> None:
        if not (found := self._found(name, revision, content=True)):
            return None
        repository, commit = found
        data = repository.commits[commit].get(path)
        if data is None:
            return self._refuse(404, "EntryNotFound", "Entry not found")
        known = self._described(path, data)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{known["oid"]}"', "Accept-Ranges": "bytes"}
        if path.endswith(_LARGE):
            headers |= {"X-Linked-Size": str(len(data)), "X-Linked-Etag": f'"{hashlib.sha256(data).hexdigest()}"'}
        if self.command == "GET" and path in self.hub.cut:
            self.close_connection = True
            return self._answer(200, data[: len(data) // 2], headers, size=len(data))
        return self._answer(200, data, headers)

    def create(self, body: bytes) -> None:
        wanted = json.loads(body)
        name = f"{wanted['organization']}/{wanted['name']}"
        if not self._writable():
            return None
        if name in self.hub.repositories:
            return self._answer(409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"})
        repository = self.hub.repositories[name] = Repository(private=wanted.get("visibility") == "private" or bool(wanted.get("private")))
        repository.commit({".gitattributes": b"*.onnx filter=lfs\n"})
        return self._answer(200, {"url": f"{self.hub.url}/{name}", "name": name})

    def validate(self, body: bytes) -> None:
        content = json.loads(body)["content"]
        good = re.match(r"---\n(?:[a-z_]+:.*\n|- .*\n)+---\n", content)
        self._answer(200 if good else 400, {"errors": [] if good else [{"message": "no metadata"}], "warnings": []})

    def preupload(self, body: bytes, name: str, revision: str) -> None:
        if self._writable() and (found := self._found(name, revision)):
            there = found[0].files
            answers = []
            for wanted in json.loads(body)["files"]:
                path = wanted["path"]
                known = self._described(path, there[path]) if path in there else {}
                oid = known.get("lfs", {}).get("oid") or known.get("oid")
                answers.append(
                    {"path": path, "uploadMode": "lfs" if path.endswith(_LARGE) else "regular", "shouldIgnore": False, "oid": oid}
                )
            self._answer(200, {"files": answers})

    def batch(self, body: bytes, name: str) -> None:
        if self._writable():
            objects = [
                wanted if wanted["oid"] in self.hub.large
                else wanted | {"actions": {"upload": {"href": f"{self.hub.url}/large/{wanted['oid']}"}}}
                for wanted in json.loads(body)["objects"]
            ]  # fmt: skip
            self._answer(200, {"transfer": "basic", "objects": objects})

    def upload(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.large[oid] = body
        self._answer(200, {})

    def commit(self, body: bytes, name: str, revision: str) -> None:
        if not self._writable() or not (found := self._found(name, revision)):
            return None
        repository, head = found
        changes: dict[str, bytes | None] = {}
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header" and value.get("parentCommit") not in (None, head):
                return self._answer(412, {"error": "the branch has moved"})
            if item["key"] == "file":
                changes[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                changes[value["path"]] = self.hub.large[value["oid"]]
            elif item["key"] == "deletedFile":
                changes[value["path"]] = None
        commit = repository.commit(changes)
        return self._answer(200, {"commitUrl": f"{self.hub.url}/{name}/commit/{commit}", "commitOid": commit, "hookOutput": ""})


_ROUTES = (
    (r"/api/repos/create", _Handler.create),
    (r"/api/validate-yaml", _Handler.validate),
    (rf"/api/models/{_REPOSITORY}", _Handler.info),
    (rf"/api/models/{_REPOSITORY}/revision/(?P<revision>.+)", _Handler.info),
    (rf"/api/models/{_REPOSITORY}/paths-info/(?P<revision>.+)", _Handler.paths_info),
    (rf"/api/models/{_REPOSITORY}/tree/(?P<revision>[^?]+)", _Handler.tree),
    (rf"/api/models/{_REPOSITORY}/preupload/(?P<revision>.+)", _Handler.preupload),
    (rf"/api/models/{_REPOSITORY}/commit/(?P<revision>.+)", _Handler.commit),
    (rf"/{_REPOSITORY}\.git/info/lfs/objects/batch", _Handler.batch),
    (r"/large/(?P<oid>[0-9a-f]{64})", _Handler.upload),
    (rf"/{_REPOSITORY}/resolve/(?P<revision>.+?)/(?P<path>[^/]+(?:/[^/]+)*)", _Handler.resolve),
)
