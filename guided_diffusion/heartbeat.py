"""The watch that ranks keep over each other: when one is killed, stops, or goes another way, all of them end.

Rank 0 listens, every other rank holds one connection to it, and both sides say a line per beat from a thread of their
own: a rank may compute, compile or write for as long as it likes, and still is heard. Rank 0 passes on what it learns.
Lines are ``at COUNT WHAT`` (a beat, with the last exchange that the rank entered), ``bye``, ``left RANK``,
``failed CODE TEXT`` of the rank itself, and ``lost CODE TEXT`` of another one.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

# A rank that a launcher started ends with it; one from a shell may outlive that.
LAUNCHED = ("TORCHELASTIC_RUN_ID", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID")
VARIABLE = "GUIDED_DIFFUSION_STALL_TIMEOUT"
STALL_TIMEOUT = 25.0  # seconds: a second or two more, and all have ended within half a minute
CONNECT_TIMEOUT = 30.0
SLOWEST_BEAT = 1.0  # seconds
GRACE = 0.5  # seconds in which a rank may end by its own word, when another has failed
LONGEST = 2000  # characters of a line
REMEDY = "start it again: training goes on with --resume_checkpoint auto, sampling by itself"

End = Callable[[str, int], object]


def stall_timeout() -> float:
    """Seconds of silence after which a rank counts as lost, from the environment; 0: never.

    :raises ValueError: if the variable is no such number.
    """
    text = os.environ.get(VARIABLE, "")
    try:
        seconds = float(text or STALL_TIMEOUT)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < 1e6:
        raise ValueError(f"{VARIABLE} {text!r} is no number of seconds: give e.g. 25, or 0 to wait for ever")
    return seconds


class Address(NamedTuple):
    """Where rank 0 listens, the word by which it knows its own, and the seconds of silence that all of them allow."""

    host: str
    port: int
    word: str
    limit: float


class _Peer:
    """What one rank knows of another.

    :param connection: None until it has connected; `rank`: None until it has said who it is.
    """

    def __init__(self, connection: socket.socket | None = None, rank: int | None = None) -> None:
        self.connection, self.rank = connection, rank
        self.silent = 0.0
        self.left = False
        self.at = (0, "")
        self._unfinished = b""
        if connection is not None:
            connection.setblocking(False)

    def read(self) -> tuple[list[str], bool]:
        """(whole lines that have arrived, is that all for ever?)"""
        assert self.connection is not None
        try:
            received = self.connection.recv(1 << 16)
        except BlockingIOError:
            return [], False
        except OSError:
            return [], True
        *lines, self._unfinished = (self._unfinished + received).split(b"\n")
        endless = len(self._unfinished) > 2 * LONGEST
        return [line.decode(errors="replace") for line in lines], not received or endless

    def tell(self, text: str) -> None:
        """Say a line; to one that does not listen, nothing."""
        connection = self.connection
        if connection is None:
            return
        with contextlib.suppress(OSError):  # that it is gone, `read` finds out
            connection.send(" ".join(text.split())[:LONGEST].encode(errors="replace") + b"\n")


class Watch:
    """One rank's part of the watch, which begins at once.

    :param limit: seconds of silence that are allowed.
    :param end: called as end(sentence, exit code) in this thread when the job must end; does not return, in earnest.
    :param server: rank 0's, and the `word` by which it knows the others; these give their `connection` to it.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        limit: float,
        *,
        end: End,
        server: socket.socket | None = None,
        word: str = "",
        connection: socket.socket | None = None,
    ) -> None:
        self.rank, self.size, self.limit = rank, size, limit
        self.interval = min(SLOWEST_BEAT, limit / 5)
        self._end, self._word, self._server = end, word, server
        self._over = threading.Event()
        self._count, self._at = 0, (0, "")
        self._parent = os.getppid() if any(name in os.environ for name in LAUNCHED) else 0
        self._selector = selectors.DefaultSelector()
        self._waker, self._woken = socket.socketpair()
        self._selector.register(self._woken, selectors.EVENT_READ)
        if connection is None:
            assert server is not None
            server.setblocking(False)
            self._selector.register(server, selectors.EVENT_READ)
            self._peers = {other: _Peer() for other in range(1, size)}
        else:
            self._peers = {0: _Peer(connection, rank=0)}
            self._selector.register(connection, selectors.EVENT_READ, self._peers[0])
        os.register_at_fork(after_in_child=self._close)  # a child would keep the connections open after this rank's end
        atexit.register(self.leave)
        self._thread = threading.Thread(target=self._run, name="watch over the other ranks", daemon=True)
        self._thread.start()

    # ---- for the main thread

    def enter(self, what: str) -> None:
        """Note an exchange before it begins: all ranks must enter the same ones, in the same order."""
        self._count += 1
        self._at = (self._count, what)

    @property
    def gone(self) -> list[int]:
        """The ranks that left in an orderly way."""
        return [other for other, peer in list(self._peers.items()) if peer.left]

    def settle(self) -> None:
        """Wait a moment after an exchange has failed: this thread ends the job if it learns who is to blame."""
        if self._over.wait(2 * self.interval + GRACE):
            time.sleep(10 * GRACE)  # the thread has something to say before the process ends

    def say_failed(self, code: int, text: str) -> None:
        """Tell the others that this rank is about to end with an error."""
        self._stop(f"failed {code} {text}")

    def leave(self) -> None:
        """End the watch in an orderly way."""
        if not self._over.is_set():
            self._stop("bye")
        self._thread.join(2 * SLOWEST_BEAT)

    def _stop(self, last: str) -> None:
        self._tell_all(last)
        self._over.set()
        with contextlib.suppress(OSError):  # the thread may have ended by itself
            self._waker.send(b"!")

    def _tell_all(self, text: str) -> None:
        for peer in list(self._peers.values()):
            peer.tell(text)

    # ---- the thread

    def _run(self) -> None:
        last = time.monotonic()
        while not self._over.is_set():
            ready = self._selector.select(max(0.0, last + self.interval - time.monotonic()))
            for key, _ in ready:
                self._hear(key)
            now = time.monotonic()
            if now - last >= self.interval:
                # A rank that was itself stopped, with all others perhaps, must not count that time as theirs.
                passed, last = min(now - last, 2 * self.interval), now
                self._beat(passed)
        time.sleep(GRACE / 10)  # for the last word to be on its way
        self._close()

    def _hear(self, key: selectors.SelectorKey) -> None:
        if key.fileobj is self._server:
            self._accept()
        elif key.data is not None and not self._over.is_set():
            self._listen_to(key.data)

    def _accept(self) -> None:
        assert self._server is not None
        try:
            connection, _ = self._server.accept()
        except OSError:
            return
        self._selector.register(connection, selectors.EVENT_READ, _Peer(connection))

    def _listen_to(self, peer: _Peer) -> None:
        lines, ended = peer.read()
        spoke = bool(lines)
        if peer.rank is None and not self._introduced(peer, lines):
            if ended or spoke:
                self._drop(peer)
            return
        peer.silent = 0.0
        for line in lines:
            self._take(peer, *line.split(" ", 1))
        if ended and not self._over.is_set():
            self._drop(peer)
            if not peer.left:
                self._lose(f"rank {peer.rank} has ended without a word, as when it is killed: {REMEDY}")

    def _introduced(self, peer: _Peer, lines: list[str]) -> bool:
        """Whether a new connection is one of the ranks: anything may knock at an open port."""
        word, _, rank = lines.pop(0).partition(" ") if lines else ("", "", "")
        known = secrets.compare_digest(word.encode(), self._word.encode()) and rank.isdigit()
        if known and int(rank) in self._peers:
            peer.rank = int(rank)
            self._peers[peer.rank] = peer
        return peer.rank is not None

    def _drop(self, peer: _Peer) -> None:
        if peer.connection is not None:
            self._selector.unregister(peer.connection)
            peer.connection.close()
            peer.connection = None

    def _take(self, peer: _Peer, kind: str, rest: str = "") -> None:
        """One line of a rank that is known."""
        number, _, text = rest.partition(" ")
        if kind == "at":
            peer.at = (int(number), text)
        elif kind == "bye":
            peer.left = True
            self._pass_on(f"left {peer.rank}", peer)
        elif kind == "left":
            self._peers.setdefault(int(number), _Peer()).left = True
        elif kind == "failed":
            self._lose(f"rank {peer.rank} has failed ({text}), and all end with it", int(number), patient=True)
        elif kind == "lost":
            self._lose(text, int(number), patient=True, source=peer)

    def _pass_on(self, text: str, source: _Peer | None) -> None:
        for peer in self._peers.values():
            if peer is not source:
                peer.tell(text)

    def _beat(self, passed: float) -> None:
        """Say that this rank is there, and see whether the others are."""
        self._tell_all(f"at {self._at[0]} {self._at[1]}")
        if self._parent and os.getppid() != self._parent:
            self._lose(f"what started this rank (process {self._parent}) has ended, and it ends too: {REMEDY}")
        for rank, peer in self._peers.items():
            watched = not peer.left and (self.rank == 0 or rank == 0)
            peer.silent += passed if watched else 0.0
            if peer.silent > self.limit:
                self._lose(
                    f"rank {rank} has been silent for {peer.silent:.0f} s, more than {VARIABLE} allows: its process is "
                    f"stopped or its machine is gone; {REMEDY}"
                )
        self._compare()

    def _compare(self) -> None:
        """Ranks that wait for each other in different exchanges would wait for ever."""
        entered = {self._at[0]: (self.rank, self._at[1])} if self._count else {}
        for rank, peer in self._peers.items():
            count, what = peer.at
            other = entered.setdefault(count, (rank, what))
            if count and what != other[1]:
                one, two = (f"rank {number} is in {name}" for number, name in sorted([other, (rank, what)]))
                self._lose(
                    f"{one} where {two} (exchange {count} of each): the ranks went different ways, which is an error "
                    "of the program"
                )

    def _lose(self, sentence: str, code: int = 1, *, patient: bool = False, source: _Peer | None = None) -> None:
        """End the job, unless this rank is ending by its own word; `patient` waits for that a moment."""
        if self._over.is_set():
            return
        self._let_in()
        self._pass_on(f"lost {code} {sentence}", source)
        time.sleep(GRACE if patient else GRACE / 5)  # the others at least read what was passed on
        if not self._over.is_set():
            self._over.set()
            self._end(sentence, code)

    def _let_in(self) -> None:
        """Know those that have connected and were not heard yet: they are to be told too."""
        for _ in range(self.size):  # a round for each connection, then one for the first line of the last
            for key, _ in self._selector.select(0):
                if key.fileobj is self._server:
                    self._accept()
                elif key.data is not None and key.data.rank is None:
                    self._introduced(key.data, key.data.read()[0])

    def _close(self) -> None:
        for key in list((self._selector.get_map() or {}).values()):
            sock: Any = key.fileobj
            sock.close()
        self._waker.close()
        self._selector.close()


