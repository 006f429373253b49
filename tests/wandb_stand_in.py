"""A small W&B on the loopback address: takes runs, their histories and files, as far as its client asks."""

from __future__ import annotations

import base64
import gzip
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class WandbServer:
    """`history` and `files` by run id; `starts` lists the ids of runs as they were opened; `down` makes it fail."""

    def __init__(self):
        self.history: dict[str, list[dict[str, Any]]] = {}
        self.files: dict[str, set[str]] = {}
        self.starts: list[str] = []
        self.down = False
        handler = type("Bound", (Handler,), {"state": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.handle_error = lambda *_: None  # clients that hang up
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, query: dict[str, Any]) -> dict[str, Any]:
        """One GraphQL request."""
        asked, given = query.get("operationName"), query.get("variables") or {}
        if asked == "RunResumeStatus":
            rows = self.history.get(given["name"])
            return {"model": {"id": "m", "name": "p", "entity": {"id": "e", "name": "me"},
                              "bucket": None if rows is None else _bucket(given["name"], rows)}}  # fmt: skip
        if asked == "UpsertBucket":
            name = given.get("name") or "none"
            if name not in self.history or not given.get("id"):
                self.starts.append(name)
            project = {"id": "p", "name": given.get("project"), "entity": {"id": "e", "name": "me"}}
            known = _bucket(name, self.history.setdefault(name, [])) | {"id": name, "sweepName": None}
            known |= {"description": "", "project": project}
            return {"upsertBucket": {"bucket": known, "inserted": True}}
        if asked == "CreateRunFiles":
            urls = [{"name": f, "uploadUrl": f"{self.url}/upload/{given['run']}/{f}"} for f in given["files"]]
            return {"createRunFiles": {"runID": given["run"], "uploadHeaders": [], "files": urls}}
        return {
            "viewer": {"id": "u", "entity": "me", "username": "me", "email": "", "flags": "{}", "teams": {"edges": []}}
        }


def _bucket(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {"id": base64.b64encode(name.encode()).decode(), "name": name, "displayName": name, "summaryMetrics": "{}",
            "logLineCount": 0, "historyLineCount": len(rows), "eventsLineCount": 0, "eventsTail": "[]", "tags": [],
            "historyTail": json.dumps([json.dumps(row) for row in rows[-1:]]), "config": "{}", "notes": "",
            "wandbConfig": '{"t": 1}'}  # fmt: skip


class Handler(BaseHTTPRequestHandler):
    state: WandbServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        if self.state.down:
            self.send_response(503)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        parts, content = self.path.strip("/").split("/"), {}
        if parts == ["graphql"]:
            content = {"data": self.state.answer(json.loads(body))}
        elif parts[-1] == "file_stream":
            lines = json.loads(body).get("files", {}).get("wandb-history.jsonl", {}).get("content", [])
            self.state.history.setdefault(parts[-2], []).extend(map(json.loads, lines))
        elif parts[0] == "upload":
            self.state.files.setdefault(parts[1], set()).add("/".join(parts[2:]))
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_PUT = do_GET = do_POST
