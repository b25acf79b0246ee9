"""Files from the network, and the weights of Inception: where they are found, what is read, what is refused."""

from __future__ import annotations

import hashlib
import http.server
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch as th

from guided_diffusion import dist_util
from guided_diffusion.commands import download
from guided_diffusion.config import ClassifierConfig
from guided_diffusion.evaluation import downloads, weights
from guided_diffusion.evaluation.downloads import SOURCES, Source, fetch
from guided_diffusion.evaluation.inception import InceptionNetwork
from guided_diffusion.runtime.files import PART
from guided_diffusion.script_util import build_classifier

ROOT = Path(__file__).parents[2]
CONTENT = np.random.default_rng(0).bytes(700_001)
SHA = hashlib.sha256(CONTENT).hexdigest()


def sentence_of(call: Any, *args: Any, **options: Any) -> str:
    with pytest.raises((ValueError, OSError)) as caught:
        call(*args, **options)
    assert dist_util._is_users_mistake(caught.value), "raised by other code than this project's"
    text = str(caught.value)
    assert text.isprintable()
    assert "_Failed" not in text
    return text


# ---- a server


class Server(http.server.ThreadingHTTPServer):
    """Gives CONTENT, or less, and remembers which bytes were asked for."""

    content = CONTENT
    ranges = True  # whether it knows ranges
    breaks: list[int] = []  # noqa: RUF012 - of the next answers, how many bytes are given before the connection ends
    status = 0
    leads_to = ""
    chunked = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[str | None] = []
        self.gate = threading.Event()
        self.gate.set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/file"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away in the middle is what is tested, and no news."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        server, wanted = self.server, self.headers.get("Range")
        server.asked.append(wanted)
        server.gate.wait(20)
        self.close_connection = True
        if server.status or server.leads_to:
            self.send_response(server.status or 302)
            if server.leads_to:
                self.send_header("Location", server.leads_to)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and server.ranges else 0
        body = server.content[start:]
        self._head(start, body)
        self.wfile.write(body[: server.breaks.pop(0)] if server.breaks else body)

    def _head(self, start: int, body: bytes) -> None:
        size = len(self.server.content)
        self.send_response(416 if start >= size else 206 if start else 200)
        if 0 < start < size:
            self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        if not self.server.chunked:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(downloads, "PAUSE", 0.0)
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with Server() as running:
        running.breaks = []
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield running
        running.gate.set()
        running.shutdown()
        thread.join()


def source_at(server: Server, **options: Any) -> Source:
    known = {"urls": (server.url,), "file": "weights.bin", "sha256": SHA, "size": len(CONTENT), "scheme": "http"}
    return Source(**{**known, **options})


def parts(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if PART in path.name]


# ---- fetching


