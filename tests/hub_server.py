"""A small Hugging Face Hub on loopback: enough of its protocol for the real client to download and to publish.

Two servers, as in life: the Hub itself and the store ("cdn") it redirects to for large files. Each can be told to
answer a number of requests wrongly with `hub.fail(method, part_of_the_path, fault, times)`.
"""

import base64
import contextlib
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = (".safetensors", ".bin", ".parquet")
TOKEN = "hf_loopback"

Fault = Callable[["Handler", int, bytes, dict[str, str]], None]


@dataclass
class Repo:
    """A repository (of a data set if its name begins with `datasets/`): commits, newest last, each with all files."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: bool = False

    @property
    def head(self) -> str:
        return list(self.commits)[-1]

    def commit(self, files: dict[str, bytes]) -> str:
        tree = {**(self.commits[self.head] if self.commits else {}), **files}
        sha = hashlib.sha1(f"{len(self.commits)} {sorted(tree)}".encode()).hexdigest()
        self.commits[sha] = tree
        return sha


class Hub:
    """The pair of servers, their repositories, the faults to come and the requests that came."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.moved: dict[str, str] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.faults: list[list[Any]] = []
        self.closing = threading.Event()
        self.lock = threading.Lock()
        self.connections: set[socket.socket] = set()

    def __enter__(self) -> Self:
        self.servers = [ThreadingHTTPServer(("127.0.0.1", 0), Handler) for _ in range(2)]
        for server in self.servers:
            server.daemon_threads, server.block_on_close = True, False
            server.hub = self  # type: ignore[attr-defined]
            server.handle_error = lambda request, address: None  # type: ignore[method-assign]
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        self.url, self.cdn = (f"http://127.0.0.1:{server.server_address[1]}" for server in self.servers)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Close both servers and every connection; the next request is refused."""
        self.closing.set()
        for server in self.servers:
            server.shutdown()
            server.server_close()
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def publish(self, name: str, files: dict[str, bytes], private: bool = False) -> str:
        """Commit files to a repository, made if it is new; the commit's id."""
        repo = self.repos.setdefault(name, Repo(private=private))
        return repo.commit(files)

    def fail(self, method: str, part: str, fault: Fault, times: int = 1) -> None:
        """Answer the next `times` requests of `method` whose path contains `part` with `fault`."""
        self.faults.append([method, part, fault, times])

    def take_fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault[0] == method and fault[1] in path and fault[3] > 0:
                    fault[3] -= 1
                    return fault[2]
        return None

    def seen(self, method: str, part: str) -> list[dict[str, str]]:
        """The headers of the requests of `method` so far whose path contains `part`."""
        return [headers for m, path, headers in self.requests if m == method and part in path]


