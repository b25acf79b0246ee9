"""Files from servers that drop connections, redirect, answer something else, or are not there."""

from __future__ import annotations

import base64
import hashlib
import io
import os
import socket
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from refusals import sentence_of

from guided_diffusion.commands import download, models
from guided_diffusion.evaluation.weights import SOURCES
from guided_diffusion.runtime import downloads
from guided_diffusion.runtime.downloads import PART, Source, fetch

ROOT = Path(__file__).parents[2]
CONTENT = np.random.default_rng(0).bytes(700_001)
SHA = hashlib.sha256(CONTENT).hexdigest()
MD5 = base64.b64encode(hashlib.md5(CONTENT).digest()).decode()


class Server:
    """A file server on this machine; `faults` are taken one per request, after them it does what it should.

    :ivar asked: the Range of each request.
    """

    def __init__(self) -> None:
        self.faults: list[Callable[[BaseHTTPRequestHandler], Any]] = []
        self.asked: list[str | None] = []
        self.content, self.headers, self.ranges = CONTENT, dict[str, str](), True
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked.append(self.headers["Range"])
                (outer.faults.pop(0) if outer.faults else outer.answer)(self)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/weights.bin"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def answer(self, request: BaseHTTPRequestHandler, count: int | None = None) -> None:
        """The rest of the file from where it is asked for; of it `count` bytes, and then the line is cut."""
        start = int((request.headers["Range"] or "bytes=0-")[6:-1]) if self.ranges else 0
        if start >= len(self.content):
            request.send_response(416)
            request.send_header("Content-Range", f"bytes */{len(self.content)}")
            request.end_headers()
            return
        request.send_response(206 if request.headers["Range"] and self.ranges else 200)
        for name, value in {"Content-Length": str(len(self.content) - start), **self.headers}.items():
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(self.content[start:][:count])

    def drop(self, request: BaseHTTPRequestHandler) -> None:
        """Send 200,000 bytes, and cut the line."""
        self.answer(request, 200_000)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Server()
    yield server
    server.close()