def begin(rank: int, size: int, *, host: str, share: Callable[[str], str], end: End) -> Watch | None:
    """Start this rank's watch; None where rank 0's environment wants none. Every rank calls it.

    :param host: how the other ranks reach rank 0's machine; through the loopback nobody else can.
    :param share: returns rank 0's text on every rank.
    :raises TimeoutError: if rank 0 cannot be reached.
    """
    if rank > 0:
        found = share("")
        return _joined(Address(*json.loads(found)), rank, size, end) if found else None
    limit = stall_timeout()
    if not limit:
        share("")
        return None
    server = _listen(host)
    address = Address(host, server.getsockname()[1], secrets.token_hex(16), limit)
    share(json.dumps(address))
    return Watch(0, size, limit, end=end, server=server, word=address.word)


def _listen(host: str) -> socket.socket:
    if host in ("127.0.0.1", "localhost"):
        return socket.create_server(("127.0.0.1", 0), backlog=1024)
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    return socket.create_server(("", 0), backlog=1024)


def _joined(address: Address, rank: int, size: int, end: End) -> Watch:
    try:
        connection = socket.create_connection((address.host, address.port), CONNECT_TIMEOUT)
        connection.sendall(f"{address.word} {rank}\n".encode())
    except OSError as error:
        raise TimeoutError(
            f"rank {rank} cannot reach rank 0 at {address.host}:{address.port} ({error}): let the machines connect to "
            f"each other, or set {VARIABLE}=0 to do without the watch over lost ranks"
        ) from error
    return Watch(rank, size, address.limit, end=end, connection=connection)
