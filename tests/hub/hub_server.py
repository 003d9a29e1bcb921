"""A model hub in miniature on 127.0.0.1: the headers that the Hub client needs, faults on request, a request log."""

from __future__ import annotations

import hashlib
import io
import json
import socket
import struct
import threading
from collections import defaultdict, deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import torch

COMMIT = "c" * 40


def torch_bytes(value, **kwargs):
    """What `torch.save` writes."""
    buffer = io.BytesIO()
    torch.save(value, buffer, **kwargs)
    return buffer.getvalue()


class HubServer:
    """Serves `files[path]` with Hub headers under `/OWNER/NAME/resolve/REV/FILE` and plainly anywhere else.

    `faults[path]` is a queue; each GET takes one of: an HTTP status, "reset" (connection reset in mid-file), "short"
    (clean close before the end), "fewer" (fewer bytes, honestly declared), "wrong" (other bytes of the same length),
    None (no fault). `errors[path]` answers HEAD and GET alike with (status, X-Error-Code).
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, deque] = defaultdict(deque)
        self.errors: dict[str, tuple[int, str]] = {}
        self.log: list[tuple[str, str]] = []
        hub = self

        class Handler(_Handler):
            server_state = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def add(self, repo: str, filename: str, body: bytes) -> str:
        path = f"/{repo}/resolve/main/{filename}"
        self.files[path] = body
        return path

    def count(self, method: str) -> int:
        return sum(entry[0] == method for entry in self.log)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_state: HubServer

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self._answer(with_body=False)

    def do_GET(self):
        self._answer(with_body=True)

    def _answer(self, with_body):
        state, path = self.server_state, self.path
        if not path.startswith("/api/"):  # the client's own housekeeping, which differs between its versions
            state.log.append((self.command, path))
        if path in state.errors:
            status, code = state.errors[path]
            return self._send(status, {"X-Error-Code": code, "X-Repo-Commit": COMMIT}, b"{}", with_body)
        if path not in state.files:
            hub = "/resolve/" in path
            headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT} if hub else {}
            return self._send(404, headers, json.dumps({"error": unquote(path)}).encode(), with_body)
        body = state.files[path]
        fault = state.faults[path].popleft() if with_body and state.faults[path] else None
        if isinstance(fault, int):
            return self._send(fault, {}, b"fault", with_body)
        etag = hashlib.sha256(body).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(body))}
        if fault == "wrong":
            body = body[:-1] + bytes([body[-1] ^ 1])
        if fault == "fewer":
            body = body[:-1]
        self._send(200, headers | {"X-Repo-Commit": COMMIT}, body, with_body, cut=fault in ("reset", "short"))
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    def _send(self, status, headers, body, with_body, cut=False):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        if cut:
            self.send_header("Connection", "close")
        self.end_headers()
        if with_body:
            self.wfile.write(body[: len(body) // 2] if cut else body)
            self.wfile.flush()
        self.close_connection = self.close_connection or cut
