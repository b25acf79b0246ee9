"""Starting the commands as real processes, killing them at random moments, and comparing what they leave.

A `Running` knows every process that belongs to it by a mark in the environment, also those that a launcher put into
sessions of their own, so that none outlives its test.
"""

from __future__ import annotations

import contextlib
import csv
import ctypes
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch as th

ROOT = Path(__file__).parent.parent.parent
EMOJI = str(ROOT / "datasets" / "emoji64.zip")
TINY = {
    "data_dir": EMOJI,
    "image_size": 8,
    "num_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": "1",
    "attention_resolutions": "",
    "diffusion_steps": 40,
    "num_workers": 0,
    "log_interval": 1,
}
MARK = "GUIDED_DIFFUSION_FAULTS"
PATIENCE = 120  # seconds that anything here may take on a machine that is busy with other things
NOT_REPEATED = (
    "data_wait",
    "images_per_second",
    "save_stall",
)  # columns of progress.csv that are measured, and other every time
OF_A_START = ("log_dir", "resume_checkpoint", "device")  # flags in config.json that a restart changes


def command(script: str, *, ranks: int = 1, launcher: str = "", **flags: Any) -> list[str]:
    """The command line of a script, as its users write it.

    :param launcher: of several ranks, torchrun or mpiexec.
    """
    folder = Path(sys.executable).parent
    before = {
        "": [sys.executable],
        "torchrun": [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"),
            *flags.pop("of_torchrun", ()),
        ],
        "mpiexec": [str(folder / "mpiexec"), "-n", str(ranks), sys.executable],
    }[launcher]
    return [*before, str(ROOT / "scripts" / f"{script}.py"), *(f"--{name}={value}" for name, value in flags.items())]


def environment(**more: str) -> dict[str, str]:
    """This process's, with one thread and the package of this checkout."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **more}


class Running:
    """A command at work, with everything that it starts; nothing of it is left at the end of the `with` block.

    :param output: takes what it prints.
    :param before: called in the new process first, to limit it.
    """

    def __init__(self, argv: Sequence[str], output: Path, before: Callable[[], object] | None = None) -> None:
        self.mark, self.output = uuid.uuid4().hex, output
        with output.open("wb") as file:
            self.popen = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=output.parent,
                env=environment(**{MARK: self.mark}),
                start_new_session=True,
                preexec_fn=before,
            )

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self.popen.wait(PATIENCE)

    def printed(self) -> str:
        """What it said so far."""
        return self.output.read_text(errors="replace")

    def members(self) -> dict[int, str]:
        """The environment of every process that belongs to it and lives, by process id."""
        return {int(name): text for name in os.listdir("/proc") if (text := self._environment(name))}

    def _environment(self, pid: str) -> str:
        """Of a process that belongs to this; '' for any other."""
        text = _read(f"/proc/{pid}/environ") if pid.isdecimal() else ""
        return text if f"{MARK}={self.mark}" in text else ""

    def ranks(self) -> dict[int, int]:
        """rank -> process id, without the workers that a rank starts."""
        found: dict[int, int] = {}
        for pid, text in sorted(self.members().items()):
            rank = re.search(r"\0(?:RANK|PMI_RANK)=(\d+)\0", f"\0{text}\0")
            if rank and "scripts/" in _read(f"/proc/{pid}/cmdline"):
                found.setdefault(int(rank[1]), pid)
        return found

    def kill(self, known: Iterable[int] = ()) -> None:
        """SIGKILL to everything, and to what was being started meanwhile.

        :param known: processes found a moment ago, to be killed at once: to find all takes milliseconds.
        """
        for pid in known:
            if self._environment(str(pid)):
                send(pid, signal.SIGKILL)
        for _ in range(2):  # one that was being started, and had no mark yet, has it by the second time
            while members := self.members():
                for pid in members:
                    send(pid, signal.SIGKILL)
                time.sleep(0.01)
            time.sleep(0.02)

    def wait(self, timeout: float = PATIENCE) -> int:
        """The exit code, once nothing of it lives."""
        reached(lambda: self.popen.poll() is not None and not self.members(), timeout)
        code = self.popen.returncode
        assert code is not None, f"it does not end: {self.printed()[-3000:]}"
        assert not self.members(), f"parts of it live on: {self.printed()[-3000:]}"
        return int(code)


def _read(path: str) -> str:
    try:
        with open(path, "rb") as file:
            return file.read().decode(errors="replace")
    except OSError:  # it has ended
        return ""


def send(pid: int, number: int) -> None:
    """A signal to a process that may have ended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def reached(what: Callable[[], object], timeout: float = PATIENCE, poll: float = 0.002) -> bool:
    """Wait until `what()` holds; False if it never does."""
    end = time.monotonic() + timeout
    while not what():
        if time.monotonic() > end:
            return False
        time.sleep(poll)
    return True


