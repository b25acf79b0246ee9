"""Tars of pictures as WebDataset keeps them, and web servers that give parts of them, or do not."""

from __future__ import annotations

import io
import json
import tarfile
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from PIL import Image

COLOURS = ("red", "green", "blue")


def picture(value: int, size: int = 4) -> bytes:
    """A PNG of one grey."""
    file = io.BytesIO()
    Image.new("RGB", (size, size), (value, value, value)).save(file, "png")
    return file.getvalue()


def write_tar(path: Path, files: Iterable[tuple[str, bytes]], **options: Any) -> Path:
    with tarfile.open(path, "w", **options) as archive:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def samples(numbers: Iterable[int]) -> Iterator[tuple[str, bytes]]:
    """Picture NNN of grey N, with its label N % 3, a caption, and both in a JSON."""
    for number in numbers:
        label, caption = number % 3, f"a {COLOURS[number % 3]} picture"
        yield f"{number:03}.png", picture(number)
        yield f"{number:03}.cls", f"{label}\n".encode()
        yield f"{number:03}.txt", caption.encode()
        yield f"{number:03}.json", json.dumps({"label": label, "caption": caption, "width": 4}).encode()


def write_shards(folder: Path, count: int = 3, each: int = 5) -> str:
    """Some tars; returns their pattern."""
    folder.mkdir(exist_ok=True)
    for number in range(count):
        write_tar(folder / f"train-{number:02}.tar", samples(range(number * each, (number + 1) * each)))
    return f"{folder}/train-{{00..{count - 1:02}}}.tar"


class _Handler(SimpleHTTPRequestHandler):
    """Answers as a server with ranges does, after a while."""

    asked: list[tuple[str, str]]
    latency = 0.0
    ranges = True

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
