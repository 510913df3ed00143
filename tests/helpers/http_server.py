"""A real HTTP server on 127.0.0.1 that can misbehave in the ways real ones do."""

from __future__ import annotations

import re
import threading
import time
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType


@dataclass
class Answer:
    """What the server does for one request.

    Attributes:
        body: the bytes of the file.
        status: HTTP status.
        kind: Content-Type.
        headers: more headers; they replace those made from `body`.
        length: whether a Content-Length is sent.
        cut: bytes after which the connection is closed, however long the body is.
        stall: bytes after which nothing more comes until the server stops.
        drip: pause in seconds after every byte; the connection is closed after 100 bytes.
        header_drip: pause in seconds after every byte of the headers.
        ranges: whether a part is sent where one is asked for, unless `If-Range` names another ETag.
    """

    body: bytes = b""
    status: int = 200
    kind: str = "application/octet-stream"
    headers: dict[str, str] = field(default_factory=dict)
    length: bool = True
    cut: int | None = None
    stall: int | None = None
    drip: float = 0.0
    header_drip: float = 0.0
    ranges: bool = False


class FileServer:
    """Serve `answers[path]` in turn, the last one for ever; 404 elsewhere. Use as a context."""

    def __init__(self) -> None:
        self.answers: dict[str, list[Answer]] = {}
        self.requests: list[str] = []
        self.asked: list[str] = []  # the Range of each request, "" without one
        self.closing = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, format: str, *args: object) -> None:
                pass

            def do_GET(self) -> None:
                server.requests.append(self.path)
                server.asked.append(self.headers.get("Range", ""))
                queue = server.answers.get(self.path, [Answer(b"nothing here", 404)])
                answer = queue.pop(0) if len(queue) > 1 else queue[0]
                server.send(self, answer)

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True)

    def send(self, handler: BaseHTTPRequestHandler, answer: Answer) -> None:
        """Send one answer, faults included."""
        body, status = answer.body, answer.status
        headers = {"Content-Type": answer.kind}
        asked = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", ""))
        condition = handler.headers.get("If-Range")
        if answer.ranges and asked and condition in (None, answer.headers.get("ETag")):
            start, total = int(asked[1]), len(body)
            status, body = (206, body[start:]) if start < total else (416, b"")
            headers["Content-Range"] = f"bytes {start}-{total - 1}/{total}"
        if answer.length:
            headers["Content-Length"] = str(len(body))
        answer = replace(answer, body=body)
        handler.close_connection = True
        try:
            if answer.header_drip:
                for byte in b"HTTP/1.1 200 OK\r\nX-Long: " + b"x" * 1000:
                    handler.wfile.write(bytes([byte]))
                    if self.closing.wait(answer.header_drip):
                        return
            handler.send_response(status)
            for name, value in (headers | answer.headers).items():
                handler.send_header(name, value)
            handler.end_headers()
            if answer.drip:
                for index in range(100):
                    handler.wfile.write(answer.body[index : index + 1])
                    if self.closing.wait(answer.drip):
                        return
            elif answer.stall is not None:
                handler.wfile.write(answer.body[: answer.stall])
                self.closing.wait(30)
            else:
                handler.wfile.write(answer.body[: answer.cut])
        except OSError:
            pass  # the client has given up, as it should

    def url(self, path: str = "") -> str:
        """Return the address of a path."""
        return f"http://127.0.0.1:{self.http.server_port}{path}"

    def __enter__(self) -> FileServer:
        self.thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.closing.set()
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()


def wait_for(condition: object, seconds: float = 10.0) -> bool:
    """Return whether a callable becomes true in time."""
    assert callable(condition)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.01)
    return False
