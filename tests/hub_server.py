"""A Hugging Face Hub in memory: the endpoints with which huggingface_hub pushes and pulls models and datasets.

    with serve() as url:
        subprocess.run([...], env=client_environment(url, home=tmp_path))

huggingface_hub reads HF_ENDPOINT when it is imported, so its clients run in processes of their own.
"""

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_local"
USER = "local"
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".gguf", ".parquet", ".arrow")


class HubError(Exception):
    """Answered as an HTTP error; `kind` is the X-Error-Code that huggingface_hub turns into a typed exception."""

    def __init__(self, status: int, message: str, kind: str = "") -> None:
        super().__init__(message)
        self.status, self.message, self.kind = status, message, kind


@dataclass
class File:
    content: bytes
    lfs: bool = False

    @property
    def oid(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    def entry(self, path: str) -> dict:
        lfs = {"lfs": {"oid": self.oid, "size": len(self.content), "pointerSize": 0}} if self.lfs else {}
        return {"type": "file", "path": path, "size": len(self.content), "oid": self.oid, **lfs}


@dataclass
class Repo:
    """One branch, main: its commits in order, each with all its files."""

    private: bool
    commits: dict[str, dict[str, File]] = field(default_factory=dict)

    def commit(self, files: dict[str, File]) -> str:
        state = json.dumps([len(self.commits), sorted((path, file.oid) for path, file in files.items())])
        oid = hashlib.sha1(state.encode()).hexdigest()
        self.commits[oid] = files
        return oid

    def resolve(self, revision: str) -> str:
        oid = next(reversed(self.commits)) if revision == "main" else revision
        if oid not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid


@dataclass
class Reply:
    """A body that is not JSON, or needs headers."""

    body: bytes
    headers: dict[str, str]


ROUTES: list[tuple[str, re.Pattern[str], Callable]] = []
KIND = r"/api/(?P<kind>model|dataset)s"
NAME = r"/(?P<name>[^/]+/[^/]+)"


def route(method: str, pattern: str) -> Callable:
    """Answer requests whose path matches; the pattern's named groups become arguments."""

    def register(function: Callable) -> Callable:
        ROUTES.append((method, re.compile(pattern), function))
        return function

    return register


class Handler(BaseHTTPRequestHandler):
    """One request. What the hub holds hangs on a subclass of its own, made by `serve`."""

    protocol_version = "HTTP/1.1"
    repos: dict[tuple[str, str], Repo]
    uploads: dict[str, bytes]

    def log_message(self, *args: object) -> None:
        """Silence: the default writes every request to stderr."""

    def answer(self) -> None:
        url = urlsplit(self.path)
        self.query = {key: values[0] for key, values in parse_qs(url.query).items()}
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            self.send(200, self.dispatch(unquote(url.path)))
        except HubError as error:
            headers = {"X-Error-Code": error.kind, "X-Error-Message": error.message}
            self.send(error.status, Reply(json.dumps({"error": error.message}).encode(), headers))

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def dispatch(self, path: str) -> object:
        wanted = "GET" if self.command == "HEAD" else self.command
        for method, pattern, function in ROUTES:
            if method == wanted and (match := pattern.fullmatch(path)):
                return function(self, **match.groupdict())
        raise HubError(404, f"tests/hub_server.py has no route for {self.command} {path}")

    def send(self, status: int, answer: object) -> None:
        reply = answer if isinstance(answer, Reply) else Reply(json.dumps(answer).encode(), {})
        self.send_response(status)
        for key, value in {"Content-Length": str(len(reply.body)), **reply.headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(reply.body)

    @property
    def address(self) -> str:
        return f"http://{self.headers['Host']}"

    def json(self) -> dict:
        return json.loads(self.body or b"{}")

    def require_token(self) -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise HubError(401, "Invalid username or password.")

    def repo(self, kind: str, name: str) -> Repo:
        repo = self.repos.get((kind, name))
        if repo is None:
            raise HubError(404, "Repository Not Found", "RepoNotFound")
        if repo.private:
            self.require_token()
        return repo


@route("GET", "/api/whoami-v2")
def whoami(request: Handler) -> dict:
    request.require_token()
    token = {"type": "access_token", "accessToken": {"displayName": "tests", "role": "write"}}
    return {"type": "user", "id": "1", "name": USER, "orgs": [], "auth": token}


@route("POST", "/api/validate-yaml")
def validate_yaml(request: Handler) -> dict:
    return {"errors": [], "warnings": []}


@route("POST", "/api/repos/create")
def create_repo(request: Handler) -> dict:
    request.require_token()
    wanted = request.json()
    kind, name = wanted.get("type") or "model", f"{wanted.get('organization') or USER}/{wanted['name']}"
    if (kind, name) in request.repos:
        raise HubError(409, "You already created this repo")
    repo = request.repos[kind, name] = Repo(private=wanted.get("visibility") == "private")
    repo.commit({})
    prefix = "" if kind == "model" else f"{kind}s/"
    return {"url": f"{request.address}/{prefix}{name}", "id": name, "name": name}


@route("POST", r"/(?:datasets/)?[^/]+/[^/]+\.git/info/lfs/objects/batch")
def lfs_batch(request: Handler) -> dict:
    request.require_token()
    objects = [{"oid": wanted["oid"], "size": wanted["size"]} for wanted in request.json()["objects"]]
    for wanted in objects:
        if wanted["oid"] not in request.uploads:
            wanted["actions"] = {"upload": {"href": f"{request.address}/lfs/{wanted['oid']}", "header": {}}}
    return {"transfer": "basic", "objects": objects}


@route("PUT", "/lfs/(?P<oid>[0-9a-f]{64})")
def lfs_upload(request: Handler, oid: str) -> dict:
    if hashlib.sha256(request.body).hexdigest() != oid:
        raise HubError(400, "sha256 mismatch")
    request.uploads[oid] = request.body
    return {}


@route("POST", KIND + NAME + "/preupload/(?P<revision>[^/]+)")
def preupload(request: Handler, kind: str, name: str, revision: str) -> dict:
    request.require_token()
    request.repo(kind, name).resolve(revision)
    files = []
    for path in (wanted["path"] for wanted in request.json()["files"]):
        mode = "lfs" if path.endswith(LFS_SUFFIXES) else "regular"
        files.append({"path": path, "uploadMode": mode, "shouldIgnore": False})
    return {"files": files}


@route("POST", KIND + NAME + "/commit/(?P<revision>[^/]+)")
def commit(request: Handler, kind: str, name: str, revision: str) -> dict:
    request.require_token()
    repo = request.repo(kind, name)
    files = dict(repo.commits[repo.resolve(revision)])
    for item in map(json.loads, request.body.splitlines()):
        change = item["value"]
        if item["key"] == "file":
            files[change["path"]] = File(base64.b64decode(change["content"]))
        elif item["key"] == "lfsFile":
            files[change["path"]] = File(request.uploads[change["oid"]], lfs=True)
        elif item["key"] in ("deletedFile", "deletedFolder"):
            gone = change["path"].rstrip("/")
            files = {path: file for path, file in files.items() if path != gone and not path.startswith(f"{gone}/")}
    oid = repo.commit(files)
    return {"success": True, "commitOid": oid, "commitUrl": f"{request.address}/{name}/commit/{oid}"}


@route("GET", KIND + NAME + "(?:/revision/(?P<revision>[^/]+))?")
def info(request: Handler, kind: str, name: str, revision: str | None) -> dict:
    repo = request.repo(kind, name)
    oid = repo.resolve(revision or "main")
    siblings = [{"rfilename": path} for path in sorted(repo.commits[oid])]
    return {"id": name, "sha": oid, "private": repo.private, "tags": [], "siblings": siblings}


@route("GET", KIND + NAME + "/tree/(?P<revision>[^/]+)(?:/(?P<folder>.*))?")
def tree(request: Handler, kind: str, name: str, revision: str, folder: str | None) -> list[dict]:
    repo = request.repo(kind, name)
    files = repo.commits[repo.resolve(revision)]
    prefix = f"{folder.rstrip('/')}/" if folder else ""
    entries = {}
    for path, file in sorted(files.items()):
        if path.startswith(prefix):
            for parent in Path(path).parents:
                entries[f"{parent}"] = {"type": "directory", "path": f"{parent}", "oid": "", "size": 0}
            entries[path] = file.entry(path)
    if folder and not entries:
        raise HubError(404, f"{folder} does not exist", "EntryNotFound")
    below = {path: entry for path, entry in entries.items() if path.startswith(prefix) and path != "."}
    recursive = request.query.get("recursive", "").lower() in ("true", "1")
    return [entry for path, entry in below.items() if recursive or "/" not in path[len(prefix) :]]


@route("POST", KIND + NAME + "/paths-info/(?P<revision>[^/]+)")
def paths_info(request: Handler, kind: str, name: str, revision: str) -> list[dict]:
    repo = request.repo(kind, name)
    files = repo.commits[repo.resolve(revision)]
    return [files[path].entry(path) for path in parse_qs(request.body.decode())["paths"] if path in files]


@route("GET", r"/(?:(?P<kind>dataset)s/)?(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
def download(request: Handler, kind: str | None, name: str, revision: str, path: str) -> Reply:
    repo = request.repo(kind or "model", name)
    oid = repo.resolve(revision)
    file = repo.commits[oid].get(path)
    if file is None:
        raise HubError(404, f"{path} is not in {name}", "EntryNotFound")
    return Reply(file.content, {"X-Repo-Commit": oid, "ETag": f'"{file.oid}"'})


@contextmanager
def serve() -> Iterator[str]:
    """An empty hub on a free local port; gives its URL."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("HubHandler", (Handler,), {"repos": {}, "uploads": {}}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def client_environment(url: str, home: Path) -> dict[str, str]:
    """The variables of a process that talks to the hub at `url`, logged in, with caches under `home`."""
    kept = {k: v for k, v in os.environ.items() if not k.endswith("_OFFLINE") and not k.lower().endswith("_proxy")}
    # the Xet protocol is not spoken here: large files go through LFS
    return kept | {"HF_ENDPOINT": url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN, "HF_HOME": str(home)}
