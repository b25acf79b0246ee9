"""A server that speaks as much of S3 as is used: listing by pages, parts of objects, writing whole ones, refusals."""

from __future__ import annotations

import re
import threading
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from hashlib import md5
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

KEY, REGION = "AKIDEXAMPLE", "eu-central-1"
PAGE = 3  # entries that a listing gives at once
MESSAGES = {404: "Not Found", 403: "Forbidden", 301: "Moved Permanently", 416: "Requested Range Not Satisfiable"}


class Store:
    """Buckets: name -> key -> (content, date); what was asked for, and what is to go wrong.

    :param faults: for the next requests in turn: a status to answer with, or "cut" for half of a content.
    """

    def __init__(self) -> None:
        self.buckets: dict[str, dict[str, tuple[bytes, float]]] = {}
        self.asked: list[tuple[str, str, str]] = []
        self.faults: list[int | str] = []
        self.public = False

    def put(self, path: str, content: bytes) -> None:
        bucket, _, key = path.removeprefix("s3://").partition("/")
        self.buckets.setdefault(bucket, {})[key] = (content, time.time() // 1)

    def put_folder(self, path: str, folder: Path) -> None:
        for file in folder.rglob("*"):
            if file.is_file():
                self.put(f"{path}/{file.relative_to(folder).as_posix()}", file.read_bytes())


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    store: Store

    def do_GET(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        bucket, _, key = urllib.parse.unquote(url.path[1:]).partition("/")
        query = {name: values[0] for name, values in urllib.parse.parse_qs(url.query, keep_blank_values=True).items()}
        self.content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.store.asked.append(
            (self.command, f"{bucket}/{key or query.get('prefix', '')}", self.headers["Range"] or "")
        )
        fault = self.store.faults.pop(0) if self.store.faults else 0
        signed = re.search(r"Credential=([^/]+)/\d+/([^/]+)/s3/", self.headers.get("Authorization", ""))
        if isinstance(fault, int) and fault:
            self.refuse(fault, "SlowDown" if fault == 503 else "PermanentRedirect")
        elif not self.store.public and (signed is None or signed[1] != KEY):
            self.refuse(403, "InvalidAccessKeyId" if signed else "AccessDenied")
        elif signed and signed[2] != REGION:
            self.refuse(400, "AuthorizationHeaderMalformed")
        elif bucket not in self.store.buckets:
            self.refuse(404, "NoSuchBucket")
        elif key:
            self.act(self.store.buckets[bucket], key, cut=fault == "cut")
        else:
            self.list(bucket, query)

    do_HEAD = do_PUT = do_DELETE = do_GET

    def act(self, objects: dict[str, tuple[bytes, float]], key: str, cut: bool) -> None:
        if self.command == "PUT":
            objects[key] = (self.content, time.time())
            self.answer(200)
        elif self.command == "DELETE":
            objects.pop(key, None)
            self.answer(204)
        elif key not in objects:
            self.refuse(404, "NoSuchKey")
        else:
            self.give(*objects[key], cut)

    def give(self, content: bytes, date: float, cut: bool) -> None:
        headers = {"ETag": f'"{md5(content).hexdigest()}"', "Last-Modified": formatdate(date, usegmt=True)}
        part = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if part is None:
            self.answer(200, content, headers)
        elif int(part[1]) >= len(content):
            self.refuse(416, "InvalidRange", {"Content-Range": f"bytes */{len(content)}"})
        else:
            first, last = int(part[1]), min(int(part[2]), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            self.answer(206, content[first : last + 1], headers, cut)

    def list(self, bucket: str, query: dict[str, str]) -> None:
        """The page of a listing that begins behind the key that the token is."""
        prefix, delimiter = query["prefix"], query.get("delimiter")
        entries = dict[str, str]()
        for key in sorted(self.store.buckets[bucket]):
            if key.startswith(prefix):
                rest, cut, _ = key[len(prefix) :].partition(delimiter) if delimiter else (key[len(prefix) :], "", "")
                name, quoted = prefix + rest + cut, urllib.parse.quote(prefix + rest + cut)
                folder = f"<CommonPrefixes><Prefix>{quoted}</Prefix></CommonPrefixes>"
                entries[name] = folder if cut else f"<Contents><Key>{quoted}</Key><Size>1</Size></Contents>"
        names = [name for name in entries if name > query.get("continuation-token", "")]
        page = names[: min(int(query.get("max-keys", PAGE)), PAGE)]
        more = f"<NextContinuationToken>{escape(page[-1])}</NextContinuationToken>" if len(page) < len(names) else ""
        words = [
            f"<EncodingType>url</EncodingType><Prefix>{escape(prefix)}</Prefix><KeyCount>{len(page)}</KeyCount>",
            f"<IsTruncated>{str(bool(more)).lower()}</IsTruncated>{more}",
            *(entries[name] for name in page),
        ]
        self.answer(200, f"<ListBucketResult>{''.join(words)}</ListBucketResult>".encode())

    def refuse(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
        text = f"<Error><Code>{code}</Code><Message>{MESSAGES.get(status, code)}</Message></Error>"
        self.answer(
            status, text.encode(), {**(headers or {}), "x-amz-bucket-region": REGION} if status == 301 else headers
        )

    def answer(
        self, status: int, content: bytes = b"", headers: dict[str, str] | None = None, cut: bool = False
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if cut else content)
        self.close_connection = cut

    def log_message(self, *_: Any) -> None:
        """Quiet."""


@contextmanager
def served_store() -> Iterator[tuple[Store, str]]:
    """A store, and the address of its server."""
    store = Store()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"store": store}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield store, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
