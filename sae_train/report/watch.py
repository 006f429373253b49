"""The report while a run goes on: a page that is written anew when the run has logged something.

It is served on the loopback interface, and only there; nothing in the run knows of it.
"""

from __future__ import annotations

import threading
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from sae_train.errors import explaining
from sae_train.report.data import load_runs
from sae_train.report.page import page

HOST = "127.0.0.1"
REFRESH = 15  # seconds between two looks of the browser
MOST_WORK = 0.25  # share of the time that may go into writing pages
WATCHED = ("run.json", "metrics.jsonl", "absorption.parquet", "trajectory.parquet", "latents")


class LivePage:
    """The newest page of a run; made again only after the run's files changed, and not too often if that is slow."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._lock = threading.Lock()
        self._seen: tuple = ()
        self._text = ""
        self._next = 0.0

    def text(self) -> str:
        """The page with a tag that makes the browser look again, until the run has ended."""
        with self._lock:
            start = time.monotonic()
            if self._stamps() != self._seen and start >= self._next:
                self._seen, [run] = self._stamps(), load_runs([self.folder])
                going = run.facts.get("status") == "running"
                self._text = page([run], refresh=REFRESH if going else 0)
                now = time.monotonic()
                self._next = now + (now - start) / MOST_WORK
            return self._text

    def _stamps(self) -> tuple:
        files = [self.folder / name for name in WATCHED]
        return tuple(file.stat().st_mtime_ns if file.exists() else 0 for file in files)


class _Handler(BaseHTTPRequestHandler):
    def __init__(self, live: LivePage, *args):
        self.live = live
        super().__init__(*args)

    def do_GET(self) -> None:
        if self.path not in ("/", "/report.html"):
            self.send_error(404)
            return
        body = self.live.text().encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing of each request."""


def serve(folder: Path, port: int) -> ThreadingHTTPServer:
    """Return a server that is ready to serve_forever; UserError for a folder that is no run or a port that is taken."""
    live = LivePage(folder)
    live.text()
    taken = f"port {port} cannot be used"
    with explaining(lambda error: f"{taken} ({error}): choose another --port", OSError, OverflowError):
        return ThreadingHTTPServer((HOST, port), partial(_Handler, live))