def test_a_file_is_fetched_once_and_its_checksum_shown(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GUIDED_DIFFUSION_CACHE", str(tmp_path / "cache"))
    path = fetch(source_at(server))
    assert path == str(tmp_path / "cache" / "weights.bin")
    assert Path(path).read_bytes() == CONTENT
    shown = capsys.readouterr()
    assert f"{len(CONTENT)} bytes, sha256 {SHA}, as it should be" in shown.out
    assert "weights.bin: 100%" in shown.err
    assert fetch(source_at(server)) == path
    assert server.asked == [None]
    assert "is there already" in capsys.readouterr().out
    assert os.listdir(tmp_path / "cache") == ["weights.bin"]


def test_a_folder_or_a_file_may_be_named(server: Server, tmp_path: Path) -> None:
    assert fetch(source_at(server), str(tmp_path)) == str(tmp_path / "weights.bin")
    assert fetch(source_at(server), str(tmp_path / "new" / "other.bin")) == str(tmp_path / "new" / "other.bin")
    assert (tmp_path / "new" / "other.bin").read_bytes() == CONTENT


def test_what_breaks_off_goes_on_in_the_same_run(server: Server, tmp_path: Path) -> None:
    server.breaks = [300_000, 100]
    fetch(source_at(server), str(tmp_path))
    assert (tmp_path / "weights.bin").read_bytes() == CONTENT
    assert server.asked == [None, "bytes=300000-", "bytes=300100-"]


def test_a_later_run_goes_on_with_what_is_kept(server: Server, tmp_path: Path) -> None:
    server.breaks = [300_000] + [0] * (downloads.ATTEMPTS - 1)
    text = sentence_of(fetch, source_at(server), str(tmp_path))
    assert "broke off after 300000 of 700001 bytes, which are kept" in text
    [part] = parts(tmp_path)
    assert part.stat().st_size == 300_000
    server.asked.clear()
    fetch(source_at(server), str(tmp_path))
    assert server.asked == ["bytes=300000-"]
    assert (tmp_path / "weights.bin").read_bytes() == CONTENT
    assert parts(tmp_path) == []


def test_a_server_without_ranges_starts_over(server: Server, tmp_path: Path) -> None:
    server.ranges, server.breaks = False, [300_000]
    fetch(source_at(server), str(tmp_path))
    assert server.asked == [None, "bytes=300000-"]
    assert (tmp_path / "weights.bin").read_bytes() == CONTENT


def test_parts_that_do_not_belong_together_start_over(server: Server, tmp_path: Path) -> None:
    """Bytes of another file, as many as there should be or more; all but the name."""
    for kept in (b"x" * 1000, b"x" * len(CONTENT), b"x" * (len(CONTENT) + 5), CONTENT):
        (tmp_path / "weights.bin").unlink(missing_ok=True)
        digest = hashlib.sha256(server.url.encode()).hexdigest()[:8]
        (tmp_path / f"weights.bin{PART}{digest}").write_bytes(kept)
        fetch(source_at(server), str(tmp_path))
        assert (tmp_path / "weights.bin").read_bytes() == CONTENT
    assert server.asked == ["bytes=1000-", None, None, f"bytes={len(CONTENT) + 5}-", None]


def test_without_a_checksum_nothing_is_joined(server: Server, tmp_path: Path) -> None:
    server.breaks = [300_000]
    fetch(source_at(server, sha256="", size=0), str(tmp_path))
    assert server.asked == [None, None]
    assert (tmp_path / "weights.bin").read_bytes() == CONTENT


def test_a_length_need_not_be_told(server: Server, tmp_path: Path) -> None:
    server.chunked = True
    fetch(source_at(server), str(tmp_path))
    assert (tmp_path / "weights.bin").read_bytes() == CONTENT


def test_the_next_address_is_asked(server: Server, tmp_path: Path) -> None:
    urls = ("https://127.0.0.1:1/file", server.url)
    assert "its scheme is 'https', not http" in sentence_of(fetch, source_at(server, urls=urls[:1]), str(tmp_path))
    fetch(source_at(server, urls=urls), str(tmp_path))
    assert (tmp_path / "weights.bin").read_bytes() == CONTENT


def test_the_first_digits_of_a_checksum_are_enough(server: Server, tmp_path: Path) -> None:
    fetch(source_at(server, sha256=SHA[:8]), str(tmp_path))
    server.content = CONTENT[::-1]
    text = sentence_of(fetch, source_at(server, sha256=SHA[:8]), str(tmp_path / "again"))
    assert f"another file, with sha256 {hashlib.sha256(CONTENT[::-1]).hexdigest()}, not {SHA[:8]}" in text
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"status": 404}, "it answers 404 Not Found"),
        ({"status": 503}, "it answers 503"),
        ({"leads_to": "ftp://127.0.0.1/file"}, "it leads to ftp://127.0.0.1, which is not http"),
        ({"content": CONTENT + b"x"}, "it has 700002 bytes there, not 700001"),
        ({"content": CONTENT[:-1] + b"x"}, "what it gives is another file, with sha256"),
        ({"content": CONTENT[:-1], "chunked": True}, "what it gives is another file, with sha256"),
    ],
)
def test_what_is_not_the_file_is_not_kept(
    server: Server, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    for name, value in options.items():
        setattr(server, name, value)
    text = sentence_of(fetch, source_at(server), str(tmp_path))
    assert message in text
    assert f"fetch {server.url} on another machine and put it at {tmp_path}/weights.bin" in text
    assert not (tmp_path / "weights.bin").exists()
    assert parts(tmp_path) == []


def test_another_file_in_its_place_is_left_alone(server: Server, tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"mine")
    assert "is there, but is not weights.bin" in sentence_of(fetch, source_at(server), str(tmp_path))
    assert (tmp_path / "weights.bin").read_bytes() == b"mine"


def test_a_folder_that_cannot_be_made_is_named(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    text = sentence_of(fetch, source_at(server), str(tmp_path / "file" / "weights.bin"))
    assert "cannot be written (" in text


def test_of_several_processes_one_fetches(server: Server, tmp_path: Path) -> None:
    """Threads stand for processes: a lock belongs to a file that was opened, whoever did it."""
    server.gate.clear()
    lines: list[str] = []
    with ThreadPoolExecutor(3) as pool:
        jobs = [pool.submit(fetch, source_at(server), str(tmp_path), say=lines.append) for _ in range(3)]
        while len([line for line in lines if "waiting for it" in line]) < 2:
            threading.Event().wait(0.01)
        server.gate.set()
        assert {job.result(20) for job in jobs} == {str(tmp_path / "weights.bin")}
    assert server.asked == [None]
    assert os.listdir(tmp_path) == ["weights.bin"]
    assert (tmp_path / "weights.bin").read_bytes() == CONTENT


def test_addresses_are_encrypted_and_files_known() -> None:
    for source in SOURCES.values():
        assert all(url.startswith("https://") for url in source.urls)
        assert source.scheme == "https"
        assert len(source.sha256) == 64
    name, _, _ = SOURCES["inception"].file.partition(".")
    assert SOURCES["inception"].sha256.startswith(name.split("-")[-1])


def test_the_command_says_what_to_do_without_a_network(tmp_path: Path) -> None:
    environment = {**os.environ, "https_proxy": "http://127.0.0.1:1", "GUIDED_DIFFUSION_CACHE": str(tmp_path)}
    command = [sys.executable, "scripts/download.py", "inception"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert f"fetch {SOURCES['inception'].urls[0]} on another machine and put it at {tmp_path}/" in done.stderr
    assert os.listdir(tmp_path) == []


def test_the_command_fetches_by_name(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(SOURCES, "small", source_at(server))
    download.main(["small", "--out", str(tmp_path / "here.bin")])
    assert (tmp_path / "here.bin").read_bytes() == CONTENT
    with pytest.raises(SystemExit) as ended:
        download.main(["inceptoin"])
    assert ended.value.code == 2
    assert "'inceptoin' is nothing that can be fetched; did you mean inception?" in capsys.readouterr().err


# ---- the weights of Inception


@pytest.fixture(scope="module")
def state() -> dict[str, th.Tensor]:
    generator = th.Generator().manual_seed(0)
    shapes = {name: value.shape for name, value in InceptionNetwork().state_dict().items()}
    return {name: th.rand(shape, generator=generator) for name, shape in shapes.items() if shape}


def test_weights_are_looked_for_in_three_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GUIDED_DIFFUSION_CACHE", str(tmp_path))
    told = sentence_of(weights.find_inception)
    places = "--inception_weights", "$GUIDED_DIFFUSION_INCEPTION", str(tmp_path), "scripts/download.py inception"
    assert all(place in told for place in places)
    (tmp_path / SOURCES["inception"].file).write_bytes(b"weights")
    assert weights.find_inception() == str(tmp_path / SOURCES["inception"].file)
    (tmp_path / "named.pth").write_bytes(b"weights")
    monkeypatch.setenv("GUIDED_DIFFUSION_INCEPTION", str(tmp_path / "named.pth"))
    assert weights.find_inception() == str(tmp_path / "named.pth")
    assert weights.find_inception(str(tmp_path / SOURCES["inception"].file)).endswith("6726825d.pth")
    monkeypatch.setenv("GUIDED_DIFFUSION_INCEPTION", str(tmp_path / "gone"))
    for call in (lambda: weights.find_inception(), lambda: weights.find_inception(str(tmp_path / "gone"))):
        told = sentence_of(call)
        assert "gone' does not exist" in told
        assert all(place in told for place in places)


def test_state_dicts_are_read_in_three_formats(tmp_path: Path, state: dict[str, th.Tensor]) -> None:
    th.save(state, tmp_path / "new.pth")
    counted = {**state, "Conv2d_1a_3x3.bn.num_batches_tracked": th.tensor(0)}
    th.save(counted, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    safetensors.torch.save_file(counted, tmp_path / "safe.safetensors")
    for name in ("new.pth", "old.pt", "safe.safetensors"):
        network = weights.load_inception(str(tmp_path / name), dtype=th.bfloat16)
        assert network.dtype == th.bfloat16
        found = network.state_dict()
        assert all(th.equal(found[key], value) for key, value in state.items())
        (tmp_path / name).unlink()


def refused(path: Path) -> str:
    text = sentence_of(weights.load_inception, str(path))
    assert str(path) in text
    return text


def test_weights_of_another_network_are_named(tmp_path: Path, state: dict[str, th.Tensor]) -> None:
    small = {name: value for name, value in state.items() if value.numel() < 1000}
    path = tmp_path / "other.pth"
    config = {"width": 64, "depth": 1, "channel_mult": "1", "attention_resolutions": "8"}
    classifier = build_classifier(ClassifierConfig(image_size=8, **{f"classifier_{k}": v for k, v in config.items()}))
    kinds: list[tuple[Any, str]] = [
        ({**small, "AuxLogits.fc.bias": th.zeros(1000)}, "torchvision's Inception"),
        (classifier.state_dict(), "those of a classifier for diffusion; missing: Conv2d_1a_3x3"),
        ({"visual.conv1.weight": th.zeros(1)}, "those of another network; missing: Conv2d_1a_3x3"),
        (th.optim.Adam([th.zeros(1, requires_grad=True)]).state_dict(), "the state of an optimizer"),
        ([1, 2], "something else than a state dict"),
        (
            {**state, "fc.bias": th.zeros(7)},
            "those of another network; of another shape: fc.bias [7] instead of [1008]",
        ),
    ]
    for content, message in kinds:
        th.save(content, path)
        assert message in refused(path)


def test_files_that_are_no_weights_are_named(tmp_path: Path) -> None:
    path = tmp_path / "file.pth"
    for content, message in (
        (b"\n<!DOCTYPE html><html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "the pointer that Git LFS leaves"),
        (b"", "but an empty file"),
        (b"\x80\x02cos\nsystem\n(S'echo bad'\ntR.", "cannot be read as a checkpoint"),
        (b"PK\x03\x04 cut short", "cannot be read as a checkpoint"),
    ):
        path.write_bytes(content)
        assert message in refused(path)
    np.savez(tmp_path / "arrays.npz", arr_0=np.zeros(3))
    assert "an npz" in refused(tmp_path / "arrays.npz")
    (tmp_path / "classify_image_graph_def.pb").write_bytes(b"graph")
    told = refused(tmp_path / "classify_image_graph_def.pb")
    assert "but a TensorFlow graph: give weights-inception-2015-12-05-6726825d.pth as --inception_weights" in told
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:
        archive.writestr("script/constants.pkl", b"")
    assert "but a TorchScript archive" in refused(tmp_path / "script.pt")
    assert "do not exist" in sentence_of(weights.load_inception, str(tmp_path / "gone"))
    assert "but a folder: give weights-inception" in refused(tmp_path)
