"""A Hugging Face Hub on 127.0.0.1, as far as the real `huggingface_hub` client needs one. Knows nothing of models.

Serves repositories from memory: whoami, repository creation, LFS and plain uploads, commits, listings, and downloads by
range, with the status codes and headers by which the client tells gated, private and missing repositories apart.
A client reads HF_ENDPOINT when it is imported, and speaks Xet, which this server does not, unless told otherwise; so
run clients in a child process, under `LoopbackHub.environment`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from base64 import b64decode
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

OWNER = "user"
WRITE_TOKEN = "hf_write"
"""Of OWNER; may read and write that namespace."""
READ_TOKEN = "hf_read"
"""Of OWNER; may only read."""
LARGE_FILE_BYTES = 10 << 20


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _is_large(sample: bytes, size: int) -> bool:
    """Whether a file goes through LFS: binary or large ones do."""
    return size > LARGE_FILE_BYTES or b"\0" in sample


@dataclass
class Repository:
    """Files by path, at one commit; `gated` refuses downloads, `private` hides it, to anyone but the owner."""

    files: dict[str, bytes]
    gated: bool = False
    private: bool = False
    commits: int = 1

    @property
    def sha(self) -> str:
        """The commit id: changes with every commit."""
        return hashlib.sha1(b"%d" % self.commits).hexdigest()


@dataclass
class LoopbackHub:
    """The server's state, shared with the test that runs it."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    """By "user/name", or "datasets/user/name"."""
    requests: list[str] = field(default_factory=list)
    """"METHOD /path" of every request, in order."""
    objects: dict[str, bytes] = field(default_factory=dict)
    """LFS objects by SHA-256."""

    def add(self, name: str, content: Path | Mapping[str, bytes], **flags: bool) -> Repository:
        """Put a folder's files, or files by path, into a new repository. flags: gated, private."""
        if isinstance(content, Path):
            content = {str(p.relative_to(content)): p.read_bytes() for p in content.rglob("*") if p.is_file()}
        self.repositories[name] = Repository(dict(content), **flags)
        return self.repositories[name]

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """The environment for a client process: this server, a cache of its own, no proxy and no Xet."""
        kept = {k: v for k, v in os.environ.items() if not re.match(r"(?i)(HF_|HUGGING|.*_proxy$)", k)}
        own = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        return kept | own | ({} if token is None else {"HF_TOKEN": token})


