"""Web servers on this machine that give parts of files after a while, or give none: for benchmarks and tests."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class _Handler(SimpleHTTPRequestHandler):
    """Answers as a server with ranges does, after a while."""

    asked: list[tuple[str, str]]
    latency = 0.0
    ranges = True
    disable_nagle_algorithm = True  # else the content waits 40 ms until the headers are acknowledged

    def do_GET(self) -> None:
        path, wanted = Path(self.translate_path(self.path)), self.headers.get("Range", "")
        self.asked.append((path.name, wanted))
        time.sleep(self.latency)
        if not path.is_file():
            self.send_error(404)
            return
        whole = path.stat().st_size
        first, last = 0, whole - 1
        if self.ranges and wanted:
            words = wanted.removeprefix("bytes=").split("-")
            first, last = int(words[0]), min(int(words[1]), whole - 1)
        with path.open("rb") as file:
            file.seek(first)
            content = file.read(last - first + 1)
        self.send_response(206 if self.ranges and wanted else 200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Range", f"bytes {first}-{last}/{whole}")
        self.send_header("ETag", f'"{path.stat().st_mtime_ns}"')
        self.end_headers()
        with suppress(ConnectionError):  # of a client that has ended
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Quiet."""


@contextmanager
def served(folder: Path, *, latency: float = 0.0, ranges: bool = True) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """(address, what was asked for: name and range) of a server of a folder."""
    asked: list[tuple[str, str]] = []
    handler = type("Handler", (_Handler,), {"asked": asked, "latency": latency, "ranges": ranges})
    handler.protocol_version = "HTTP/1.1"
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(folder)))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