def finish(argv: Sequence[str], output: Path, before: Callable[[], object] | None = None) -> tuple[int, str]:
    """Run a command to its end: exit code, and all that it printed."""
    with Running(argv, output, before) as running:
        return running.wait(), running.printed()


def succeed(argv: Sequence[str], output: Path) -> str:
    """What a command printed that has to succeed."""
    code, text = finish(argv, output)
    assert code == 0, text
    return text


def the_sentence(text: str) -> str:
    """The line "error: ..." that ends what a command printed: the only one, and no traceback."""
    assert "Traceback" not in text, text
    found = re.findall(r"error: .{10,}", text)
    assert len(found) == 1, text
    return str(found[0])


@dataclass(frozen=True)
class Strike:
    """One kill.

    :param writing: a file was half written.
    :param seconds: until nothing of the job lived, where one rank was killed.
    """

    whom: str
    writing: bool
    seconds: float


class Killer:
    """Kills commands that write to a folder, at moments that a seed decides and the machine blurs.

    :param begun: what a command prints before it begins to work.
    :param span: seconds that it works, at most.
    """

    def __init__(self, seed: int, begun: str, span: float) -> None:
        self.chance, self.begun, self.span = random.Random(seed), begun, span

    def strikes(
        self, kills: int, folder: Path, start: Callable[[Path], tuple[list[str], int]]
    ) -> tuple[Path, list[Strike]]:
        """Start a command over and over and kill it so often, unless it ends before; returns where that was.

        One that ends before the first kill is begun again in a new folder.

        :param start: the next command line for a folder, and its number of ranks.
        """
        found: list[Strike] = []
        for number in range(20):
            here = folder.with_name(f"{folder.name}-{number}")
            here.mkdir()
            for attempt in range(kills):
                argv, ranks = start(here)
                strike = self.strike(argv, here, here.with_name(f"{here.name}-{attempt}.txt"), ranks=ranks)
                if strike is None:
                    break
                found.append(strike)
            if found:
                return here, found
        raise AssertionError(f"it never came to a kill in {folder}")

    def strike(self, argv: Sequence[str], folder: Path, output: Path, *, ranks: int = 1) -> Strike | None:
        """Run a command and kill it, or one of its ranks; None if it had succeeded before that."""
        before = unfinished(folder)
        with Running(argv, output) as running:
            alone, known = self._wait_for_the_moment(running, folder, before, ranks)
            if running.popen.poll() is not None:
                assert running.wait() == 0, running.printed()
                return None
            if not alone:
                running.kill(known)
                return Strike("everything", bool(unfinished(folder) - before), 0.0)
            send(alone, signal.SIGKILL)
            since = time.monotonic()
            if running.wait() == 0:
                return None  # it was about to end anyway
            return Strike("one rank", bool(unfinished(folder) - before), time.monotonic() - since)

    def _wait_for_the_moment(
        self, running: Running, folder: Path, before: set[str], ranks: int
    ) -> tuple[int, list[int]]:
        """The start, any moment of the work, or that at which a file is being written.

        :return: the one rank to kill, 0 for all; and all processes, as far as they are known.
        """
        kind = self.chance.choice(("start", "work", "work", "write", "write"))
        if kind == "start":
            time.sleep(self.chance.uniform(0, 2.0))
            return 0, []
        reached(lambda: self.begun in running.printed() or running.popen.poll() is not None)
        one = self.chance.randrange(ranks) if ranks > 1 and self.chance.random() < 0.5 else None
        alone = 0 if one is None else running.ranks().get(one, 0)
        known = [running.popen.pid, *running.members()]
        if kind == "work":
            time.sleep(self.chance.uniform(0, self.span))
            return alone, known
        seen, wanted = set(before), len(before) + self.chance.randint(1, 8)

        def enough() -> bool:
            seen.update(unfinished(folder))
            return len(seen) >= wanted or running.popen.poll() is not None

        reached(enough, poll=0.0002)
        return alone, known


def unfinished(folder: Path) -> set[str]:
    """Names of temporary files in a folder and those in it."""
    found = set()
    for place in (folder, folder / "shards", folder / "images"):
        try:
            found.update(name for name in os.listdir(place) if ".part-" in name)
        except FileNotFoundError:
            continue
    return found


@dataclass
class Tally:
    """A line of the table: how often a fault struck, and what became of the run."""

    fault: str
    struck: int = 0
    writing: int = 0
    survived: int = 0
    lost: int = 0
    longest: float = 0.0

    def add(self, strikes: Sequence[Strike], lost: Sequence[str]) -> None:
        """Count the kills of one run, which either ended as the unbroken one, or not."""
        self.struck += len(strikes)
        self.writing += sum(strike.writing for strike in strikes)
        self.survived += 0 if lost else len(strikes)
        self.lost += len(strikes) if lost else 0
        self.longest = max([self.longest, *(strike.seconds for strike in strikes)])