@pytest.fixture
def source(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Source:
    monkeypatch.setenv("GUIDED_DIFFUSION_CACHE", str(tmp_path / "cache"))
    return Source(urls=(server.url,), file="weights.bin", sha256=SHA, size=len(CONTENT))


def gone(request: BaseHTTPRequestHandler) -> None:
    request.send_error(404)


def web_page(request: BaseHTTPRequestHandler) -> None:
    request.send_response(200)
    request.send_header("Content-Type", "text/html; charset=utf-8")
    request.end_headers()
    request.wfile.write(b"<html>log in</html>")


def test_a_file_is_fetched_once(
    source: Source, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = fetch(source)
    assert path == str(tmp_path / "cache" / "weights.bin")
    assert Path(path).read_bytes() == CONTENT
    shown = capsys.readouterr()
    assert f"{len(CONTENT)} bytes, sha256 as published" in shown.out
    assert "100%" in shown.err
    assert fetch(source) == path
    assert "is there already" in capsys.readouterr().out
    assert server.asked == [None]
    assert os.listdir(tmp_path / "cache") == ["weights.bin"]


def test_a_folder_or_a_file_may_be_named(source: Source, tmp_path: Path) -> None:
    assert fetch(source, str(tmp_path)) == str(tmp_path / "weights.bin")
    assert fetch(source, str(tmp_path / "new" / "other.bin")) == str(tmp_path / "new" / "other.bin")
    assert (tmp_path / "new" / "other.bin").read_bytes() == CONTENT


def test_of_several_addresses_the_first_that_works_is_taken(source: Source, server: Server, tmp_path: Path) -> None:
    (tmp_path / "local").write_bytes(CONTENT)
    server.faults = [gone]
    fetch(replace(source, urls=(server.url, "http://127.0.0.1:1/weights.bin", (tmp_path / "local").as_uri())))
    assert (tmp_path / "cache" / "weights.bin").read_bytes() == CONTENT


def test_a_mirror_takes_the_place_of_the_published_address(source: Source, server: Server) -> None:
    away = replace(source, urls=("http://127.0.0.1:1/weights.bin",))
    assert fetch(away.at(server.url.rpartition("/")[0] + "/"))
    assert "write https://HOST/FOLDER" in sentence_of(away.at, "example.org/files")


def test_a_redirection_is_followed(source: Source, server: Server) -> None:
    def elsewhere(request: BaseHTTPRequestHandler) -> None:
        request.send_response(302)
        request.send_header("Location", f"{server.url}?token=1")
        request.end_headers()

    server.faults = [elsewhere]
    assert Path(fetch(source)).read_bytes() == CONTENT


def test_a_transfer_goes_on_where_the_line_was_cut(source: Source, server: Server) -> None:
    server.faults = [server.drop, server.drop]
    assert Path(fetch(source)).read_bytes() == CONTENT
    assert server.asked == [None, "bytes=200000-", "bytes=400000-"]


def test_a_later_command_goes_on_too(source: Source, server: Server, tmp_path: Path) -> None:
    server.faults = [server.drop, gone]
    text = sentence_of(fetch, source)
    assert "HTTP Error 404" in text
    assert "try again later, which goes on from there" in text
    assert os.listdir(tmp_path / "cache") == [f"weights.bin{PART}"]
    assert Path(fetch(source)).read_bytes() == CONTENT
    assert server.asked[-1] == "bytes=200000-"
    assert os.listdir(tmp_path / "cache") == ["weights.bin"]


def test_a_server_without_ranges_begins_anew(source: Source, server: Server) -> None:
    server.ranges = False
    server.faults = [server.drop]
    assert Path(fetch(source)).read_bytes() == CONTENT


def test_what_was_whole_before_it_was_named_is_not_fetched_again(
    source: Source, server: Server, tmp_path: Path
) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / f"weights.bin{PART}").write_bytes(CONTENT)
    assert Path(fetch(source)).read_bytes() == CONTENT
    (tmp_path / "other").write_bytes(b"")
    (tmp_path / f"longer{PART}").write_bytes(CONTENT + b"more")
    assert Path(fetch(source, str(tmp_path / "longer"))).read_bytes() == CONTENT
    assert server.asked == ["bytes=700001-", "bytes=700005-", None]


def test_a_server_that_never_answers_is_left_for_the_next(
    source: Source, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloads, "TIMEOUT", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        fetch(replace(source, urls=(f"http://127.0.0.1:{silent.getsockname()[1]}/file", server.url)))


def test_one_process_at_a_time_fetches_a_file(source: Source, server: Server, tmp_path: Path) -> None:
    said = []

    def meanwhile(request: BaseHTTPRequestHandler) -> None:
        said.append(sentence_of(fetch, source))
        server.answer(request)

    server.faults = [meanwhile]
    fetch(source)
    assert said == [f"another process fetches {tmp_path}/cache/weights.bin: wait for it"]


@pytest.mark.parametrize(
    ("content", "changes", "message"),
    [
        (CONTENT[:-1] + b"x", {}, "its sha256 is another one"),
        (CONTENT[:-1], {}, "it has 700000 bytes in place of 700001"),
        (CONTENT[:-1], {"sha256": "", "size": 0, "least": 700_001}, "it has 700000 bytes, and its weights alone take"),
        (CONTENT[:-1] + b"x", {"sha256": "", "size": 0}, "its md5 is another one"),
        (b" <!DOCTYPE html>", {"sha256": "", "size": 0}, "it is a web page"),
        (b"", {"sha256": "", "size": 0}, "it is an empty file"),
    ],
)
def test_another_file_is_not_kept_and_a_sentence_says_what_to_do(
    source: Source, server: Server, tmp_path: Path, content: bytes, changes: dict[str, Any], message: str
) -> None:
    server.content, server.headers = content, {"Content-MD5": MD5} if "md5" in message else {}
    source = replace(source, **changes)
    text = sentence_of(fetch, source)
    assert f"{server.url}: {message}" in text
    size = f" ({source.size or f'at least {source.least}'} bytes)" if source.size or source.least else ""
    assert f"fetch {server.url}{size} on another machine and put it at {tmp_path}/cache/weights.bin" in text
    assert os.listdir(tmp_path / "cache") == []
    server.content = CONTENT
    assert Path(fetch(source)).read_bytes() == CONTENT


def test_a_page_in_place_of_the_file_leaves_what_has_come(source: Source, server: Server, tmp_path: Path) -> None:
    server.faults = [server.drop, web_page]
    assert "it answers a web page" in sentence_of(fetch, source)
    assert (tmp_path / "cache" / f"weights.bin{PART}").stat().st_size == 200_000


def test_another_file_in_its_place_is_left_alone(source: Source, tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"mine")
    assert "exists, but is not weights.bin, it has 4 bytes" in sentence_of(fetch, source, str(tmp_path))
    assert (tmp_path / "weights.bin").read_bytes() == b"mine"
    assert fetch(replace(source, sha256=SHA[:8])).endswith("weights.bin")  # the first digits are enough


def test_a_folder_that_cannot_be_made_is_named(source: Source, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    assert "cannot be written (" in sentence_of(fetch, source, str(tmp_path / "file" / "weights.bin"))


def test_the_command_says_what_to_do_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("GUIDED_DIFFUSION_CACHE", str(tmp_path))
    with pytest.raises(SystemExit) as end:
        download.main(["inception"])
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert f"fetch {SOURCES['inception'].urls[0]} (95628359 bytes) on another machine and put it at" in said
    assert os.listdir(tmp_path) == []


def test_a_file_in_a_zip_is_unpacked(source: Source, server: Server, tmp_path: Path) -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("model.ckpt", CONTENT)
    server.content = packed.getvalue()
    url, inner = f"{server.url.rpartition('/')[0]}/faces.zip", Source((), "faces.ckpt", member="model.ckpt")
    assert fetch(replace(inner, urls=(url,)).at(server.url.rpartition("/")[0])) == str(
        tmp_path / "cache" / "faces.ckpt"
    )
    assert (tmp_path / "cache" / "faces.ckpt").read_bytes() == CONTENT
    assert os.listdir(tmp_path / "cache") == ["faces.ckpt"]
    other = replace(inner, urls=(url,), file="other.ckpt", member="last.ckpt")
    assert "it is no zip with last.ckpt" in sentence_of(fetch, other)
    with zipfile.ZipFile(packed := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model.ckpt", bytes(10**6))
    server.content = packed.getvalue()
    assert "model.ckpt unpacks to 1000000 bytes" in sentence_of(fetch, replace(inner, urls=(url,), file="bomb.ckpt"))
    assert os.listdir(tmp_path / "cache") == ["faces.ckpt"]


def test_the_command_fetches_by_name(
    source: Source, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(SOURCES, "small", replace(source, urls=("http://127.0.0.1:1/weights.bin",)))
    download.main(["small", "--out", str(tmp_path / "here.bin"), "--mirror", server.url.rpartition("/")[0]])
    assert (tmp_path / "here.bin").read_bytes() == CONTENT
    for command, words in ((download, ["inceptoin"]), (models, ["download", "inceptoin"])):
        with pytest.raises(SystemExit) as ended:
            command.main(words)
        assert ended.value.code == 2
        assert "'inceptoin' is unknown; did you mean inception?" in capsys.readouterr().err
