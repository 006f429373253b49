"""A small hub on the loopback address: repos in memory behind those of the hub's HTTP routes that its client asks for.

    python tests/hub_stand_in.py        # serves until it is ended; prints its address

Faults can be set: `hub.faults[("POST", "/commit/")] = 503` answers so; "cut" breaks the connection off before anything
happens, "lost" after it has happened.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_stand_in"


@dataclass
class Repo:
    private: bool
    commits: list[dict[str, bytes]] = field(default_factory=lambda: [{".gitattributes": b"*.safetensors lfs\n"}])

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1]

    def sha(self) -> str:
        return hashlib.sha1(repr((len(self.commits), sorted(self.files))).encode()).hexdigest()


class Hub:
    """The server with its state; `seen` lists (method, path) of every request."""

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.faults: dict[tuple[str, str], int | str] = {}
        self.seen: list[tuple[str, str]] = []
        hub = self

        class Bound(Handler):
            pass

        Bound.hub = hub
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Bound)
        self.server.handle_error = lambda *_: None  # clients that hang up
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def _serve(self) -> None:
        path, body = unquote(urlsplit(self.path).path), self._body()
        self.hub.seen.append((self.command, path))
        fault = next(
            (f for (method, part), f in self.hub.faults.items() if method == self.command and part in path), None
        )
        if fault == "cut":
            self._break_off()
        elif isinstance(fault, int):
            self._answer(fault, {"error": f"made to fail with {fault}"})
        else:
            answer = self._route(path, body)
            if fault == "lost":
                self._break_off()
            else:
                self._answer(*answer)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _break_off(self) -> None:
        self.close_connection = True
        self.connection.close()

    def _answer(self, status: int, content: dict | list | bytes, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _route(self, path: str, body: bytes) -> tuple:
        writes = self.command in ("POST", "PUT") and not path.startswith("/lfs/")
        if writes and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid username or password."}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return self._validate(json.loads(body)["content"])
        if path.startswith("/lfs/"):
            return self._keep(path.removeprefix("/lfs/"), body)
        if path.endswith(".git/info/lfs/objects/batch"):
            return self._batch(json.loads(body))
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            return self._api("/".join(parts[2:4]), parts[4:], body)
        if len(parts) > 4 and parts[2] == "resolve":
            return self._resolve("/".join(parts[:2]), "/".join(parts[4:]))
        return 404, {"error": "no such route"}

    def _create(self, asked: dict) -> tuple:
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if name in self.hub.repos:
            return 409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"}
        self.hub.repos[name] = Repo(asked.get("visibility") == "private")
        return 200, {"url": f"{self.hub.url}/{name}", "name": name}

    def _validate(self, content: str) -> tuple:
        import yaml

        front = yaml.safe_load(content.split("---")[1])
        errors = [] if isinstance(front, dict) and front.get("license") else [{"message": "no license"}]
        return 200, {"errors": errors, "warnings": []}

    def _keep(self, oid: str, body: bytes) -> tuple:
        if hashlib.sha256(body).hexdigest() != oid:
            return 400, {"error": "other content than announced"}
        self.hub.blobs[oid] = body
        return 200, {}

    def _batch(self, asked: dict) -> tuple:
        objects = []
        for item in asked["objects"]:
            upload = {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"}}
            objects.append(item if item["oid"] in self.hub.blobs else item | {"actions": upload})
        return 200, {"transfer": "basic", "objects": objects}

    def _api(self, name: str, rest: list[str], body: bytes) -> tuple:
        repo = self._repo(name)
        if repo is None:
            return 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
        if not rest or rest[0] == "revision":
            siblings = [{"rfilename": file} for file in sorted(repo.files)]
            return 200, {"id": name, "sha": repo.sha(), "private": repo.private, "siblings": siblings, "tags": []}
        if rest[0] == "tree":
            return 200, [_entry(path, data) for path, data in sorted(repo.files.items())]
        if rest[0] == "preupload":
            files = [{"path": f["path"], "uploadMode": _mode(f["path"]), "shouldIgnore": False}
                     for f in json.loads(body)["files"]]  # fmt: skip
            return 200, {"files": files}
        return self._commit(name, repo, [json.loads(line) for line in body.splitlines()])

    def _commit(self, name: str, repo: Repo, lines: list[dict]) -> tuple:
        files = dict(repo.files)
        for line in lines:
            value = line["value"]
            if line["key"] == "header" and value.get("parentCommit", repo.sha()) != repo.sha():
                return 412, {"error": "A commit has happened since"}
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            if line["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
        repo.commits.append(files)
        return 200, {
            "success": True,
            "commitOid": repo.sha(),
            "commitUrl": f"{self.hub.url}/{name}/commit/{repo.sha()}",
        }

    def _repo(self, name: str) -> Repo | None:
        repo = self.hub.repos.get(name)
        hidden = repo is not None and repo.private and self.headers.get("Authorization") != f"Bearer {TOKEN}"
        return None if hidden else repo

    def _resolve(self, name: str, path: str) -> tuple:
        repo = self._repo(name)
        if repo is None:
            return 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
        if path not in repo.files:
            return 404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": repo.sha()}
        data = repo.files[path]
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": repo.sha()}
        if asked := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or ""):
            return 206, data[int(asked[1]) : int(asked[2]) + 1], headers
        return 200, data, headers


def _mode(path: str) -> str:
    return "lfs" if path.endswith((".safetensors", ".png")) else "regular"


def _entry(path: str, data: bytes) -> dict:
    entry = {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
    lfs = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return entry | ({"lfs": lfs} if _mode(path) == "lfs" else {})


if __name__ == "__main__":
    print(Hub().url, flush=True)
    threading.Event().wait()