def table(rows: Sequence[Tally]) -> str:
    """Faults, survived, lost."""
    head = f"{'fault':<68} {'struck':>7} {'while writing':>14} {'survived':>9} {'lost':>5} {'slowest end':>12}"
    lines = [
        f"{row.fault:<68} {row.struck:>7} {row.writing:>14} {row.survived:>9} {row.lost:>5} {row.longest:>10.1f} s"
        for row in rows
    ]
    return "\n".join([head, *lines])


def differences(one: Any, other: Any, where: str = "") -> Iterator[str]:
    """Places in which two values of tensors, dicts and lists differ in any bit."""
    if isinstance(one, th.Tensor) and isinstance(other, th.Tensor):
        same = one.dtype == other.dtype and one.shape == other.shape and _bytes(one) == _bytes(other)
        yield from [] if same else [where]
    elif isinstance(one, Mapping) and isinstance(other, Mapping):
        yield from (f"{where}.{key} is in one of them" for key in one.keys() ^ other.keys())
        for key in one.keys() & other.keys():
            yield from differences(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple) and type(one) is type(other) and len(one) == len(other):
        for index, (left, right) in enumerate(zip(one, other, strict=True)):
            yield from differences(left, right, f"{where}[{index}]")
    elif repr(one) != repr(other):
        yield f"{where}: {one!r:.80} and {other!r:.80}"


def _bytes(tensor: th.Tensor) -> bytes:
    return tensor.detach().contiguous().view(-1).view(th.uint8).numpy().tobytes()


def rows(folder: Path) -> list[dict[str, str]]:
    """progress.csv, without the columns that are measured."""
    with (folder / "progress.csv").open(newline="") as file:
        found = list(csv.DictReader(file, strict=True))
    assert all(None not in row and None not in row.values() for row in found), "a row is torn"
    return [{name: value for name, value in row.items() if name not in NOT_REPEATED and value} for row in found]


def training_differences(whole: Path, broken: Path, step: int) -> list[str]:
    """In what a run that was killed differs from one that was not: weights, averages, optimizer, state, config, log."""
    names = sorted(path.name for path in whole.glob(f"*{step:06d}.pt"))
    found = [] if len(names) >= 4 else [f"{whole} is no whole run"]
    for name in names:
        if not (broken / name).exists():
            found.append(f"{name} is missing")
            continue
        found += differences(*(th.load(folder / name, weights_only=True) for folder in (whole, broken)), name)
    found += differences(_flags(whole), _flags(broken), "config.json")
    if rows(whole) != rows(broken):
        found.append(f"progress.csv has the steps {', '.join(row['step'] for row in rows(broken))}")
    return found


def _flags(folder: Path) -> dict[str, Any]:
    flags = json.loads((folder / "config.json").read_text())["flags"]
    return {name: value for name, value in flags.items() if name not in OF_A_START}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder of samples but the log's."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(("log", "progress"))]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def sampling_differences(whole: Path, broken: Path) -> list[str]:
    """Files of samples that are missing, left over, or other bytes."""
    one, other = contents(whole), contents(broken)
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def bound_by_permissions() -> None:
    """File modes bind root too, from the next program on."""
    libc, of_bounding_set = ctypes.CDLL(None), 24
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        libc.prctl(of_bounding_set, capability, 0, 0, 0)  # in vain where this is not root, whom modes bind anyway


def on_small_disk(argv: Sequence[str], folder: Path, size: str, *, options: str = "rw") -> list[str]:
    """A command line that sees a disk of that size, with the files of `folder`, there, and leaves its files there.

    :param options: of the disk while the command runs: rw, or ro.
    """
    disk = (
        'set -e; mkdir "$0.disk"; mount -t tmpfs -o "size=$1" none "$0.disk"; cp -a "$0/." "$0.disk"; '
        'mount -o "remount,$2" "$0.disk"; kept="$0.kept"; mkdir "$kept"; mount --bind "$0" "$kept"; '
        'mount --bind "$0.disk" "$0"; folder="$0"; shift 2; set +e; "$@"; code=$?; set -e; '
        'rm -rf "$kept"/*; cp -a "$folder/." "$kept"; exit $code'
    )
    return ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", disk, str(folder), size, options, *argv]


def can_mount() -> bool:
    """Whether this machine lets a process make a small disk for itself alone."""
    argv = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", "mount -t tmpfs none /mnt"]
    try:
        return subprocess.run(argv, capture_output=True, timeout=PATIENCE).returncode == 0
    except OSError:
        return False