class Handler(BaseHTTPRequestHandler):
    """Routes a request by method and path; both servers answer all of them."""

    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> Hub:
        return self.server.hub  # type: ignore[attr-defined]

    def setup(self) -> None:
        super().setup()
        self.hub.connections.add(self.connection)

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.route()

    do_GET = do_POST = do_PUT = do_HEAD  # noqa: N815

    def route(self) -> None:
        url = urlsplit(self.path)
        path, self.query = unquote(url.path), parse_qs(url.query)
        self.hub.requests.append((self.command, path, {k.lower(): v for k, v in self.headers.items()}))
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        for pattern, answer in ROUTES:
            if match := re.fullmatch(pattern, f"{self.command} {path}"):
                return answer(self, *match.groups())
        self.refuse(404, "EntryNotFound")

    def reply(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        fault = self.hub.take_fault(self.command, unquote(urlsplit(self.path).path))
        (fault or send)(self, status, body, headers or {})

    def reply_json(self, value: Any) -> None:
        self.reply(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def refuse(self, status: int, code: str) -> None:
        self.reply(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code, "Content-Type": "application/json"})

    def allowed(self, name: str, write: bool = False) -> Repo | None:
        """The repository, if it is there and this request may see it; else the refusal is sent."""
        repo = self.hub.repos.get(name)
        token = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if repo is None or ((repo.private or write) and not token):
            self.refuse(404 if token else 401, "RepoNotFound")
            return None
        return repo

    def tree(self, repo: Repo, revision: str) -> tuple[str, dict[str, bytes]] | None:
        sha = repo.head if revision == "main" else revision
        if sha not in repo.commits:
            self.refuse(404, "RevisionNotFound")
            return None
        return sha, repo.commits[sha]

    def send_file(self, content: bytes, headers: dict[str, str]) -> None:
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self.reply(206 if start else 200, content[start:], {**headers, "Accept-Ranges": "bytes"})


def send(handler: Handler, status: int, body: bytes, headers: dict[str, str], length: int | None = None) -> None:
    """The answer as it should be."""
    handler.send_response(status)
    for key, value in {"Content-Length": str(len(body) if length is None else length), **headers}.items():
        handler.send_header(key, value)
    handler.end_headers()
    if handler.command != "HEAD":
        handler.wfile.write(body)


def with_status(status: int, answer: bytes = b"{}", **headers: str) -> Fault:
    """Answer with this status instead."""
    return lambda handler, *_: send(handler, status, answer, {k.replace("_", "-"): v for k, v in headers.items()})


def cut(handler: Handler, status: int, body: bytes, headers: dict[str, str]) -> None:
    """Break the connection after half of the body."""
    send(handler, status, body[: len(body) // 2], headers, length=len(body))
    handler.close_connection = True


def stall(handler: Handler, status: int, body: bytes, headers: dict[str, str]) -> None:
    """Send half of the body, then nothing for as long as anyone waits."""
    send(handler, status, body[: len(body) // 2], headers, length=len(body))
    handler.wfile.flush()
    handler.hub.closing.wait(10)
    handler.close_connection = True


def shorten(handler: Handler, status: int, body: bytes, headers: dict[str, str]) -> None:
    """A whole answer, shorter than what was announced before."""
    send(handler, status, body[:-7], headers)


def flip_bit(handler: Handler, status: int, body: bytes, headers: dict[str, str]) -> None:
    """The right length with one bit wrong, in the last byte."""
    send(handler, status, body[:-1] + bytes([body[-1] ^ 1]), headers)


def replace(content: bytes) -> Fault:
    """Something else under the same address, with the ETag of its own."""
    etag = hashlib.sha256(content).hexdigest()
    return lambda handler, status, body, headers: send(handler, status, content, {**headers, "ETag": f'"{etag}"'})


def resolve(handler: Handler, name: str, revision: str, filename: str) -> None:
    if name in handler.hub.moved:
        target = f"/{handler.hub.moved[name]}/resolve/{revision}/{filename}"
        return handler.reply(307, b"", {"Location": target})
    repo = handler.allowed(name)
    found = handler.tree(repo, revision) if repo else None
    if found is None:
        return None
    sha, files = found
    commit = {"X-Repo-Commit": sha}
    if filename not in files:
        return handler.reply(404, b"", {**commit, "X-Error-Code": "EntryNotFound"})
    content = files[filename]
    if not filename.endswith(LARGE):
        return handler.send_file(content, {**commit, "ETag": f'"{git_sha1(content)}"'})
    digest = hashlib.sha256(content).hexdigest()
    handler.hub.objects[digest] = content
    linked = {"X-Linked-ETag": f'"{digest}"', "X-Linked-Size": str(len(content))}
    return handler.reply(302, b"", {**commit, **linked, "Location": f"{handler.hub.cdn}/cdn/{digest}"})


def serve_object(handler: Handler, digest: str) -> None:
    handler.send_file(handler.hub.objects[digest], {"ETag": f'"{digest}"'})


def repo_info(handler: Handler, name: str, revision: str | None) -> None:
    repo = handler.allowed(name)
    found = handler.tree(repo, revision or "main") if repo else None
    if found is not None:
        siblings = [sibling(path, content) for path, content in found[1].items()]
        handler.reply_json({"id": name, "sha": found[0], "siblings": siblings})


def sibling(path: str, content: bytes) -> dict[str, Any]:
    large = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    described = {"rfilename": path, "size": len(content), "blobId": git_sha1(content)}
    return {**described, "lfs": large} if path.endswith(LARGE) else described


def list_files(handler: Handler, name: str, revision: str, folder: str | None) -> None:
    """Files below a folder, or what is right in it: files and folders."""
    repo = handler.allowed(name)
    found = handler.tree(repo, revision) if repo else None
    if found is None:
        return
    below = {path: content for path, content in found[1].items() if path.startswith(f"{folder}/" if folder else "")}
    if handler.query.get("recursive") not in (["true"], ["True"]):
        depth = len(folder) + 1 if folder else 0
        folders = {path[: path.index("/", depth)] for path in below if "/" in path[depth:]}
        below = {path: content for path, content in below.items() if "/" not in path[depth:]}
        return handler.reply_json([*map(directory, sorted(folders)), *(file(*item) for item in below.items())])
    return handler.reply_json([file(*item) for item in below.items()])


def file(path: str, content: bytes) -> dict[str, Any]:
    described = {"type": "file", "oid": git_sha1(content), "size": len(content), "path": path}
    large = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return {**described, "lfs": large} if path.endswith(LARGE) else described


def directory(path: str) -> dict[str, Any]:
    return {"type": "directory", "oid": git_sha1(path.encode()), "size": 0, "path": path}


def list_models(handler: Handler) -> None:
    author = handler.query.get("author", [""])[0]
    handler.reply_json([{"id": name} for name in handler.hub.repos if name.startswith(f"{author}/")])


def create(handler: Handler) -> None:
    request = json.loads(handler.body)
    name = f"{request['organization']}/{request['name']}"
    if handler.headers.get("Authorization") != f"Bearer {TOKEN}":
        return handler.refuse(401, "InvalidCredentials")
    private = request.get("visibility") == "private" or bool(request.get("private"))
    repo = handler.hub.repos.setdefault(name, Repo(private=private))
    if not repo.commits:
        repo.commit({".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"})
    return handler.reply_json({"url": f"{handler.hub.url}/{name}", "name": name, "id": name})


def preupload(handler: Handler, name: str, revision: str) -> None:
    if repo := handler.allowed(name, write=True):
        files = repo.commits[repo.head]
        answers = []
        for path in (file["path"] for file in json.loads(handler.body)["files"]):
            mode = "lfs" if path.endswith(LARGE) else "regular"
            oid = git_sha1(files[path]) if path in files and mode == "regular" else None
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        handler.reply_json({"files": answers})


def lfs_batch(handler: Handler, name: str) -> None:
    if handler.allowed(name, write=True):
        objects = json.loads(handler.body)["objects"]
        for item in objects:
            if item["oid"] not in handler.hub.objects:
                upload = {"href": f"{handler.hub.cdn}/upload/{item['oid']}"}
                item["actions"] = {"upload": upload, "verify": {"href": f"{handler.hub.url}/verify"}}
        handler.reply_json({"transfer": "basic", "objects": objects})


def store(handler: Handler, digest: str) -> None:
    if hashlib.sha256(handler.body).hexdigest() != digest:
        return handler.refuse(400, "BadDigest")
    handler.hub.objects[digest] = handler.body
    return handler.reply(200)


def commit(handler: Handler, name: str, revision: str) -> None:
    repo = handler.allowed(name, write=True)
    if repo is None:
        return
    files = {}
    for line in map(json.loads, handler.body.splitlines()):
        value = line["value"]
        if line["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "lfsFile":
            files[value["path"]] = handler.hub.objects[value["oid"]]
    sha = repo.commit(files)
    handler.reply_json({"commitOid": sha, "commitUrl": f"{handler.hub.url}/{name}/commit/{sha}"})


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


NAME = r"((?:datasets/)?[\w.-]+/[\w.-]+)"
API = r"/api/(?:models/)?" + NAME
ROUTES: list[tuple[str, Callable[..., None]]] = [
    (rf"(?:HEAD|GET) /{NAME}/resolve/([^/]+)/(.+)", resolve),
    (r"GET /cdn/(\w+)", serve_object),
    (rf"GET {API}(?:/revision/([^/]+))?", repo_info),
    (rf"GET {API}/tree/([^/]+)(?:/(.+))?", list_files),
    (r"GET /api/models", list_models),
    (r"POST /api/repos/create", create),
    (r"POST /api/validate-yaml|POST /verify", lambda handler: handler.reply_json({})),
    (rf"POST {API}/preupload/([^/]+)", preupload),
    (rf"POST /{NAME}\.git/info/lfs/objects/batch", lfs_batch),
    (r"PUT /upload/(\w+)", store),
    (rf"POST {API}/commit/([^/]+)", commit),
]