class _Refusal(Exception):
    def __init__(self, status: int, code: str, message: str, **answer: str) -> None:
        super().__init__(message)
        self.status, self.headers = status, {"X-Error-Code": code, "X-Error-Message": message}
        self.answer = {"error": message} | answer


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LoopbackHub

    def _answer(self) -> None:
        self.path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {self.path}")
        body = self._body()
        try:
            for methods, pattern, route in _ROUTES:
                if self.command in methods and (match := re.fullmatch(pattern, self.path)):
                    return route(self, body, **match.groupdict())
            raise _Refusal(404, "", f"no such route: {self.command} {self.path}")
        except _Refusal as refusal:
            self._send(json.dumps(refusal.answer).encode(), refusal.status, refusal.headers)

    do_GET = do_HEAD = do_POST = do_PUT = _answer

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _send(self, content: bytes, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, value: Any) -> None:
        self._send(json.dumps(value).encode(), headers={"Content-Type": "application/json"})

    def _token(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
        if token not in (None, READ_TOKEN, WRITE_TOKEN):
            raise _Refusal(401, "", "Invalid credentials in Authorization header")
        return token

    def _authorise_write(self, namespace: str) -> None:
        token = self._token()
        if token is None:
            raise _Refusal(401, "", "Invalid username or password.")
        if token != WRITE_TOKEN or namespace != OWNER:
            raise _Refusal(403, "", f"You don't have the rights to create a model under the namespace {namespace!r}")

    def _repository(self, kind: str | None, name: str, *, download: bool = False) -> Repository:
        repository = self.hub.repositories.get(f"datasets/{name}" if kind in ("datasets", "datasets/") else name)
        token = self._token()
        is_owner = token is not None and name.startswith(OWNER + "/")
        if repository is None or (repository.private and not is_owner):
            raise _Refusal(401 if token is None else 404, "RepoNotFound", "Repository not found")
        if download and repository.gated and not is_owner:
            raise _Refusal(401 if token is None else 403, "GatedRepo", f"Access to model {name} is restricted.")
        return repository

    @staticmethod
    def _check_revision(repository: Repository, revision: str | None) -> None:
        if revision not in (None, "main", repository.sha):
            raise _Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    def whoami(self, body: bytes) -> None:
        if self._token() is None:
            raise _Refusal(401, "", "Invalid username or password.")
        self._json({"type": "user", "name": OWNER, "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def create(self, body: bytes) -> None:
        request = json.loads(body)
        namespace = request["organization"] or OWNER
        self._authorise_write(namespace)
        name = f"{namespace}/{request['name']}"
        url = f"{self.hub.url}/{name}"
        if name in self.hub.repositories:
            raise _Refusal(409, "", "You already created this model repo", url=url)
        self.hub.add(name, {}, private=request.get("visibility") == "private")
        self._json({"url": url, "name": name})

    def validate_yaml(self, body: bytes) -> None:
        self._json({"errors": [], "warnings": []})

    def info(self, body: bytes, kind: str, name: str, revision: str | None) -> None:
        repository = self._repository(kind, name)
        self._check_revision(repository, revision)
        siblings = [{"rfilename": path} for path in sorted(repository.files)]
        flags = {"private": repository.private, "gated": "manual" if repository.gated else False}
        self._json({"id": name, "sha": repository.sha, "siblings": siblings, "tags": [], "downloads": 0} | flags)

    def tree(self, body: bytes, kind: str, name: str, revision: str) -> None:
        repository = self._repository(kind, name)
        self._check_revision(repository, revision)
        self._json([self._entry(path, content) for path, content in sorted(repository.files.items())])

    @staticmethod
    def _entry(path: str, content: bytes) -> dict[str, Any]:
        entry = {"type": "file", "path": path, "size": len(content), "oid": _git_oid(content)}
        if _is_large(content[:512], len(content)):
            entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
        return entry

    def preupload(self, body: bytes, name: str) -> None:
        repository = self._repository(None, name)
        self._authorise_write(name.split("/")[0])
        files = []
        for file in json.loads(body)["files"]:
            path, present = file["path"], repository.files.get(file["path"])
            large = _is_large(b64decode(file["sample"]), file["size"])
            oid = None
            if present is not None:
                oid = hashlib.sha256(present).hexdigest() if large else _git_oid(present)
            mode = "lfs" if large else "regular"
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._json({"files": files})

    def lfs_batch(self, body: bytes, name: str) -> None:
        self._authorise_write(name.split("/")[0])
        objects = []
        for entry in json.loads(body)["objects"]:
            if entry["oid"] not in self.hub.objects:
                entry["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{entry['oid']}"}}
            objects.append(entry)
        self._json({"transfer": "basic", "objects": objects})

    def lfs_put(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            raise _Refusal(400, "", "the content does not have this SHA-256")
        self.hub.objects[oid] = body
        self._send(b"")

    def commit(self, body: bytes, name: str) -> None:
        repository = self._repository(None, name)
        self._authorise_write(name.split("/")[0])
        for line in body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                repository.files[value["path"]] = b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                repository.files[value["path"]] = self.hub.objects[value["oid"]]
        repository.commits += 1
        commit_url = f"{self.hub.url}/{name}/commit/{repository.sha}"
        self._json({"commitUrl": commit_url, "commitOid": repository.sha, "hookOutput": ""})

    def resolve(self, body: bytes, kind: str | None, name: str, revision: str, path: str) -> None:
        repository = self._repository(kind, name, download=True)
        self._check_revision(repository, revision)
        if (content := repository.files.get(path)) is None:
            raise _Refusal(404, "EntryNotFound", "Entry not found")
        large = _is_large(content[:512], len(content))
        etag = hashlib.sha256(content).hexdigest() if large else _git_oid(content)
        headers = {"X-Repo-Commit": repository.sha, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        first = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if first is None:
            return self._send(content, headers=headers)
        start, end = int(first[1]), int(first[2] or len(content) - 1)
        headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
        self._send(content[start : end + 1], 206, headers)


_NAME = r"(?P<name>[^/]+/[^/]+?)"
_API = rf"/api/(?P<kind>models|datasets)/{_NAME}"
_ROUTES: list[tuple[tuple[str, ...], str, Any]] = [
    (("GET",), r"/api/whoami-v2", _Handler.whoami),
    (("POST",), r"/api/repos/create", _Handler.create),
    (("POST",), r"/api/validate-yaml", _Handler.validate_yaml),
    (("GET",), rf"{_API}(/revision/(?P<revision>[^/]+))?", _Handler.info),
    (("GET",), rf"{_API}/tree/(?P<revision>[^/]+)", _Handler.tree),
    (("POST",), rf"/api/models/{_NAME}/preupload/main", _Handler.preupload),
    (("POST",), rf"/{_NAME}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    (("PUT",), r"/lfs/(?P<oid>[0-9a-f]{64})", _Handler.lfs_put),
    (("POST",), rf"/api/models/{_NAME}/commit/main", _Handler.commit),
    (("GET", "HEAD"), rf"/(?P<kind>datasets/)?{_NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
]


@contextmanager
def serve_hub() -> Iterator[LoopbackHub]:
    """Run a LoopbackHub on a free port for the length of a with block."""
    hub = LoopbackHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
